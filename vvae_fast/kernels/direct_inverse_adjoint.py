"""The gradient that the inverse passes on, dL/dz_K of docs/math.md (35), in the direct form, from the first step to the
last. With it the backward gives those of the parameters, (36)."""

import triton
import triton.language as tl
from torch import Tensor

from vvae_fast import shapes
from vvae_fast.kernels import _heuristics
from vvae_fast.kernels.launch import ceil_div, launch, set_strides, unit_columns
from vvae_fast.kernels.math import Activation, activate, constrain
from vvae_fast.kernels.root import root_gradient
from vvae_fast.shapes import Formulas


@triton.jit(do_not_specialize=["rows", "num_steps", "num_sets"])
def direct_inverse_adjoint_kernel(
    grad_z,  # [rows, D]
    grad_log_det,  # [rows]
    u,  # [sets, K, D]
    w,  # [sets, K, D]
    a,  # [K, rows]
    dz,  # [rows, D], contiguous
    minus_dz,  # [rows, D], contiguous
    minus_log_det,  # [rows]
    rows,
    num_steps,
    num_sets,
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
    STAGES: tl.constexpr,
):
    """BLOCK_ROWS rows a program. Parameters have one row where they are shared: [S, BLOCK_D], S = 1 or BLOCK_ROWS."""
    dtype: tl.constexpr = a.dtype.element_ty
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
    u += owner[:, None] * u_set + col[None, :] * u_col  # [S, BLOCK_D]
    w += owner[:, None] * w_set + col[None, :] * w_col  # [S, BLOCK_D]
    a += row  # [R]
    params = owned[:, None] & (col < D)[None, :]  # [S, BLOCK_D]

    g = tl.load(grad_z + row[:, None] * grad_z_row + col[None, :] * grad_z_col, mask, 0).to(dtype)  # [R, BLOCK_D]
    lambda_ = tl.load(grad_log_det + row * grad_log_det_row, inside, 0)  # [R]
    for _ in tl.range(num_steps, num_stages=STAGES):
        u_k = tl.load(u, params, 0).to(dtype)  # [S, BLOCK_D]
        w_k = tl.load(w, params, 0).to(dtype)  # [S, BLOCK_D]
        c, s, rho, inv_n, _, _ = constrain(tl.sum(w_k * u_k, 1), tl.sum(w_k * w_k, 1), CONSTRAINT)  # [S]
        h, h_prime = activate(tl.load(a, inside, F.absent), F)  # [R]
        u_hat = u_k + (rho * inv_n)[:, None] * w_k  # [S, BLOCK_D]
        mu = root_gradient(tl.sum(g * u_hat, 1), lambda_, h, h_prime, c, s, F)  # [R]
        g += w_k * mu[:, None]
        u += u_step
        w += w_step
        a += rows
    at = row[:, None] * D + col[None, :]  # [R, BLOCK_D]
    tl.store(dz + at, g, mask)
    tl.store(minus_dz + at, -g, mask)
    tl.store(minus_log_det + row, -lambda_, inside)


def launch_direct_inverse_adjoint(
    grad_z: Tensor,
    grad_log_det: Tensor,
    u: Tensor,
    w: Tensor,
    a: Tensor,
    dz: Tensor,
    minus_dz: Tensor,
    minus_log_det: Tensor,
    formulas: Formulas,
) -> None:
    """Fills dz [R, D], what the backward takes for (36), minus_dz [R, D] and minus_log_det [R], all contiguous."""
    rows, dim = grad_z.shape
    num_steps, num_sets = u.shape[-2], shapes.num_sets(u)
    config = _heuristics.direct("forward", rows, dim, num_sets == 1, a.dtype)
    grad_z, u, w = (unit_columns(t) for t in (grad_z, u, w))
    launch(
        direct_inverse_adjoint_kernel,
        (ceil_div(rows, config.block_rows),),
        grad_z,
        *(grad_z, grad_log_det, u, w, a, dz, minus_dz, minus_log_det, rows, num_steps, num_sets),
        *(*grad_z.stride(), *grad_log_det.stride(), *set_strides(u, 3), *set_strides(w, 3)),
        *(dim, config.block_dim, config.block_rows, num_sets == 1, formulas.constraint, Activation.of(formulas)),
        config.num_stages,
        num_warps=config.num_warps,
        capped=True,
    )
