"""Runs whose head is a full one in the first epochs, and then cut to its rank."""

import copy
import dataclasses
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from small_runs import make_config, without_times

from vvae_fast import AmortizedPlanarFlow
from vvae_fast.train.base import outcome
from vvae_fast.train.base.files import RunError
from vvae_fast.train.cli import main
from vvae_fast.train.data.sets import load_dataset
from vvae_fast.train.run import module, networks, resuming, runs
from vvae_fast.train.run.checkpoints import BEST, LAST, PREVIOUS, load_checkpoint
from vvae_fast.train.study.compare import Model
from vvae_fast.train.study.studies import load_study

STAGE = "its head is cut to rank 2"


@pytest.fixture(scope="module")
def dataset():
    digits = load_dataset("digits")
    return dataclasses.replace(digits, train=digits.train[:120], val=digits.val[:40], test=digits.test[:30])


def config_of(dataset, **changes):
    return make_config(dataset, **{"rank": 2, "full_epochs": 2, "epochs": 4} | changes)


def train(config, dataset, folder):
    """The result, and the stages that were told."""
    stages = []
    result = runs.run(config, dataset, folder, lambda stage, history: stages.append(stage))
    return result, stages


@pytest.mark.parametrize("optimizer", ["adam", "adamax"])
def test_the_first_epochs_are_those_of_a_full_head(dataset, tmp_path, optimizer):
    config = config_of(dataset, optimizer=optimizer)
    result, stages = train(config, dataset, tmp_path / "cut")
    full, _ = train(config.uncut(), dataset, tmp_path / "full")
    history, whole = (without_times(r)["history"] for r in (result, full))
    assert history[:2] == whole[:2]
    assert history[2] != whole[2]
    assert [stage for stage in stages if stage.startswith(STAGE)] == [f"{STAGE}, resuming after epoch 2"]
    assert config.name == "amortized-K2-rank2-full2-seed3"
    assert result["num_parameters"] < full["num_parameters"]
    assert (result["rank"], result["status"], len(history)) == (2, "finished", 4)
    assert result["best_epoch"] >= 2
    vae, epoch = runs.load_best(config, dataset, tmp_path / "cut")
    assert (vae.flow.rank, epoch) == (2, result["best_epoch"])


def test_the_optimizer_keeps_what_it_knows_of_the_rest(dataset, tmp_path, monkeypatch):
    kept = []
    after_cut = resuming.after_cut

    def watched(checkpoint, vae, cut, config, trainer):
        before = {name: x.clone() for name, x in vae.state_dict().items()}
        changed = after_cut(checkpoint, vae, cut, config, trainer)
        optimizers = [
            networks.build_optimizer(config, networks.build_vae(c, dataset)) for c in (config.uncut(), config)
        ]
        states = [copy.deepcopy(x["optimizer_states"][0]) for x in (checkpoint, changed)]
        for optimizer, state in zip(optimizers, states, strict=True):
            optimizer.load_state_dict(state)
        after = {name: x.clone() for name, x in vae.state_dict().items()}
        kept.append((before, after, *(list(o.state.values()) for o in optimizers)))
        return changed

    monkeypatch.setattr(runs, "after_cut", watched)
    train(config_of(dataset), dataset, tmp_path)
    ((before, after, states_before, states_after),) = kept
    alike = [name for name in after if name in before]
    assert [name for name in after if name not in before] == [
        f"flow.head.{name}" for name in ("down.weight", "up.weight", "up.bias")
    ]
    assert all(torch.equal(before[name], after[name]) for name in alike)
    named = [
        dict(zip(names, states, strict=True)) for names, states in ((before, states_before), (after, states_after))
    ]
    for name in after:
        state = named[1][name]
        if name in alike:
            assert all(torch.equal(x, named[0][name][key]) for key, x in state.items()), name
        assert all(bool(x.any()) is (name in alike) for x in state.values()), name


def test_a_run_that_is_interrupted_at_the_cut_goes_on(dataset, tmp_path, monkeypatch):
    """The checkpoint of its last epoch with a full head is read as one of the rank, too."""
    config = config_of(dataset)
    whole, _ = train(config, dataset, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(runs, "after_cut", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(config, dataset, tmp_path / "cut")
    last = tmp_path / "cut" / LAST
    assert "vae.flow.head.weight" in load_checkpoint(last)["state_dict"]
    vae = runs.vae_of_checkpoint(load_checkpoint(last), last, config, dataset)
    assert vae.flow.rank == 2
    result, stages = train(config, dataset, tmp_path / "cut")
    assert any(stage.startswith(STAGE) for stage in stages)
    assert without_times(result) == without_times(whole)


@pytest.mark.parametrize("epochs", [3, 4])
def test_a_damaged_checkpoint_after_the_cut(dataset, tmp_path, epochs):
    """The run goes on from the one before it, whose head is still full where the damaged one is the first cut."""
    config = config_of(dataset, epochs=epochs)
    whole, _ = train(config, dataset, tmp_path)
    checkpoint = load_checkpoint(tmp_path / PREVIOUS)
    assert len(checkpoint["vvae_fast"]["history"]) == epochs - 1
    assert ("vae.flow.head.weight" in checkpoint["state_dict"]) is (epochs == 3)
    (tmp_path / "result.json").unlink()
    (tmp_path / LAST).write_bytes(b"")
    result, _ = train(config, dataset, tmp_path)
    assert without_times(result) == without_times(whole)


def test_more_epochs_and_more_samples(dataset, tmp_path):
    config = config_of(dataset, schedule="constant")
    train(config, dataset, tmp_path / "cut")
    longer = dataclasses.replace(config, epochs=6)
    result, stages = train(longer, dataset, tmp_path / "cut")
    assert not any(stage.startswith(STAGE) for stage in stages)
    whole, _ = train(longer, dataset, tmp_path / "whole")
    assert without_times(result)["history"] == without_times(whole)["history"]
    more, stages = train(dataclasses.replace(longer, num_samples=40), dataset, tmp_path / "cut")
    assert stages.count("training") == 0
    assert more["num_samples"] == 40


def worse_at(monkeypatch, values):
    """Adds to the validation -ELBO of these epochs."""
    plain = module.VAEModule.on_validation_epoch_end

    def changed(self):
        added = values.get(self.current_epoch, 0.0)
        self._val_mean.sums = self._val_mean.sums + added * self._val_mean.count
        plain(self)

    monkeypatch.setattr(module.VAEModule, "on_validation_epoch_end", changed)


def test_patience_and_the_best_epoch_count_from_the_cut(dataset, tmp_path, monkeypatch):
    """The epochs before it are all worse than the first, and better than all after it."""
    worse_at(monkeypatch, {0: -1e4, 1: -1e3, 2: -1e2, 3: 10.0, 4: 1e3, 5: 1e3, 6: 1e3, 7: 1e3})
    config = config_of(dataset, full_epochs=3, epochs=9, patience=2)
    result, _ = train(config, dataset, tmp_path)
    assert (result["status"], result["epochs_done"], result["best_epoch"]) == ("stopped", 6, 3)
    assert result["reason"] == "no better validation -ELBO since epoch 4"
    assert load_checkpoint(tmp_path / BEST)["state_dict"]["vae.flow.head.up.weight"].shape[1] == 2


@pytest.mark.parametrize("epoch", [1, 2])
def test_a_run_that_diverges_before_its_cut_or_at_once_after_it(dataset, tmp_path, monkeypatch, epoch):
    """Its best epoch has a full head, which is cut for the scores."""
    worse_at(monkeypatch, {epoch: math.nan})
    result, _ = train(config_of(dataset), dataset, tmp_path)
    assert (result["status"], result["epochs_done"], result["best_epoch"]) == ("diverged", epoch + 1, epoch - 1)
    assert math.isfinite(result["nll"])
    assert "vae.flow.head.weight" in load_checkpoint(tmp_path / BEST)["state_dict"]
    vae, _ = runs.load_best(config_of(dataset), dataset, tmp_path)
    assert vae.flow.rank == 2
    again, stages = train(config_of(dataset), dataset, tmp_path)
    assert (stages, again["nll"]) == (["already finished"], result["nll"])


def test_outcomes_count_from_an_epoch():
    history = [{"epoch": n, "val_neg_elbo": value} for n, value in enumerate([1.0, 5.0, 4.0, 6.0])]
    assert outcome.of_training(history, 9, True)["reason"].endswith("since epoch 1")
    assert outcome.of_training(history, 9, True, 1)["reason"].endswith("since epoch 3")


@pytest.mark.parametrize("flow", ["planar", "sylvester-orthogonal", "householder"])
def test_other_families_and_normalised_features(dataset, tmp_path, flow):
    config = config_of(dataset, flow=flow, normalise=True, epochs=3)
    result, _ = train(config, dataset, tmp_path)
    assert result["status"] == "finished"
    vae, _ = runs.load_best(config, dataset, tmp_path)
    assert (vae.flow.rank, vae.flow.normalise) == (2, True)


def test_the_rows_by_which_it_is_cut(dataset, monkeypatch):
    """Those that the first epoch begins with, and samples of their posteriors; a rank of all features loses nothing."""
    config = config_of(dataset, rank=7, epochs=3)
    torch.manual_seed(0)
    vae = networks.build_vae(config.uncut(), dataset)
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    rows = torch.cat(list(networks.make_loaders(dataset, config.batch_size, config.seed)[0]))[:60]
    noise, posterior, taken = torch.randn(60, 3), vae.encode(rows), []
    before = vae(rows, noise=noise).neg_elbo.detach()
    with_rank = AmortizedPlanarFlow.with_rank
    monkeypatch.setattr(
        AmortizedPlanarFlow,
        "with_rank",
        lambda self, *arguments: taken.append(arguments) or with_rank(self, *arguments),
    )
    monkeypatch.setattr(networks, "CUT_ROWS", 60)
    networks.cut_head(vae, config, dataset)
    ((rank, z, features),) = taken
    assert (rank, vae.flow.rank) == (7, 7)
    assert torch.equal(features, posterior.features)
    drawn = (z - posterior.mean) / (0.5 * posterior.log_var).exp()
    assert 0.8 < drawn.std() < 1.2
    assert drawn.std(0).min() > 0.5
    torch.testing.assert_close(vae(rows, noise=noise).neg_elbo, before, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"full_epochs": 4}, "its head is to be cut after 4 epochs, and it has 4; give fewer full epochs"),
        ({"layer_norm": True}, "a head that is cut has no layer norm; leave it or the full epochs out"),
        ({"rank": 9}, "the rank must be at most"),
        ({"rank": 0}, "full epochs are of a head with a rank, and it has none; leave them out"),
    ],
)
def test_what_is_refused_before_anything_is_written(dataset, tmp_path, changes, message):
    with pytest.raises(RunError, match=message):
        runs.run(config_of(dataset, **changes), dataset, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_in_a_study_it_is_a_setting_of_the_heads_with_a_rank(dataset, tmp_path):
    text = "\n".join(
        f"{name}: {json.dumps(value)}"
        for name, value in {
            **{"data": "digits", "network": "mlp", "hidden": [7], "latent_dim": 3, "optimizer": "adam", "lr": 0.01},
            **{"schedule": "cosine", "batch_size": 50, "epochs": 4, "warmup_epochs": 0, "patience": 0},
            **{"num_samples": 9, "full_epochs": 2, "seeds": [0]},
            "models": {"vanilla": [0], "amortized": [2], "shared": [2], "amortized-rank2": [2]},
        }.items()
    )
    (tmp_path / "study.yaml").write_text(text)
    study = load_study(tmp_path / "study.yaml")
    configs = [model.config(study.base(dataset), 0, dataset) for model in study.models]
    assert [config.full_epochs for config in configs] == [0, 0, 0, 2]
    (tmp_path / "study.yaml").write_text(text.replace("full_epochs: 2", "full_epochs: -1"))
    with pytest.raises(RunError, match="full_epochs must be an int of at least 0, got -1"):
        load_study(tmp_path / "study.yaml")
    assert Model("amortized", 2).config(config_of(dataset), 0, dataset).full_epochs == 0


OPTIONS = "train --epochs 3 --batch-size 79 --latent-dim 2 --hidden 5 --steps 2 --num-samples 9 --rank 2"


def test_on_the_command_line(tmp_path, capsys):
    np.save(tmp_path / "bits.npy", np.random.default_rng(0).integers(0, 2, (100, 16)))
    command = [*OPTIONS.split(), "--data", str(tmp_path / "bits.npy"), "--out", str(tmp_path / "run"), "--full-epochs"]
    assert main([*command, "1"]) == 0
    assert STAGE in capsys.readouterr().out
    for checkpoint in (BEST, LAST):
        assert main(["evaluate", str(tmp_path / "run" / checkpoint), "--data", str(tmp_path / "bits.npy")]) == 0
    assert "full_epochs is 1 there, 2 here" in failure(capsys, [*command, "2"])
    assert "fewer full epochs" in failure(capsys, [*command, "3", "--fresh"])
    without = " ".join(command).replace("--rank 2 ", "").split()
    assert "--full-epochs are of a head with a rank, and there is no --rank" in failure(capsys, [*without, "1"])


def failure(capsys, command):
    assert main(command) == 2
    return capsys.readouterr().err


@pytest.mark.long
def test_two_processes_train_what_one_does(tmp_path):
    np.save(tmp_path / "bits.npy", np.random.default_rng(0).integers(0, 2, (100, 16)))
    command = [*OPTIONS.split(), "--full-epochs", "1", "--data", str(tmp_path / "bits.npy"), "--out"]
    assert main([*command, str(tmp_path / "one")]) == 0
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "vvae_fast"]
    started = subprocess.run(
        [sys.executable, *launcher, *command, str(tmp_path / "two")], capture_output=True, text=True, timeout=300
    )
    assert started.returncode == 0, started.stderr
    one, two = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("one", "two"))
    for key in ("neg_elbo", "nll", "kl"):
        assert two[key] == pytest.approx(one[key], abs=1e-3)
