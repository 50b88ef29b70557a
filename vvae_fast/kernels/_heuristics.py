"""How each problem is launched: blocks, warps and stages from `_table.py`, by shape and dtype alone, so that a problem
gives the same bits on every GPU."""

from typing import NamedTuple

import torch

from vvae_fast.kernels import _table

# Programs that share out the rows of shared parameters, and numbers in the partial sums that they leave.
_MOST_PARTIALS = 1024
_MOST_PARTIAL_NUMBERS = 2**22


class Direct(NamedTuple):
    """A launch of the direct form: a program has block_rows rows of block_dim columns, z in registers."""

    block_rows: int
    block_dim: int
    num_warps: int
    num_stages: int  # steps whose parameters are on their way


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
