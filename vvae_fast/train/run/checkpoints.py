"""Checkpoints that survive a killed process, and the classes with which Lightning writes and reads them."""

from __future__ import annotations

import os
import pickle
import struct
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch

from vvae_fast.train.base import seal
from vvae_fast.train.base.extras import require
from vvae_fast.train.base.files import RunError, replacing
from vvae_fast.train.run.module import CHECKPOINT_KEY, MONITOR
from vvae_fast.train.run.runconfig import are_plans, is_config, is_history

callbacks = require("lightning.pytorch.callbacks")
io: Any = require("lightning.pytorch.plugins.io")

LAST, PREVIOUS, BEST = "last.ckpt", "previous.ckpt", "best.ckpt"
# The errors that torch.load raises for a file that it cannot read.
DAMAGED = (
    *(OSError, EOFError, MemoryError, RuntimeError, ValueError, LookupError, TypeError, AttributeError),
    *(AssertionError, ArithmeticError, ImportError, struct.error, pickle.PickleError, zipfile.BadZipFile, zlib.error),
)
# The entries that Lightning resumes from, beside the weights.
LIGHTNING_KEYS = {"global_step", "loops", "callbacks", "optimizer_states", "lr_schedulers", "pytorch-lightning_version"}


class AtomicCheckpointIO(io.TorchCheckpointIO):
    """Writes a temporary file in the same folder and renames it; keeps the checkpoint before the last one.

    Lightning's class writes to the system's temporary folder, and a move from there to another disk is a copy. If the
    power fails, a rename can reach the disk before the data: so the checkpoint before is kept, and every file has a
    checksum.

    Args:
        resumed: the checkpoint that the run continues from, already read and checked; Lightning gets it from here.
    """

    def __init__(self, resumed: dict | None = None):
        super().__init__()
        self.resumed = resumed

    def load_checkpoint(self, path: str | Path, *arguments: object, **options: object) -> dict:
        return load_checkpoint(Path(path)) if self.resumed is None else self.resumed

    def save_checkpoint(self, checkpoint: dict, path: str | Path, storage_options: object = None) -> None:
        path = Path(path)
        with replacing(path) as temporary:
            try:
                torch.save(checkpoint, temporary)
                seal.seal(temporary)
            except (OSError, RuntimeError) as error:  # torch's writer reports a full disk as RuntimeError
                raise RunError(f"{path} cannot be written ({_reason(error)}); make room or repair the disk") from error
            if path.name == LAST and path.exists():
                os.replace(path, path.with_name(PREVIOUS))


def checkpoint_callbacks(folder: Path) -> list:
    """They write LAST after each epoch, for resuming, and BEST after each validation that is better than all before."""
    last = callbacks.ModelCheckpoint(
        folder, Path(LAST).stem, save_on_train_epoch_end=True, every_n_epochs=1, enable_version_counter=False
    )
    best = callbacks.ModelCheckpoint(
        folder,
        Path(BEST).stem,
        monitor=MONITOR,
        save_on_train_epoch_end=False,
        every_n_epochs=1,
        enable_version_counter=False,
    )
    return [best, last]


def best_of(run: Path) -> Path:
    """The checkpoint of a run's folder; a file is one itself.

    Raises RunError if the folder is one of several runs.
    """
    if not run.is_dir() and (run.is_file() or run.suffix == Path(BEST).suffix):
        return run
    best = run / BEST
    runs = [] if best.is_file() else sorted(path.parent for path in run.glob(f"*/{BEST}"))
    if runs:
        raise RunError(f"{best}: no such checkpoint; check the path, or give the folder of one run, such as {runs[0]}")
    return best


def advice_to_a_reader(path: Path) -> str:
    """What to do about an unusable checkpoint that was to be read, and not to be continued from."""
    last = path.with_name(LAST)
    other = f"{last}, the run as it was after its last epoch" if path.name == BEST and last.is_file() else "another run"
    return f"give {other}, or train it again: vvae-fast train or compare with --fresh"


def load_checkpoint(path: Path, advice: str | None = None) -> dict:
    """A checkpoint of this package, tensors on the CPU; one of an older version, without a checksum, is read as it is.

    Raises RunError if it is missing, has a wrong checksum, or is not one of this package: with `advice`, by default
    that for a run which would be continued.
    """
    repair = advice or "remove it or use --fresh"
    if not path.is_file():
        raise RunError(f"{path}: no such checkpoint; check the path")
    try:
        if seal.check(path) == seal.DAMAGED:
            raise ValueError("its checksum is wrong or its end is missing")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's guesses about damaged files; the error is enough
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except DAMAGED as error:
        raise RunError(f"{path} cannot be read as a checkpoint ({_reason(error)}); {repair}") from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get(CHECKPOINT_KEY), dict):
        raise RunError(f"{path} is a checkpoint of another program; {advice or 'choose another --out'}")
    if not _is_ours(checkpoint):
        raise RunError(f"{path} is a damaged checkpoint or one of another version; {repair}")
    return checkpoint


def _is_ours(checkpoint: dict) -> bool:
    ours, weights = checkpoint[CHECKPOINT_KEY], checkpoint.get("state_dict")
    return (
        checkpoint.keys() >= LIGHTNING_KEYS
        and type(checkpoint.get("epoch")) is int
        and isinstance(weights, dict)
        and all(isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in weights.items())
        and is_config(ours.get("config"))
        and is_history(ours.get("history"))
        and isinstance(ours.get("stopped"), bool)
        and are_plans(ours.get("plans", []))
    )


def _reason(error: BaseException) -> str:
    return (str(error) or type(error).__name__).split("\n")[0].split(". ")[0]


def origin(path: Path) -> str:
    """A remark on the checkpoint that `load_last` found at `path`; empty for an undamaged last one."""
    if path.name == PREVIOUS and path.with_name(LAST).exists():
        return f" from {path}, since {LAST} beside it is damaged"
    return "" if seal.check(path) == seal.SEALED else f" from {path}, which has no checksum"


def load_last(folder: Path) -> tuple[Path, dict] | None:
    """The newest readable checkpoint of a folder with its path, None where it has none.

    Raises RunError if the folder has checkpoints, but none that is readable and of this package.
    """
    paths = [folder / name for name in (LAST, PREVIOUS) if (folder / name).exists()]
    problem = None
    for path in paths:
        try:
            return path, load_checkpoint(path)
        except RunError as error:
            problem = problem or error
    if problem is not None:
        raise problem
    return None
