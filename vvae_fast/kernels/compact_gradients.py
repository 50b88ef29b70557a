"""The parameters' gradients in the compact form, docs/math.md (14), (15) over all K steps at once: partial sums over
slices of the rows, and a launch that adds them and goes through the constraint (6)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vvae_fast import shapes
from vvae_fast.kernels import _heuristics
from vvae_fast.kernels.blocks import CHUNK, dot, rows_of
from vvae_fast.kernels.launch import (
    Launch,
    Layout,
    ceil_div,
    launch,
    layout,
    planned,
    set_strides,
    sizes,
    unit_columns,
)
from vvae_fast.kernels.math import AnyFlow, activate, adjoint_parts, constrain, constrain_backward, unit
from vvae_fast.spec import FlowSpec as Formulas


@triton.jit(do_not_specialize=["rows", "rows_per_set", "num_steps", "num_sets", "num_slices", "num_blocks"])
def compact_gradients_kernel(
    grad_z,  # [rows, D]
    grad_log_det,  # [rows]
    z,  # [rows, D]
    a,  # [K, rows]
    delta,  # [K, rows]
    constraint,  # [sets, 3, K]: c and s, the third is not used here
    partials,  # [sets, slices, K (2 D + K + 2)]: v and dw [K, D], S [K, K], db and gamma [K] behind one another;
    # gamma times unit(s)
    rows,
    rows_per_set,
    num_steps,
    num_sets,
    num_slices,
    num_blocks,  # of rows, in a slice
    grad_z_row: tl.constexpr,
    grad_z_col: tl.constexpr,
    grad_log_det_row: tl.constexpr,
    z_row: tl.constexpr,
    z_col: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_STEPS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    SHARED: tl.constexpr,
    CONSTRAINT: tl.constexpr,
    F: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One slice, the CHUNK steps of one chunk, and BLOCK_D columns of v and dw or, behind these, BLOCK_STEPS of S."""
    dtype: tl.constexpr = a.dtype.element_ty
    COLUMN_TILES: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    program = tl.program_id(0).to(tl.int64)
    owner, first_block = program // num_slices, program % num_slices * num_blocks
    size = num_steps.to(tl.int64)
    partials += program * (size * (2 * D + num_steps + 2))
    step = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK).to(tl.int64)  # [CHUNK]
    steps = step < num_steps  # [CHUNK]
    a += step[:, None] * rows  # [CHUNK, 1]
    tile = tl.program_id(2)
    if tile < COLUMN_TILES:
        col = tile * BLOCK_D + tl.arange(0, BLOCK_D)  # [BLOCK_D]
        constraint += owner * 3 * num_steps
        c = tl.load(constraint + step, steps, 0)  # [CHUNK]
        s = tl.load(constraint + num_steps + step, steps, 1)  # [CHUNK]
        v, dw = tl.zeros([CHUNK, BLOCK_D], dtype), tl.zeros([CHUNK, BLOCK_D], dtype)
        db, gamma = tl.zeros([CHUNK], dtype), tl.zeros([CHUNK], dtype)
        for block in tl.range(first_block, first_block + num_blocks, num_stages=2):
            row = rows_of(owner, block, num_sets, BLOCK_ROWS, SHARED)  # [R]
            inside = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS) < rows_per_set  # [R]
            saved = steps[:, None] & inside[None, :]  # [CHUNK, R]
            mask = inside[:, None] & (col < D)[None, :]  # [R, BLOCK_D]
            h, h_prime = activate(tl.load(a + row[None, :], saved, F.padding_preactivation), F)  # [CHUNK, R]
            d = tl.load(delta + step[:, None] * rows + row[None, :], saved, 0)  # [CHUNK, R]
            g = tl.load(grad_z + row[:, None] * grad_z_row + col[None, :] * grad_z_col, mask, 0).to(dtype)
            z_0 = tl.load(z + row[:, None] * z_row + col[None, :] * z_col, mask, 0).to(dtype)  # [R, BLOCK_D]
            v = dot(h, g, v, PRECISION)
            dw = dot(d, z_0, dw, PRECISION)
            if tile == 0:
                lambda_ = tl.load(grad_log_det + row * grad_log_det_row, inside, 0)  # [R]
                db += tl.sum(d, 1)
                of_step = unit(s, CONSTRAINT)[:, None]
                _, _, of_c = adjoint_parts(lambda_[None, :], h, h_prime, c[:, None], s[:, None], of_step, F)
                gamma += tl.sum(of_c, 1)
        at = step[:, None] * D + col[None, :]  # [CHUNK, BLOCK_D]
        params = steps[:, None] & (col < D)[None, :]  # [CHUNK, BLOCK_D]
        tl.store(partials + at, v, params)
        tl.store(partials + size * D + at, dw, params)
        if tile == 0:
            partials += size * (2 * D + num_steps)
            tl.store(partials + step, db, steps)
            tl.store(partials + size + step, gamma, steps)
    elif (tile - COLUMN_TILES + 1) * BLOCK_STEPS > tl.program_id(1) * CHUNK:  # S is needed above its diagonal only
        later = (tile - COLUMN_TILES) * BLOCK_STEPS + tl.arange(0, BLOCK_STEPS).to(tl.int64)  # [BLOCK_STEPS]
        triangle = tl.zeros([CHUNK, BLOCK_STEPS], dtype)
        for block in tl.range(first_block, first_block + num_blocks, num_stages=2):
            row = rows_of(owner, block, num_sets, BLOCK_ROWS, SHARED)  # [R]
            inside = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS) < rows_per_set  # [R]
            saved = steps[:, None] & inside[None, :]  # [CHUNK, R]
            h, _ = activate(tl.load(a + row[None, :], saved, F.padding_preactivation), F)  # [CHUNK, R]
            mask = (later < num_steps)[:, None] & inside[None, :]  # [BLOCK_STEPS, R]
            d = tl.load(delta + later[:, None] * rows + row[None, :], mask, 0)  # [BLOCK_STEPS, R]
            triangle = dot(h, tl.trans(d), triangle, PRECISION)
        mask = steps[:, None] & (later < num_steps)[None, :]  # [CHUNK, BLOCK_STEPS]
        tl.store(partials + 2 * size * D + step[:, None] * size + later[None, :], triangle, mask)


@triton.jit
def sum_slices(partials, size, num_slices, BLOCK: tl.constexpr, BLOCK_SLICES: tl.constexpr, at, mask):
    """[BLOCK]: partials[:, at] added up in a fixed order."""
    total = tl.zeros([BLOCK], partials.dtype.element_ty)
    for first in tl.range(0, num_slices, BLOCK_SLICES):
        nth = first + tl.arange(0, BLOCK_SLICES)  # [BLOCK_SLICES]
        wanted = (nth < num_slices)[:, None] & mask[None, :]  # [BLOCK_SLICES, BLOCK]
        total += tl.sum(tl.load(partials + nth[:, None] * size + at[None, :], wanted, 0), 0)
    return total


@triton.jit(do_not_specialize=["num_steps", "num_slices"])
def compact_finish_kernel(
    u,  # [sets, K, D]
    w,  # [sets, K, D]
    constraint,  # [sets, 3, K]: the third is of_w, where u_hat = u + of_w w
    partials,  # [sets, slices, K (2 D + K + 2)]; v comes to lie in the first slice
    du,  # [sets, K, D], a set's steps contiguous
    dw,  # [sets, K, D], a set's steps contiguous
    db,  # [sets, K]
    num_steps,
    num_slices,
    u_set: tl.constexpr,
    u_step: tl.constexpr,
    u_col: tl.constexpr,
    w_set: tl.constexpr,
    w_step: tl.constexpr,
    w_col: tl.constexpr,
    du_set: tl.constexpr,
    dw_set: tl.constexpr,
    db_set: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SLICES: tl.constexpr,
    CONSTRAINT: tl.constexpr,
):
    """One step of one set a program: adds the slices and the products with S of (14), and takes them through (6)."""
    dtype: tl.constexpr = partials.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    owner, k = program // num_steps, program % num_steps
    size = num_steps * (2 * D + num_steps.to(tl.int64) + 2)
    partials += owner * num_slices * size
    triangle = partials + 2 * num_steps.to(tl.int64) * D  # S [K, K]
    sums = triangle + num_steps.to(tl.int64) * num_steps  # db [K], gamma [K]
    of_w = constraint + (owner * 3 + 2) * num_steps  # [K]
    u += owner * u_set
    w += owner * w_set
    col = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    one = tl.arange(0, 1)  # [1]

    alpha, n, q = tl.zeros([1], dtype), tl.zeros([1], dtype), tl.zeros([1], dtype)
    for start in tl.range(0, D, BLOCK_D, num_stages=1):
        at = start + col  # [BLOCK_D]
        mask = at < D
        u_k = tl.load(u + k * u_step + at * u_col, mask, 0).to(dtype)  # [BLOCK_D]
        w_k = tl.load(w + k * w_step + at * w_col, mask, 0).to(dtype)  # [BLOCK_D]
        v = sum_slices(partials, size, num_slices, BLOCK_D, BLOCK_SLICES, k * D + at, mask)  # [BLOCK_D]
        for first in tl.range(k // CHUNK * CHUNK, num_steps, CHUNK, num_stages=1):
            j = first + tl.arange(0, CHUNK)  # [CHUNK]
            later = (j > k) & (j < num_steps)
            of_j = sum_slices(triangle, size, num_slices, CHUNK, BLOCK_SLICES, k * num_steps + j, later)  # [CHUNK]
            w_j = tl.load(w + j[:, None] * w_step + at[None, :] * w_col, later[:, None] & mask[None, :], 0).to(dtype)
            v += tl.sum(of_j[:, None] * w_j, 0)
        alpha += tl.sum(w_k * u_k, 0)
        n += tl.sum(w_k * w_k, 0)
        q += tl.sum(v * w_k, 0)
        tl.debug_barrier()  # no thread adds the first slice any more, which v replaces
        tl.store(partials + k * D + at, v, mask)
    gamma = sum_slices(sums + num_steps, size, num_slices, 1, BLOCK_SLICES, k + one, one < 1)  # [1]
    _, _, _, rho, inv_n, rising, falling = constrain(alpha, n, CONSTRAINT)  # [1]
    dalpha, of_v, of_w_n = constrain_backward(rho, inv_n, rising, falling, q, gamma)  # [1]
    tl.debug_barrier()  # the slices are added by other threads than those that read v

    for start in tl.range(0, D, BLOCK_D, num_stages=1):
        at = start + col  # [BLOCK_D]
        mask = at < D
        u_k = tl.load(u + k * u_step + at * u_col, mask, 0).to(dtype)  # [BLOCK_D]
        w_k = tl.load(w + k * w_step + at * w_col, mask, 0).to(dtype)  # [BLOCK_D]
        v = tl.load(partials + k * D + at, mask, 0)  # [BLOCK_D]
        dw_at = (num_steps + k) * D + at
        dw_k = sum_slices(partials, size, num_slices, BLOCK_D, BLOCK_SLICES, dw_at, mask)  # [BLOCK_D]
        for first in tl.range(0, k, CHUNK, num_stages=1):
            j = first + tl.arange(0, CHUNK).to(tl.int64)  # [CHUNK]
            earlier = j < k
            of_j = sum_slices(triangle, size, num_slices, CHUNK, BLOCK_SLICES, j * num_steps + k, earlier)  # [CHUNK]
            params = earlier[:, None] & mask[None, :]  # [CHUNK, BLOCK_D]
            u_hat = tl.load(u + j[:, None] * u_step + at[None, :] * u_col, params, 0).to(dtype)  # u as yet
            w_j = tl.load(w + j[:, None] * w_step + at[None, :] * w_col, params, 0).to(dtype)
            u_hat += tl.load(of_w + j, earlier, 0)[:, None] * w_j
            dw_k += tl.sum(of_j[:, None] * u_hat, 0)
        dw_k += of_v * v + dalpha * u_k + of_w_n * (inv_n * w_k)
        tl.store(du + owner * du_set + k * D + at, v + dalpha * w_k, mask)
        tl.store(dw + owner * dw_set + k * D + at, dw_k, mask)
    db_k = sum_slices(sums, size, num_slices, 1, BLOCK_SLICES, k + one, one < 1)  # [1]
    tl.store(db + owner * db_set + k + one, db_k)


@planned
def _plan(
    grad_z: Layout,
    grad_log_det: Layout,
    z: Layout,
    u: Layout,
    w: Layout,
    du: Layout,
    dw: Layout,
    db: Layout,
    dtype: torch.dtype,
    device: torch.device,
    formulas: Formulas,
) -> tuple[tuple[int, int], Launch, Launch]:
    """The partial sums, and the launches that leave and add them."""
    _, (grad_z, z, u, w) = unit_columns(grad_z, z, u, w)  # copied before
    rows, dim, num_steps, num_sets = sizes(z, u)
    rows_per_set = rows // num_sets
    config = _heuristics.compact_gradients(rows_per_set, num_sets, dim, num_steps, shapes.compute_dtype(dtype))
    chunks = ceil_div(num_steps, CHUNK.value)
    tiles = ceil_div(dim, config.block_dim) + ceil_div(num_steps, config.block_steps)
    num_slices = ceil_div(ceil_div(rows_per_set, config.block_rows), config.num_blocks)
    summing = Launch(
        compact_gradients_kernel,
        (num_sets * num_slices, chunks, tiles),
        *(rows, rows_per_set, num_steps, num_sets, num_slices, config.num_blocks),
        *(*grad_z[1], *grad_log_det[1], *z[1]),
        *(dim, config.block_dim, config.block_steps, config.block_rows, num_sets == 1),
        *(formulas.constraint, AnyFlow.of(formulas), config.precision),
        num_warps=config.num_warps,
        capped=True,
    )
    adding = Launch(
        compact_finish_kernel,
        (num_sets * num_steps,),
        *(num_steps, num_slices, *set_strides(u, 3), *set_strides(w, 3)),
        *(set_strides(t, n)[0] for t, n in ((du, 3), (dw, 3), (db, 2))),
        *(dim, config.finish_block_dim, 8, formulas.constraint),
        num_warps=4,
        capped=True,
    )
    return (num_sets * num_slices, num_steps * (2 * dim + num_steps + 2)), summing, adding


def launch_compact_gradients(
    grad_z: Tensor,
    grad_log_det: Tensor,
    z: Tensor,
    u: Tensor,
    w: Tensor,
    a: Tensor,
    delta: Tensor,
    constraint: Tensor,
    du: Tensor,
    dw: Tensor,
    db: Tensor,
    formulas: Formulas,
) -> None:
    """Fills du, dw and db, in which the steps of a set are contiguous."""
    partials, summing, adding = _plan(
        *map(layout, (grad_z, grad_log_det, z, u, w, du, dw, db)), z.dtype, z.device, formulas
    )
    partials = a.new_empty(partials)
    launch(summing, grad_z, grad_log_det, z, a, delta, constraint, partials)
    launch(adding, u, w, constraint, partials, du, dw, db)
