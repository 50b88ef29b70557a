"""The forward in the compact form, docs/math.md (9), (10): one launch, for parameter sets that serve many rows."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from vvae_fast.spec import FlowSpec
from vvae_fast.triton import _heuristics
from vvae_fast.triton.blocks import (
    CHUNK,
    GRAM,
    constrain_chunk,
    dot,
    elements,
    load_state,
    load_w_and_u_hat,
    rows_of_program,
    scan,
    store_gram,
    store_state,
)
from vvae_fast.triton.launch import Call, Launch, Layout, Tensors, ceil_div, copied, layouts, planned
from vvae_fast.triton.math import AnyFlow, activate, log_abs_determinant


@triton.jit(do_not_specialize=["rows", "rows_per_set", "num_steps", "num_sets", "num_blocks"])
def compact_forward_kernel(
    z,  # [rows, D]
    u,  # [sets, K, D]
    w,  # [sets, K, D]
    b,  # [sets, K]
    z_K,  # [rows, D], contiguous
    log_det,  # [rows]
    a,  # [K, rows], or [CHUNK, rows] where nothing is saved
    state,  # [rows, D], contiguous: z between chunks where not in registers; z_K or, for half precision, float32
    scratch,  # [programs, GRAM]
    rows,
    rows_per_set,
    num_steps,
    num_sets,
    num_blocks,  # of rows, in a set
    FIXED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CONSTRAINT: tl.constexpr,
    F: tl.constexpr,
    IN_REGISTERS: tl.constexpr,  # z, not in memory between chunks
    SAVE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """BLOCK_ROWS rows of one set a program."""
    D: tl.constexpr = FIXED.dim
    dtype: tl.constexpr = tl.float64 if z.dtype.element_ty == tl.float64 else tl.float32
    program, owner, _block, row, inside = rows_of_program(num_blocks, num_sets, rows_per_set, BLOCK_ROWS, FIXED.shared)
    scratch += program * GRAM
    rows = rows.to(tl.int64)
    step = tl.arange(0, CHUNK).to(tl.int64)  # [CHUNK]
    col = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    u += owner * FIXED.u.set + step[:, None] * FIXED.u.step  # [CHUNK, 1], as w
    w += owner * FIXED.w.set + step[:, None] * FIXED.w.step
    b += owner * FIXED.b.set + step * FIXED.b.step  # [CHUNK]
    a_row = a + row  # [R]
    a_tile = a_row[:, None] + step[None, :] * rows  # [R, CHUNK]
    if IN_REGISTERS:
        z_k = ()  # tiles [R, BLOCK_D]
        for tile in tl.static_range(0, D, BLOCK_D):
            at = tile + col  # [BLOCK_D]
            mask = inside[:, None] & (at < D)[None, :]  # [R, BLOCK_D]
            z_k += (tl.load(elements(z, row, at, FIXED.z), mask, 0).to(dtype),)
    sum_of_logs = tl.zeros([BLOCK_ROWS], dtype)  # [R]

    for first in tl.range(0, num_steps, CHUNK, num_stages=1):
        left = num_steps - first
        steps = step < left  # [CHUNK]
        c, s, sunk, of_w = constrain_chunk(u, w, steps, FIXED, BLOCK_D, CONSTRAINT, dtype)  # [CHUNK]
        products = tl.zeros([BLOCK_ROWS, CHUNK], dtype)
        gram = tl.zeros([CHUNK, CHUNK], dtype)
        if IN_REGISTERS:
            for tile in tl.static_range(0, D, BLOCK_D):
                w_k, u_hat = load_w_and_u_hat(u, w, of_w, tile + col, steps, FIXED)  # [CHUNK, BLOCK_D]
                products = dot(z_k[tile // BLOCK_D], tl.trans(w_k), products, PRECISION)
                gram = dot(u_hat, tl.trans(w_k), gram, PRECISION)
        else:
            for start in tl.range(0, D, BLOCK_D, num_stages=1):
                at = start + col  # [BLOCK_D]
                w_k, u_hat = load_w_and_u_hat(u, w, of_w, at, steps, FIXED)  # [CHUNK, BLOCK_D]
                z_tile = load_state(first > 0, z, FIXED.z, state, row, inside, at, D)  # [R, BLOCK_D]
                products = dot(z_tile, tl.trans(w_k), products, PRECISION)
                gram = dot(u_hat, tl.trans(w_k), gram, PRECISION)

        saved = inside[:, None] & steps[None, :]  # [R, CHUNK]
        tl.store(a_tile, products + tl.load(b, steps, 0).to(dtype)[None, :], saved)
        store_gram(scratch, gram)
        tl.debug_barrier()
        scan(a_row, scratch, rows, tl.where(inside, left, 0), F)
        tl.debug_barrier()
        h, h_prime = activate(tl.load(a_tile, saved, 0), F)  # [R, CHUNK]
        # [R, CHUNK], 0 for missing steps
        logs = log_abs_determinant(h, h_prime, c[None, :], s[None, :], sunk[None, :], F)
        if F.eps > 0:
            logs = tl.where(steps[None, :], logs, 0)
        sum_of_logs += tl.sum(logs, 1)

        if IN_REGISTERS:
            z_next = ()
            for tile in tl.static_range(0, D, BLOCK_D):
                u_hat = load_w_and_u_hat(u, w, of_w, tile + col, steps, FIXED)[1]  # [CHUNK, BLOCK_D]
                z_next += (dot(h, u_hat, z_k[tile // BLOCK_D], PRECISION),)
            z_k = z_next
        else:
            for start in tl.range(0, D, BLOCK_D, num_stages=1):
                at = start + col  # [BLOCK_D]
                u_hat = load_w_and_u_hat(u, w, of_w, at, steps, FIXED)[1]  # [CHUNK, BLOCK_D]
                z_tile = load_state(first > 0, z, FIXED.z, state, row, inside, at, D)  # [R, BLOCK_D]
                z_tile = dot(h, u_hat, z_tile, PRECISION)
                store_state(left > CHUNK, state, z_K, z_tile, row, inside, at, D)
        tl.debug_barrier()  # other threads read this z next, and write where this chunk's a was if it is not saved
        u += CHUNK * FIXED.u.step
        w += CHUNK * FIXED.w.step
        b += CHUNK * FIXED.b.step
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
    state: torch.dtype | None  # of z between chunks; None: z_K, where they are in memory at all
    scratch: tuple[int, int]
    launch: Launch


@planned
def _plan(of_inputs: tuple[Layout, ...], dtype: torch.dtype, device: torch.device, spec: FlowSpec, save: bool) -> _Plan:
    call = Call(dict(zip("zuwb", of_inputs, strict=True)), dtype)
    config = _heuristics.compact("forward", call.rows, call.dim, call.shared, call.dtype)
    num_blocks = ceil_div(call.rows_per_set, config.block_rows)
    programs = call.num_sets * num_blocks
    plan = Launch(
        compact_forward_kernel,
        (programs,),
        *(call.rows, call.rows_per_set, call.num_steps, call.num_sets, num_blocks, call.fixed("z", "u", "w", "b")),
        *(config.block_rows, config.block_dim, spec.constraint, AnyFlow.of(spec)),
        *(config.in_registers, save, config.precision),
        num_warps=config.num_warps,
        capped=not config.in_registers,
    )
    state = None if config.in_registers or dtype == call.dtype else call.dtype
    return _Plan(call.copies, (CHUNK.value, call.rows), state, (programs, GRAM.value), plan)


def launch_compact_forward(inputs: Tensors, outputs: Tensors, spec: FlowSpec, save: bool) -> None:
    """From z, u, w and b fills z_K [R, D], log_det [R] and, if `save`, a [K, R], all contiguous."""
    z, (z_K, log_det, a) = inputs[0], outputs
    plan = _plan(layouts(*inputs), z.dtype, z.device, spec, save)
    state = z_K if plan.state is None else torch.empty_like(z_K, dtype=plan.state)
    a = a if save else log_det.new_empty(plan.chunk)
    plan.launch(*copied(plan.copies, inputs), z_K, log_det, a, state, log_det.new_empty(plan.scratch))
