"""Studies in YAML files, and what the commands make of them."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest

from vvae_fast.train.base.files import RunError
from vvae_fast.train.cli import main
from vvae_fast.train.data.sets import load_dataset
from vvae_fast.train.run.networks import build_vae
from vvae_fast.train.run.runconfig import CHOICES, RunConfig, is_config
from vvae_fast.train.study.compare import Model, compare
from vvae_fast.train.study.studies import OTHERS, SETTINGS, load_study

yaml = pytest.importorskip("yaml")

CONFIGS = Path(__file__).parents[2] / "configs"
SMALL = {
    **{"data": "", "splits": {"train": 80, "val": 10, "test": 10}, "network": "gated-mlp", "hidden": [6, 5]},
    **{"latent_dim": 2, "optimizer": "adamax", "lr": 0.01, "schedule": "constant", "batch_size": 40, "epochs": 2},
    **{"warmup_epochs": 1, "patience": 3, "num_samples": 7, "seeds": [4, 2, 4]},
    "models": {"vanilla": [0], "shared": [3], "amortized": [1, 2]},
}


@pytest.fixture
def write(tmp_path):
    """Writes SMALL with changes as a study's file, and its data; None leaves a setting out."""
    np.save(tmp_path / "bits.npy", np.random.default_rng(0).integers(0, 2, (100, 16)))

    def write_study(**changes) -> Path:
        content = {**SMALL, "data": str(tmp_path / "bits.npy"), **changes}
        path = tmp_path / "small.yaml"
        path.write_text(
            yaml.safe_dump({key: value for key, value in content.items() if value is not None}, sort_keys=False)
        )
        return path

    return write_study


@pytest.mark.parametrize("name", ["fashion_mlp_cpu", "mnist_rank_cpu", "mnist_gaps_cpu"])
def test_studies_by_the_protocol_of_mnist_mlp_cpu(name):
    studies = (name, "mnist_mlp_cpu", "mnist_gaps_cpu")
    study, mnist, with_gaps = (load_study(CONFIGS / f"{stem}.yaml") for stem in studies)
    assert {**study.settings, "data": "mnist"} == mnist.settings
    assert (study.seeds, study.gaps, study.splits) == (mnist.seeds, with_gaps.gaps, mnist.splits)


def test_the_page_has_every_key():
    page = (CONFIGS.parent / "docs" / "study.md").read_text().partition("## A file")[2].partition("## Run one")[0]
    keys = [
        key for line in page.splitlines() for key in re.findall(r"`(\w+)`", line.split("|")[1] if "|" in line else "")
    ]
    assert sorted(keys) == sorted({*SETTINGS, *OTHERS})
    for name, choices in CHOICES.items():
        assert name == "model" or f"| `{name}` | {', '.join(choices)} |" in page


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_protocols(path):
    study = load_study(path)
    assert study.protocol
    assert study.splits is not None
    assert study.settings.keys() >= {"data", "network", "latent_dim", "optimizer", "lr", "schedule", "batch_size"}
    assert study.settings.keys() >= {"epochs", "warmup_epochs", "patience", "num_samples"}
    lengths = {model.num_steps for model in study.models}
    assert {Model("vanilla", 0), Model("amortized", 16)} <= set(study.models)
    assert len(study.seeds) > 1
    if path.stem == "mnist_mlp_cpu":
        assert {Model("amortized", 4), Model("shared", 16), Model("shared", 80)} <= set(study.models)
    elif path.stem == "mnist_rank_cpu":
        assert {(model.num_steps, model.rank) for model in study.models if model.kind == "amortized"} == {
            (num_steps, rank) for num_steps in (4, 16, 80) for rank in (0, 8, 32, 128)
        }
    elif path.stem == "mnist_gaps_cpu":
        assert {Model("vanilla", 0, matched=16)} <= set(study.models)
    elif path.stem not in ("mnist_mlp_cpu_high_lr", "fashion_mlp_cpu"):
        assert lengths == {0, 2, 4, 8, 16, 32, 80}
    if study.settings["data"] == "digits":
        digits = load_dataset("digits")
        study.check_splits(digits)
        assert is_config(study.base(digits).to_json())


def test_compare_runs_a_study(write, tmp_path, capsys):
    out, command = tmp_path / "out", ["compare", "--config", str(write()), "--out"]
    assert main([*command, str(out)]) == 0
    content = json.loads((out / "results.json").read_text())
    models = [("vanilla", 0), ("shared", 3), ("amortized", 1), ("amortized", 2)]
    assert [(run["model"], run["num_steps"], run["seed"]) for run in content["runs"]] == [
        (*model, seed) for model in models for seed in (4, 2)
    ]
    settings = {name: SMALL[name] for name in content["config"].keys() & SMALL.keys() if name != "data"}
    assert len(settings) == 11
    assert {name: content["config"][name] for name in settings} == settings
    for run in content["runs"]:
        assert run["gap"] == pytest.approx(run["neg_elbo"] - run["nll"])
        assert run["active_units"] in (0, 1, 2)
        config = RunConfig.from_json(json.loads((out / f"{folder_of(run)}/config.json").read_text()))
        vae = build_vae(config, load_dataset(config_data(write)))
        assert run["num_parameters"] == sum(parameter.numel() for parameter in vae.parameters())
    environment = json.loads((out / "vanilla-seed4" / "environment.json").read_text())
    assert environment["torch"]
    assert environment["threads"] >= 1
    # given again, nothing is repeated; and an option of the command line goes before the file
    written = (out / "vanilla-seed4" / "result.json").stat().st_mtime_ns
    assert main([*command, str(out)]) == 0
    assert (out / "vanilla-seed4" / "result.json").stat().st_mtime_ns == written
    capsys.readouterr()
    assert main([*command, str(out), "--lr", "0.02"]) == 2
    assert "lr is 0.01 there, 0.02 here" in capsys.readouterr().err


def folder_of(run: dict) -> str:
    model = run["model"] if run["model"] == "vanilla" else f"{run['model']}-K{run['num_steps']}"
    return f"{model}-seed{run['seed']}"


def config_data(write) -> str:
    return yaml.safe_load(write().read_text())["data"]


def test_families_of_a_study(write, tmp_path, capsys):
    models = {
        "vanilla": [0],
        "shared": [2],
        "amortized-householder": [2],
        "shared-sylvester-triangular": [1],
        "amortized-sylvester-orthogonal-units1-rank2": [2],
        "amortized-sylvester-householder": [1],
    }
    out, path = tmp_path / "out", write(models=models, seeds=[4])
    assert main(["compare", "--config", str(path), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    for name in ("shared triangular Sylvester L=1", "amortized rank-2 orthogonal Sylvester M=1 L=2"):
        assert name in printed
    runs = json.loads((out / "results.json").read_text())["runs"]
    assert [(run["model"], run["flow"], run["num_steps"], run["units"], run["rank"]) for run in runs] == [
        ("vanilla", "planar", 0, 0, 0),
        ("shared", "planar", 2, 0, 0),
        ("amortized", "householder", 2, 0, 0),
        ("shared", "sylvester-triangular", 1, 0, 0),
        ("amortized", "sylvester-orthogonal", 2, 1, 2),
        ("amortized", "sylvester-householder", 1, 0, 0),
    ]
    folder = out / "amortized-sylvester-orthogonal-L2-M1-rank2-seed4"
    assert main(["evaluate", str(folder), "--config", str(path), "--num-samples", "5"]) == 0


@pytest.mark.parametrize(
    "name",
    ["vanilla-householder", "amortized-sylvester", "amortized-householder-units2", "shared-rank2", "amortized-planar"],
)
def test_families_that_do_not_exist(write, name, capsys):
    assert main(["compare", "--config", str(write(models={name: [2]}))]) == 2
    assert "models must be a list of flow lengths for each kind" in capsys.readouterr().err


def test_ranks_of_a_study(write, tmp_path, capsys):
    models = {"vanilla": [0], "amortized": [2], "amortized-rank2": [2, 1], "amortized-rank3": [2]}
    out, path = tmp_path / "out", write(models=models, seeds=[4])
    assert main(["compare", "--config", str(path), "--out", str(out)]) == 0
    content = json.loads((out / "results.json").read_text())
    keys = ("model", "num_steps", "rank")
    amortized = [("amortized", 2, 0), ("amortized", 2, 2), ("amortized", 1, 2), ("amortized", 2, 3)]
    assert [tuple(run[key] for key in keys) for run in content["runs"]] == [("vanilla", 0, 0), *amortized]
    assert "rank" not in content["config"], "which holds what all runs share"
    counts = [run["num_parameters"] for run in content["runs"]]
    assert counts[1] - counts[2] == 5 * 10 - 2 * (5 + 10)
    assert (out / "amortized-K1-rank2-seed4" / "result.json").exists()
    printed = capsys.readouterr().out
    for title, k in (("amortized planar", 2), ("amortized rank-2 planar", 1), ("amortized rank-3 planar", 2)):
        assert re.search(rf"\| {title} +\| {k} \|", printed), printed


def test_a_matched_vanilla_vae_has_as_many_parameters_as_a_flow(write, tmp_path, capsys):
    models = {"vanilla": [0], "vanilla-matched": [3], "amortized": [3]}
    out, command = tmp_path / "out", ["compare", "--config", str(write(models=models, seeds=[4])), "--out"]
    assert main([*command, str(out)]) == 0
    content = json.loads((out / "results.json").read_text())
    vanilla, wide, flow = content["runs"]
    assert [run["matched"] for run in content["runs"]] == [0, 3, 0]
    config = RunConfig.from_json(json.loads((out / "vanilla-matched3-seed4" / "config.json").read_text()))
    more = config.hidden[0] - 6
    assert (config.model, config.matched, config.hidden) == ("vanilla", 3, (6 + more, 5 + more))
    assert content["config"]["hidden"] == [6, 5], "which the others have"
    dataset = load_dataset(config_data(write))
    narrower = build_vae(dataclasses.replace(config, hidden=(5 + more, 4 + more)), dataset)
    counts = [sum(x.numel() for x in narrower.parameters()), flow["num_parameters"], wide["num_parameters"]]
    assert vanilla["num_parameters"] <= counts[0] < counts[1] <= counts[2]
    title = "vanilla VAE, matched to K = 3"
    assert f"| {title} " in capsys.readouterr().out
    written = (out / config.name / "result.json").stat().st_mtime_ns
    assert main([*command, str(out)]) == 0
    assert (out / config.name / "result.json").stat().st_mtime_ns == written
    path = write(models=models, network="gated-conv", hidden=None)
    assert main(["compare", "--config", str(path), "--out", str(tmp_path / "conv")]) == 2
    assert "gated-conv has its own widths, no vanilla VAE of it can match" in capsys.readouterr().err


def test_train_and_evaluate_take_a_study(write, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = ["--config", str(write())]
    assert main(["train", *config, "--model", "shared", "--steps", "2", "--seed", "5"]) == 0
    run = tmp_path / "runs" / "train-small"
    recorded = json.loads((run / "config.json").read_text())
    assert (recorded["network"], recorded["num_steps"], recorded["seed"]) == ("gated-mlp", 2, 5)
    result = json.loads((run / "result.json").read_text())
    capsys.readouterr()
    assert main(["evaluate", str(run / "best.ckpt"), *config]) == 0
    printed = capsys.readouterr().out
    assert f"nll:            {result['nll']:.3f}" in printed
    assert f"active_units:   {result['active_units']}\n" in printed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"splits": {"train": 81, "val": 10, "test": 9}}, r"splits are .*81.*, bits.npy has .*80.*; correct"),
        ({"epochs": 0}, "epochs must be a positive int, got 0; correct the file"),
        ({"epochs": None}, r"small.yaml lacks settings; add epochs \(a positive int\)$"),
        ({"lr": None, "models": None, "hidden": None}, r"add hidden \(a list of .*\), lr \(a .*\), models \(a list of"),
        ({"batch_size": "many"}, "batch_size must be a positive int, got 'many'"),
        ({"lr": "0,001"}, "lr must be a positive number, got '0,001'; correct the file"),
        ({"lr": "1e3x"}, "lr must be a positive number, got '1e3x'"),
        ({"lr": True}, "lr must be a positive number, got True"),
        ({"lr": "1e4"}, "lr must be a positive number up to 1000, got '1e4'"),
        ({"lr": float("nan")}, "lr must be a positive number, got nan"),
        ({"epochs": "1.5e0"}, "epochs must be a positive int, got '1.5e0'"),
        ({"epochs": "1e300"}, "epochs must be at most 10000000, got '1e300'"),
        ({"epochs": True}, "epochs must be a positive int, got True"),
        ({"seeds": ["1e1", "1e99"]}, r"seeds must be a list of ints from 0 to 2\^32 - 1, each at most 4294967295"),
        ({"splits": {"train": "8e1", "val": 10, "test": "many"}}, "splits must be rows of train, val, test, got"),
        ({"data": 1e3}, "data must be a name or a path, got 1000.0"),
        ({"array": 3}, "array must be the name of an archive's array, got 3"),
        ({"likelihood": "poisson"}, "likelihood must be one of bernoulli, binomial, gaussian, got 'poisson'"),
        ({"network": "transformer"}, "network must be one of mlp, gated-mlp, gated-conv, got 'transformer'"),
        ({"network": "gated-conv"}, "gated-conv has its own widths; remove hidden"),
        ({"network": "gated-conv", "hidden": None}, "wants grey images of 28 x 28"),
        ({"hidden": []}, "hidden must be a list of positive ints"),
        ({"seeds": None}, r"add seeds \(a list of ints"),
        ({"models": {"vanilla": [3]}}, "models must be a list of flow lengths for each kind"),
        ({"models": {"sylvester": [3]}}, "models must be a list of flow lengths for each kind"),
        ({"models": {"shared": [0]}}, "models must be"),
        ({"models": {"shared-rank2": [3]}}, "models must be"),
        ({"models": {"amortized-rank": [3]}}, "models must be"),
        ({"models": {"amortized-rank0": [3]}}, "models must be"),
        ({"models": {"amortized-full": [3]}}, "models must be"),
        ({"models": {2: [3]}}, "models must be"),
        (
            {"models": {"vanilla": [0], "amortized-rank6": [2]}},
            "amortized-K2-rank6-seed4: the rank must be .* = 5, got 6",
        ),
        ({"learning_rate": 0.1}, "unknown setting learning_rate; known are array, batch_size"),
    ],
)
def test_files_that_cannot_be_run(write, tmp_path, capsys, changes, message):
    out = tmp_path / "out"
    assert main(["compare", "--config", str(write(**changes)), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error)
    assert not list(out.glob("*/result.json"))


NUMBERS = {
    **{
        "lr": "1e-2",
        "epochs": "2e0",
        "batch_size": 40.0,
        "latent_dim": "2",
        "hidden": ["6", 5.0],
        "num_samples": "0.7e1",
    },
    **{
        "warmup_epochs": "1",
        "patience": 3.0,
        "seeds": ["4e0", 2],
        "splits": {"train": "8e1", "val": 10.0, "test": "10"},
    },
    "models": {"vanilla": ["0"], "shared": [3.0], "amortized": ["1e0", 2]},
}


def test_numbers_are_read_as_people_write_them(write):
    """1e-3 is a string to PyYAML."""
    plain, written = load_study(write()), write(**NUMBERS)
    assert "lr: 1e-2\n" in written.read_text()
    read = load_study(written)
    assert read == plain
    assert {name: type(value) for name, value in read.settings.items()} == {
        name: type(value) for name, value in plain.settings.items()
    }


def test_normalise_is_a_setting_of_the_amortized_flows(write, tmp_path):
    path = write(normalise=True, models={"vanilla": [0], "shared": [1], "amortized": [1]}, epochs=1, seeds=[4])
    study = load_study(path)
    dataset = load_dataset(study.settings["data"])
    configs = [model.config(study.base(dataset), 4, dataset) for model in study.models]
    assert [config.normalise for config in configs] == [False, False, True]
    assert [config.name for config in configs] == ["vanilla-seed4", "shared-K1-seed4", "amortized-K1-normalised-seed4"]
    assert build_vae(configs[2], dataset).flow.normalise
    out = tmp_path / "out"
    assert main(["compare", "--config", str(path), "--out", str(out)]) == 0
    assert json.loads((out / "results.json").read_text())["config"]["normalise"] is True
    assert (
        main(["train", "--config", str(path), "--model", "vanilla", "--seed", "4", "--out", str(tmp_path / "one")]) == 0
    )
    with pytest.raises(RunError, match="normalise must be true or false, got 1"):
        load_study(write(normalise=1))


def test_array_and_likelihood_are_settings_too(write, tmp_path, capsys):
    x = np.random.default_rng(0).integers(0, 2, (100, 16))
    np.savez(tmp_path / "two.npz", bits=x, labels=np.arange(100)[:, None])
    changes = {"data": str(tmp_path / "two.npz"), "array": "bits", "likelihood": "gaussian", "models": {"vanilla": [0]}}
    out = tmp_path / "out"
    assert main(["compare", "--config", str(write(**changes, seeds=[0])), "--out", str(out)]) == 0
    content = json.loads((out / "results.json").read_text())
    assert (content["config"]["array"], content["config"]["likelihood"]) == ("bits", "gaussian")
    assert (content["dataset"]["arrays"], content["dataset"]["likelihood"]) == (["bits"], "gaussian")
    assert "gaussian likelihood: asked for" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["- 1\n", "a: [\n", "\x00", "1: 2\n"])
def test_files_that_are_no_studies(tmp_path, content):
    (tmp_path / "a.yaml").write_text(content)
    with pytest.raises(RunError, match=r"a.yaml (cannot be read|holds no settings)"):
        load_study(tmp_path / "a.yaml")
    with pytest.raises(RunError, match=r"b.yaml cannot be read \(No such file or directory\); check the path"):
        load_study(tmp_path / "b.yaml")
    (tmp_path / "c.yaml").write_bytes(b"\xff\xfe\xb0")
    with pytest.raises(RunError, match=r"c.yaml cannot be read \(no text in UTF-8\); give a YAML file"):
        load_study(tmp_path / "c.yaml")


def test_a_study_names_its_models_itself(write, capsys):
    assert main(["compare", "--config", str(write()), "--steps", "3"]) == 2
    assert "leave --steps and --shared out" in capsys.readouterr().err
    assert main(["compare", "--config", str(write()), "--matched"]) == 2
    assert "write vanilla-matched: [K] there for --matched" in capsys.readouterr().err


GAPS = {"num_points": 6, "iterations": 2, "num_samples": 10}


def test_a_study_measures_gaps_once(write, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["compare", "--config", str(write(gaps=GAPS)), "--out", str(out), "--seeds", "4"]
    assert main(command) == 0
    runs = json.loads((out / "results.json").read_text())["runs"]
    files = [out / folder_of(run) / "gaps.json" for run in runs]
    for run, file in zip(runs, files, strict=True):
        content = json.loads(file.read_text())
        assert run["gaps"] == {key: content[key] for key in run["gaps"]}
        assert run["gaps"]["settings"] == {**GAPS, "num_steps": None}
        assert "points" not in run["gaps"]
        assert 1 <= run["gaps"]["scores"]["effective_sample_size"]["median"] <= GAPS["num_samples"]
    written = [file.stat().st_mtime_ns for file in files]
    capsys.readouterr()
    assert main(command) == 0
    assert capsys.readouterr().out.count("its gaps are measured already") == len(files)
    assert json.loads((out / "results.json").read_text())["runs"] == runs
    assert [file.stat().st_mtime_ns for file in files] == written
    write(gaps={**GAPS, "iterations": 3})
    files[0].unlink()
    assert main(command) == 0
    assert json.loads(files[0].read_text())["settings"]["iterations"] == 3
    assert all(file.stat().st_mtime_ns > before for file, before in zip(files, written, strict=True))


@pytest.mark.parametrize("gaps", [{}, {"num_points": 6}, {**GAPS, "num_points": 0}, {**GAPS, "steps": 2}, 7])
def test_gaps_that_cannot_be_measured(write, gaps):
    with pytest.raises(RunError, match="gaps must be positive ints num_points, iterations, num_samples, got"):
        load_study(write(gaps=gaps))


def test_several_processes_measure_no_gaps(write, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("vvae_fast.train.run.processes.is_launched", lambda: True)
    study = load_study(write(gaps=GAPS))
    dataset = load_dataset(study.settings["data"])
    with pytest.raises(RunError, match="gaps are measured in one process"):
        compare(study.base(dataset), dataset, study.models, study.seeds, tmp_path / "out", False, gaps=study.gaps)
    assert not (tmp_path / "out").exists()
