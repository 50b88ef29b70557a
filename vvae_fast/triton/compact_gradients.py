"""The parameters' gradients in the compact form, docs/math.md (14), (15) over all K steps at once: partial sums over
slices of the rows, and a launch that adds them and goes through the constraint (6)."""

from typing import NamedTuple

import triton
import triton.language as tl

from vvae_fast.spec import FlowSpec
from vvae_fast.triton import _heuristics
from vvae_fast.triton.blocks import CHUNK, dot, elements, load_params, load_w_and_u_hat, rows_of, sum_partials
from vvae_fast.triton.launch import Call, Launch, Tensors, ceil_div
from vvae_fast.triton.math import AnyFlow, activate, adjoint_parts, constrain, constrain_backward, unit


@triton.jit(do_not_specialize=["rows", "rows_per_set", "num_steps", "num_sets", "num_slices", "num_blocks"])
def compact_gradients_kernel(
    grad_z,  # [rows, D]
    grad_log_det,  # [rows]
    z,  # [rows, D]
    a,  # [K, rows]
    delta,  # [K, rows]
    constraint,  # [sets, 3, K]: c and s, the third is not used here
    partials,  # [sets, slices, K (2 D + K + 2)]: v and dw [K, D], S [K, K], db and gamma [K], concatenated; gamma is
    # dL/dc times unit(s)
    rows,
    rows_per_set,
    num_steps,
    num_sets,
    num_slices,
    num_blocks,  # of rows, in a slice
    FIXED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_STEPS: tl.constexpr,
    CONSTRAINT: tl.constexpr,
    F: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One slice and the CHUNK steps of one chunk a program: BLOCK_D columns of v and dw, or in later programs
    BLOCK_STEPS columns of S."""
    D: tl.constexpr = FIXED.dim
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
            row, inside = rows_of(owner, block, num_sets, rows_per_set, BLOCK_ROWS, FIXED.shared)  # [R]
            saved = steps[:, None] & inside[None, :]  # [CHUNK, R]
            mask = inside[:, None] & (col < D)[None, :]  # [R, BLOCK_D]
            h, h_prime = activate(tl.load(a + row[None, :], saved, F.padding_preactivation), F)  # [CHUNK, R]
            d = tl.load(delta + step[:, None] * rows + row[None, :], saved, 0)  # [CHUNK, R]
            g = tl.load(elements(grad_z, row, col, FIXED.grad_z), mask, 0).to(dtype)
            z_0 = tl.load(elements(z, row, col, FIXED.z), mask, 0).to(dtype)  # [R, BLOCK_D]
            v = dot(h, g, v, PRECISION)
            dw = dot(d, z_0, dw, PRECISION)
            if tile == 0:
                lambda_ = tl.load(grad_log_det + row * FIXED.grad_log_det, inside, 0)  # [R]
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
            row, inside = rows_of(owner, block, num_sets, rows_per_set, BLOCK_ROWS, FIXED.shared)  # [R]
            saved = steps[:, None] & inside[None, :]  # [CHUNK, R]
            h, _ = activate(tl.load(a + row[None, :], saved, F.padding_preactivation), F)  # [CHUNK, R]
            mask = (later < num_steps)[:, None] & inside[None, :]  # [BLOCK_STEPS, R]
            d = tl.load(delta + later[:, None] * rows + row[None, :], mask, 0)  # [BLOCK_STEPS, R]
            triangle = dot(h, tl.trans(d), triangle, PRECISION)
        mask = steps[:, None] & (later < num_steps)[None, :]  # [CHUNK, BLOCK_STEPS]
        tl.store(partials + 2 * size * D + step[:, None] * size + later[None, :], triangle, mask)


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
    FIXED: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SLICES: tl.constexpr,
    CONSTRAINT: tl.constexpr,
):
    """One step of one set a program: adds the slices and the products with S of (14), and takes them through (6)."""
    D: tl.constexpr = FIXED.dim
    dtype: tl.constexpr = partials.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    owner, k = program // num_steps, program % num_steps
    size = num_steps * (2 * D + num_steps.to(tl.int64) + 2)
    partials += owner * num_slices * size
    triangle = partials + 2 * num_steps.to(tl.int64) * D  # S [K, K]
    sums = triangle + num_steps.to(tl.int64) * num_steps  # db [K], gamma [K]
    of_w = constraint + (owner * 3 + 2) * num_steps  # [K]
    u += owner * FIXED.u.set
    w += owner * FIXED.w.set
    col = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    one = tl.arange(0, 1)  # [1]

    alpha, n, q = tl.zeros([1], dtype), tl.zeros([1], dtype), tl.zeros([1], dtype)
    for start in tl.range(0, D, BLOCK_D, num_stages=1):
        at = start + col  # [BLOCK_D]
        mask = at < D
        u_k = tl.load(u + k * FIXED.u.step + at * FIXED.u.col, mask, 0).to(dtype)  # [BLOCK_D]
        w_k = tl.load(w + k * FIXED.w.step + at * FIXED.w.col, mask, 0).to(dtype)  # [BLOCK_D]
        v = sum_partials(partials, size, num_slices, k * D + at, mask, BLOCK_SLICES)  # [BLOCK_D]
        for first in tl.range(k // CHUNK * CHUNK, num_steps, CHUNK, num_stages=1):
            j = first + tl.arange(0, CHUNK)  # [CHUNK]
            later = (j > k) & (j < num_steps)
            of_j = sum_partials(triangle, size, num_slices, k * num_steps + j, later, BLOCK_SLICES)  # [CHUNK]
            w_j = load_params(w + j[:, None] * FIXED.w.step, at, FIXED.w, later, D, dtype)  # [CHUNK, BLOCK_D]
            v += tl.sum(of_j[:, None] * w_j, 0)
        alpha += tl.sum(w_k * u_k, 0)
        n += tl.sum(w_k * w_k, 0)
        q += tl.sum(v * w_k, 0)
        tl.debug_barrier()  # no thread adds the first slice any more, which v replaces
        tl.store(partials + k * D + at, v, mask)
    gamma = sum_partials(sums + num_steps, size, num_slices, k + one, one < 1, BLOCK_SLICES)  # [1]
    _, _, _, rho, inv_n, rising, falling = constrain(alpha, n, CONSTRAINT)  # [1]
    dalpha, of_v, of_w_n = constrain_backward(rho, inv_n, rising, falling, q, gamma)  # [1]
    tl.debug_barrier()  # the slices are added by other threads than those that read v

    for start in tl.range(0, D, BLOCK_D, num_stages=1):
        at = start + col  # [BLOCK_D]
        mask = at < D
        u_k = tl.load(u + k * FIXED.u.step + at * FIXED.u.col, mask, 0).to(dtype)  # [BLOCK_D]
        w_k = tl.load(w + k * FIXED.w.step + at * FIXED.w.col, mask, 0).to(dtype)  # [BLOCK_D]
        v = tl.load(partials + k * D + at, mask, 0)  # [BLOCK_D]
        dw_at = (num_steps + k) * D + at
        dw_k = sum_partials(partials, size, num_slices, dw_at, mask, BLOCK_SLICES)  # [BLOCK_D]
        for first in tl.range(0, k, CHUNK, num_stages=1):
            j = first + tl.arange(0, CHUNK).to(tl.int64)  # [CHUNK]
            earlier = j < k
            of_j = sum_partials(triangle, size, num_slices, j * num_steps + k, earlier, BLOCK_SLICES)  # [CHUNK]
            u_at, w_at = u + j[:, None] * FIXED.u.step, w + j[:, None] * FIXED.w.step  # [CHUNK, 1]
            u_hat = load_w_and_u_hat(u_at, w_at, tl.load(of_w + j, earlier, 0), at, earlier, FIXED)[1]
            dw_k += tl.sum(of_j[:, None] * u_hat, 0)
        dw_k += of_v * v + dalpha * u_k + of_w_n * (inv_n * w_k)
        tl.store(du + owner * FIXED.du.set + k * D + at, v + dalpha * w_k, mask)
        tl.store(dw + owner * FIXED.dw.set + k * D + at, dw_k, mask)
    db_k = sum_partials(sums, size, num_slices, k + one, one < 1, BLOCK_SLICES)  # [1]
    tl.store(db + owner * FIXED.db.set + k + one, db_k)


class GradientsPlan(NamedTuple):
    partials: tuple[int, int]
    summing: Launch  # leaves the partial sums
    adding: Launch


def plan_gradients(call: Call, spec: FlowSpec) -> GradientsPlan:
    config = _heuristics.compact_gradients(call.rows_per_set, call.num_sets, call.dim, call.num_steps, call.dtype)
    chunks = ceil_div(call.num_steps, CHUNK.value)
    tiles = ceil_div(call.dim, config.block_dim) + ceil_div(call.num_steps, config.block_steps)
    num_slices = ceil_div(ceil_div(call.rows_per_set, config.block_rows), config.num_blocks)
    summing = Launch(
        compact_gradients_kernel,
        (call.num_sets * num_slices, chunks, tiles),
        *(call.rows, call.rows_per_set, call.num_steps, call.num_sets, num_slices, config.num_blocks),
        call.fixed("grad_z", "grad_log_det", "z"),
        *(config.block_rows, config.block_dim, config.block_steps),
        *(spec.constraint, AnyFlow.of(spec), config.precision),
        num_warps=config.num_warps,
        capped=True,
    )
    adding = Launch(
        compact_finish_kernel,
        (call.num_sets * call.num_steps,),
        *(call.num_steps, num_slices, call.fixed("u", "w", "du", "dw", "db")),
        *(config.finish_block_dim, 8, spec.constraint),
        num_warps=4,
        capped=True,
    )
    size = call.num_steps * (2 * call.dim + call.num_steps + 2)
    return GradientsPlan((call.num_sets * num_slices, size), summing, adding)


def launch_gradients(
    plan: GradientsPlan, of_rows: Tensors, params: Tensors, steps: Tensors, gradients: Tensors
) -> None:
    """From grad_z, grad_log_det and z, from u and w, and from a, delta and the constraint of compact_backward_kernel
    fills du, dw and db, in which the steps of a set are contiguous."""
    partials = steps[0].new_empty(plan.partials)
    plan.summing(*of_rows, *steps, partials)
    plan.adding(*params, steps[2], partials, *gradients)
