"""The backward in the compact form, docs/math.md (11) to (15): three launches, the last two in compact_gradients.py. A
program writes to its own memory only, in a fixed order: no atomics, the same bits on every run."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vvae_fast.kernels import _heuristics
from vvae_fast.kernels.compact_chunk import CHUNK, SCRATCH, dot, load_state, rows_of, scan_back, store_gram
from vvae_fast.kernels.compact_gradients import launch_compact_gradients
from vvae_fast.kernels.launch import ceil_div, launch, set_strides, unit_columns
from vvae_fast.kernels.math import constrain


@triton.jit(do_not_specialize=["rows", "rows_per_set", "num_steps", "num_sets", "num_blocks"])
def compact_backward_kernel(
    grad_z,  # [rows, D]
    grad_log_det,  # [rows]
    u,  # [sets, K, D]
    w,  # [sets, K, D]
    a,  # [K, rows]
    dz,  # [rows, D], contiguous; holds g between chunks where registers do not
    delta,  # [K, rows]
    constraint,  # [sets, 3, K]: c, s and of_w, where u_hat = u + of_w w
    scratch,  # [programs, SCRATCH]
    rows,
    rows_per_set,
    num_steps,
    num_sets,
    num_blocks,  # of rows, in a set
    grad_z_row: tl.constexpr,
    grad_z_col: tl.constexpr,
    grad_log_det_row: tl.constexpr,
    u_set: tl.constexpr,
    u_step: tl.constexpr,
    u_col: tl.constexpr,
    w_set: tl.constexpr,
    w_step: tl.constexpr,
    w_col: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    SHARED: tl.constexpr,
    CONSTRAINED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """delta and dz of BLOCK_ROWS rows of one set a program, and the constraint of the set, for compact_gradients.py."""
    dtype: tl.constexpr = a.dtype.element_ty
    IN_REGISTERS: tl.constexpr = D <= BLOCK_D
    program = tl.program_id(0).to(tl.int64)
    owner, block = program // num_blocks, program % num_blocks
    row = rows_of(owner, block, num_sets, BLOCK_ROWS, SHARED)  # [R]
    inside = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS) < rows_per_set  # [R]
    scratch += program * SCRATCH
    rows = rows.to(tl.int64)
    step = tl.arange(0, CHUNK)  # [CHUNK]
    col = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    mask = inside[:, None] & (col < D)[None, :]  # [R, BLOCK_D]
    constraint += owner * 3 * num_steps
    lambda_ = tl.load(grad_log_det + row * grad_log_det_row, inside, 0)  # [R]
    if IN_REGISTERS:
        g = tl.load(grad_z + row[:, None] * grad_z_row + col[None, :] * grad_z_col, mask, 0).to(dtype)  # [R, BLOCK_D]

    chunks = tl.cdiv(num_steps, CHUNK)
    for nth in tl.range(chunks, num_stages=1):
        first = (chunks - 1 - nth).to(tl.int64) * CHUNK
        steps = first + step < num_steps  # [CHUNK]
        u_at = u + owner * u_set + (first + step)[:, None] * u_step  # [CHUNK, 1]
        w_at = w + owner * w_set + (first + step)[:, None] * w_step  # [CHUNK, 1]
        q = tl.zeros([BLOCK_ROWS, CHUNK], dtype)
        gram = tl.zeros([CHUNK, CHUNK], dtype)
        if IN_REGISTERS:
            params = steps[:, None] & (col < D)[None, :]  # [CHUNK, BLOCK_D]
            u_hat = tl.load(u_at + col[None, :] * u_col, params, 0).to(dtype)  # [CHUNK, BLOCK_D], u as yet
            w_k = tl.load(w_at + col[None, :] * w_col, params, 0).to(dtype)  # [CHUNK, BLOCK_D]
            c, s, rho, inv_n, _, _ = constrain(tl.sum(w_k * u_hat, 1), tl.sum(w_k * w_k, 1), CONSTRAINED)  # [CHUNK]
            of_w = rho * inv_n  # [CHUNK]
            u_hat += of_w[:, None] * w_k
            q = dot(g, tl.trans(u_hat), q, PRECISION)
            gram = dot(u_hat, tl.trans(w_k), gram, PRECISION)
        else:
            w_q = tl.zeros([BLOCK_ROWS, CHUNK], dtype)
            w_gram = tl.zeros([CHUNK, CHUNK], dtype)
            alpha, n = tl.zeros([CHUNK], dtype), tl.zeros([CHUNK], dtype)
            for start in tl.range(0, D, BLOCK_D, num_stages=1):
                at = start + col  # [BLOCK_D]
                tile = inside[:, None] & (at < D)[None, :]  # [R, BLOCK_D]
                params = steps[:, None] & (at < D)[None, :]  # [CHUNK, BLOCK_D]
                u_k = tl.load(u_at + at[None, :] * u_col, params, 0).to(dtype)  # [CHUNK, BLOCK_D]
                w_k = tl.load(w_at + at[None, :] * w_col, params, 0).to(dtype)  # [CHUNK, BLOCK_D]
                g = load_state(nth > 0, grad_z, grad_z_row, grad_z_col, dz, row, at, tile, D)  # [R, BLOCK_D]
                q = dot(g, tl.trans(u_k), q, PRECISION)
                w_q = dot(g, tl.trans(w_k), w_q, PRECISION)
                gram = dot(u_k, tl.trans(w_k), gram, PRECISION)
                w_gram = dot(w_k, tl.trans(w_k), w_gram, PRECISION)
                alpha += tl.sum(w_k * u_k, 1)
                n += tl.sum(w_k * w_k, 1)
            c, s, rho, inv_n, _, _ = constrain(alpha, n, CONSTRAINED)  # [CHUNK]
            of_w = rho * inv_n  # [CHUNK]
            q += of_w[None, :] * w_q
            gram += of_w[:, None] * w_gram

        saved = inside[:, None] & steps[None, :]  # [R, CHUNK]
        delta_row = delta + first * rows + row  # [R]
        delta_tile = delta_row[:, None] + step.to(tl.int64)[None, :] * rows  # [R, CHUNK]
        tl.store(delta_tile, q, saved)
        store_gram(scratch, gram, c, s)
        if block == 0:
            tl.store(constraint + first + step, c, steps)
            tl.store(constraint + num_steps + first + step, s, steps)
            tl.store(constraint + 2 * num_steps + first + step, of_w, steps)
        tl.debug_barrier()
        scan_back(a + first * rows + row, delta_row, lambda_, scratch, rows, tl.where(inside, num_steps - first, 0))
        tl.debug_barrier()
        d = tl.load(delta_tile, saved, 0)  # [R, CHUNK]

        if IN_REGISTERS:
            g = dot(d, w_k, g, PRECISION)
        else:
            for start in tl.range(0, D, BLOCK_D, num_stages=1):
                at = start + col  # [BLOCK_D]
                tile = inside[:, None] & (at < D)[None, :]  # [R, BLOCK_D]
                params = steps[:, None] & (at < D)[None, :]  # [CHUNK, BLOCK_D]
                w_k = tl.load(w_at + at[None, :] * w_col, params, 0).to(dtype)  # [CHUNK, BLOCK_D]
                g = load_state(nth > 0, grad_z, grad_z_row, grad_z_col, dz, row, at, tile, D)  # [R, BLOCK_D]
                tl.store(dz + row[:, None] * D + at[None, :], dot(d, w_k, g, PRECISION), tile)
            tl.debug_barrier()  # other threads read this g next

    if IN_REGISTERS:
        tl.store(dz + row[:, None] * D + col[None, :], g, mask)


def launch_compact_backward(
    grad_z: Tensor,
    grad_log_det: Tensor,
    z: Tensor,
    u: Tensor,
    w: Tensor,
    a: Tensor,
    dz: Tensor,
    du: Tensor,
    dw: Tensor,
    db: Tensor,
    constrained: bool,
) -> None:
    """Fills dz [R, D], contiguous, and du, dw, db, in which the steps of a set are contiguous."""
    rows, dim = z.shape
    num_steps, num_sets = u.shape[-2], u.shape[0] if u.dim() == 3 else 1
    rows_per_set = rows // num_sets
    config = _heuristics.compact_backward(rows_per_set, num_sets, dim, a.dtype)
    num_blocks = ceil_div(rows_per_set, config.block_rows)
    grad_z, z, u, w = (unit_columns(t) for t in (grad_z, z, u, w))
    delta = torch.empty_like(a)
    constraint = a.new_empty(num_sets, 3, num_steps)
    scratch = a.new_empty(num_sets * num_blocks, SCRATCH.value)
    # Between chunks g is not rounded to half precision.
    between = dz if dim <= config.block_dim or dz.dtype == a.dtype else torch.empty_like(dz, dtype=a.dtype)
    launch(
        compact_backward_kernel,
        (num_sets * num_blocks,),
        z,
        *(grad_z, grad_log_det, u, w, a, between, delta, constraint, scratch),
        *(rows, rows_per_set, num_steps, num_sets, num_blocks),
        *(*grad_z.stride(), *grad_log_det.stride(), *set_strides(u, 3), *set_strides(w, 3)),
        *(dim, config.block_dim, config.block_rows, num_sets == 1, constrained, config.precision),
        num_warps=config.num_warps,
    )
    if between is not dz:
        dz.copy_(between)
    launch_compact_gradients(grad_z, grad_log_det, z, u, w, a, delta, constraint, du, dw, db, constrained)
