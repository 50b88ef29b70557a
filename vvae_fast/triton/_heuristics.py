"""How each problem is launched: blocks, warps and stages from `_table.py`, by shape and dtype alone, whatever GPU
there is."""

from typing import NamedTuple

import torch

from vvae_fast.triton import _table, launch

# Programs that share out the rows of shared parameters, and numbers in the partial sums that they leave.
_MOST_PARTIALS = 1024
_MOST_PARTIAL_NUMBERS = 2**22
_COMPACT_PROGRAMS = 512  # wanted of the compact form's sums over rows: a few on each multiprocessor of a large GPU
_PRECISION = "tf32x3"  # of float32's tl.dot: next to IEEE arithmetic, on NVIDIA's tensor cores; tf32 alone has 11 bits
_COMPACT_WORK = 2**16  # numbers of z in a parameter set from which on the compact form's more launches pay


class Direct(NamedTuple):
    """A launch of the direct form: a program has block_rows rows of block_dim columns, z in registers."""

    block_rows: int
    block_dim: int
    num_warps: int
    num_stages: int  # steps whose parameters are on their way


def most_direct_dim(dtype: torch.dtype) -> int:
    """The most columns that the registers of a program of the direct form hold."""
    return 1024 if dtype == torch.float64 else 2048


def is_compact(rows_per_set: int, dim: int, num_steps: int, dtype: torch.dtype) -> bool:
    """Which form a problem takes: the compact one where a set serves many rows, and wherever a row has more columns
    than the direct form's registers hold.

    Its gradients are products over all K steps, docs/math.md (14), which cancel where steps outnumber dimensions.
    Between its products tensors go through memory, which a barrier must order.
    """
    many = rows_per_set >= 64 and rows_per_set * dim >= _COMPACT_WORK and dim >= 32 and num_steps <= dim
    return launch.BARRIER_ORDERS_MEMORY and (many or dim > most_direct_dim(dtype))


def direct(pass_: str, rows: int, dim: int, shared: bool, dtype: torch.dtype) -> Direct:
    """For pass_ "forward" or "backward" and the dtype of computation."""
    block_dim = 1 << (dim - 1).bit_length()
    few, many = _table.DIRECT[pass_, "shared" if shared else "amortized", block_dim]
    block_rows, num_warps, num_stages = few if rows <= _table.FEW_ROWS else many
    if dtype == torch.float64:  # a number is two registers
        block_rows, num_warps = (block_rows // 2, num_warps) if block_rows > 1 else (1, 2 * num_warps)
    return Direct(block_rows, block_dim, num_warps, num_stages)


def num_partials(rows: int, size: int, config: Direct) -> int:
    """Programs of the backward with shared parameters of `size` numbers."""
    most = max(64, min(_MOST_PARTIALS, _MOST_PARTIAL_NUMBERS // size))
    return min(-(-rows // config.block_rows), most)


class Compact(NamedTuple):
    """A launch of the compact form: block_rows rows of one set a program, block_dim columns at a time; z or its
    gradient stays in registers between chunks, or in memory."""

    block_rows: int
    block_dim: int
    num_warps: int
    in_registers: bool
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


def compact(pass_: str, rows: int, dim: int, shared: bool, dtype: torch.dtype) -> Compact:
    """For pass_ "forward" or "backward" and the dtype of computation."""
    if dtype == torch.float64:  # a number is two registers
        return Compact(16, 16, 1 if pass_ == "forward" else 4, False, "ieee")
    in_registers = pass_ == "forward" and shared and dim <= 64  # with rows apart, addresses take too many
    few, many = _table.COMPACT[pass_, 64 if in_registers else 512]
    return Compact(*(few if rows <= _table.FEW_COMPACT_ROWS else many), in_registers, _PRECISION)


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
    return CompactGradients(
        block_rows,
        block_dim,
        block_steps,
        num_blocks,
        4,
        "ieee" if dtype == torch.float64 else _PRECISION,
        finish_block_dim,
    )
