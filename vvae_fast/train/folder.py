"""A run's folder: whose it is, that one process alone works in it, and its deletion."""

from __future__ import annotations

import fcntl
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vvae_fast.train.checkpoints import BEST, LAST, PREVIOUS, load_last
from vvae_fast.train.files import RunError, check_equal, read_json
from vvae_fast.train.module import CHECKPOINT_KEY
from vvae_fast.train.runconfig import (
    ADDED,
    RECORD,
    RESULT_KEYS,
    RunConfig,
    is_config,
    is_history,
    is_number,
    with_defaults,
)

CONFIG, ENVIRONMENT, RESULT = "config.json", "environment.json", "result.json"
LOCK, CSV, TENSORBOARD = "lock", "csv", "tensorboard"
CONTENTS = {CONFIG, ENVIRONMENT, RESULT, LOCK, CSV, TENSORBOARD, BEST, LAST, PREVIOUS}


def check_same(config: RunConfig, content: dict, path: Path) -> None:
    """Raises RunError where `content`, the configuration that `path` records, is not `config`."""
    content = with_defaults(content)
    content["likelihood"] = content["likelihood"] or config.likelihood  # an older version's digest tells them apart
    check_equal(config.to_json(), content, path)


def check_folder(config: RunConfig, folder: Path) -> None:
    """Raises RunError where a folder holds a run, or a checkpoint, of another configuration."""
    if (folder / CONFIG).exists():
        check_same(config, read_json(folder / CONFIG), folder / CONFIG)
    last = load_last(folder)
    if last is not None:
        path, checkpoint = last
        check_same(config, checkpoint[CHECKPOINT_KEY]["config"], path)


def load_result(config: RunConfig, folder: Path) -> dict | None:
    """The finished run's result; None where there is none, or one without the scores that were ADDED later.

    Raises RunError where the file is not a result, or another run's.
    """
    path = folder / RESULT
    if not path.exists():
        return None
    result = read_json(path)
    if not _is_result({**dict.fromkeys(ADDED, 0), **result}):
        raise RunError(f"{path} is not a result of vvae-fast; remove it or use --fresh")
    for key in ("model", "num_steps", "seed"):
        wanted = getattr(config, key)
        if result[key] != wanted:
            raise RunError(
                f"{path} is another run's ({key} is {result[key]} there, {wanted} here); remove it or use --fresh"
            )
    return result if result.keys() >= ADDED else None


def _is_result(result: dict) -> bool:
    if result.keys() != RESULT_KEYS or type(result["best_epoch"]) is not int:
        return False
    numbers = [result[key] for key in RECORD if key != "model"]
    finite = all(is_number(value) and math.isfinite(value) for value in numbers)
    return finite and is_history(result["history"]) and len(result["history"]) > 0


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Inside, no other process can take this folder. Raises RunError where one has it."""
    with (folder / LOCK).open("a") as file:  # closing it, or dying, gives the lock back
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunError(
                f"{folder}: another process is training here; wait for it or choose another --out"
            ) from error
        yield


def remove_run(folder: Path) -> None:
    """Deletes a run's folder. Raises RunError where the folder is not a run's, or holds more than a run."""
    folder = folder.resolve()  # rmtree refuses links
    if not folder.exists():
        return
    _check_is_run(folder)
    with locked(folder):
        try:
            shutil.rmtree(folder)
        except OSError as error:
            raise RunError(f"{folder} cannot be deleted ({error.strerror}); choose another --out") from error


def _check_is_run(folder: Path) -> None:
    names = {path.name.removesuffix(".tmp") for path in folder.iterdir()} if folder.is_dir() else {folder.name}
    what_to_do = "it will not be deleted; move it away or choose another --out"
    if not folder.is_dir() or not _has_config(folder / CONFIG):
        if not (folder.is_dir() and names <= {LOCK}):  # nothing is lost with an empty folder
            raise RunError(f"{folder} is not a run of vvae-fast and {what_to_do}")
    elif names - CONTENTS:
        raise RunError(f"{folder} holds more than a run ({min(names - CONTENTS)}): {what_to_do}")


def _has_config(path: Path) -> bool:
    try:
        return path.is_file() and is_config(read_json(path))
    except RunError:
        return False
