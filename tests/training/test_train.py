import dataclasses
import json
import math

import pytest
import torch
from small_runs import make_config, without_times

from vvae_fast.nn.vae import ElboTerms
from vvae_fast.train.base.files import RunError, read_json, write_json
from vvae_fast.train.run import checkpoints, folder, runs
from vvae_fast.train.run.objective import free_energy, kl_weight, lr_factor
from vvae_fast.train.run.runconfig import RunConfig, data_digest


def weights(path) -> dict:
    return torch.load(path / "last.ckpt", weights_only=True)["state_dict"]


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
    stages = []
    resumed = runs.run(
        config, dataset, tmp_path / "killed", lambda stage, history: stages.append((stage, len(history)))
    )
    done = occurrence - 1  # nothing that was finished is repeated
    assert stages[: 1 + (done > 0)] == [(f"resuming after epoch {done}", done)] * (done > 0) + [("training", done + 1)]
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
    assert epochs == [2, 3, 4, 4]


def test_a_damaged_last_checkpoint_costs_one_epoch(dataset, tmp_path):
    config = make_config(dataset)
    whole = runs.run(config, dataset, tmp_path)
    (tmp_path / "result.json").unlink()
    (tmp_path / "last.ckpt").write_bytes(b"PK\x03\x04 half a file")
    assert without_times(runs.run(config, dataset, tmp_path)) == without_times(whole)
    for name in ("last.ckpt", "previous.ckpt"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(RunError, match=r"last.ckpt cannot be read as a checkpoint .*--fresh"):
        folder.check_folder(config, tmp_path)


def test_a_finished_run_is_read_not_repeated(dataset, tmp_path):
    config = make_config(dataset, epochs=1)
    first = runs.run(config, dataset, tmp_path)
    stages = []
    assert runs.run(config, dataset, tmp_path, lambda stage, history: stages.append(stage)) == first
    assert stages == ["already finished"]


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


def test_only_runs_are_deleted(dataset, tmp_path):
    thesis, run, link = (tmp_path / name for name in ("thesis", "run", "link"))
    for path in (thesis, run):
        path.mkdir()
    (thesis / "chapter.tex").touch()
    config = make_config(dataset).to_json()
    for content in (None, {}, {**config, "more": 1}, {**config, "seed": "3"}, {**config, "model": "car"}, [1]):
        if content is not None:
            write_json(thesis / "config.json", content)
        with pytest.raises(RunError, match="not a run of vvae-fast and it will not be deleted"):
            folder.remove_run(thesis)
    write_json(thesis / "config.json", config)
    with pytest.raises(RunError, match=r"more than a run \(chapter.tex\)"):
        folder.remove_run(thesis)
    assert (thesis / "chapter.tex").exists()
    write_json(run / "config.json", config)
    link.symlink_to(run)
    folder.remove_run(link)
    assert not run.exists()
    folder.remove_run(link)


def test_what_cannot_be_deleted_is_told(dataset, tmp_path, monkeypatch):
    write_json(tmp_path / "config.json", make_config(dataset).to_json())

    def busy(path, **options):
        if not options.get("ignore_errors"):
            raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(folder.shutil, "rmtree", busy)
    with pytest.raises(RunError, match=r"cannot be deleted \(Device or resource busy\)"):
        folder.remove_run(tmp_path)


def test_one_process_works_in_a_folder(dataset, tmp_path):
    config = make_config(dataset, epochs=1)
    write_json(tmp_path / "config.json", config.to_json())
    with folder.locked(tmp_path):
        for act in (lambda: runs.run(config, dataset, tmp_path), lambda: folder.remove_run(tmp_path)):
            with pytest.raises(RunError, match="another process is training here"):
                act()
    runs.run(config, dataset, tmp_path)


def test_the_digest_tells_splits_and_likelihoods_apart(dataset):
    rows = torch.cat([dataset.train, dataset.val])
    others = [
        {"train": rows[:100], "val": rows[100:]},
        {name: getattr(dataset, name).flatten(1) for name in ("train", "val", "test")},
        {"likelihood": "gaussian"},
        {"total_count": 17},
        {"dynamic": True},
    ]
    digests = [data_digest(dataclasses.replace(dataset, **changes)) for changes in ({}, *others)]
    assert len(set(digests)) == len(digests)


def test_the_best_checkpoint_must_be_the_runs(dataset, tmp_path):
    config = make_config(dataset, epochs=1)
    runs.run(config, dataset, tmp_path)
    best = tmp_path / "best.ckpt"
    checkpoint = torch.load(best, weights_only=True)

    def rejected(message: str) -> None:
        with pytest.raises(RunError, match=message):
            runs.load_best(config, dataset, tmp_path)

    checkpoint["vvae_fast"]["config"]["seed"] = 4
    torch.save(checkpoint, best)
    rejected(r"best.ckpt belongs to another run \(seed is 4 there, 3 here\)")
    checkpoint["vvae_fast"]["config"]["seed"] = 3
    checkpoint["state_dict"].popitem()
    torch.save(checkpoint, best)
    rejected("checkpoint of another model")
    best.unlink()
    rejected("best.ckpt is missing.*--fresh")


def test_the_result_must_be_the_runs(dataset, tmp_path):
    config = make_config(dataset, epochs=1)
    result = runs.run(config, dataset, tmp_path)
    missing = {key: value for key, value in result.items() if key != "nll"}
    for content, message in [
        ({**result, "seed": 4}, r"another run's \(seed is 4 there, 3 here\)"),
        (missing, "not a result"),
        ({**result, "nll": "low"}, "not a result"),
        ({**result, "history": [{}]}, "not a result"),
    ]:
        write_json(tmp_path / "result.json", content)
        with pytest.raises(RunError, match=f"{message}.*--fresh"):
            runs.run(config, dataset, tmp_path)


def test_checkpoints_of_wrong_structure_fall_back(dataset, tmp_path):
    config = make_config(dataset, epochs=2)
    runs.run(config, dataset, tmp_path)
    last = tmp_path / "last.ckpt"
    good = last.read_bytes()
    ours = torch.load(last, weights_only=True)["vvae_fast"]
    for changes in (
        {"state_dict": [1]},
        {"epoch": "1"},
        {"loops": None},
        {"vvae_fast": {}},
        {"vvae_fast": {**ours, "history": 5}},
        {"vvae_fast": {**ours, "stopped": 0}},
        {"vvae_fast": {**ours, "config": {**ours["config"], "hidden": 7}}},
    ):
        checkpoint = {**torch.load(last, weights_only=True), **changes}
        torch.save({key: value for key, value in checkpoint.items() if value is not None}, last)
        with pytest.raises(RunError, match="damaged checkpoint"):
            checkpoints.load_checkpoint(last)
        path, _ = checkpoints.load_last(tmp_path)
        assert path.name == "previous.ckpt"
        last.write_bytes(good)


def test_mutated_checkpoints_are_read_or_refused(dataset, tmp_path):
    runs.run(make_config(dataset, epochs=1), dataset, tmp_path)
    good = (tmp_path / "last.ckpt").read_bytes()
    refusals = []
    for position in range(64, 2500, 8):  # the archive's pickle
        (tmp_path / "bad.ckpt").write_bytes(good[:position] + bytes([good[position] ^ 0x55]) + good[position + 1 :])
        try:
            checkpoints.load_checkpoint(tmp_path / "bad.ckpt")
        except RunError as error:
            refusals.append(str(error))
    assert len(refusals) > 100
    assert not any("\n" in message for message in refusals)


def test_divergence_ends_a_run_with_a_result(dataset, tmp_path, monkeypatch):
    config = make_config(dataset, epochs=3)
    monkeypatch.setattr(runs.VAEModule, "validation_step", lambda self, x, i: self._val_mean.add(_nans(len(x)), len(x)))
    result = runs.run(config, dataset, tmp_path)
    assert (result["status"], result["epochs_done"], result["epochs_planned"]) == ("diverged", 1, 3)
    assert (result["nll"], result["best_epoch"]) == (None, None)
    assert read_json(tmp_path / "result.json")["reason"] == "the validation -ELBO is nan"


def _nans(count: int) -> ElboTerms:
    return ElboTerms(*[torch.full((count,), math.nan)] * 3)


def test_deeply_nested_json_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(RunError, match="cannot be read"):
        read_json(tmp_path / "config.json")


def test_a_full_disk_is_told(tmp_path, monkeypatch):
    def full(content, path):
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed\nframe #0")

    monkeypatch.setattr(checkpoints.torch, "save", full)
    with pytest.raises(RunError, match=r"last.ckpt cannot be written \(PytorchStreamWriter .* failed\); make room"):
        checkpoints.AtomicCheckpointIO().save_checkpoint({}, tmp_path / "last.ckpt")


def test_configurations_survive_json(dataset):
    config = make_config(dataset)
    assert RunConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_gaussian_data_of_any_scale_train(dataset, tmp_path):
    real = {split: 50.0 * getattr(dataset, split).sin() + 300.0 for split in ("train", "val", "test")}
    gaussian = dataclasses.replace(dataset, **real, likelihood="gaussian", total_count=None)
    result = runs.run(make_config(gaussian, epochs=2), gaussian, tmp_path)
    assert math.isfinite(result["neg_elbo"])


def test_runs_of_older_versions_are_theirs_still(dataset, tmp_path):
    """Their configurations lack the fields that have defaults, their results the scores added later."""
    config = make_config(dataset, epochs=2)
    result = runs.run(config, dataset, tmp_path)
    lacking = ("network", "optimizer", "schedule", "rank")
    older = {key: value for key, value in config.to_json().items() if key not in lacking}
    assert RunConfig.from_json(older) == config
    write_json(tmp_path / "config.json", older)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    checkpoint["vvae_fast"]["config"] = older
    torch.save(checkpoint, tmp_path / "last.ckpt")
    folder.check_folder(config, tmp_path)
    with pytest.raises(RunError, match="optimizer is adam there, adamax here"):
        folder.check_folder(dataclasses.replace(config, optimizer="adamax"), tmp_path)
    with pytest.raises(RunError, match="rank is 0 there, 2 here"):
        folder.check_folder(dataclasses.replace(config, rank=2), tmp_path)
    stages = []
    write_json(tmp_path / "result.json", {key: value for key, value in result.items() if key != "rank"})
    assert runs.run(config, dataset, tmp_path, lambda stage, history: stages.append(stage)) == result
    assert stages == ["already finished"], "a result without a rank is complete"
    added = ("gap", "active_units", "num_parameters")
    write_json(tmp_path / "result.json", {key: value for key, value in result.items() if key not in added})
    stages = []
    assert runs.run(config, dataset, tmp_path, lambda stage, history: stages.append(stage)) == result
    assert stages == ["evaluating"]


def test_a_constant_schedule_is_one(dataset, tmp_path):
    assert [lr_factor(epoch, 9, "constant") for epoch in range(9)] == [1.0] * 9
    cosine, constant = (
        runs.run(make_config(dataset, schedule=name), dataset, tmp_path / name) for name in ("cosine", "constant")
    )
    assert cosine["history"][0]["val_neg_elbo"] == constant["history"][0]["val_neg_elbo"]
    assert cosine["history"][-1]["val_neg_elbo"] != constant["history"][-1]["val_neg_elbo"]
