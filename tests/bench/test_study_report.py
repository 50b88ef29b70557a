"""docs/results.md and its figures are what the committed results give, byte for byte."""

import dataclasses
import json
import re
import shutil

import matplotlib
import pytest

from benchmarks.flow.loops import PLAIN, REFERENCE
from benchmarks.report import front, svg
from benchmarks.study import study_figures, study_report, study_results, study_text
from benchmarks.study.study_results import Unusable
from vvae_fast.train.study.compare import Model
from vvae_fast.train.study.spread import Spread

STUDIES = study_results.read_all()


@pytest.fixture
def copied(tmp_path):
    """A copy of the results."""
    folder = tmp_path / "results"
    shutil.copytree(study_results.FOLDER, folder, ignore=shutil.ignore_patterns("*.svg"))
    return folder


def test_the_pages_are_those_of_the_committed_results(copied, tmp_path):
    readme = tmp_path / "README.md"
    markers = study_report.README_START, study_report.README_END
    readme.write_text(front.between(*markers, "old", study_report.README.read_text()))
    assert study_report.main(copied, tmp_path / "results.md", readme) == 0
    assert (tmp_path / "results.md").read_bytes() == study_report.PAGE.read_bytes()
    assert readme.read_bytes() == study_report.README.read_bytes()
    for results in STUDIES:
        name = f"{results.study.name}.svg"
        committed = (study_results.FOLDER / name).read_text()
        (version,) = re.findall(r"Matplotlib v([\d.]+)", committed)
        if matplotlib.__version__ != version:
            pytest.skip(f"the page is the same; the figures are those of matplotlib {version}")
        assert (copied / name).read_text() == committed


def test_the_studies_hold_what_was_promised():
    by_name = {results.study.name: results for results in STUDIES}
    digits, mnist = by_name["digits"], by_name["mnist_mlp_cpu"]
    lengths = {(model.kind, model.num_steps) for model in mnist.runs}
    assert lengths >= {("vanilla", 0), ("amortized", 4), ("amortized", 16), ("shared", 16), ("shared", 80)}
    for results in (digits, mnist):
        assert len(results.study.seeds) >= 2
        for model in results.runs:
            assert results.seconds(model, study_results.OURS) > 0
            assert results.seconds(model, REFERENCE) > 0
    assert {model.num_steps for model in digits.runs} == {0, 2, 4, 8, 16, 32, 80}
    assert mnist.difference(Model("amortized", 16), "nll").mean <= -1.0, "nats below the vanilla VAE"


def test_every_number_of_the_text_comes_from_the_results(copied):
    """Other results give other sentences: no number of theirs is left."""
    path = copied / "digits" / "results.json"
    content = json.loads(path.read_text())
    for run in content["runs"]:
        run.pop("gaps")
        unchanged = run["model"] == "vanilla" and not run["matched"]
        for key in ("neg_elbo", "nll", "gap", "kl"):
            run[key] = 1000.0 + run["seed"] if unchanged else 1003.25 + run["seed"]
    path.write_text(json.dumps(content))
    (results,) = (found for found in study_results.read_all(copied) if found.study.name == "digits")
    text = study_text.findings(results)
    assert "harm clearly at 6 of 6 lengths, and help clearly at none" in text
    assert set(re.findall(r"[+-]\d+\.\d\d ±", text)) == {"+3.25 ±", "+0.00 ±"}


def test_heads_with_a_rank_are_a_family_of_their_own(tmp_path):
    """The full head's sentences and numbers stay as they are."""
    (results,) = (found for found in STUDIES if found.study.name == "mnist_mlp_cpu")
    ranked = {Model("amortized", k, rank): results.runs[Model("amortized", k)] for rank in (32, 8) for k in (16, 80)}
    rows = [
        {**row, "rank": rank}
        for row in results.epochs["epochs"]
        for rank in (32, 8)
        if Model(row["model"], row["num_steps"], rank) in ranked
    ]
    epochs = {**results.epochs, "epochs": results.epochs["epochs"] + rows}
    with_ranks = dataclasses.replace(results, runs={**ranked, **results.runs}, epochs=epochs)
    assert with_ranks.families == ["amortized", "amortized rank-8", "amortized rank-32", "shared"]
    assert with_ranks.flows("amortized") == results.flows("amortized")
    lines, before = (study_report.model_table(x).splitlines() for x in (with_ranks, results))
    assert set(before) < set(lines)
    assert len([line for line in lines if line.startswith("| amortized rank-32 planar |")]) == 2
    text = study_text.findings(with_ranks)
    assert study_text.findings(results).splitlines()[0] in text
    assert "**Amortized rank-32 flows help at every length.**" in text
    less = "; ".join(f"amortized rank-{rank} K = {k}: +0.00 ± 0.00" for rank in (8, 32) for k in (16, 80))
    assert f"- NLL minus that of full heads, in nats: {less}." in text
    assert "of full heads" not in study_text.findings(results)
    paths = study_figures.write_all(with_ranks, tmp_path)
    assert [path.name for path in paths] == ["mnist_mlp_cpu.svg", "mnist_mlp_cpu_ranks.svg"]
    for path, word in zip(paths, ("steps of the flow", "seconds of an epoch"), strict=True):
        assert word in path.read_text()
        assert "amortized rank-8" in path.read_text()
    assert "(results/mnist_mlp_cpu_ranks.svg)" in study_report.section(with_ranks, [])
    assert "_ranks.svg" not in study_report.section(results, [])


def test_flows_that_are_not_planar_are_families_of_their_own():
    (results,) = (found for found in STUDIES if found.study.name == "mnist_families_cpu")
    triangular, orthogonal = "amortized triangular Sylvester", "amortized orthogonal Sylvester M=16"
    assert results.families == ["amortized", orthogonal, triangular, "amortized Householder"]
    assert [model.flow for model in results.flows("amortized")] == ["planar", "planar"]
    assert [model.length for model in results.flows(triangular)] == ["L = 2", "L = 4"]
    text = study_text.findings(results)
    for family in ("**Amortized flows", "**Amortized orthogonal Sylvester M=16 flows", "**Amortized Householder flows"):
        assert text.count(f"{family} ") == 1
    assert "The best amortized planar flow, K = 80," in text
    assert "Amortized triangular Sylvester flows" in study_text.conclusions([results])
    assert "![NLL of each family against its cost]" in study_report.section(results, [])
    assert "In `mnist_families_cpu` some are Sylvester" in study_text.introduction([*STUDIES[:1], results])


def test_a_matched_vanilla_vae_is_compared_with_its_flow(tmp_path):
    (results,) = (found for found in STUDIES if found.study.name == "mnist_mlp_cpu")
    wide, flow, vanilla = Model("vanilla", 0, matched=16), Model("amortized", 16), study_results.VANILLA_MODEL

    def with_nll(shift: float) -> study_results.Results:
        runs = [{**run, "nll": run["nll"] + shift, "num_parameters": 1_507_000} for run in results.runs[flow]]
        return dataclasses.replace(results, runs={vanilla: results.runs[vanilla], wide: runs, **results.runs})

    for shift, words in (
        (1.0, "are -1.00 ± 0.00 nats, not explained by its parameters."),
        (-1.0, "are +1.00 ± 0.00 nats, so the parameters help more without a flow."),
        (0.0, "are +0.00 ± 0.00 nats, no clear difference: the flow's parameters explain its gain."),
    ):
        changed = with_nll(shift)
        own = results.difference(flow, "nll")
        assert f"as many as amortized K = 16 has or a few more, changes the NLL by {own.mean + shift:+.2f}" in (
            study_text.findings(changed)
        )
        assert words in study_text.findings(changed)
    same = dataclasses.replace(changed, runs={**changed.runs, flow: results.runs[vanilla], wide: results.runs[vanilla]})
    assert "are +0.00 ± 0.00 nats, no clear difference." in study_text.findings(same), "no gain, nothing to explain"
    page = study_report.page([changed], {})
    assert "| vanilla VAE, matched to K = 16 | 0 |" in page
    assert "Only `mnist_mlp_cpu` has a vanilla VAE with as many" in page
    assert [path.name for path in study_figures.write_all(changed, tmp_path)] == ["mnist_mlp_cpu.svg"]


def test_a_model_that_was_not_run_is_left_out_and_named(copied):
    path = copied / "digits" / "results.json"
    content = json.loads(path.read_text())
    runs = [run for run in content["runs"] if (run["model"], run["num_steps"]) != ("shared", 32)]
    path.write_text(json.dumps({**content, "runs": runs}))
    (results,) = (found for found in study_results.read_all(copied) if found.study.name == "digits")
    assert Model("shared", 32) not in results.runs
    named = study_text.limitations([results])
    assert re.search(r"- Models of `digits` that were not run yet: .*shared planar K=32\.\n", named)
    path.write_text(json.dumps({**content, "runs": [run for run in runs if run["model"] != "vanilla"]}))
    with pytest.raises(Unusable, match=r"lacks 3 runs .* such as vanilla VAE, seed 0"):
        study_results.read_all(copied)


def test_the_page_compares_an_epoch_with_the_plain_loop_where_it_was_timed(copied):
    path = copied / "digits" / "epochs.json"
    content = json.loads(path.read_text())
    rows = [row for row in content["epochs"] if row["backend"] != PLAIN]
    vanilla = rows[0]["seconds"]
    timed = [{**row, "backend": PLAIN, "seconds": 7.5 * vanilla} for row in rows if row["backend"] == REFERENCE]
    for added, words in (([], []), (timed, 2 * [f"(7.5 times with the {PLAIN})"])):
        path.write_text(json.dumps({**content, "epochs": rows + added}))
        (results,) = (found for found in study_results.read_all(copied) if found.study.name == "digits")
        assert re.findall(r"\(.* times with the [a-z ]*\)", study_text.findings(results).replace(";", "\n")) == words
        assert (f"with the {PLAIN} were not measured" in study_report.timing(results)) == (not added)


@pytest.mark.parametrize(
    ("differences", "words"),
    [
        ([-2.0, -1.0], "help at every length"),
        ([0.1, -0.1], "make no clear difference at any length"),
        ([-2.0, -0.1], "help clearly at 1 of 2 lengths, with no clear difference elsewhere"),
        ([2.0, 0.1], "harm clearly at 1 of 2 lengths, and help clearly at none"),
        ([2.0, -2.0], "help clearly at 1 of 2 lengths and harm clearly at 1"),
    ],
)
def test_verdicts(differences, words):
    assert study_text.verdict([Spread(mean, 0.3) for mean in differences]) == words


@pytest.mark.parametrize(
    ("mean", "words"), [(-1.0, "help clearly"), (1.0, "harm clearly"), (0.5, "make no clear difference")]
)
def test_a_verdict_on_one_length(mean, words):
    assert study_text.verdict([Spread(mean, 0.3)]) == words


def test_results_of_another_configuration_or_incomplete_ones_are_refused(copied, capsys, tmp_path):
    path = copied / "digits" / "results.json"
    content = json.loads(path.read_text())
    changed = {**content, "config": {**content["config"], "lr": 1.0}}
    for bad, message in (
        (changed, "lr is 1.0, in .*digits.yaml 0.003"),
        ({**content, "runs": content["runs"][1:]}, "lacks 1 runs"),
    ):
        path.write_text(json.dumps(bad))
        with pytest.raises(Unusable, match=message):
            study_results.read_all(copied)
        assert study_report.main(copied, tmp_path / "results.md", tmp_path / "README.md") == 1
        assert re.search(message, capsys.readouterr().err)
        assert not (tmp_path / "results.md").exists()


def test_one_seed_is_refused(tmp_path):
    """The deviation of one seed would be 0, and every difference clear."""
    config = (study_results.CONFIGS / "digits.yaml").read_text().replace("seeds: [0, 1, 2]", "seeds: [0]")
    (tmp_path / "digits.yaml").write_text(config)
    with pytest.raises(Unusable, match=r"digits\.yaml has one seed"):
        study_results.read(study_results.FOLDER / "digits", tmp_path / "digits.yaml")


def test_figures_have_no_digits_that_depend_on_the_processor():
    one, other = (
        f'<rect height="{height}"/> <g transform="scale(0.015625 -0.015625)"/> -0.15'
        for height in ("279.264448", "279.264447")
    )
    assert (
        svg.with_rounded_coordinates(one) == '<rect height="279.264"/> <g transform="scale(0.015625 -0.015625)"/> -0.15'
    )
    assert svg.with_rounded_coordinates(one) == svg.with_rounded_coordinates(other)


def test_figures_have_no_ids_that_depend_on_the_processor():
    """matplotlib hashes coordinates in full precision, whose last bits differ from one processor to another."""
    one, other = (f'<path id="m{h}"/> url(#p{h}) <path id="p{h}"/> 0.15' for h in ("0ea0fc5983", "fa78f665ab"))
    assert svg.with_numbered_ids(one) == '<path id="id0"/> url(#id1) <path id="id1"/> 0.15'
    assert svg.with_numbered_ids(one) == svg.with_numbered_ids(other)
    for results in STUDIES:
        assert not re.search(
            r'id="[a-z][0-9a-f]{10}"', (study_results.FOLDER / f"{results.study.name}.svg").read_text()
        )


def test_seconds_of_heads_that_are_cut():
    (results,) = (found for found in STUDIES if found.study.name == "mnist_mlp_cpu")
    study = dataclasses.replace(results.study, settings={**results.study.settings, "full_epochs": 7})
    text = study_report.timing(dataclasses.replace(results, study=study))
    assert text.endswith("Those of a rank are of an epoch after the cut; the 7 before take as long as a full head's.")
    assert "cut" not in study_report.timing(results)
