"""Reads arrays of numbers from .npy files and .npz archives, chooses one, and checks it against its header."""

from __future__ import annotations

import lzma
import math
import os
import struct
import tokenize
import warnings
import zipfile
import zlib
from contextlib import closing
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple

from vvae_fast.train.base.extras import require
from vvae_fast.train.data.idx import DataError

if TYPE_CHECKING:
    import numpy as np

SPLITS = ("train", "val", "test")
WHOLE = "x"  # in an archive with several arrays, the one to split
SUFFIX = ".npy"
# The errors that numpy and zipfile raise for a damaged file, or for one of another format.
DAMAGED = (
    *(ValueError, TypeError, LookupError, ArithmeticError, SyntaxError, RuntimeError, EOFError, OSError),
    *(struct.error, tokenize.TokenError, zipfile.BadZipFile, zlib.error, lzma.LZMAError),
)
ZIP_PREFIXES = (b"PK\x03\x04", b"PK\x05\x06")  # the second is that of an empty archive
FLOAT32_BYTES = 4


class Header(NamedTuple):
    """The entries of an array's header."""

    shape: tuple[int, ...]
    dtype: np.dtype

    def __str__(self) -> str:
        return f"{list(self.shape)} {self.dtype}"


def read_arrays(path: Path, array: str | None = None) -> dict[str, np.ndarray]:
    """The chosen arrays of a file, each of booleans, integers or real numbers [N, *shape].

    Args:
        path: a file as numpy.save or numpy.savez writes it, .npy or .npz.
        array: the name of an archive's array. By default the archive's only one, x, or train, val and test.

    Returns:
        train, val and test, or one array under its own name.

    Raises:
        DataError: the file is missing or damaged, holds no numbers or too many for the memory, or can be read in
            several ways: then the message lists the archive's arrays.
    """
    if path.is_dir():
        raise DataError(f"{path}: wanted an array file, got a folder; give a file as numpy.save writes it")
    if not path.is_file():
        raise DataError(f"{path}: wanted an array file, got no such file; check the path")
    try:
        with path.open("rb") as file:
            if _is_one_array(file):
                if array is not None:
                    raise DataError(f"{path}: wanted an archive to take '{array}' from, got one array; leave it out")
                return {path.stem: _read_array(file, os.fstat(file.fileno()).st_size, path, path.stem)}
            with zipfile.ZipFile(file) as archive:
                return {name: _read_member(archive, name, path) for name in _wanted(archive, path, array)}
    except DataError:
        raise
    except DAMAGED as error:
        raise _damaged(path, error) from error


def _is_one_array(file: IO[bytes]) -> bool:
    """Whether a file starts like one array, whatever its name. Raises ValueError if it also is not an archive."""
    magic = require("numpy").lib.format.MAGIC_PREFIX
    start = file.read(len(magic))
    file.seek(0)
    if start != magic and not start.startswith(ZIP_PREFIXES):  # zipfile would skip bytes before the archive
        raise ValueError("it starts as neither" if start else "it is empty")
    return start == magic


def _damaged(path: Path, error: Exception) -> DataError:
    if isinstance(error, OSError) and error.strerror:
        return DataError(f"{path}: wanted a readable file, got '{error.strerror}'; check it and its permissions")
    reason = " ".join((str(error) or type(error).__name__).split())
    return DataError(
        f"{path}: wanted numbers as numpy.save or numpy.savez write them, got something else or a damaged file "
        f"({reason}); save it again, without objects"
    )


def _wanted(archive: zipfile.ZipFile, path: Path, array: str | None) -> list[str]:
    """The names of the chosen arrays."""
    names = [name.removesuffix(SUFFIX) for name in archive.namelist() if name.endswith(SUFFIX)]
    if array is not None:
        if names.count(array) != 1:
            raise DataError(f"{path}: wanted the array '{array}', got {_listing(archive, names)}; check the name")
        return [array]
    if len(names) == 1:
        return names
    splits = [name for name in SPLITS if names.count(name) == 1]
    if len(splits) == len(SPLITS) and WHOLE not in names:
        return splits
    if names.count(WHOLE) == 1 and not splits:
        return [WHOLE]
    missing = [name for name in SPLITS if name not in splits]
    lacks = f", no {' and no '.join(missing)}" if splits and missing else ""
    raise DataError(
        f"{path}: wanted one array, or {WHOLE}, or {', '.join(SPLITS)}, got {_listing(archive, names)}{lacks}; "
        "rename them, or choose the one to split with --array NAME"
    )


def _listing(archive: zipfile.ZipFile, names: list[str]) -> str:
    """The content of an archive in words, for a message."""
    found = []
    for name in names:
        try:
            with archive.open(name + SUFFIX) as file:
                found.append(f"{name} {_read_header(file)}")
        except DAMAGED:
            found.append(f"{name} (unreadable)")
    return ", ".join(found) or "none"


def _read_member(archive: zipfile.ZipFile, name: str, path: Path) -> np.ndarray:
    info = archive.getinfo(name + SUFFIX)
    with closing(archive.open(info)) as file:
        return _read_array(file, info.file_size, path, name)


def _read_array(file: IO[bytes], size: int, path: Path, name: str) -> np.ndarray:
    """The one array of a file of `size` bytes."""
    np = require("numpy")
    where = f"{path}, array '{name}'"
    header = _read_header(file)
    _check_header(header, where)
    wanted, came = math.prod(header.shape) * header.dtype.itemsize, size - file.tell()
    if wanted != came:
        raise DataError(
            f"{where}: wanted {wanted} bytes after the header, as its sizes {list(header.shape)} say, got {came}; "
            "save it again"
        )
    check_memory(wanted + math.prod(header.shape) * FLOAT32_BYTES, where)
    file.seek(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as below
        return np.lib.format.read_array(file, allow_pickle=False)


def _read_header(file: IO[bytes]) -> Header:
    """Raises one of DAMAGED if the header is missing, or not one of numpy's."""
    np = require("numpy")
    version = np.lib.format.read_magic(file)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"format version {'.'.join(map(str, version))}, which is that of no array of numbers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of files written by Python 2, which can be read
        shape, _, dtype = readers[version](file)
    if not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"sizes {shape}")
    return Header(shape, dtype)


def _check_header(header: Header, where: str) -> None:
    if header.dtype.kind not in "biuf":
        kind = "objects" if header.dtype.hasobject else header.dtype
        raise DataError(f"{where}: wanted booleans, integers or real numbers, got {kind}; convert it")
    if len(header.shape) < 2:
        raise DataError(f"{where}: wanted rank 2 or more [N, *shape], got sizes {list(header.shape)}; reshape it")
    if 0 in header.shape:
        raise DataError(f"{where}: wanted at least one element, got sizes {list(header.shape)}; add rows")


def check_memory(wanted: int, where: str) -> None:
    """Raises DataError if that many bytes are more than this machine has."""
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if wanted > there:
        raise too_large(where, f"{wanted / 2**30:.1f} GiB where the machine has {there / 2**30:.1f}")


def too_large(where: str, came: str) -> DataError:
    """The error for data that the memory cannot hold."""
    return DataError(
        f"{where}: wanted data that fit into memory, got {came}; save fewer rows or fewer columns (data are held as "
        "float32, whatever they are saved as)"
    )
