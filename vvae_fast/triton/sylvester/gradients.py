"""What the adjoints of a layer write: the gradients of a row's own parameters, or the vectors of which sums over the
rows that share a set are made, docs/math.md (61), (64)."""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from vvae_fast.triton.sylvester.calls import Call
from vvae_fast.triton.sylvester.layer import rows_at, triangle

NUM_PARTS = 5  # in turn of_r, h, p, x and dp


@triton.jit
def put_gradients(
    dcolumns,  # [sets, L, M, D], as the following of a row's own parameters
    dr,  # [sets, L, M, M]
    dr_tilde,  # [sets, L, M, M], anything where r is packed
    dd,  # [sets, L, M], or [L, rows, M] where sums are made of them, as the following
    dd_tilde,
    db,
    ds,
    parts,  # [NUM_PARTS, L, rows, M], as the following of which sums are made
    of_z,  # [L, rows, D]
    of_dd,  # [R, M], as the following
    of_dd_tilde,
    of_ds,
    of_r,  # R's gradient is of_r h^T above the diagonal
    h,
    of_a,  # R~'s gradient is of_a p^T above the diagonal; it is db, too
    p,
    x,  # Q's gradient is g x^T + z dp^T
    dp,
    g,  # [R, D]
    z,  # [R, D]
    row,
    rows,
    inside,
    layer,
    num_layers,
    unit,
    there,
    FIXED: tl.constexpr,
    BLOCK: tl.constexpr,
    OWN: tl.constexpr,
):
    """OWN: each row has its parameter set to itself."""
    M: tl.constexpr = FIXED.units
    D: tl.constexpr = FIXED.dim
    col = tl.arange(0, BLOCK.dim)  # [D]
    mask = inside[:, None] & there[None, :]  # [R, M]
    nth = layer * rows + row  # [R]
    if OWN:
        nth = row * num_layers + layer
        both = inside[:, None, None] & (there[:, None] & there[None, :])[None, :, :]  # [R, M, M]
        above = triangle(unit, there, True)[None, :, :]  # [1, M, M]
        square = (unit[:, None] * M + unit[None, :])[None, :, :]  # [1, M, M]
        tile = tl.where(above, of_r[:, :, None] * h[:, None, :], 0)
        if FIXED.packed:
            below = triangle(unit, there, False)[None, :, :]
            tile = tl.where(below, p[:, :, None] * of_a[:, None, :], tile)
        else:
            tl.store(
                (dr_tilde + nth * (M * M))[:, None, None] + square,
                tl.where(above, of_a[:, :, None] * p[:, None, :], 0),
                both,
            )
        tl.store((dr + nth * (M * M))[:, None, None] + square, tile, both)
        if FIXED.columns:
            at = (unit[:, None] * D + col[None, :])[None, :, :]  # [1, M, D]
            wanted = mask[:, :, None] & (col < D)[None, None, :]  # [R, M, D]
            of_rows = (dcolumns + nth * (M * D))[:, None, None]  # [R, 1, 1]
            tl.store(of_rows + at, x[:, :, None] * g[:, None, :] + dp[:, :, None] * z[:, None, :], wanted)
    else:
        part = num_layers.to(tl.int64) * rows * M
        parts += rows_at(nth, M, unit)  # [R, M]
        tl.store(parts, of_r, mask)
        tl.store(parts + part, h, mask)
        tl.store(parts + 2 * part, p, mask)
        if FIXED.columns:
            tl.store(parts + 3 * part, x, mask)
            tl.store(parts + 4 * part, dp, mask)
            tl.store(of_z + rows_at(nth, D, col), g, inside[:, None] & (col < D)[None, :])
    vector = rows_at(nth, M, unit)  # [R, M]
    tl.store(dd + vector, of_dd, mask)
    tl.store(dd_tilde + vector, of_dd_tilde, mask)
    tl.store(db + vector, of_a, mask)
    tl.store(ds + vector, of_ds, mask)


class Gradients(NamedTuple):
    """Of one call; tensors that it does not need are empty."""

    dcolumns: Tensor  # [P, L, M, D]
    dr: Tensor  # [P, L, M, M]
    dr_tilde: Tensor  # [P, L, M, M]
    dd: Tensor  # [P, L, M]
    dd_tilde: Tensor  # [P, L, M]
    db: Tensor  # [P, L, M]
    ds: Tensor  # [P, L, M]

    @classmethod
    def of(cls, call: Call) -> "Gradients":
        return cls(*(call.z.new_empty((0,) if t is None else t.shape) for t in call.given))


class Room(NamedTuple):
    """Where an adjoint writes what sums over rows are made of."""

    vectors: Tensor  # [4, L, R, M]: of dd, dd_tilde, db and ds
    parts: Tensor  # [NUM_PARTS, L, R, M]
    of_z: Tensor  # [L, R, D]: g of each layer

    @classmethod
    def of(cls, call: Call) -> "Room":
        vector = call.layers, call.rows, call.units
        of_z = (call.layers, call.rows, call.dim) if call.sizes.fixed.columns else (0,)
        return cls(*(call.z.new_empty(shape) for shape in ((4, *vector), (NUM_PARTS, *vector), of_z)))
