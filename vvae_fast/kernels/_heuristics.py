"""Blocks and warps by shape."""

from typing import NamedTuple


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
