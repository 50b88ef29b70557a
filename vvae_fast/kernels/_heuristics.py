"""Blocks and warps by shape."""

from typing import NamedTuple

import torch


class Direct(NamedTuple):
    block_rows: int
    block_dim: int
    num_warps: int
    num_partials: int = 1


def _block(rows, dim, shared):
    block_dim = 1 << (dim - 1).bit_length()
    per_warp = 256
    if block_dim >= per_warp:
        return Direct(1, block_dim, min(16, block_dim // per_warp))
    return Direct(per_warp // block_dim, block_dim, 1)


def direct_forward(rows: int, dim: int, shared: bool) -> Direct:
    return _block(rows, dim, shared)


def direct_backward(rows: int, dim: int, shared: bool) -> Direct:
    return _block(rows, dim, shared)._replace(num_partials=512)


class Compact(NamedTuple):
    """A launch of the compact form: block_rows rows of one set a program, block_dim columns at a time; z or its
    gradient stays in registers where they are all."""

    block_rows: int
    block_dim: int
    in_registers: bool
    num_warps: int
    precision: str  # of tl.dot


class CompactGradients(NamedTuple):
    """A launch of the compact form's sums over rows: a program takes num_blocks blocks of block_rows rows in turn, for
    block_dim columns or block_steps other steps."""

    block_rows: int
    block_dim: int
    block_steps: int
    num_blocks: int
    num_warps: int
    precision: str  # of tl.dot
    finish_block_dim: int  # columns at a time of the launch that adds the partial sums


_MOST_COMPACT_IN_REGISTERS = 64  # columns
_COMPACT_PROGRAMS = 512  # wanted: enough for the largest GPU, a few on each multiprocessor


def is_compact(rows_per_set: int, dim: int, num_steps: int) -> bool:
    """Which form a problem takes: the compact one where a set serves many rows, and wherever a row has more columns
    than the registers of a program hold.

    Its gradients are products over all K steps, docs/math.md (14), which cancel where steps outnumber dimensions.
    """
    return dim > 4096 or (rows_per_set >= 16 and dim >= 32 and num_steps <= dim)


def _precision(dtype: torch.dtype) -> str:
    """Of tl.dot: IEEE arithmetic, or next to it three products on NVIDIA's tensor cores; one alone has 11 bits."""
    return "tf32x3" if dtype == torch.float32 and torch.version.hip is None else "ieee"


def _compact(rows_per_set: int, num_sets: int, dim: int, dtype: torch.dtype) -> Compact:
    wide = dtype == torch.float64  # a number is two registers
    most_dim, most_rows = (_MOST_COMPACT_IN_REGISTERS // 2, 32) if wide else (_MOST_COMPACT_IN_REGISTERS, 64)
    in_registers = dim <= most_dim
    block_dim = 16 if wide or in_registers else 32
    block_rows = 16
    while block_rows < most_rows and -(-rows_per_set // (2 * block_rows)) * num_sets >= _COMPACT_PROGRAMS // 2:
        block_rows *= 2
    num_warps = max(1, block_rows // 16)
    return Compact(block_rows, block_dim, in_registers, num_warps, _precision(dtype))


def compact_forward(rows_per_set: int, num_sets: int, dim: int, dtype: torch.dtype) -> Compact:
    return _compact(rows_per_set, num_sets, dim, dtype)


def compact_backward(rows_per_set: int, num_sets: int, dim: int, dtype: torch.dtype) -> Compact:
    return _compact(rows_per_set, num_sets, dim, dtype)


def compact_gradients(
    rows_per_set: int, num_sets: int, dim: int, num_steps: int, dtype: torch.dtype
) -> CompactGradients:
    block_rows = 32 if rows_per_set > 16 and dtype != torch.float64 else 16
    block_dim = min(64, max(16, 1 << (dim - 1).bit_length()))
    block_steps = min(64, max(16, 1 << (num_steps - 1).bit_length()))
    tiles = -(-num_steps // 16) * (-(-dim // block_dim) + -(-num_steps // block_steps))
    row_blocks = -(-rows_per_set // block_rows)
    num_blocks = -(-row_blocks // max(1, _COMPACT_PROGRAMS // (tiles * num_sets)))
    finish_block_dim = min(256, max(16, 1 << (dim - 1).bit_length()))
    return CompactGradients(block_rows, block_dim, block_steps, num_blocks, 4, _precision(dtype), finish_block_dim)
