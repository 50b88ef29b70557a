"""The oracle: planar flows as a loop over the K steps in plain PyTorch, with a hand-written adjoint and an inverse.

Everything here runs on any device and dtype, under torch.func, forward-mode AD and double backward. The kernels are its
twins: same names, same order. Shapes: z [*batch, D]; u, w [*params, K, D] and b [*params, K], where *params is empty
(shared) or ends *batch (amortized), so that indexing one step and broadcasting is all that is needed.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from vvae_fast.reference.activations import activate, log_abs_determinant, solve, step_adjoint
from vvae_fast.spec import DEFAULT, FlowSpec

LEAST_ALPHA = {torch.float32: -87.0, torch.float64: -708.0}  # that s holds, docs/math.md (38)


class Constrained(NamedTuple):
    """The invertible parameters of K steps, docs/math.md (4), (5), (29), (38)."""

    u_hat: Tensor  # [*params, K, D]
    c: Tensor  # [*params, K]  w . u_hat
    s: Tensor  # [*params, K]  1 + c, taken from m(alpha) + 1: 1 + c would cancel
    sunk: Tensor  # [*params, K]  what log s lies below the least s that is held, else 0
    unit: Tensor  # [*params, K]  gradients of c are kept times this: s, and 1 without the constraint
    alpha: Tensor  # [*params, K]  w . u
    rho: Tensor  # [*params, K]  u_hat = u + rho w / n
    inv_n: Tensor  # [*params, K]  1 / |w|^2, and 0 where w = 0 or |w|^2 underflows


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x) at full precision, in every mode of differentiation: F.softplus is linear from x = 20 on."""
    positive = x > 0
    return torch.where(positive, x, 0) + torch.log1p(torch.exp(torch.where(positive, -x, x)))


def constrain(u: Tensor, w: Tensor, constraint: str) -> Constrained:
    """u_hat with w . u_hat > -1: Rezende & Mohamed 2015, appendix A.1, docs/math.md (4), (5), or flowjax's (29)."""
    alpha = (w * u).sum(-1)  # [*params, K]
    if constraint == "none":
        zero = torch.zeros_like(alpha)
        return Constrained(u, alpha, 1 + alpha, zero, zero + 1, alpha, zero, zero)
    n = (w * w).sum(-1)  # [*params, K]
    nonzero = n >= torch.finfo(n.dtype).tiny
    inv_n = torch.where(nonzero, 1 / torch.where(nonzero, n, 1), 0)  # [*params, K]
    least = LEAST_ALPHA[alpha.dtype]
    s, sunk = softplus(alpha.clamp(min=least)), torch.where(nonzero, (alpha - least).clamp(max=0), 0)
    if constraint == "softplus":
        rho = softplus(-alpha) - 1  # [*params, K]
    else:
        s = torch.log1p(s)
        rho = s - (1 + alpha)  # 1 + alpha is exact where it comes near s
    s = torch.where(nonzero, s, 1)  # [*params, K]
    u_hat = u + (rho * inv_n)[..., None] * w  # [*params, K, D]
    return Constrained(u_hat, s - 1, s, sunk, s, alpha, rho, inv_n)


def unconstrain(u_hat: Tensor, w: Tensor, s: Tensor) -> Tensor:
    """The u [*params, K, D] that `constrain` maps to c = s - 1 and to u_hat, moved along w to w . u_hat = c,
    docs/math.md (65). NaN where s <= 0."""
    alpha = s + torch.log(-torch.expm1(-s))  # [*params, K]  softplus(alpha) = s
    n = (w * w).sum(-1)  # [*params, K]
    nonzero = n >= torch.finfo(n.dtype).tiny
    along = (alpha - (w * u_hat).sum(-1)) / torch.where(nonzero, n, 1)  # [*params, K]
    return u_hat + torch.where(nonzero, along, 0)[..., None] * w


def _constraint_slopes(alpha: Tensor, constraint: str) -> tuple[Tensor, Tensor]:
    """dc/dalpha, which is held where s is, and -drho/dalpha [*params, K], docs/math.md (6), (30)."""
    up, down = torch.sigmoid(alpha.clamp(min=LEAST_ALPHA[alpha.dtype])), torch.sigmoid(-alpha)
    if constraint == "softplus":
        return up, down
    s = softplus(alpha)
    return up / (1 + s), (down + s) / (1 + s)


def constrain_backward(
    v: Tensor, gamma: Tensor, u: Tensor, w: Tensor, at: Constrained, constraint: str
) -> tuple[Tensor, Tensor]:
    """du, dw [*params, K, D] from v = dL/du_hat [*params, K, D], gamma = dL/dc unit [*params, K], docs/math.md (6)."""
    if constraint == "none":
        return v + gamma[..., None] * w, gamma[..., None] * u
    q = (v * w).sum(-1) * at.inv_n  # [*params, K]  v . w / n
    nonzero = at.inv_n > 0
    dc, minus_drho = _constraint_slopes(at.alpha, constraint)
    dalpha = torch.where(nonzero, gamma * (dc / at.unit) - q * minus_drho, 0)  # [*params, K]  (39)
    du = v + dalpha[..., None] * w
    w_n = at.inv_n[..., None] * w  # w / n first: rho q / n^2 alone overflows where |w| is small
    dw = (at.rho * at.inv_n)[..., None] * v + dalpha[..., None] * u - (2 * at.rho * q)[..., None] * w_n
    return du, dw


def planar_forward(
    z: Tensor, u: Tensor, w: Tensor, b: Tensor, spec: FlowSpec = DEFAULT
) -> tuple[Tensor, Tensor, Tensor]:
    """z_K [*batch, D], log_det [*batch] and the pre-activations a [K, *batch], docs/math.md (1) to (3)."""
    p = constrain(u, w, spec.constraint)
    log_det = torch.zeros_like(z[..., 0])  # [*batch]
    pre_activations = []
    for k in range(u.shape[-2]):
        a = (z * w[..., k, :]).sum(-1) + b[..., k]  # [*batch]
        act = activate(a, spec.activation, spec.slope)
        log_det = log_det + log_abs_determinant(act, p.c[..., k], p.s[..., k], p.sunk[..., k], spec.log_det_eps)
        z = z + p.u_hat[..., k, :] * act.h[..., None]  # [*batch, D]
        pre_activations.append(a)
    a = torch.stack(pre_activations) if pre_activations else log_det.new_empty((0, *log_det.shape))
    return z, log_det, a


def planar_backward(
    grad_z: Tensor, grad_log_det: Tensor, z: Tensor, u: Tensor, w: Tensor, b: Tensor, spec: FlowSpec = DEFAULT
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dz [*batch, D], du and dw [*params, K, D], db [*params, K]: the adjoint of `planar_forward`, docs/math.md (16).

    Written in differentiable operations, so that it serves double backward too.
    """
    p = constrain(u, w, spec.constraint)
    z_before, activated = [], []
    for k in range(u.shape[-2]):
        a = (z * w[..., k, :]).sum(-1) + b[..., k]  # [*batch]
        act = activate(a, spec.activation, spec.slope)
        z_before.append(z)
        activated.append(act)
        z = z + p.u_hat[..., k, :] * act.h[..., None]

    g = grad_z  # [*batch, D]  dL/dz_k
    of_v, of_dw, of_db, of_gamma = [], [], [], []  # of the steps, the last one first
    for k in reversed(range(u.shape[-2])):
        act = activated[k]
        c, s, unit = p.c[..., k], p.s[..., k], p.unit[..., k]
        e = (g * p.u_hat[..., k, :]).sum(-1)  # [*batch]
        delta, gamma_k = step_adjoint(e, grad_log_det, act, c, s, unit, spec.log_det_eps)  # [*batch]
        params = w[..., k, :].shape
        of_v.append((g * act.h[..., None]).sum_to_size(params))
        of_dw.append((z_before[k] * delta[..., None]).sum_to_size(params))
        of_db.append(delta.sum_to_size(params[:-1]))
        of_gamma.append(gamma_k.sum_to_size(params[:-1]))
        g = g + delta[..., None] * w[..., k, :]
    if not of_v:
        return g, torch.zeros_like(u), torch.zeros_like(w), torch.zeros_like(b)
    v, dw = (torch.stack(x[::-1], -2) for x in (of_v, of_dw))  # [*params, K, D]
    db, gamma = (torch.stack(x[::-1], -1) for x in (of_db, of_gamma))  # [*params, K]
    du, dw_constraint = constrain_backward(v, gamma, u, w, p, spec.constraint)
    return g, du, dw + dw_constraint, db


def planar_inverse(z: Tensor, u: Tensor, w: Tensor, b: Tensor, spec: FlowSpec = DEFAULT) -> tuple[Tensor, Tensor]:
    """z_0 [*batch, D] from z_K, and the log_det [*batch] of this inverse map, docs/math.md (17), (18)."""
    p = constrain(u, w, spec.constraint)
    log_det = torch.zeros_like(z[..., 0])  # [*batch]
    for k in reversed(range(u.shape[-2])):
        c, s = p.c[..., k], p.s[..., k]
        rhs = (z * w[..., k, :]).sum(-1) + b[..., k]  # [*batch]
        act = activate(solve(rhs, c, s, spec.activation, spec.slope), spec.activation, spec.slope)
        log_det = log_det - log_abs_determinant(act, c, s, p.sunk[..., k])
        z = z - p.u_hat[..., k, :] * act.h[..., None]
    return z, log_det
