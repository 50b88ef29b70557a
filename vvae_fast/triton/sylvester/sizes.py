"""What the kernels of Sylvester flows are compiled for, and how many rows and warps a program has: by M, D and dtype
alone, so that a row's bits depend on no batch size. Reasoned from registers, not measured on a GPU."""

from typing import NamedTuple

import torch

_WARP = 32  # threads
_MOST_WARPS = 16
_MOST_ROWS = 32


class Fixed(NamedTuple):
    """The sizes and the kind of a flow."""

    dim: int
    units: int
    columns: bool  # Q's columns are given; without, it is the triangular kind
    packed: bool  # R~ lies transposed below the diagonal of r
    shared: bool  # one parameter set for all rows


class Block(NamedTuple):
    """What a program has, in powers of two."""

    rows: int
    units: int
    dim: int


def padded(size: int) -> int:
    """The least power of two that holds it."""
    return 1 << (size - 1).bit_length()


def _of_thread(dtype: torch.dtype) -> int:
    """Numbers of a matrix that a thread holds; several matrices are there at once."""
    return 8 if dtype == torch.float64 else 16


def most_numbers(dtype: torch.dtype) -> int:
    """Of a row's matrix, M x D in powers of two: what the registers of a program hold. Kernels of flows with so many
    spill some."""
    return _MOST_WARPS * _WARP * _of_thread(dtype)


def numbers(dim: int, units: int) -> int:
    """Of a row's largest matrix: M is at most D."""
    return padded(units) * padded(dim)


def block(dim: int, units: int, dtype: torch.dtype) -> tuple[Block, int]:
    """And the warps of a program."""
    of_warp, of_row = _WARP * _of_thread(dtype), numbers(dim, units)
    rows = min(_MOST_ROWS, max(1, of_warp // (2 * of_row)))  # half as many numbers: vectors of many rows take registers
    return Block(rows, padded(units), padded(dim)), max(1, of_row // of_warp)
