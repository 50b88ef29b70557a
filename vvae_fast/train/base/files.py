"""Writes files that a killed program cannot leave half-written; the error for files that belong to something else."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class RunError(ValueError):
    """A run cannot be started, resumed or read. The message is one line and ends with what to do."""


class DivergedError(RunError):
    """A run has no result, because its numbers went out of bounds."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path in the same folder. After the block, it replaces `path` in one step."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)  # else writing would wait for a pipe of that name, or follow a link
    yield temporary
    os.replace(temporary, path)


def write_json(path: Path, content: object) -> None:
    """Writes indented JSON in one step; NaN and inf become null, since JSON lacks them."""
    with replacing(path) as temporary:
        text = json.dumps(_finite(content), indent=2, allow_nan=False)
        temporary.write_text(text + "\n", encoding="utf-8")


def _finite(content: object) -> object:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def read_text(path: Path) -> str:
    """A file's text. Raises OSError if it cannot be read or is not a file, ValueError if it is not UTF-8."""
    if path.exists() and not path.is_file():  # reading a pipe would wait for its writer
        raise OSError("it is a folder" if path.is_dir() else "it is no regular file")
    return path.read_text(encoding="utf-8")


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises RunError if the file is not one."""
    try:
        content = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(
            f"{path} cannot be read ({' '.join(str(error).split())}); remove it or choose another --out"
        ) from error
    if not isinstance(content, dict):
        raise RunError(f"{path} holds no JSON object; remove it or choose another --out")
    return content


def check_equal(wanted: dict, content: dict, path: Path) -> None:
    """Raises RunError if `content`, the configuration that `path` records, is not the one that is `wanted`."""
    differing = [key for key in {**wanted, **content} if wanted.get(key) != content.get(key)]
    if differing:
        key = differing[0]
        raise RunError(
            f"{path} belongs to another run ({key} is {content.get(key)} there, {wanted.get(key)} here); "
            "use --fresh to replace it or choose another --out"
        )


def make_folder(path: Path) -> None:
    """Makes a folder and its parents. Raises RunError if it cannot."""
    try:
        path.resolve().mkdir(parents=True, exist_ok=True)  # mkdir fails for a link whose target is gone
    except OSError as error:
        raise RunError(f"{path} cannot be made a folder ({error.strerror}); choose another --out") from error
