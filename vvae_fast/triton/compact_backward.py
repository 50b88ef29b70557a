"""The backward in the compact form, docs/math.md (11) to (15): three launches, the last two in compact_gradients.py. A
program writes to its own memory only, in a fixed order: no atomics, the same bits on every run."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vvae_fast.spec import FlowSpec
from vvae_fast.triton import _heuristics
from vvae_fast.triton.blocks import (
    CHUNK,
    GRAM,
    constrain_chunk,
    dot,
    load_params,
    load_state,
    load_w_and_u_hat,
    rows_of_program,
    scan_back,
    store_gram,
    store_state,
)
from vvae_fast.triton.compact_gradients import GradientsPlan, launch_gradients, plan_gradients
from vvae_fast.triton.launch import Call, Launch, Layout, Tensors, ceil_div, copied, layouts, planned
from vvae_fast.triton.math import AnyFlow, activate, step_adjoint, unit


@triton.jit(do_not_specialize=["rows", "rows_per_set", "num_steps", "num_sets", "num_blocks"])
def compact_backward_kernel(
    grad_z,  # [rows, D]
    grad_log_det,  # [rows]
    u,  # [sets, K, D]
    w,  # [sets, K, D]
    a,  # [K, rows]
    dz,  # [rows, D], contiguous
    delta,  # [K, rows]
    constraint,  # [sets, 3, K]: c, s and of_w, where u_hat = u + of_w w
    state,  # [rows, D], contiguous: g between chunks; dz or, for half precision, float32
    scratch,  # [programs, GRAM + CHUNK BLOCK_ROWS]: a chunk's Gram matrix, and its h' [CHUNK, BLOCK_ROWS]
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
    PRECISION: tl.constexpr,
):
    """delta and dz of BLOCK_ROWS rows of one set a program, and the constraint of the set, for compact_gradients.py."""
    D: tl.constexpr = FIXED.dim
    dtype: tl.constexpr = a.dtype.element_ty
    program, owner, block, row, inside = rows_of_program(num_blocks, num_sets, rows_per_set, BLOCK_ROWS, FIXED.shared)
    scratch += program * (GRAM + CHUNK * BLOCK_ROWS)
    slope = scratch + GRAM + tl.arange(0, BLOCK_ROWS)  # [R]
    rows = rows.to(tl.int64)
    step = tl.arange(0, CHUNK)  # [CHUNK]
    col = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    constraint += owner * 3 * num_steps
    lambda_ = tl.load(grad_log_det + row * FIXED.grad_log_det, inside, 0)  # [R]
    chunks = tl.cdiv(num_steps, CHUNK)
    for nth in tl.range(chunks, num_stages=1):
        first = (chunks - 1 - nth).to(tl.int64) * CHUNK
        steps = first + step < num_steps  # [CHUNK]
        left = tl.where(inside, num_steps - first, 0)  # [R]
        u_at = u + owner * FIXED.u.set + (first + step)[:, None] * FIXED.u.step  # [CHUNK, 1]
        w_at = w + owner * FIXED.w.set + (first + step)[:, None] * FIXED.w.step  # [CHUNK, 1]
        c, s, _, of_w = constrain_chunk(u_at, w_at, steps, FIXED, BLOCK_D, CONSTRAINT, dtype)  # [CHUNK]
        products = tl.zeros([BLOCK_ROWS, CHUNK], dtype)
        gram = tl.zeros([CHUNK, CHUNK], dtype)
        for start in tl.range(0, D, BLOCK_D, num_stages=1):
            at = start + col  # [BLOCK_D]
            w_k, u_hat = load_w_and_u_hat(u_at, w_at, of_w, at, steps, FIXED)  # [CHUNK, BLOCK_D]
            g = load_state(nth > 0, grad_z, FIXED.grad_z, state, row, inside, at, D)  # [R, BLOCK_D]
            products = dot(g, tl.trans(u_hat), products, PRECISION)
            gram = dot(u_hat, tl.trans(w_k), gram, PRECISION)

        saved = inside[:, None] & steps[None, :]  # [R, CHUNK]
        delta_row = delta + first * rows + row  # [R]
        delta_tile = delta_row[:, None] + step.to(tl.int64)[None, :] * rows  # [R, CHUNK]
        a_tile = (a + first * rows + row)[:, None] + step.to(tl.int64)[None, :] * rows  # [R, CHUNK]
        h, h_prime = activate(tl.load(a_tile, saved, F.padding_preactivation), F)  # [R, CHUNK]
        of_step = unit(s, CONSTRAINT)[None, :]
        d, _ = step_adjoint(products, lambda_[:, None], h, h_prime, c[None, :], s[None, :], of_step, F)  # [R, CHUNK]
        tl.store(delta_tile, d, saved)  # without the sum in (11), which comes with the scan
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
            w_k = load_params(w_at, at, FIXED.w, steps, D, dtype)  # [CHUNK, BLOCK_D]
            g = load_state(nth > 0, grad_z, FIXED.grad_z, state, row, inside, at, D)  # [R, BLOCK_D]
            g = dot(d, w_k, g, PRECISION)
            store_state(nth + 1 < chunks, state, dz, g, row, inside, at, D)
        tl.debug_barrier()  # other threads read this g next


class _Plan(NamedTuple):
    copies: tuple[bool, ...] | None  # of the inputs
    constraint: tuple[int, int, int]
    state: torch.dtype | None  # of g between chunks; None: dz
    scratch: tuple[int, int]
    launch: Launch
    gradients: GradientsPlan


@planned
def _plan(of_tensors: tuple[Layout, ...], dtype: torch.dtype, device: torch.device, spec: FlowSpec) -> _Plan:
    names = ("grad_z", "grad_log_det", "z", "u", "w", "du", "dw", "db")
    call = Call(dict(zip(names, of_tensors, strict=True)), dtype)
    config = _heuristics.compact("backward", call.rows, call.dim, call.shared, call.dtype)
    num_blocks = ceil_div(call.rows_per_set, config.block_rows)
    programs = call.num_sets * num_blocks
    plan = Launch(
        compact_backward_kernel,
        (programs,),
        *(call.rows, call.rows_per_set, call.num_steps, call.num_sets, num_blocks),
        call.fixed("grad_z", "grad_log_det", "u", "w"),
        *(config.block_rows, config.block_dim, spec.constraint, AnyFlow.of(spec), config.precision),
        num_warps=config.num_warps,
    )
    state, scratch = None if dtype == call.dtype else call.dtype, GRAM.value + CHUNK.value * config.block_rows
    constraint = call.num_sets, 3, call.num_steps
    return _Plan(call.copies, constraint, state, (programs, scratch), plan, plan_gradients(call, spec))


def launch_compact_backward(
    inputs: Tensors, a: Tensor, dz: Tensor, gradients: Tensors, spec: FlowSpec, params: bool = True
) -> None:
    """From grad_z, grad_log_det, z, u and w, and from the saved a, fills dz [R, D], contiguous, and with `params` the
    gradients du, dw and db, in which the steps of a set are contiguous."""
    z = inputs[2]
    plan = _plan(layouts(*inputs, *gradients), z.dtype, z.device, spec)
    grad_z, grad_log_det, z, u, w = copied(plan.copies, inputs)
    delta, constraint = torch.empty_like(a), a.new_empty(plan.constraint)
    state = dz if plan.state is None else torch.empty_like(dz, dtype=plan.state)
    scratch = a.new_empty(plan.scratch)
    plan.launch(grad_z, grad_log_det, u, w, a, dz, delta, constraint, state, scratch)
    if params:
        launch_gradients(plan.gradients, (grad_z, grad_log_det, z), (u, w), (a, delta, constraint), gradients)
