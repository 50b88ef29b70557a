"""The IDX format of the original MNIST files, gzip-compressed."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor

UNSIGNED_BYTE = 0x08  # the only element type that MNIST uses


class DataError(ValueError):
    """Data that cannot be used. The message is one line: the file, what was expected, what was found, what to do."""


def read_idx(path: Path, rank: int) -> Tensor:
    """Read a gzip-compressed IDX file of unsigned bytes.

    The format: a magic number 0x0000TTRR (element type, rank), ``rank`` sizes, the payload; all big-endian.

    Args:
        path: the ``.gz`` file.
        rank: the rank that the file must have, 3 for images and 1 for labels.

    Returns:
        uint8 tensor with the sizes that the header gives.

    Raises:
        DataError: the file is missing, unreadable, not gzip or cut short, or its header has other values or
            disagrees with the payload.
    """
    content = _decompress(path)
    header_size = 4 + 4 * rank
    wanted = UNSIGNED_BYTE << 8 | rank
    magic = int.from_bytes(content[:4], "big")
    if len(content) < 4 or magic != wanted:
        came = f"0x{magic:08x}" if len(content) >= 4 else f"{len(content)} bytes"
        raise DataError(
            f"{path}: wanted the IDX magic number 0x{wanted:08x} (unsigned bytes, rank {rank}), got {came}; "
            "check that this is the original file under its own name"
        )
    if len(content) < header_size:
        raise DataError(
            f"{path}: wanted an IDX header of {header_size} bytes, got {len(content)}; fetch the file again"
        )
    sizes = struct.unpack(f">{rank}I", content[4:header_size])
    payload = content[header_size:]
    if len(payload) != math.prod(sizes):
        raise DataError(
            f"{path}: wanted {math.prod(sizes)} bytes after the header, as its sizes {list(sizes)} say, "
            f"got {len(payload)}; fetch the file again"
        )
    if not payload:
        raise DataError(f"{path}: wanted at least one element, got sizes {list(sizes)}; fetch the file again")
    return torch.frombuffer(payload, dtype=torch.uint8).view(sizes)


def _decompress(path: Path) -> bytearray:
    """The whole decompressed content, writable because torch.frombuffer needs that."""
    try:
        with gzip.open(path, "rb") as file:
            return bytearray(file.read())
    except FileNotFoundError as error:
        raise DataError(f"{path}: wanted a gzip file, got no such file; check the folder") from error
    except gzip.BadGzipFile as error:
        raise DataError(f"{path}: wanted a gzip file, got something else ({error}); fetch the file again") from error
    except (EOFError, zlib.error) as error:
        raise DataError(f"{path}: wanted a whole gzip file, got a cut or damaged one; fetch the file again") from error
    except OSError as error:
        raise DataError(f"{path}: wanted a readable file, got '{error.strerror}'; check its permissions") from error
