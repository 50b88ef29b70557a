"""The part of docs/results.md on inference gaps, where a study has them."""

import dataclasses
import json
import shutil

import pytest

from benchmarks.study import study_figures, study_gaps, study_report, study_results, study_text
from benchmarks.study.study_results import VANILLA_MODEL, Unusable

SCORES = {"effective_sample_size": 8.0, "effective_sample_size_optimal": 600.0}


def gaps(seed: int, nll: float, optimal: float, approximation: float, amortization: float) -> dict:
    """As a run's record has them, of `settings` in digits.yaml."""
    parts = {"nll": nll, "nll_optimal": optimal, "approximation_gap": approximation, "amortization_gap": amortization}
    scores = {"neg_elbo": optimal + approximation + amortization, **parts, **SCORES}
    rows = [
        {"num_samples": count, "nll": nll + extra, "nll_optimal": optimal} for count, extra in ((100, 1.5), (1000, 0))
    ]
    return {
        "settings": {"num_points": 200, "num_steps": None, "iterations": 600, "num_samples": 1000},
        "scores": {name: {"mean": x + 0.1 * (seed - 1), "std": 2.5, "median": x} for name, x in scores.items()},
        "by_samples": rows,
        "few_effective": 0.625,
        "few_effective_optimal": 0.0,
    }


@pytest.fixture
def with_gaps(tmp_path):
    """Reads digits' committed results with these gaps in place of theirs: of the vanilla VAE and of flows."""

    def make(vanilla: tuple[float, ...], flow: tuple[float, ...]) -> study_results.Results:
        folder = tmp_path / "digits"
        shutil.copytree(study_results.FOLDER / "digits", folder, dirs_exist_ok=True)
        content = json.loads((folder / "results.json").read_text())
        content["runs"] = [run for run in content["runs"] if not run.get("matched")]
        for run in content["runs"]:
            run.pop("gaps", None)
            if run["model"] == "vanilla" or run["num_steps"] == 16:
                run["gaps"] = gaps(run["seed"], *(vanilla if run["model"] == "vanilla" else flow))
        (folder / "results.json").write_text(json.dumps(content))
        return study_results.read(folder, study_results.CONFIGS / "digits.yaml")

    return make


def test_a_gain_is_split_in_model_family_and_encoder(with_gaps, tmp_path):
    results = with_gaps((98.4, 97.05, 0.66, 6.2), (95.4, 94.6, 0.11, 5.1))
    assert [model.label for model in study_gaps.measured(results)] == [
        *("vanilla VAE", "amortized planar K=16", "shared planar K=16")
    ]
    text = study_text.findings(results)
    assert "Without a flow 90% of log p(x) - ELBO, which is 6.86 nats, is what the encoder lacks." in text
    parts = "-2.45 ± 0.00 from a better model, -0.55 ± 0.00 from a better family, -1.10 ± 0.00 from a better encoder"
    assert f"changes -ELBO by -4.10 ± 0.00 nats: {parts}." in text
    assert "it helps the encoder more than the family" in text
    assert (
        "from q* by 1.35 nats without a flow and 0.80 with it. So it counted 0.55 ± 0.00 nats of better inference"
        in text
    )
    assert "is not measured" not in text
    page = study_report.section(results, [])
    assert "200 rows, from q and from q*" in page
    assert "| amortized planar | 16 | 96.90 ± 0.00 | 95.40 ± 0.00 | 94.60 ± 0.00 | 94.60 ± 0.00 | 8.0 |" in page
    assert "| 62.5% | 0.0% |" in page
    assert "| vanilla VAE | 0 | 103.91 ± 0.10 | 97.05 ± 0.10 | 0.66 ± 0.10 | 2.50 | 6.20 ± 0.10 | 2.50 |" in page
    assert "amortized planar K=16, the best by the NLL from q*, in nats: model -2.45" in study_text.conclusions(
        [results]
    )
    paths = study_figures.write_all(results, tmp_path)
    assert [path.name for path in paths] == ["digits.svg", "digits_gaps.svg"]
    assert "approximation: the family" in paths[1].read_text()


def test_other_numbers_give_other_sentences(with_gaps):
    results = with_gaps((97.0, 97.0, 3.0, 1.0), (97.5, 97.2, 1.0, 1.5))
    text = study_text.findings(results)
    assert "Without a flow 75% of log p(x) - ELBO" in text
    assert "from a worse model, -2.00 ± 0.00 from a better family, +0.50 ± 0.00 from a worse encoder" in text
    assert "it helps the family more than the encoder" in text
    assert "So it hid 0.30 ± 0.00 nats of a better model" in text
    text = study_text.findings(with_gaps((97.0, 96.0, 1.0, 1.0), (97.0, 96.0, 1.0, 1.0)))
    assert "from a not clearly different model" in text
    assert "It makes neither inference part clearly smaller." in text
    assert "which is no clear difference" in text


def test_gaps_measured_in_another_way_than_the_file_says_are_refused(with_gaps):
    results = with_gaps((98.4, 97.05, 0.66, 6.2), (95.4, 94.6, 0.11, 5.1))
    runs = results.runs[VANILLA_MODEL]
    changed = [
        {**run, "gaps": {**run["gaps"], "settings": {**run["gaps"]["settings"], "iterations": 5}}} for run in runs
    ]
    for study, found in ((results.study, changed), (dataclasses.replace(results.study, gaps=None), runs)):
        with pytest.raises(Unusable, match="gaps were measured with"):
            study_results.check_gaps(study, study_results.FOLDER, found)


def test_results_without_gaps_have_no_such_part():
    (results,) = (found for found in study_results.read_all() if found.study.name == "mnist_mlp_cpu_high_lr")
    assert study_gaps.section(results) == study_gaps.findings(results) == []
    assert study_gaps.conclusion(results) == ""
