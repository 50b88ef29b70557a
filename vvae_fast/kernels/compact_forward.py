"""The forward in the compact form, docs/math.md (9), (10): one launch, for parameter sets that serve many rows."""

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
    scan,
    store_gram,
)
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
from vvae_fast.kernels.math import AnyFlow, activate, log_abs_determinant
from vvae_fast.spec import FlowSpec as Formulas


@triton.jit(do_not_specialize=["rows", "rows_per_set", "num_steps", "num_sets", "num_blocks"])
def compact_forward_kernel(
    z,  # [rows, D]
    u,  # [sets, K, D]
    w,  # [sets, K, D]
    b,  # [sets, K]
    z_K,  # [rows, D], contiguous
    state,  # [rows, D], contiguous: z between chunks where not in registers; z_K or, for half precision, float32
    log_det,  # [rows]
    a,  # [K, rows], or [CHUNK, rows] where nothing is saved
    scratch,  # [programs, GRAM]
    rows,
    rows_per_set,
    num_steps,
    num_sets,
    num_blocks,  # of rows, in a set
    z_row: tl.constexpr,
    z_col: tl.constexpr,
    u_set: tl.constexpr,
    u_step: tl.constexpr,
    u_col: tl.constexpr,
    w_set: tl.constexpr,
    w_step: tl.constexpr,
    w_col: tl.constexpr,
    b_set: tl.constexpr,
    b_step: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    IN_REGISTERS: tl.constexpr,  # z, not in memory between chunks
    SHARED: tl.constexpr,
    CONSTRAINT: tl.constexpr,
    F: tl.constexpr,
    SAVE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """BLOCK_ROWS rows of one set a program."""
    dtype: tl.constexpr = tl.float64 if z.dtype.element_ty == tl.float64 else tl.float32
    program = tl.program_id(0).to(tl.int64)
    owner, block = program // num_blocks, program % num_blocks
    row = rows_of(owner, block, num_sets, BLOCK_ROWS, SHARED)  # [R]
    inside = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS) < rows_per_set  # [R]
    scratch += program * GRAM
    rows = rows.to(tl.int64)
    step = tl.arange(0, CHUNK).to(tl.int64)  # [CHUNK]
    col = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    u += owner * u_set + step[:, None] * u_step  # [CHUNK, 1], as w
    w += owner * w_set + step[:, None] * w_step
    b += owner * b_set + step * b_step  # [CHUNK]
    a_row = a + row  # [R]
    a_tile = a_row[:, None] + step[None, :] * rows  # [R, CHUNK]
    if IN_REGISTERS:
        z_k = ()  # tiles [R, BLOCK_D]
        for tile in tl.static_range(0, D, BLOCK_D):
            at = tile + col  # [BLOCK_D]
            mask = inside[:, None] & (at < D)[None, :]  # [R, BLOCK_D]
            z_k += (tl.load(z + row[:, None] * z_row + at[None, :] * z_col, mask, 0).to(dtype),)
    sum_of_logs = tl.zeros([BLOCK_ROWS], dtype)  # [R]

    for first in tl.range(0, num_steps, CHUNK, num_stages=1):
        left = num_steps - first
        steps = step < left  # [CHUNK]
        c, s, sunk, of_w = constrain_chunk(u, w, u_col, w_col, steps, D, BLOCK_D, CONSTRAINT, dtype)  # [CHUNK]
        p = tl.zeros([BLOCK_ROWS, CHUNK], dtype)
        gram = tl.zeros([CHUNK, CHUNK], dtype)
        if IN_REGISTERS:
            for tile in tl.static_range(0, D, BLOCK_D):
                w_k = load_params(w, tile + col, w_col, steps, D, dtype)  # [CHUNK, BLOCK_D]
                u_hat = load_params(u, tile + col, u_col, steps, D, dtype) + of_w[:, None] * w_k
                p = dot(z_k[tile // BLOCK_D], tl.trans(w_k), p, PRECISION)
                gram = dot(u_hat, tl.trans(w_k), gram, PRECISION)
        else:
            for start in tl.range(0, D, BLOCK_D, num_stages=1):
                at = start + col  # [BLOCK_D]
                w_k = load_params(w, at, w_col, steps, D, dtype)  # [CHUNK, BLOCK_D]
                u_hat = load_params(u, at, u_col, steps, D, dtype) + of_w[:, None] * w_k
                mask = inside[:, None] & (at < D)[None, :]  # [R, BLOCK_D]
                z_t = load_state(first > 0, z, z_row, z_col, state, row, at, mask, D)  # [R, BLOCK_D]
                p = dot(z_t, tl.trans(w_k), p, PRECISION)
                gram = dot(u_hat, tl.trans(w_k), gram, PRECISION)

        saved = inside[:, None] & steps[None, :]  # [R, CHUNK]
        tl.store(a_tile, p + tl.load(b, steps, 0).to(dtype)[None, :], saved)
        store_gram(scratch, gram)
        tl.debug_barrier()
        scan(a_row, scratch, rows, tl.where(inside, left, 0), F)
        tl.debug_barrier()
        h, h_prime = activate(tl.load(a_tile, saved, 0), F)  # [R, CHUNK]
        # [R, CHUNK], 0 behind the last step
        logs = log_abs_determinant(h, h_prime, c[None, :], s[None, :], sunk[None, :], F)
        if F.eps > 0:
            logs = tl.where(steps[None, :], logs, 0)
        sum_of_logs += tl.sum(logs, 1)

        if IN_REGISTERS:
            z_next = ()
            for tile in tl.static_range(0, D, BLOCK_D):
                w_k = load_params(w, tile + col, w_col, steps, D, dtype)  # [CHUNK, BLOCK_D]
                u_hat = load_params(u, tile + col, u_col, steps, D, dtype) + of_w[:, None] * w_k
                z_next += (dot(h, u_hat, z_k[tile // BLOCK_D], PRECISION),)
            z_k = z_next
        else:
            for start in tl.range(0, D, BLOCK_D, num_stages=1):
                at = start + col  # [BLOCK_D]
                w_k = load_params(w, at, w_col, steps, D, dtype)  # [CHUNK, BLOCK_D]
                u_hat = load_params(u, at, u_col, steps, D, dtype) + of_w[:, None] * w_k
                mask = inside[:, None] & (at < D)[None, :]  # [R, BLOCK_D]
                z_t = load_state(first > 0, z, z_row, z_col, state, row, at, mask, D)  # [R, BLOCK_D]
                z_t = dot(h, u_hat, z_t, PRECISION)
                if left > CHUNK:
                    tl.store(state + row[:, None] * D + at[None, :], z_t, mask)
                else:
                    tl.store(z_K + row[:, None] * D + at[None, :], z_t, mask)
        tl.debug_barrier()  # other threads read this z next, and write where this chunk's a was if it is not saved
        u += CHUNK * u_step
        w += CHUNK * w_step
        b += CHUNK * b_step
        if SAVE:
            a_row += CHUNK * rows
            a_tile += CHUNK * rows

    if IN_REGISTERS:
        for tile in tl.static_range(0, D, BLOCK_D):
            at = tile + col  # [BLOCK_D]
            mask = inside[:, None] & (at < D)[None, :]  # [R, BLOCK_D]
            tl.store(z_K + row[:, None] * D + at[None, :], z_k[tile // BLOCK_D], mask)
    tl.store(log_det + row, sum_of_logs, inside)


class _Plan(NamedTuple):
    copies: tuple[bool, ...] | None  # of z, u, w and b
    chunk: tuple[int, int]  # of a, where nothing is saved
    scratch: tuple[int, int]
    state: torch.dtype | None  # of z between chunks; None: z_K, where they are in memory at all
    launch: Launch


@planned
def _plan(
    z: Layout,
    u: Layout,
    w: Layout,
    b: Layout,
    dtype: torch.dtype,
    device: torch.device,
    formulas: Formulas,
    save: bool,
) -> _Plan:
    """For `dtype` the tensors' own."""
    copies, (z, u, w, b) = unit_columns(z, u, w, b)
    (rows, dim, num_steps, num_sets), computed = sizes(z, u), shapes.compute_dtype(dtype)
    rows_per_set = rows // num_sets
    config = _heuristics.compact("forward", rows, dim, num_sets == 1, computed)
    num_blocks = ceil_div(rows_per_set, config.block_rows)
    launches = Launch(
        compact_forward_kernel,
        (num_sets * num_blocks,),
        *(rows, rows_per_set, num_steps, num_sets, num_blocks),
        *(*z[1], *set_strides(u, 3), *set_strides(w, 3), *set_strides(b, 2)),
        *(dim, config.block_dim, config.block_rows, config.in_registers),
        *(num_sets == 1, formulas.constraint, AnyFlow.of(formulas), save, config.precision),
        num_warps=config.num_warps,
        capped=not config.in_registers,
    )
    state = None if config.in_registers or dtype == computed else computed
    return _Plan(copies, (CHUNK.value, rows), (num_sets * num_blocks, GRAM.value), state, launches)


def launch_compact_forward(
    z: Tensor,
    u: Tensor,
    w: Tensor,
    b: Tensor,
    z_K: Tensor,
    log_det: Tensor,
    a: Tensor,
    formulas: Formulas,
    save: bool,
) -> None:
    """Fills z_K [R, D], log_det [R] and, if `save`, a [K, R], all contiguous."""
    plan = _plan(*map(layout, (z, u, w, b)), z.dtype, z.device, formulas, save)
    scratch = log_det.new_empty(plan.scratch)
    state = z_K if plan.state is None else torch.empty_like(z_K, dtype=plan.state)
    a = a if save else log_det.new_empty(plan.chunk)
    launch(plan.launch, *copied(plan.copies, z, u, w, b), z_K, state, log_det, a, scratch)
