"""Checkpoints that survive being killed, and what Lightning needs to write and read them."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import torch

from vvae_fast.train.extras import require
from vvae_fast.train.files import RunError, replacing
from vvae_fast.train.module import CHECKPOINT_KEY, MONITOR

callbacks = require("lightning.pytorch.callbacks")
io = require("lightning.pytorch.plugins.io")

LAST, PREVIOUS, BEST = "last.ckpt", "previous.ckpt", "best.ckpt"


class AtomicCheckpointIO(io.TorchCheckpointIO):
    """Writes beside the file and renames; keeps the last checkpoint's predecessor.

    Lightning's own writes to the system's temporary folder, and moving from there to another disk is a copy. A rename
    can reach the disk before the data when the power fails: hence the predecessor.
    """

    def save_checkpoint(self, checkpoint: dict, path: str | Path, storage_options: object = None) -> None:
        path = Path(path)
        with replacing(path) as temporary:
            torch.save(checkpoint, temporary)
            if path.name == LAST and path.exists():
                os.replace(path, path.with_name(PREVIOUS))


def checkpoint_callbacks(folder: Path) -> list:
    """After each epoch LAST, from which a run resumes; after each validation that improves on all before it BEST."""
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


def load_checkpoint(path: Path) -> dict:
    """A checkpoint of ours, tensors on the CPU. Raises RunError where there is none or it is not one of ours."""
    if not path.is_file():
        raise RunError(f"{path}: no such checkpoint; check the path")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError) as error:
        reason = str(error).split("\n")[0].split(". ")[0]
        raise RunError(f"{path} cannot be read as a checkpoint ({reason}); remove it or use --fresh") from error
    if not isinstance(checkpoint, dict) or CHECKPOINT_KEY not in checkpoint:
        raise RunError(f"{path} is a checkpoint of another program; choose another --out")
    return checkpoint


def load_last(folder: Path) -> tuple[Path, dict] | None:
    """The newest readable checkpoint of a folder with its path, None where it has none.

    Raises RunError where the folder has checkpoints and none of them is readable and ours.
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
