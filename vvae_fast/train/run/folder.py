"""A run's folder: its owner, a lock so that only one process works in it, and its deletion."""

from __future__ import annotations

import fcntl
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vvae_fast.train.base import outcome
from vvae_fast.train.base.files import RunError, check_equal, read_json
from vvae_fast.train.run.checkpoints import BEST, LAST, PREVIOUS, load_last
from vvae_fast.train.run.module import CHECKPOINT_KEY
from vvae_fast.train.run.runconfig import (
    ADDED,
    LATER,
    OWN_SETTINGS,
    RECORD,
    RESULT_KEYS,
    SCORES,
    RunConfig,
    are_plans,
    differing_only_in_length,
    is_config,
    is_history,
    is_number,
    with_defaults,
)

CONFIG, ENVIRONMENT, RESULT, GAPS = "config.json", "environment.json", "result.json", "gaps.json"
LOCK, CSV, TENSORBOARD = "lock", "csv", "tensorboard"
CONTENTS = {CONFIG, ENVIRONMENT, RESULT, GAPS, LOCK, CSV, TENSORBOARD, BEST, LAST, PREVIOUS}


def check_same(config: RunConfig, content: dict, path: Path) -> None:
    """Raises RunError if `config` may not continue the run whose configuration, `content`, is in `path`: only the
    number of epochs, upwards, and the importance samples may differ."""
    content = differing_only_in_length(config, with_defaults(content))
    content["likelihood"] = content["likelihood"] or config.likelihood  # in an older version the digest decides
    check_equal(config.to_json(), content, path)


def check_folder(config: RunConfig, folder: Path) -> None:
    """Raises RunError if a folder holds a run or a checkpoint of another configuration, or foreign files."""
    if (folder / CONFIG).exists():
        check_same(config, read_json(folder / CONFIG), folder / CONFIG)
    last = load_last(folder)
    if last is not None:
        path, checkpoint = last
        check_same(config, checkpoint[CHECKPOINT_KEY]["config"], path)
    foreign = [name for name in sorted(CONTENTS - {LOCK}) if (folder / name).exists()]
    if foreign and last is None and not (folder / CONFIG).exists():
        raise RunError(f"{folder / foreign[0]} is there, but no {CONFIG}: it is no run's; choose another --out")


def load_result(config: RunConfig, folder: Path) -> dict | None:
    """The finished run's result. None if there is none, or if it has fewer epochs, other importance samples, or lacks
    keys that were ADDED later.

    Raises RunError if the file is not a result, or belongs to another run.
    """
    path = folder / RESULT
    if not path.exists():
        return None
    result = {**LATER, **read_json(path)}
    if not _is_result({**ADDED, **result}):
        raise RunError(f"{path} is not a result of vvae-fast; remove it or use --fresh")
    for key in OWN_SETTINGS:
        wanted = getattr(config, key)
        if result[key] != wanted:
            raise RunError(
                f"{path} is another run's ({key} is {result[key]} there, {wanted} here); remove it or use --fresh"
            )
    complete = result.keys() >= ADDED.keys()
    is_wanted = complete and outcome.is_over(result, config.epochs) and result["num_samples"] == config.num_samples
    return {**result, "history": _numbers(result["history"])} if is_wanted else None


def _numbers(history: list[dict]) -> list[dict]:
    """A history as it was read, with NaN in place of null, which stands for numbers that are not finite."""
    return [{key: math.nan if value is None else value for key, value in record.items()} for record in history]


def _is_result(result: dict) -> bool:
    if result.keys() != RESULT_KEYS or result["status"] not in outcome.STATUSES:
        return False
    if not isinstance(result["history"], list) or not all(isinstance(record, dict) for record in result["history"]):
        return False
    diverged = result["status"] == outcome.DIVERGED
    may_lack = {*SCORES, "best_epoch"} if diverged else set()  # a diverged run may have nothing to evaluate
    keys = {*RECORD, "best_epoch", "num_samples"} - {"model", "flow", "status", "reason"}
    numbers = [result[key] for key in keys if not (key in may_lack and result[key] is None)]
    finite = all(is_number(value) and math.isfinite(value) for value in numbers)
    has_reason = isinstance(result["reason"], str) if result["status"] != outcome.FINISHED else result["reason"] is None
    has_history = is_history(_numbers(result["history"])) and len(result["history"]) > 0
    has_dataset = isinstance(result["dataset"], dict)
    return finite and has_reason and has_history and has_dataset and are_plans(result["earlier_plans"])


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Locks the folder for this process inside the block. Raises RunError if another process has it."""
    if (folder / LOCK).exists() and not (folder / LOCK).is_file():  # opening a pipe would wait for a reader
        raise RunError(f"{folder / LOCK} is no regular file; remove it or choose another --out")
    with (folder / LOCK).open("a") as file:  # closing it, or the end of the process, frees the lock
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunError(
                f"{folder}: another process is training here; wait for it or choose another --out"
            ) from error
        yield


def remove_run(folder: Path) -> None:
    """Deletes a run's folder. Raises RunError if the folder is not a run's, or holds other files too."""
    folder = folder.resolve()  # rmtree does not accept links
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
