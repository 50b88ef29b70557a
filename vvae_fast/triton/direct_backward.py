"""The backward of the flow and of its inverse in the direct form, docs/math.md (16), (40): one launch, and one that
adds the partial sums of shared parameters. A program writes to its own memory only, in a fixed order: no atomics, the
same bits on every run."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vvae_fast.spec import FlowSpec
from vvae_fast.triton import _heuristics
from vvae_fast.triton.blocks import elements, sum_partials
from vvae_fast.triton.launch import (
    BARRIER_ORDERS_MEMORY,
    Call,
    Launch,
    Layout,
    Params,
    Tensors,
    ceil_div,
    copied,
    layouts,
    planned,
)
from vvae_fast.triton.math import AnyFlow, activate, constrain, constrain_backward, step_adjoint, unit
from vvae_fast.triton.root import inverse_of_u, inverse_step_adjoint


@triton.jit(do_not_specialize=["rows", "num_steps", "num_sets", "first_block", "num_blocks"])
def direct_backward_kernel(
    grad_z,  # [rows, D]
    grad_log_det,  # [rows]
    z,  # [rows, D]
    u,  # [sets, K, D]
    w,  # [sets, K, D]
    a,  # [K, rows]
    dz,  # [rows, D], contiguous
    du,  # [sets or programs, K, D], rows contiguous
    dw,  # [sets or programs, K, D], rows contiguous
    db,  # [sets or programs, K]
    kept,  # [programs, K, BLOCK_ROWS, D] where parameters are shared, else [sets, K, D]: z_{k-1} of a block, may be dw
    rows,
    num_steps,
    num_sets,
    first_block,
    num_blocks,  # of rows that a program takes in turn, adding up the gradients of its parameters
    partial,  # numbers from a program's gradients to the next one's where parameters are shared
    FIXED: tl.constexpr,
    KEPT_SET: tl.constexpr,  # stride
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CONSTRAINT: tl.constexpr,
    F: tl.constexpr,
    INVERSE: tl.constexpr,
    ACCUMULATE: tl.constexpr,  # there are several blocks
    SWEEP: tl.constexpr,
    WALK_BACK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """SWEEP keeps the z_{k-1} of a block of rows, WALK_BACK uses them. Parameters have one row where they are shared:
    [S, BLOCK_D], S = 1 or BLOCK_ROWS. The inverse is a flow of its own, from its z_K and from the last step to the
    first, docs/math.md (40)."""
    D: tl.constexpr = FIXED.dim
    dtype: tl.constexpr = tl.float64 if z.dtype.element_ty == tl.float64 else tl.float32
    program = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    sign: tl.constexpr = -1 if INVERSE else 1  # in which the sweep takes the steps
    first_step = num_steps.to(tl.int64) - 1 if INVERSE else 0
    end = -1 if INVERSE else num_steps.to(tl.int64)  # the step after the last one
    if FIXED.shared:
        owner = tl.zeros([1], tl.int64)  # [S]
        owned = tl.full([1], 1, tl.int1)  # [S]
        target = program * partial
        kept_step: tl.constexpr = BLOCK_ROWS * D
        kept += program * num_steps * kept_step + tl.arange(0, BLOCK_ROWS)[:, None] * D + col[None, :]  # [R, BLOCK_D]
    else:
        owner = program * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        owned = owner < num_sets
        target = 0
        kept_step: tl.constexpr = D
        kept += owner[:, None] * KEPT_SET + col[None, :]  # [R, BLOCK_D]
    u += owner[:, None] * FIXED.u.set + col[None, :] * FIXED.u.col  # [S, BLOCK_D]
    w += owner[:, None] * FIXED.w.set + col[None, :] * FIXED.w.col  # [S, BLOCK_D]
    du += target + owner[:, None] * FIXED.du.set + end * D + col[None, :]  # [S, BLOCK_D]
    dw += target + owner[:, None] * FIXED.dw.set + end * D + col[None, :]  # [S, BLOCK_D]
    db += target + owner * FIXED.db.set + end  # [S]
    params = owned[:, None] & (col < D)[None, :]  # [S, BLOCK_D]

    for block in tl.range(first_block, first_block + num_blocks):
        if FIXED.shared:
            first = (block * tl.num_programs(0).to(tl.int64) + program) * BLOCK_ROWS
            row = first + tl.arange(0, BLOCK_ROWS)  # [R]
            inside = row < rows
        else:
            row = block * num_sets.to(tl.int64) + owner
            inside = owned
        mask = inside[:, None] & (col < D)[None, :]  # [R, BLOCK_D]

        if SWEEP:
            z_k = tl.load(elements(z, row, col, FIXED.z), mask, 0).to(dtype)  # [R, BLOCK_D]
            u_at, w_at = u + first_step * FIXED.u.step, w + first_step * FIXED.w.step  # of the loop's step
            a_at, kept_at = a + row + first_step * rows, kept + first_step * kept_step
            for _ in tl.range(num_steps, num_stages=STAGES):
                tl.store(kept_at, z_k, mask)
                u_k = tl.load(u_at, params, 0).to(dtype)  # [S, BLOCK_D]
                w_k = tl.load(w_at, params, 0).to(dtype)  # [S, BLOCK_D]
                _, _, _, rho, inv_n, _, _ = constrain(tl.sum(w_k * u_k, 1), tl.sum(w_k * w_k, 1), CONSTRAINT)  # [S]
                h, _ = activate(tl.load(a_at, inside, F.padding_preactivation), F)  # [R]
                z_k += (u_k + (rho * inv_n)[:, None] * w_k) * (sign * h)[:, None]
                u_at += sign * FIXED.u.step
                w_at += sign * FIXED.w.step
                a_at += sign * rows
                kept_at += sign * kept_step
        if SWEEP and WALK_BACK:
            tl.debug_barrier()  # another thread may read this z

        if WALK_BACK:
            g = tl.load(elements(grad_z, row, col, FIXED.grad_z), mask, 0).to(dtype)  # [R, BLOCK_D]
            lambda_ = tl.load(grad_log_det + row * FIXED.grad_log_det, inside, 0).to(dtype)  # [R]
            u_at, w_at, a_at, kept_at = (
                u + end * FIXED.u.step,
                w + end * FIXED.w.step,
                a + row + end * rows,
                kept + end * kept_step,
            )
            du_at, dw_at, db_at = du, dw, db
            for _ in tl.range(num_steps, num_stages=STAGES):
                u_at -= sign * FIXED.u.step
                w_at -= sign * FIXED.w.step
                a_at -= sign * rows
                kept_at -= sign * kept_step
                du_at -= sign * D
                dw_at -= sign * D
                db_at -= sign
                u_k = tl.load(u_at, params, 0).to(dtype)  # [S, BLOCK_D]
                w_k = tl.load(w_at, params, 0).to(dtype)  # [S, BLOCK_D]
                alpha, n = tl.sum(w_k * u_k, 1), tl.sum(w_k * w_k, 1)  # [S]
                c, s, _, rho, inv_n, rising, falling = constrain(alpha, n, CONSTRAINT)  # [S]
                u_hat = u_k + (rho * inv_n)[:, None] * w_k  # [S, BLOCK_D]
                h, h_prime = activate(tl.load(a_at, inside, F.padding_preactivation), F)  # [R]
                e = tl.sum(g * u_hat, 1)  # [R]
                if INVERSE:
                    delta, gamma = inverse_step_adjoint(e, lambda_, h, h_prime, c, s, F)  # [R]
                else:
                    delta, gamma = step_adjoint(e, lambda_, h, h_prime, c, s, unit(s, CONSTRAINT), F)  # [R]
                h = sign * h
                v = g * h[:, None]  # [R, BLOCK_D]
                dw_k = tl.load(kept_at, mask, 0) * delta[:, None]  # [R, BLOCK_D]
                db_k, delta_h = delta, delta * h  # [R]
                g += w_k * delta[:, None]
                if FIXED.shared:
                    v, dw_k = tl.sum(v, 0)[None, :], tl.sum(dw_k, 0)[None, :]  # [S, BLOCK_D]
                    db_k, gamma = tl.sum(db_k, 0, keep_dims=True), tl.sum(gamma, 0, keep_dims=True)  # [S]
                    if INVERSE:
                        delta_h = tl.sum(delta_h, 0, keep_dims=True)
                # The constraint's adjoint (6) is linear: partial sums may go through it.
                dalpha, of_v, of_w_n = constrain_backward(rho, inv_n, rising, falling, tl.sum(v * w_k, 1), gamma)
                of_u = inverse_of_u(dalpha, delta_h, inv_n) if INVERSE else dalpha
                du_k = v + dalpha[:, None] * w_k
                dw_k += of_v[:, None] * v + of_u[:, None] * u_k + of_w_n[:, None] * (inv_n[:, None] * w_k)
                if ACCUMULATE:
                    before = block > 0
                    du_k += tl.load(du_at, params & before, 0)
                    dw_k += tl.load(dw_at, params & before, 0)
                    db_k += tl.load(db_at, owned & before, 0)
                tl.store(du_at, du_k, params)
                tl.store(dw_at, dw_k, params)
                tl.store(db_at, db_k, owned)
            tl.store(dz + row[:, None] * D + col[None, :], g, mask)
        if ACCUMULATE:
            tl.debug_barrier()  # another thread may read these sums, or write the next z, in the next block


@triton.jit(do_not_specialize=["num_partials", "matrix", "size", "blocks"])
def add_partials_kernel(
    partials,  # [sets, num_partials, partial]: du, dw and db, concatenated
    du,  # [sets, K, D], a set's steps contiguous
    dw,  # [sets, K, D], a set's steps contiguous
    db,  # [sets, K]
    num_partials,
    partial,
    matrix,  # K D
    size,  # K (2 D + 1)
    blocks,  # of a set
    FIXED: tl.constexpr,
    BLOCK_PARTIALS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Adds a set's partial sums in a fixed order, BLOCK elements a program."""
    program = tl.program_id(0).to(tl.int64)
    owner = program // blocks
    i = program % blocks * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    partials += owner * num_partials * partial
    total = sum_partials(partials, partial.to(tl.int64), num_partials, i, i < size, BLOCK_PARTIALS)
    tl.store(du + owner * FIXED.du.set + i, total, i < matrix)
    tl.store(dw + owner * FIXED.dw.set + (i - matrix), total, (i >= matrix) & (i < 2 * matrix))
    tl.store(db + owner * FIXED.db.set + (i - 2 * matrix), total, (i >= 2 * matrix) & (i < size))


class _Plan(NamedTuple):
    copies: tuple[bool, ...] | None  # of the inputs
    launches: tuple[Launch, ...]  # of direct_backward_kernel, in turn
    kept: tuple[int, ...] | None  # None: dw, in which each dw_k takes the place of its z_{k-1}, read just before
    partials: tuple[int, int] | None  # where du, dw and db are added up by a launch of its own
    of_partials: tuple[int, int, int]  # du, dw and db, and what aligns the next
    adding: Launch | None


@planned
def _plan(
    of_tensors: tuple[Layout, ...], dtype: torch.dtype, device: torch.device, spec: FlowSpec, inverse: bool
) -> _Plan:
    names = ("grad_z", "grad_log_det", "z", "u", "w", "du", "dw", "db")
    call = Call(dict(zip(names, of_tensors, strict=True)), dtype)
    config = _heuristics.direct("backward", call.rows, call.dim, call.shared, call.dtype)
    matrix, size = call.num_steps * call.dim, call.num_steps * (2 * call.dim + 1)
    if call.shared:
        programs = _heuristics.num_partials(call.rows, size, config)
        num_blocks = ceil_div(call.rows, programs * config.block_rows)
    else:
        programs, num_blocks = ceil_div(call.num_sets, config.block_rows), call.rows_per_set
    in_partials = programs > 1 if call.shared else num_blocks > 1 and dtype != call.dtype
    partial = 16 * ceil_div(size, 16)  # aligned
    fixed = call.fixed(*names)
    if call.shared:
        kept, kept_set = (programs, call.num_steps, config.block_rows, call.dim), 0
    elif num_blocks == 1 and dtype == call.dtype:
        kept, kept_set = None, fixed.dw.set
    else:
        kept, kept_set = (call.num_sets, call.num_steps, call.dim), matrix
    if in_partials and not call.shared:
        to_partials = Params(partial, call.dim, 1)
        fixed = fixed._replace(du=to_partials, dw=to_partials, db=to_partials)
    # (first block, blocks, SWEEP, WALK_BACK): a launch for what another thread may read, if a barrier orders nothing.
    parts = [(0, num_blocks, True, True)]
    if not BARRIER_ORDERS_MEMORY:
        parts = [(block, 1, sweep, not sweep) for block in range(num_blocks) for sweep in (True, False)]
    launches = tuple(
        Launch(
            direct_backward_kernel,
            (programs,),
            *(call.rows, call.num_steps, call.num_sets, first_block, of_launch, partial, fixed, kept_set),
            *(config.block_rows, config.block_dim, spec.constraint, AnyFlow.of(spec)),
            *(inverse, num_blocks > 1, sweep, walk_back, config.num_stages),
            num_warps=config.num_warps,
            capped=True,
        )
        for first_block, of_launch, sweep, walk_back in parts
    )
    return _Plan(
        call.copies,
        launches,
        kept,
        (programs if call.shared else call.num_sets, partial) if in_partials else None,
        (matrix, matrix, partial - 2 * matrix),
        _plan_adding(call, programs, partial) if in_partials else None,
    )


def _plan_adding(call: Call, programs: int, partial: int) -> Launch:
    """The launch that adds the partial sums: of all programs where parameters are shared, else one for each set."""
    matrix, size, block = call.num_steps * call.dim, call.num_steps * (2 * call.dim + 1), 32
    blocks = ceil_div(size, block)
    return Launch(
        add_partials_kernel,
        (call.num_sets * blocks,),
        *(programs if call.shared else 1, partial, matrix, size, blocks, call.fixed("du", "dw", "db")),
        *(128 if call.shared else 1, block),
        num_warps=8 if call.shared else 1,
    )


def launch_direct_backward(
    inputs: Tensors,
    a: Tensor,
    dz: Tensor,
    gradients: Tensors,
    spec: FlowSpec,
    params: bool = True,
    inverse: bool = False,
) -> None:
    """From grad_z, grad_log_det, z, u and w, and from the saved a, fills dz [R, D], contiguous, and the gradients du,
    dw and db, in which the steps of a set are contiguous. The inverse's z is what it was given, z_K, and a are its
    roots. Without `params` the gradients hold anything."""
    z = inputs[2]
    plan = _plan(layouts(*inputs, *gradients), z.dtype, z.device, spec, inverse)
    inputs, to = copied(plan.copies, inputs), gradients
    if plan.partials is not None:
        partials = a.new_empty(plan.partials)
        to = partials.split_with_sizes(plan.of_partials, 1)
    kept = gradients[1] if plan.kept is None else a.new_empty(plan.kept)
    for of_rows in plan.launches:
        of_rows(*inputs, a, dz, *to, kept)
    if plan.adding is not None and params:
        plan.adding(partials, *gradients)
