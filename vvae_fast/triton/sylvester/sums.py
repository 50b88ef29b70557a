"""The gradients of parameters that several rows share, docs/math.md (61), (64): products over the rows of what an
adjoint wrote. A program adds the rows of a slice in a fixed order: no atomics, the same bits on every run."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vvae_fast.triton import launch
from vvae_fast.triton.blocks import dot
from vvae_fast.triton.launch import Launch, ceil_div, planned
from vvae_fast.triton.sylvester.calls import Call, Sizes
from vvae_fast.triton.sylvester.gradients import Gradients, Room
from vvae_fast.triton.sylvester.sizes import padded

_PROGRAMS = 512  # wanted of a launch: a few on each multiprocessor of a large GPU
_LEAST_ROWS = 256  # of a slice


@triton.jit
def slice_of_program(num_slices, num_sets, num_layers, rows_per_set, BLOCK_ROWS: tl.constexpr):
    """A program's parameter set and layer, its blocks of the set's rows, from the first to the one behind the last, and
    where its sums are among those of all slices, sets and layers."""
    program = tl.program_id(0).to(tl.int64)
    nth, slice_ = program // num_slices, program % num_slices
    owner, layer, blocks = nth // num_layers, nth % num_layers, tl.cdiv(rows_per_set, BLOCK_ROWS)
    place = (slice_ * num_sets + owner) * num_layers + layer
    return owner, layer, slice_ * blocks // num_slices, (slice_ + 1) * blocks // num_slices, place


@triton.jit(do_not_specialize=["rows", "rows_per_set", "num_layers", "num_sets", "num_slices"])
def sylvester_products_kernel(
    x,  # [L, rows, HEIGHT]
    y,  # [L, rows, WIDTH]
    u,  # [L, rows, HEIGHT]
    v,  # [L, rows, WIDTH]
    sums,  # [slices, sets, L, HEIGHT, WIDTH]
    rows,
    rows_per_set,
    num_layers,
    num_sets,
    num_slices,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_HEIGHT: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds x y^T + u v^T over the rows of a slice where KIND is "whole". Where it is "upper", x y^T above the diagonal
    and zeros elsewhere; where it is "packed", also u v^T below the diagonal."""
    dtype: tl.constexpr = x.dtype.element_ty
    owner, layer, first, end, place = slice_of_program(num_slices, num_sets, num_layers, rows_per_set, BLOCK_ROWS)
    tiles: tl.constexpr = (WIDTH + BLOCK_WIDTH - 1) // BLOCK_WIDTH
    i = tl.program_id(1) // tiles * BLOCK_HEIGHT + tl.arange(0, BLOCK_HEIGHT)  # [BLOCK_HEIGHT]
    j = tl.program_id(1) % tiles * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)  # [BLOCK_WIDTH]
    above = tl.zeros([BLOCK_HEIGHT, BLOCK_WIDTH], dtype)
    below = tl.zeros([BLOCK_HEIGHT, BLOCK_WIDTH], dtype)
    for block in tl.range(first, end, num_stages=2):
        of_set = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # [BLOCK_ROWS]
        at = layer * rows + of_set * num_sets + owner  # [BLOCK_ROWS]
        inside = of_set < rows_per_set
        left = at[None, :] * HEIGHT + i[:, None]  # [BLOCK_HEIGHT, BLOCK_ROWS]
        right = at[:, None] * WIDTH + j[None, :]  # [BLOCK_ROWS, BLOCK_WIDTH]
        of_left = (i < HEIGHT)[:, None] & inside[None, :]
        of_right = inside[:, None] & (j < WIDTH)[None, :]
        above = dot(tl.load(x + left, of_left, 0), tl.load(y + right, of_right, 0), above, PRECISION)
        if KIND == "whole":
            above = dot(tl.load(u + left, of_left, 0), tl.load(v + right, of_right, 0), above, PRECISION)
        if KIND == "packed":
            below = dot(tl.load(u + left, of_left, 0), tl.load(v + right, of_right, 0), below, PRECISION)
    if KIND != "whole":
        above = tl.where(i[:, None] < j[None, :], above, tl.where(i[:, None] > j[None, :], below, 0))
    sums += place * (HEIGHT * WIDTH)
    tl.store(sums + i[:, None] * WIDTH + j[None, :], above, (i < HEIGHT)[:, None] & (j < WIDTH)[None, :])


@triton.jit(do_not_specialize=["rows", "rows_per_set", "num_layers", "num_sets", "num_slices"])
def sylvester_sums_kernel(
    x,  # [L, rows, M]
    sums,  # [slices, sets, L, M]
    rows,
    rows_per_set,
    num_layers,
    num_sets,
    num_slices,
    M: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """The sums of vectors over the rows of a slice."""
    owner, layer, first, end, place = slice_of_program(num_slices, num_sets, num_layers, rows_per_set, BLOCK_ROWS)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    total = tl.zeros([BLOCK_M], x.dtype.element_ty)
    for block in tl.range(first, end):
        of_set = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # [BLOCK_ROWS]
        at = layer * rows + of_set * num_sets + owner  # [BLOCK_ROWS]
        mask = (of_set < rows_per_set)[:, None] & (m < M)[None, :]
        total += tl.sum(tl.load(x + at[:, None] * M + m[None, :], mask, 0), 0)
    sums += place * M
    tl.store(sums + m, total, m < M)


class _Plan(NamedTuple):
    columns: Launch
    r: Launch
    r_tilde: Launch
    vectors: Launch
    slices: int


@planned
def _plan(sizes: Sizes, device: torch.device) -> _Plan:
    fixed, of_layers = sizes.fixed, sizes.sets * sizes.layers
    double = sizes.dtype == torch.float64
    block_rows = 16 if double else 32
    block_units = min(32, max(16, padded(fixed.units)))
    block_dim = min(32 if double else 64, max(16, padded(fixed.dim)))
    precision = "ieee" if double or launch.AMD else "tf32x3"  # AMD has none
    slices = min(ceil_div(sizes.rows_per_set, _LEAST_ROWS), ceil_div(_PROGRAMS, of_layers))
    counts = sizes.rows, sizes.rows_per_set, sizes.layers, sizes.sets, slices

    def products(kind: str, length: int, block_length: int) -> Launch:
        tiles = ceil_div(fixed.units, block_units) * ceil_div(length, block_length)
        return Launch(
            sylvester_products_kernel,
            (of_layers * slices, tiles),
            *(*counts, fixed.units, length, kind, block_rows, block_units, block_length, precision),
            num_warps=4,
            capped=True,
        )

    square = min(block_dim, block_units)
    vectors = Launch(
        sylvester_sums_kernel,
        (of_layers * slices, ceil_div(fixed.units, block_units)),
        *(*counts, fixed.units, 32, block_units),
        num_warps=2,
    )
    return _Plan(
        products("whole", fixed.dim, block_dim),
        products("packed" if fixed.packed else "upper", fixed.units, square),
        products("upper", fixed.units, square),
        vectors,
        slices,
    )


def launch_sums(call: Call, room: Room, passed: Tensor, to: Gradients) -> None:
    """Adds what an adjoint wrote over the rows of each set; passed [L, R, D] is z of each layer, as in Q's gradient."""
    plan = _plan(call.sizes, call.z.device)
    of_a, (of_r, h, p, x, dp) = room.vectors[2], room.parts

    def put(add: Launch, out: Tensor, *of_rows: Tensor) -> None:
        sums = out.new_empty((plan.slices, *out.shape)) if plan.slices > 1 else out
        add(*of_rows, sums)
        if plan.slices > 1:
            torch.sum(sums, 0, out=out)

    if call.sizes.fixed.columns:
        put(plan.columns, to.dcolumns, x, room.of_z, dp, passed)
    put(plan.r, to.dr, of_r, h, p, of_a)
    if not call.sizes.fixed.packed:
        put(plan.r_tilde, to.dr_tilde, of_a, p, of_a, p)
    for out, of_rows in zip((to.dd, to.dd_tilde, to.db, to.ds), room.vectors, strict=True):
        put(plan.vectors, out, of_rows)
