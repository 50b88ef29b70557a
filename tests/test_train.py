import dataclasses
import json
import math

import pytest
import torch

from vvae_fast.nn.vae import ElboTerms
from vvae_fast.train import checkpoints, runs
from vvae_fast.train.data import load_dataset
from vvae_fast.train.files import RunError, write_json
from vvae_fast.train.objective import free_energy, kl_weight, lr_factor
from vvae_fast.train.runs import RunConfig


@pytest.fixture(scope="module")
def dataset():
    digits = load_dataset("digits")
    return dataclasses.replace(digits, train=digits.train[:120], val=digits.val[:40], test=digits.test[:30])


def make_config(dataset, **changes) -> RunConfig:
    settings = {
        **{"model": "amortized", "num_steps": 2, "seed": 3, "data": "digits", "data_digest": runs.data_digest(dataset)},
        **{"epochs": 4, "batch_size": 50, "latent_dim": 3, "hidden": (7,), "lr": 1e-2},
        **{"warmup_epochs": 0, "patience": 0, "num_samples": 20},
    }
    return RunConfig(**{**settings, **changes})


def without_times(result: dict) -> dict:
    history = [{key: value for key, value in record.items() if key != "seconds"} for record in result["history"]]
    return {key: value for key, value in result.items() if key != "seconds_per_epoch"} | {"history": history}


def weights(folder) -> dict:
    return torch.load(folder / "last.ckpt", weights_only=True)["state_dict"]


class Killed(Exception):
    pass


def killed_while_saving(monkeypatch, name: str, occurrence: int):
    """The program dies when it has written half of the `occurrence`-th checkpoint of that name."""
    save, calls = torch.save, []

    def dying(content, path, *arguments):
        save(content, path, *arguments)
        calls.append(path.name == name + ".tmp")
        if calls[-1] and sum(calls) == occurrence:
            path.write_bytes(path.read_bytes()[:1000])
            raise Killed

    monkeypatch.setattr(checkpoints.torch, "save", dying)


def test_kl_weight_grows_in_equal_steps():
    assert [kl_weight(epoch, 4) for epoch in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert kl_weight(0, 0) == 1.0


def test_lr_factor_falls_from_one_towards_zero():
    factors = [lr_factor(epoch, 100) for epoch in range(100)]
    assert factors[0] == 1.0
    assert factors[50] == pytest.approx(0.5)
    assert factors[99] < 1e-3
    assert factors == sorted(factors, reverse=True)


@pytest.mark.parametrize("beta", [0.25, 1.0])
def test_free_energy_weighs_the_kl_alone(beta):
    reconstruction, kl = torch.tensor([3.0, 5.0]), torch.tensor([2.0, 4.0])
    terms = ElboTerms(reconstruction + kl, reconstruction, kl)
    assert free_energy(terms, beta).item() == pytest.approx(4.0 + 3.0 * beta)


def test_training_lowers_the_free_energy_and_warms_up(dataset, tmp_path):
    result = runs.run(make_config(dataset, warmup_epochs=3, epochs=6), dataset, tmp_path)
    history = result["history"]
    assert [record["beta"] for record in history] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0])
    assert history[-1]["train_neg_elbo"] < 0.9 * history[0]["train_neg_elbo"]
    assert result["neg_elbo"] == pytest.approx(result["reconstruction"] + result["kl"], rel=1e-6)
    assert result["nll"] < result["neg_elbo"]
    assert result["seconds_per_epoch"] > 0
    assert {"best.ckpt", "last.ckpt", "config.json", "result.json", "csv", "tensorboard"} <= set(
        path.name for path in tmp_path.iterdir()
    )
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(("name", "occurrence"), [("last.ckpt", 1), ("last.ckpt", 3), ("best.ckpt", 2)])
def test_a_killed_run_goes_on_and_ends_bit_for_bit_the_same(dataset, tmp_path, monkeypatch, name, occurrence):
    config = make_config(dataset)
    whole = runs.run(config, dataset, tmp_path / "whole")
    with monkeypatch.context() as patch:
        killed_while_saving(patch, name, occurrence)
        with pytest.raises(Killed):
            runs.run(config, dataset, tmp_path / "killed")
    epochs = []
    resumed = runs.run(config, dataset, tmp_path / "killed", lambda stage, history: epochs.append(len(history)))
    assert epochs[0] == occurrence  # nothing that was finished is repeated
    assert without_times(resumed) == without_times(whole)
    expected, got = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert all(torch.equal(expected[key], got[key]) for key in expected)


def test_ctrl_c_is_passed_on_and_the_run_goes_on(dataset, tmp_path):
    def interrupt(stage, history):
        if len(history) == 3:  # two are saved
            raise KeyboardInterrupt

    config = make_config(dataset)
    with pytest.raises(KeyboardInterrupt):
        runs.run(config, dataset, tmp_path, interrupt)
    epochs = []
    runs.run(config, dataset, tmp_path, lambda stage, history: epochs.append(len(history)))
    assert epochs == [3, 4, 4]


def test_a_damaged_last_checkpoint_costs_one_epoch(dataset, tmp_path):
    config = make_config(dataset)
    whole = runs.run(config, dataset, tmp_path)
    (tmp_path / "result.json").unlink()
    (tmp_path / "last.ckpt").write_bytes(b"PK\x03\x04 half a file")
    assert without_times(runs.run(config, dataset, tmp_path)) == without_times(whole)
    for name in ("last.ckpt", "previous.ckpt"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(RunError, match=r"last.ckpt cannot be read as a checkpoint .*--fresh"):
        runs.check_folder(config, tmp_path)


def test_a_finished_run_is_read_not_repeated(dataset, tmp_path):
    config = make_config(dataset, epochs=1)
    first = runs.run(config, dataset, tmp_path)
    assert runs.run(config, dataset, tmp_path, lambda *arguments: pytest.fail("trained again")) == first


def test_early_stopping_stops_and_stays_stopped(dataset, tmp_path, monkeypatch):
    config = make_config(dataset, epochs=30, lr=0.3, patience=2)
    result = runs.run(config, dataset, tmp_path)
    values = [record["val_neg_elbo"] for record in result["history"]]
    assert len(values) < 30
    assert min(values) == min(values[:-2])
    assert result["best_epoch"] == len(values) - 3
    (tmp_path / "result.json").unlink()
    assert runs.run(config, dataset, tmp_path)["history"] == result["history"]


@pytest.mark.parametrize(("model", "num_steps"), [("vanilla", 0), ("shared", 2)])
def test_the_other_models_train(dataset, tmp_path, model, num_steps):
    result = runs.run(make_config(dataset, model=model, num_steps=num_steps, epochs=1), dataset, tmp_path)
    assert math.isfinite(result["nll"])
    assert (result["model"], result["num_steps"]) == (model, num_steps)


def test_folders_of_other_runs_are_refused(dataset, tmp_path):
    config = make_config(dataset, epochs=1)
    runs.run(config, dataset, tmp_path)
    other = dataclasses.replace(config, hidden=(9,))
    with pytest.raises(
        RunError, match=r"config.json belongs to another run \(hidden is \[7\] there, \[9\] here\).*--fresh"
    ):
        runs.run(other, dataset, tmp_path)
    write_json(tmp_path / "config.json", other.to_json())
    with pytest.raises(RunError, match=r"last.ckpt belongs to another run \(hidden is"):
        runs.run(other, dataset, tmp_path)
    torch.save({"state_dict": {}}, tmp_path / "last.ckpt")
    (tmp_path / "previous.ckpt").unlink(missing_ok=True)
    with pytest.raises(RunError, match=r"last.ckpt is a checkpoint of another program"):
        runs.run(other, dataset, tmp_path)


def test_only_runs_are_deleted(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").touch()
    with pytest.raises(RunError, match="will not be deleted"):
        runs.remove_run(tmp_path / "thesis")
    write_json(tmp_path / "config.json", {})
    runs.remove_run(tmp_path)
    assert not tmp_path.exists()
    runs.remove_run(tmp_path)


def test_configurations_survive_json(dataset):
    config = make_config(dataset)
    assert RunConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_gaussian_data_of_any_scale_train(dataset, tmp_path):
    real = {split: 50.0 * getattr(dataset, split).sin() + 300.0 for split in ("train", "val", "test")}
    gaussian = dataclasses.replace(dataset, **real, likelihood="gaussian", total_count=None)
    result = runs.run(make_config(gaussian, epochs=2), gaussian, tmp_path)
    assert math.isfinite(result["neg_elbo"])
