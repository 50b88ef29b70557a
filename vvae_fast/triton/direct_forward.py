"""The forward and the inverse in the direct form, docs/math.md (1) to (8), (17): z stays in registers, one launch, any
parameter sets."""

import torch
import triton
import triton.language as tl

from vvae_fast.spec import FlowSpec
from vvae_fast.triton import _heuristics
from vvae_fast.triton.blocks import elements
from vvae_fast.triton.launch import Call, Launch, Layout, Tensors, ceil_div, copied, layouts, planned
from vvae_fast.triton.math import AnyFlow, activate, constrain, log_abs_determinant
from vvae_fast.triton.root import solve


@triton.jit(do_not_specialize=["rows", "num_steps", "num_sets"])
def direct_forward_kernel(
    z,  # [rows, D]
    u,  # [sets, K, D]
    w,  # [sets, K, D]
    b,  # [sets, K]
    z_K,  # [rows, D], contiguous
    log_det,  # [rows]
    a,  # [K, rows]
    rows,
    num_steps,
    num_sets,
    FIXED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CONSTRAINT: tl.constexpr,
    F: tl.constexpr,
    INVERSE: tl.constexpr,
    SAVE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """BLOCK_ROWS rows a program. Parameters have one row where they are shared: [S, BLOCK_D], S = 1 or BLOCK_ROWS. The
    inverse takes z_K for z, the last step first, and leaves z_0 and the roots a of docs/math.md (17): a flow of its own
    with -h in place of h, (40)."""
    D: tl.constexpr = FIXED.dim
    dtype: tl.constexpr = tl.float64 if z.dtype.element_ty == tl.float64 else tl.float32
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # [R]
    col = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    inside = row < rows
    mask = inside[:, None] & (col < D)[None, :]  # [R, BLOCK_D]
    if FIXED.shared:
        owner = tl.zeros([1], tl.int64)  # [S]
        owned = tl.full([1], 1, tl.int1)  # [S]
    else:
        owner = row % num_sets
        owned = inside
    sign: tl.constexpr = -1 if INVERSE else 1  # in which the steps are taken
    first = num_steps.to(tl.int64) - 1 if INVERSE else 0
    u += owner[:, None] * FIXED.u.set + first * FIXED.u.step + col[None, :] * FIXED.u.col  # [S, BLOCK_D]
    w += owner[:, None] * FIXED.w.set + first * FIXED.w.step + col[None, :] * FIXED.w.col  # [S, BLOCK_D]
    b += owner * FIXED.b.set + first * FIXED.b.step  # [S]
    a += row + first * rows  # [R]
    params = owned[:, None] & (col < D)[None, :]  # [S, BLOCK_D]

    z_k = tl.load(elements(z, row, col, FIXED.z), mask, 0).to(dtype)  # [R, BLOCK_D]
    sum_of_logs = tl.zeros([BLOCK_ROWS], dtype)  # [R]
    for _ in tl.range(num_steps, num_stages=STAGES):
        u_k = tl.load(u, params, 0).to(dtype)  # [S, BLOCK_D]
        w_k = tl.load(w, params, 0).to(dtype)  # [S, BLOCK_D]
        b_k = tl.load(b, owned, 0).to(dtype)  # [S]
        c, s, sunk, rho, inv_n, _, _ = constrain(tl.sum(w_k * u_k, 1), tl.sum(w_k * w_k, 1), CONSTRAINT)  # [S]
        a_k = tl.sum(z_k * w_k, 1) + b_k  # [R]
        if INVERSE:
            a_k = solve(a_k, c, s, F)
        h, h_prime = activate(a_k, F)
        sum_of_logs += sign * log_abs_determinant(h, h_prime, c, s, sunk, F)
        z_k += (u_k + (rho * inv_n)[:, None] * w_k) * (sign * h)[:, None]
        if SAVE:
            tl.store(a, a_k, inside)
        u += sign * FIXED.u.step
        w += sign * FIXED.w.step
        b += sign * FIXED.b.step
        a += sign * rows
    tl.store(z_K + row[:, None] * D + col[None, :], z_k, mask)
    tl.store(log_det + row, sum_of_logs, inside)


@planned
def _plan(
    of_inputs: tuple[Layout, ...], dtype: torch.dtype, device: torch.device, spec: FlowSpec, save: bool, inverse: bool
) -> tuple[Launch, tuple[bool, ...] | None]:
    """The launch, and which of z, u, w and b it takes as copies."""
    call = Call(dict(zip("zuwb", of_inputs, strict=True)), dtype)
    config = _heuristics.direct("forward", call.rows, call.dim, call.shared, call.dtype)
    plan = Launch(
        direct_forward_kernel,
        (ceil_div(call.rows, config.block_rows),),
        *(call.rows, call.num_steps, call.num_sets, call.fixed("z", "u", "w", "b")),
        *(config.block_rows, config.block_dim, spec.constraint, AnyFlow.of(spec), inverse, save, config.num_stages),
        num_warps=config.num_warps,
        capped=True,
    )
    return plan, call.copies


def launch_direct_forward(inputs: Tensors, outputs: Tensors, spec: FlowSpec, save: bool, inverse: bool = False) -> None:
    """From z, u, w and b fills z_K [R, D], log_det [R] and, if `save`, a [K, R], all contiguous. The inverse goes from
    z_K in z to z_0."""
    z = inputs[0]
    plan, copies = _plan(layouts(*inputs), z.dtype, z.device, spec, save, inverse)
    plan(*copied(copies, inputs), *outputs)
