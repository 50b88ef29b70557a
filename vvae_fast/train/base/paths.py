"""Reads paths from the command line or a study's file: once, here; from then on they are absolute.

`~` and `~name` are home folders. A relative path starts at the current directory, or where the caller says. Addresses
such as s3://bucket are rejected: files are local. For a folder that is written to, links are followed once, and `::`
and `$NAME` are rejected, because the libraries that write there would not read them as part of a name.
"""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

from vvae_fast.train.base.files import RunError

ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
ARRAY_SUFFIXES = (".npy", ".npz")
# fsspec reads a::b as a chain of file systems, and TensorBoard's logger replaces $NAME and ${NAME}.
UNWRITABLE = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")  # TensorBoard writes UTF-8, a message is one line
READ_TWO_WAYS = re.compile(r"::|\$(?:[A-Za-z0-9_]+|\{[^}]*\})")


def resolve(text: str, start: Path | None = None) -> Path:
    """The absolute path of a file or folder that is read.

    Args:
        text: what the user wrote.
        start: where a relative path starts, by default the current directory.

    Raises:
        RunError: it is empty, an address, in the home of an unknown user, or in a loop of links.
    """
    if not text or "\0" in text:
        raise RunError("must be neither empty nor contain a null character")
    if ADDRESS.match(text):
        raise RunError(f"'{text}' is an address, and wanted is the path of a local file or folder; copy it here first")
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        raise RunError(f"'{text}': there is no such user's home folder; write ./{text} for a name that starts with ~")
    try:
        path = (Path.cwd() if start is None else start) / expanded
    except FileNotFoundError as error:
        raise RunError(f"'{text}': the current directory is gone; change to another") from error
    _check_links(path)
    return path


def resolve_out(text: str) -> Path:
    """The absolute path, without links, of a folder that is written to. Raises RunError as `resolve` does, and if a
    library that writes there would read the path as a different one."""
    path = Path(os.path.realpath(resolve(text)))
    if UNWRITABLE.search(str(path)):
        raise RunError(f"{str(path)!r} has a control character or one that is no UTF-8; choose another --out")
    found = READ_TWO_WAYS.search(str(path))
    if found:
        raise RunError(
            f"{path}: '{found[0]}' in a path is read as more than a name by the libraries that write there; "
            "choose another --out"
        )
    return path


def resolve_data(text: str, start: Path | None = None) -> str:
    """A data set's name unchanged, or the resolved path of an array file."""
    is_path = "/" in text or text.startswith("~") or text.endswith(ARRAY_SUFFIXES)
    return str(resolve(text, start)) if is_path else text


def _check_links(path: Path) -> None:
    try:
        path.stat()
    except OSError as error:  # opening it later reports that it is missing or cannot be read
        if error.errno == errno.ELOOP:
            raise RunError(f"{path} is in a loop of symbolic links; correct the links or choose another") from error
