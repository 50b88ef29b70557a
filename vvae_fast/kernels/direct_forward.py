"""The forward and the inverse in the direct form, docs/math.md (1) to (8), (17): z stays in registers, one launch, any
parameter sets."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vvae_fast import shapes
from vvae_fast.kernels import _heuristics
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
from vvae_fast.kernels.math import AnyFlow, activate, constrain, log_abs_determinant
from vvae_fast.kernels.root import solve
from vvae_fast.spec import FlowSpec as Formulas


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
    SHARED: tl.constexpr,
    CONSTRAINT: tl.constexpr,
    F: tl.constexpr,
    INVERSE: tl.constexpr,
    SAVE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """BLOCK_ROWS rows a program. Parameters have one row where they are shared: [S, BLOCK_D], S = 1 or BLOCK_ROWS. The
    inverse takes z_K for z, the last step first, and leaves z_0 and the roots a of docs/math.md (17): a flow of its own
    with -h in place of h, (40)."""
    dtype: tl.constexpr = tl.float64 if z.dtype.element_ty == tl.float64 else tl.float32
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # [R]
    col = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    inside = row < rows
    mask = inside[:, None] & (col < D)[None, :]  # [R, BLOCK_D]
    if SHARED:
        owner = tl.zeros([1], tl.int64)  # [S]
        owned = tl.full([1], 1, tl.int1)  # [S]
    else:
        owner = row % num_sets
        owned = inside
    sign: tl.constexpr = -1 if INVERSE else 1  # in which the steps are taken
    first = num_steps.to(tl.int64) - 1 if INVERSE else 0
    u += owner[:, None] * u_set + first * u_step + col[None, :] * u_col  # [S, BLOCK_D]
    w += owner[:, None] * w_set + first * w_step + col[None, :] * w_col  # [S, BLOCK_D]
    b += owner * b_set + first * b_step  # [S]
    a += row + first * rows  # [R]
    params = owned[:, None] & (col < D)[None, :]  # [S, BLOCK_D]

    z_k = tl.load(z + row[:, None] * z_row + col[None, :] * z_col, mask, 0).to(dtype)  # [R, BLOCK_D]
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
        u += sign * u_step
        w += sign * w_step
        b += sign * b_step
        a += sign * rows
    tl.store(z_K + row[:, None] * D + col[None, :], z_k, mask)
    tl.store(log_det + row, sum_of_logs, inside)


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
    inverse: bool,
) -> tuple[Launch, tuple[bool, ...] | None]:
    """The launch, and which of z, u, w and b it takes as copies."""
    copies, (z, u, w, b) = unit_columns(z, u, w, b)
    rows, dim, num_steps, num_sets = sizes(z, u)
    config = _heuristics.direct("forward", rows, dim, num_sets == 1, shapes.compute_dtype(dtype))
    plan = Launch(
        direct_forward_kernel,
        (ceil_div(rows, config.block_rows),),
        *(rows, num_steps, num_sets),
        *(*z[1], *set_strides(u, 3), *set_strides(w, 3), *set_strides(b, 2)),
        *(dim, config.block_dim, config.block_rows, num_sets == 1, formulas.constraint, AnyFlow.of(formulas)),
        *(inverse, save, config.num_stages),
        num_warps=config.num_warps,
        capped=True,
    )
    return plan, copies


def launch_direct_forward(
    z: Tensor,
    u: Tensor,
    w: Tensor,
    b: Tensor,
    z_K: Tensor,
    log_det: Tensor,
    a: Tensor,
    formulas: Formulas,
    save: bool,
    inverse: bool = False,
) -> None:
    """Fills z_K [R, D], log_det [R] and, if `save`, a [K, R], all contiguous. The inverse goes from z_K in z to z_0."""
    plan, copies = _plan(*map(layout, (z, u, w, b)), z.dtype, z.device, formulas, save, inverse)
    launch(plan, *copied(copies, z, u, w, b), z_K, log_det, a)
