"""A checksum within a checkpoint's file: the comment at the end of the zip archive that torch.save writes.

A change of any bit, also in the comment, is detected. Programs that do not know the checksum can still read the file.
"""

from __future__ import annotations

import hashlib
import os
import struct
from pathlib import Path
from typing import BinaryIO

END = b"PK\x05\x06"  # the zip format's end record: 22 bytes, of which the last two are the comment's length
END_SIZE = 22
MARK = b"vvae_fast sha256 "
SIZE = len(MARK) + 2 * hashlib.sha256().digest_size  # bytes of the comment
CHUNK = 1 << 20

SEALED, UNSEALED, DAMAGED = "sealed", "unsealed", "damaged"


def seal(path: Path) -> None:
    """Adds the checksum to a zip archive without a comment. Raises ValueError if the file is not one, and OSError."""
    with path.open("r+b") as file:
        if not _ends_in_record(file, 0):
            raise ValueError(f"{path} is no archive without a comment")
        file.seek(-2, os.SEEK_END)
        file.write(struct.pack("<H", SIZE) + MARK)
        file.write(_digest(file, file.tell()))


def check(path: Path) -> str:
    """SEALED for a file whose checksum is right, UNSEALED for a zip archive without one, else DAMAGED."""
    with path.open("rb") as file:
        if _ends_in_record(file, 0):
            return UNSEALED
        if not _ends_in_record(file, SIZE):
            return DAMAGED
        file.seek(len(MARK) - SIZE, os.SEEK_END)
        return SEALED if _digest(file, file.tell()) == file.read() else DAMAGED


def _ends_in_record(file: BinaryIO, comment: int) -> bool:
    """Whether the zip format's end record, with a comment of that size, ends the file."""
    if file.seek(0, os.SEEK_END) < END_SIZE + comment:
        return False
    file.seek(-END_SIZE - comment, os.SEEK_END)
    record = file.read(END_SIZE)
    return record.startswith(END) and record.endswith(struct.pack("<H", comment))


def _digest(file: BinaryIO, size: int) -> bytes:
    """The checksum of the first `size` bytes of a file, in hexadecimal; the file's position is then after them."""
    digest = hashlib.sha256()
    file.seek(0)
    while size > 0:
        chunk = file.read(min(CHUNK, size))
        if not chunk:
            raise OSError("the file ended while it was read")
        digest.update(chunk)
        size -= len(chunk)
    return digest.hexdigest().encode()
