"""The backward in the compact form, docs/math.md (11) to (15): three launches, the last two in compact_gradients.py. A
program writes to its own memory only, in a fixed order: no atomics, the same bits on every run."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vvae_fast import shapes
from vvae_fast.kernels import _heuristics
from vvae_fast.kernels.blocks import (
    CHUNK,
    GRAM,
    constrain_chunk,
    dot,
    load_params,
    load_state,
    rows_of,
    scan_back,
    store_gram,
)
from vvae_fast.kernels.compact_gradients import launch_compact_gradients
from vvae_fast.kernels.launch import (
    Launch,
    Layout,
    ceil_div,
    copied,
    launch,
    layout,
    planned,
    set_strides,
    sizes,
    unit_columns,
)
from vvae_fast.kernels.math import AnyFlow, activate, step_adjoint, unit
from vvae_fast.spec import FlowSpec as Formulas


@triton.jit(do_not_specialize=["rows", "rows_per_set", "num_steps", "num_sets", "num_blocks"])
def compact_backward_kernel(
    grad_z,  # [rows, D]
    grad_log_det,  # [rows]
    u,  # [sets, K, D]
    w,  # [sets, K, D]
    a,  # [K, rows]
    dz,  # [rows, D], contiguous
    state,  # [rows, D], contiguous: g between chunks; dz or, for half precision, float32
    delta,  # [K, rows]
    constraint,  # [sets, 3, K]: c, s and of_w, where u_hat = u + of_w w
    scratch,  # [programs, GRAM + CHUNK BLOCK_ROWS]: a chunk's Gram matrix, and its h' [CHUNK, BLOCK_ROWS]
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
    CONSTRAINT: tl.constexpr,
    F: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """delta and dz of BLOCK_ROWS rows of one set a program, and the constraint of the set, for compact_gradients.py."""
    dtype: tl.constexpr = a.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    owner, block = program // num_blocks, program % num_blocks
    row = rows_of(owner, block, num_sets, BLOCK_ROWS, SHARED)  # [R]
    inside = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS) < rows_per_set  # [R]
    scratch += program * (GRAM + CHUNK * BLOCK_ROWS)
    slope = scratch + GRAM + tl.arange(0, BLOCK_ROWS)  # [R]
    rows = rows.to(tl.int64)
    step = tl.arange(0, CHUNK)  # [CHUNK]
    col = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    constraint += owner * 3 * num_steps
    lambda_ = tl.load(grad_log_det + row * grad_log_det_row, inside, 0)  # [R]
    chunks = tl.cdiv(num_steps, CHUNK)
    for nth in tl.range(chunks, num_stages=1):
        first = (chunks - 1 - nth).to(tl.int64) * CHUNK
        steps = first + step < num_steps  # [CHUNK]
        left = tl.where(inside, num_steps - first, 0)  # [R]
        u_at = u + owner * u_set + (first + step)[:, None] * u_step  # [CHUNK, 1]
        w_at = w + owner * w_set + (first + step)[:, None] * w_step  # [CHUNK, 1]
        c, s, _, of_w = constrain_chunk(u_at, w_at, u_col, w_col, steps, D, BLOCK_D, CONSTRAINT, dtype)  # [CHUNK]
        q = tl.zeros([BLOCK_ROWS, CHUNK], dtype)
        gram = tl.zeros([CHUNK, CHUNK], dtype)
        for start in tl.range(0, D, BLOCK_D, num_stages=1):
            at = start + col  # [BLOCK_D]
            w_k = load_params(w_at, at, w_col, steps, D, dtype)  # [CHUNK, BLOCK_D]
            u_hat = load_params(u_at, at, u_col, steps, D, dtype) + of_w[:, None] * w_k
            mask = inside[:, None] & (at < D)[None, :]  # [R, BLOCK_D]
            g = load_state(nth > 0, grad_z, grad_z_row, grad_z_col, state, row, at, mask, D)  # [R, BLOCK_D]
            q = dot(g, tl.trans(u_hat), q, PRECISION)
            gram = dot(u_hat, tl.trans(w_k), gram, PRECISION)

        saved = inside[:, None] & steps[None, :]  # [R, CHUNK]
        delta_row = delta + first * rows + row  # [R]
        delta_tile = delta_row[:, None] + step.to(tl.int64)[None, :] * rows  # [R, CHUNK]
        a_tile = (a + first * rows + row)[:, None] + step.to(tl.int64)[None, :] * rows  # [R, CHUNK]
        h, h_prime = activate(tl.load(a_tile, saved, F.padding_preactivation), F)  # [R, CHUNK]
        of_step = unit(s, CONSTRAINT)[None, :]
        d, _ = step_adjoint(q, lambda_[:, None], h, h_prime, c[None, :], s[None, :], of_step, F)  # [R, CHUNK]
        tl.store(delta_tile, d, saved)  # with q for e: the sum in (11) comes with the scan
        tl.store(slope[:, None] + step[None, :] * BLOCK_ROWS, h_prime)
        store_gram(scratch, gram)
        if block == 0:
            tl.store(constraint + first + step, c, steps)
            tl.store(constraint + num_steps + first + step, s, steps)
            tl.store(constraint + 2 * num_steps + first + step, of_w, steps)
        tl.debug_barrier()
        scan_back(delta_row, slope, scratch, rows, left, BLOCK_ROWS)
        tl.debug_barrier()
        d = tl.load(delta_tile, saved, 0)  # [R, CHUNK]

        for start in tl.range(0, D, BLOCK_D, num_stages=1):
            at = start + col  # [BLOCK_D]
            w_k = load_params(w_at, at, w_col, steps, D, dtype)  # [CHUNK, BLOCK_D]
            mask = inside[:, None] & (at < D)[None, :]  # [R, BLOCK_D]
            g = load_state(nth > 0, grad_z, grad_z_row, grad_z_col, state, row, at, mask, D)  # [R, BLOCK_D]
            g = dot(d, w_k, g, PRECISION)
            if nth + 1 < chunks:
                tl.store(state + row[:, None] * D + at[None, :], g, mask)
            else:
                tl.store(dz + row[:, None] * D + at[None, :], g, mask)
        tl.debug_barrier()  # other threads read this g next


class _Plan(NamedTuple):
    copies: tuple[bool, ...] | None  # of grad_z, z, u and w
    constraint: tuple[int, int, int]
    scratch: tuple[int, int]
    state: torch.dtype | None  # of g between chunks; None: dz
    launch: Launch


@planned
def _plan(
    grad_z: Layout,
    grad_log_det: Layout,
    z: Layout,
    u: Layout,
    w: Layout,
    dtype: torch.dtype,
    device: torch.device,
    formulas: Formulas,
) -> _Plan:
    """For `dtype` the tensors' own."""
    copies, (grad_z, z, u, w) = unit_columns(grad_z, z, u, w)
    (rows, dim, num_steps, num_sets), computed = sizes(z, u), shapes.compute_dtype(dtype)
    rows_per_set = rows // num_sets
    config = _heuristics.compact("backward", rows, dim, num_sets == 1, computed)
    num_blocks = ceil_div(rows_per_set, config.block_rows)
    launches = Launch(
        compact_backward_kernel,
        (num_sets * num_blocks,),
        *(rows, rows_per_set, num_steps, num_sets, num_blocks),
        *(*grad_z[1], *grad_log_det[1], *set_strides(u, 3), *set_strides(w, 3)),
        *(dim, config.block_dim, config.block_rows, num_sets == 1, formulas.constraint, AnyFlow.of(formulas)),
        config.precision,
        num_warps=config.num_warps,
    )
    scratch = num_sets * num_blocks, GRAM.value + CHUNK.value * config.block_rows
    return _Plan(copies, (num_sets, 3, num_steps), scratch, None if dtype == computed else computed, launches)


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
    formulas: Formulas,
    params: bool = True,
) -> None:
    """Fills dz [R, D], contiguous, and with `params` du, dw, db, in which the steps of a set are contiguous."""
    plan = _plan(*map(layout, (grad_z, grad_log_det, z, u, w)), z.dtype, z.device, formulas)
    grad_z, z, u, w = copied(plan.copies, grad_z, z, u, w)
    delta, constraint, scratch = torch.empty_like(a), a.new_empty(plan.constraint), a.new_empty(plan.scratch)
    state = dz if plan.state is None else torch.empty_like(dz, dtype=plan.state)
    launch(plan.launch, grad_z, grad_log_det, u, w, a, dz, state, delta, constraint, scratch)
    if params:
        launch_compact_gradients(grad_z, grad_log_det, z, u, w, a, delta, constraint, du, dw, db, formulas)
