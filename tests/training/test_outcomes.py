"""How runs end: diverged, stopped, extended; what the table, the files and the exit code say of it."""

import json
import math

import numpy as np
import pytest
import small_runs
import torch
from small_runs import without_times

from vvae_fast.nn.vae import ElboTerms
from vvae_fast.train.base import outcome
from vvae_fast.train.base.files import DivergedError, RunError
from vvae_fast.train.cli import main
from vvae_fast.train.density import runs as density_runs
from vvae_fast.train.density.fit import make_grid
from vvae_fast.train.run import runs
from vvae_fast.train.study.plots import plot_curves

SMALL = ["--batch-size", "40", "--latent-dim", "2", "--hidden", "3", "--steps", "1", "--num-samples", "2"]


@pytest.fixture
def data(tmp_path) -> str:
    np.save(tmp_path / "bits.npy", np.random.default_rng(0).integers(0, 2, (60, 9)))
    return str(tmp_path / "bits.npy")


@pytest.fixture
def diverge(monkeypatch):
    """Makes the validation of the runs of these models what it is not, from an epoch on, counted from 1."""

    def make(epoch: int, value: float = math.nan, models: tuple[str, ...] = ("vanilla", "amortized")) -> None:
        step = runs.VAEModule.validation_step

        def bad(self, batch, index):
            if self.current_epoch + 1 < epoch or self.config.model not in models:
                return step(self, batch, index)
            return self._val_mean.add(ElboTerms(*[torch.full((len(batch.x),), value)] * 3), len(batch.x))

        monkeypatch.setattr(runs.VAEModule, "validation_step", bad)

    return make


def read(path) -> dict:
    def refuse(text):
        raise AssertionError(f"{text} is no JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_run_that_diverges_keeps_its_best_epoch_and_says_so(data, tmp_path, capsys, diverge, value):
    diverge(3, value)
    command = ["train", *SMALL, "--epochs", "9", "--data", data, "--out", str(tmp_path / "run")]
    assert main(command) == 3
    captured = capsys.readouterr()
    assert "1 of 1 runs diverged" in captured.err
    assert "amortized planar (1 of 1 diverged)" in captured.out
    line = f"diverged after 3 of 9 epochs: the validation -ELBO is {value}; the scores are those of epoch"
    assert captured.out.count(line) == 2, "in the progress and below the table"
    result = read(tmp_path / "run" / "result.json")
    assert [result[key] for key in outcome.OUTCOME[:3]] == ["diverged", 3, 9]
    assert result["best_epoch"] in (0, 1)
    assert math.isfinite(result["nll"])
    assert result["history"][2]["val_neg_elbo"] is None
    assert main(command) == 3, "nothing is trained again, and it says so again"
    again = capsys.readouterr().out
    assert "already finished" in again
    assert line.split(":")[0] in again


def test_a_run_that_diverges_at_once_has_no_scores(data, tmp_path, capsys, diverge):
    diverge(1)
    assert main(["train", *SMALL, "--epochs", "9", "--data", data, "--out", str(tmp_path / "run")]) == 3
    printed = capsys.readouterr().out
    assert "diverged after 1 of 9 epochs: the validation -ELBO is nan; no epoch to evaluate; lower --lr" in printed
    row = next(line for line in printed.splitlines() if line.startswith("| amortized planar"))
    assert [cell.strip() for cell in row.split("|")[3:8]] == ["-"] * 5
    result = read(tmp_path / "run" / "result.json")
    assert {result[key] for key in ("neg_elbo", "nll", "gap", "kl", "active_units", "best_epoch")} == {None}


def test_a_comparison_goes_on_after_a_run_that_diverged(data, tmp_path, capsys, diverge):
    diverge(1, models=("vanilla",))
    out = tmp_path / "out"
    command = ["compare", *SMALL, "--epochs", "2", "--seeds", "0", "1", "--data", data, "--out", str(out)]
    assert main(command) == 3
    captured = capsys.readouterr()
    assert "2 of 4 runs diverged" in captured.err
    assert "vanilla VAE (2 of 2 diverged)" in captured.out
    assert "vanilla VAE, seed 1: diverged after 1 of 2 epochs" in captured.out
    records = read(out / "results.json")["runs"]
    assert [record["status"] for record in records] == ["diverged"] * 2 + ["finished"] * 2
    assert {path.name for path in out.glob("*.png")} >= {"elbo.png", "samples.png", "posterior.png"}
    diverge(1)
    command[-1] = str(tmp_path / "all")
    assert main(command) == 3
    assert (tmp_path / "all" / "elbo.png").exists(), "plots survive runs without an epoch"


def test_weights_that_become_nan(data, tmp_path, capsys, monkeypatch):
    """Nothing is told to the code: its own numbers are what is not finite."""
    step = runs.VAEModule.training_step

    def spoiling(self, batch, index):
        if self.current_epoch == 2:
            torch.nn.init.constant_(next(self.parameters()), math.nan)
        return step(self, batch, index)

    monkeypatch.setattr(runs.VAEModule, "training_step", spoiling)
    command = ["compare", *SMALL, "--epochs", "20", "--seeds", "0", "--data", data, "--out", str(tmp_path / "out")]
    assert main(command) == 3
    assert "vanilla VAE, seed 0: diverged after 3 of 20 epochs: the validation -ELBO is nan" in capsys.readouterr().out
    assert len(list((tmp_path / "out").glob("*.png"))) == 4


def test_scores_that_are_not_finite(data, tmp_path, capsys, monkeypatch):
    scores = {"neg_elbo": 1.0, "nll": math.inf, "gap": -math.inf, "kl": 0.5, "reconstruction": 0.5, "active_units": 1}
    monkeypatch.setattr(runs, "evaluate", lambda *arguments: scores)
    assert main(["train", *SMALL, "--epochs", "2", "--data", data, "--out", str(tmp_path / "run")]) == 3
    assert "diverged after 2 of 2 epochs: nll on the test set is inf" in capsys.readouterr().out
    result = read(tmp_path / "run" / "result.json")
    assert (result["neg_elbo"], result["nll"]) == (1.0, None)


def test_patience_is_no_divergence(data, tmp_path, capsys):
    command = ["train", *SMALL, "--epochs", "99", "--lr", "0.5", "--patience", "2", "--data", data, "--out"]
    assert main([*command, str(tmp_path / "run")]) == 0
    result = read(tmp_path / "run" / "result.json")
    done = result["epochs_done"]
    assert (result["status"], result["epochs_planned"]) == ("stopped", 99)
    assert done == result["best_epoch"] + 3 < 99
    assert f"stopped after {done} of 99 epochs: no better validation -ELBO since epoch {done - 2}" in (
        capsys.readouterr().out
    )
    command[command.index("--epochs") + 1] = "120"
    assert main([*command, str(tmp_path / "run")]) == 0, "more epochs change nothing"
    assert read(tmp_path / "run" / "result.json") == result


def test_a_density_that_diverges_leaves_the_others(tmp_path, capsys, monkeypatch):
    fit, out = density_runs.fit, tmp_path / "out"

    def failing(config, *more):
        if config.num_steps == 2:
            raise DivergedError(f"{config.label}: q's integral is nan")
        return fit(config, *more)

    monkeypatch.setattr(density_runs, "make_grid", lambda: make_grid(8.0, 64))
    monkeypatch.setattr(density_runs, "fit", failing)
    command = f"density --energies U1 U2 --steps 1 2 --iterations 2 --restarts 1 --out {out}".split()
    assert main(command) == 3
    captured = capsys.readouterr()
    assert "diverged: U2 K=2: q's integral is nan" in captured.out
    assert "2 of 4 runs diverged" in captured.err
    content = read(out / "results.json")
    assert [record["config"]["num_steps"] for record in content["fits"]] == [1, 1]
    assert len(content["diverged"]) == 2
    assert (out / "figure.png").exists()
    monkeypatch.setattr(density_runs, "fit", fit)
    assert main(command) == 0, "what diverged is tried again"
    assert "diverged" not in read(out / "results.json")
    monkeypatch.setattr(density_runs, "fit", failing)
    assert main([*command[:5], "2", *command[7:-1], str(tmp_path / "none")]) == 3


HISTORIES = [
    [],
    [math.nan],
    [math.inf, -math.inf],
    [0.0],
    [5.0],
    [5.0, math.nan],
    [1e308, -1e308],
    [3.4e38] * 3,
    [0.0, 0.0],
    [-2.0, 7.0, math.inf],
]


@pytest.mark.parametrize("values", HISTORIES)
@pytest.mark.parametrize("beside", [None, [2.0, 1.0]])
def test_plots_survive_any_history(tmp_path, values, beside):
    histories = [
        [{"epoch": k, "val_neg_elbo": value} for k, value in enumerate(v)] for v in (values, beside) if v is not None
    ]
    plot_curves({"a": histories, "b": [], "c": histories[:1]}, tmp_path / "elbo.png")
    assert (tmp_path / "elbo.png").stat().st_size > 1000


def make_config(dataset, **changes):
    return small_runs.make_config(dataset, **{"epochs": 2, "warmup_epochs": 1, **changes})


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_more_epochs_go_on_with_a_finished_run(dataset, tmp_path, schedule):
    """2 + 3 epochs: the same every time; with a constant learning rate as 5 at once, and with a cosine not."""
    short, long = (make_config(dataset, epochs=epochs, schedule=schedule) for epochs in (2, 5))
    whole = runs.run(long, dataset, tmp_path / "whole")
    extended = []
    for name in ("a", "b"):
        first = runs.run(short, dataset, tmp_path / name)
        stages = []
        extended.append(runs.run(long, dataset, tmp_path / name, lambda stage, history, to=stages: to.append(stage)))
        assert stages[0].startswith("resuming after epoch 2, with 5 epochs in place of 2: ")
        assert ("not a run of 5" in stages[0]) == (schedule == "cosine")
        assert stages[1:] == ["training"] * 3 + ["evaluating"]
        assert extended[-1]["history"][:2] == first["history"], "nothing is repeated"
    assert without_times(extended[0]) == without_times(extended[1])
    assert extended[0]["earlier_plans"] == [{"epochs": 2, "until": 2}]
    assert (extended[0]["epochs_done"], extended[0]["epochs_planned"]) == (5, 5)
    same = without_times({**extended[0], "earlier_plans": []}) == without_times(whole)
    assert same == (schedule == "constant")
    with pytest.raises(RunError, match="epochs is 5 there, 2 here"):
        runs.run(short, dataset, tmp_path / "a")


def test_an_extended_run_that_is_interrupted_goes_on(dataset, tmp_path):
    def interrupt(stage, history):
        if len(history) == 5:
            raise KeyboardInterrupt

    runs.run(make_config(dataset, epochs=2), dataset, tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        runs.run(make_config(dataset, epochs=7), dataset, tmp_path / "a", interrupt)
    resumed = runs.run(make_config(dataset, epochs=7), dataset, tmp_path / "a")
    runs.run(make_config(dataset, epochs=2), dataset, tmp_path / "b")
    straight = runs.run(make_config(dataset, epochs=7), dataset, tmp_path / "b")
    assert without_times(resumed) == without_times(straight)


def test_the_first_plan_leaves_no_patience(dataset, tmp_path, monkeypatch):
    """Without a patience its number of epochs was one, and Lightning takes that from the checkpoint."""

    def worsening(self, batch, index):
        value = torch.full((len(batch.x),), self.current_epoch + 1.0)
        self._val_mean.add(ElboTerms(value, value, value), len(batch.x))

    monkeypatch.setattr(runs.VAEModule, "validation_step", worsening)
    runs.run(make_config(dataset, epochs=1), dataset, tmp_path)
    result = runs.run(make_config(dataset, epochs=4), dataset, tmp_path)
    assert (result["status"], result["epochs_done"], result["best_epoch"]) == ("finished", 4, 0)


def test_other_importance_samples_evaluate_a_finished_run_again(dataset, tmp_path):
    first = runs.run(make_config(dataset), dataset, tmp_path)
    last = (tmp_path / "last.ckpt").read_bytes()
    stages = []
    second = runs.run(
        make_config(dataset, num_samples=7), dataset, tmp_path, lambda stage, history: stages.append(stage)
    )
    assert stages == ["evaluating"]
    assert (tmp_path / "last.ckpt").read_bytes() == last
    assert second["num_samples"] == 7
    assert second["nll"] != first["nll"]
    assert runs.run(make_config(dataset), dataset, tmp_path) == first
    with pytest.raises(RunError, match="latent_dim is 3 there, 4 here"):
        runs.run(make_config(dataset, num_samples=7, latent_dim=4), dataset, tmp_path)


def test_a_moved_run_keeps_its_best(dataset, tmp_path):
    """Lightning forgets the best score where the folder has another name than in the checkpoint."""
    config = make_config(dataset, epochs=6, lr=0.5, schedule="constant")

    def interrupt(stage, history):
        if len(history) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runs.run(config, dataset, tmp_path / "a", interrupt)
    (tmp_path / "a").rename(tmp_path / "b")
    moved = runs.run(config, dataset, tmp_path / "b")
    assert without_times(moved) == without_times(runs.run(config, dataset, tmp_path / "whole"))
    assert moved["best_epoch"] == outcome.best_epoch(moved["history"])
    assert not (tmp_path / "a").exists()
