"""Checkpoints carry a checksum, and what is not built as Lightning would build it is refused by name."""

import copy
import random
import shutil
import struct

import pytest
import torch
from small_runs import without_times
from test_outcomes import make_config

from vvae_fast.train.base import seal
from vvae_fast.train.base.files import RunError
from vvae_fast.train.run import checkpoints, runs


@pytest.fixture(scope="module")
def original(dataset, tmp_path_factory):
    """What `interrupted` copies."""

    def interrupt(stage, history):
        if len(history) == 4:
            raise KeyboardInterrupt

    folder, config = tmp_path_factory.mktemp("interrupted") / "run", make_config(dataset, epochs=5)
    with pytest.raises(KeyboardInterrupt):
        runs.run(config, dataset, folder, interrupt)
    (folder / "previous.ckpt").unlink()
    return folder, config


@pytest.fixture
def interrupted(original, tmp_path):
    """A run's folder, interrupted after 3 of 5 epochs, and its configuration; previous.ckpt is gone."""
    folder, config = original
    return shutil.copytree(folder, tmp_path / "run"), config


def test_a_sealed_checkpoint_is_an_archive_as_ever(interrupted):
    folder, _ = interrupted
    for name in ("last.ckpt", "best.ckpt"):
        path = folder / name
        assert seal.check(path) == seal.SEALED
        assert torch.load(path, weights_only=True)["vvae_fast"] == checkpoints.load_checkpoint(path)["vvae_fast"]
        with pytest.raises(ValueError, match="no archive without a comment"):
            seal.seal(path)


def test_one_flipped_bit_anywhere_is_refused(interrupted):
    folder, _ = interrupted
    path, good = folder / "last.ckpt", (folder / "last.ckpt").read_bytes()
    generator = random.Random(0)
    tail = 8 * (seal.END_SIZE + seal.SIZE)  # every bit of the archive's end record and of the checksum
    bits = [*range(8 * len(good) - tail, 8 * len(good)), *(generator.randrange(8 * len(good)) for _ in range(300))]
    for bit in bits:
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bad)
        assert seal.check(path) == seal.DAMAGED, bit
    with pytest.raises(RunError, match=r"last.ckpt cannot be read as a checkpoint \(its checksum is wrong .*--fresh"):
        checkpoints.load_checkpoint(path)


def test_cut_and_lengthened_checkpoints_are_refused(interrupted):
    folder, _ = interrupted
    path, good = folder / "last.ckpt", (folder / "last.ckpt").read_bytes()
    sizes = [0, 1, 21, 22, 100, len(good) // 2, len(good) - seal.SIZE - 1, len(good) - seal.SIZE, len(good) - 1]
    for content in [good[:size] for size in sizes] + [good + b"\0", b"\0" + good, good * 2, good[: -seal.SIZE] + good]:
        path.write_bytes(content)
        with pytest.raises(RunError, match=r"last\.ckpt cannot be read as a checkpoint"):
            checkpoints.load_checkpoint(path)


def test_a_damaged_last_checkpoint_is_named_where_its_predecessor_serves(dataset, tmp_path):
    config, stages = make_config(dataset, epochs=3), []
    whole = runs.run(config, dataset, tmp_path)
    (tmp_path / "result.json").unlink()
    last = bytearray((tmp_path / "last.ckpt").read_bytes())
    last[len(last) // 2] ^= 16
    (tmp_path / "last.ckpt").write_bytes(last)
    again = runs.run(config, dataset, tmp_path, lambda stage, history: stages.append(stage))
    assert stages[0] == f"resuming after epoch 2 from {tmp_path}/previous.ckpt, since last.ckpt beside it is damaged"
    assert without_times(again) == without_times(whole)


def test_a_checkpoint_without_a_checksum_is_read_and_named(interrupted, dataset):
    folder, config = interrupted
    path, stages = folder / "last.ckpt", []
    torch.save(torch.load(path, weights_only=True), path)
    assert seal.check(path) == seal.UNSEALED
    runs.run(config, dataset, folder, lambda stage, history: stages.append(stage))
    assert stages[0] == f"resuming after epoch 3 from {path}, which has no checksum"
    assert seal.check(path) == seal.SEALED


def adam(checkpoint: dict) -> dict:
    return checkpoint["optimizer_states"][0]


def stopping(checkpoint: dict) -> dict:
    return next(state for key, state in checkpoint["callbacks"].items() if key.startswith("EarlyStopping"))


def best(checkpoint: dict) -> dict:
    return next(state for key, state in checkpoint["callbacks"].items() if "val/neg_elbo" in key and "Model" in key)


FOREIGN = {
    "no loops": lambda c: c.update(loops={}),
    "loops of numbers": lambda c: c.update(loops={key: 3 for key in c["loops"]}),
    "no progress": lambda c: c["loops"]["fit_loop"].update(epoch_progress={}),
    "progress in words": lambda c: c["loops"]["fit_loop"]["epoch_progress"]["current"].update(processed="3"),
    "other progress": lambda c: c["loops"]["fit_loop"]["epoch_progress"]["current"].update(processed=2),
    "no optimizer": lambda c: c.update(optimizer_states=[]),
    "an empty optimizer": lambda c: c.update(optimizer_states=[{}]),
    "two optimizers": lambda c: c.update(optimizer_states=c["optimizer_states"] * 2),
    "an optimizer's name": lambda c: c.update(optimizer_states="adam"),
    "no groups": lambda c: adam(c).update(param_groups=[]),
    "a group of texts": lambda c: adam(c).update(param_groups=["lr"]),
    "other parameters": lambda c: adam(c)["param_groups"][0].update(params=[0, 1]),
    "betas in words": lambda c: adam(c)["param_groups"][0].update(betas="0.9"),
    "a moment's shape": lambda c: adam(c)["state"][0].update(exp_avg=torch.zeros(3)),
    "a moment's type": lambda c: adam(c)["state"][0].update(
        exp_avg_sq=torch.zeros_like(adam(c)["state"][0]["exp_avg"]).int()
    ),
    "a moment's name": lambda c: adam(c)["state"].__setitem__(0, {"step": torch.tensor(3.0)}),
    "a state too few": lambda c: adam(c)["state"].pop(0),
    "a step in words": lambda c: adam(c)["state"][0].update(step="three"),
    "version x": lambda c: c.update({"pytorch-lightning_version": "x"}),
    "version 3": lambda c: c.update({"pytorch-lightning_version": 3}),
    "a later version": lambda c: c.update({"pytorch-lightning_version": "99.1"}),
    "a schedule": lambda c: c.update(lr_schedulers=[{}]),
    "steps in words": lambda c: c.update(global_step="9"),
    "another epoch": lambda c: c.update(epoch=7),
    "a huge epoch": lambda c: c.update(epoch=10**15),
    "no callbacks": lambda c: c.update(callbacks={}),
    "callbacks in a list": lambda c: c.update(callbacks=[]),
    "an empty callback": lambda c: stopping(c).clear(),
    "a patience in words": lambda c: stopping(c).update(patience="2"),
    "a score in words": lambda c: best(c).update(best_model_score="low"),
    "models in words": lambda c: best(c).update(best_k_models={"a": "b"}),
    "models by number": lambda c: best(c).update(best_k_models={3: torch.tensor(1.0)}),
    "weights of integers": lambda c: c.update(state_dict={key: x.int() for key, x in c["state_dict"].items()}),
    "plans in words": lambda c: c["vvae_fast"].update(plans="3"),
    "history out of order": lambda c: c["vvae_fast"]["history"].reverse(),
}


@pytest.mark.parametrize("sealed", [True, False], ids=["sealed", "unsealed"])
@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_parts_are_refused_by_name(interrupted, dataset, name, sealed):
    folder, config = interrupted
    path, stages = folder / "last.ckpt", []
    checkpoint = torch.load(path, weights_only=True)
    FOREIGN[name](checkpoint)
    torch.save(checkpoint, path)
    if sealed:
        seal.seal(path)
    with pytest.raises(RunError, match=r"last\.ckpt:? .*--fresh") as error:
        runs.run(config, dataset, folder, lambda stage, history: stages.append(stage))
    assert "\n" not in str(error.value)
    assert stages == []


def test_a_checkpoint_of_an_older_torch_goes_on(interrupted, dataset, tmp_path):
    """A parameter group lacks settings that were added since; torch has defaults for them."""
    folder, config = interrupted
    checkpoint = torch.load(folder / "last.ckpt", weights_only=True)
    adam(checkpoint)["param_groups"][0].pop("decoupled_weight_decay", None)
    checkpoint["vvae_fast"].pop("plans")
    torch.save(copy.copy(checkpoint), folder / "last.ckpt")
    resumed = runs.run(config, dataset, folder)
    assert without_times(resumed) == without_times(runs.run(config, dataset, tmp_path / "whole"))


def test_a_seal_is_the_digest_of_all_before_it(tmp_path):
    path = tmp_path / "a.ckpt"
    torch.save({"a": torch.zeros(3 * seal.CHUNK // 4 + 5)}, path)  # of several chunks
    plain = path.read_bytes()
    seal.seal(path)
    sealed = path.read_bytes()
    assert sealed[: len(plain) - 2] == plain[:-2]
    assert sealed[len(plain) - 2 : len(plain)] == struct.pack("<H", seal.SIZE)
    assert seal.check(path) == seal.SEALED
