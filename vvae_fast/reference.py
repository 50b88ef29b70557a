"""The oracle: planar flows as a loop over the K steps in plain PyTorch, with a hand-written adjoint and an inverse.

Everything here runs on any device and dtype, under torch.func, forward-mode AD and double backward. The kernels are its
twins: same names, same order. Shapes: z [*batch, D]; u, w [*params, K, D] and b [*params, K], where *params is empty
(shared) or ends *batch (amortized), so that indexing one step and broadcasting is all that is needed.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# Bisection alone reaches the last bit of a bracket of width 200 in this many halvings; Newton needs far fewer.
_ROOT_ITERATIONS = {torch.float32: 36, torch.float64: 66}


class Constrained(NamedTuple):
    """The invertible parameters of K steps, docs/math.md (4), (5)."""

    u_hat: Tensor  # [*params, K, D]
    c: Tensor  # [*params, K]  w . u_hat
    s: Tensor  # [*params, K]  1 + c, taken from the softplus: 1 + c would cancel
    alpha: Tensor  # [*params, K]  w . u
    rho: Tensor  # [*params, K]  u_hat = u + rho w / n
    inv_n: Tensor  # [*params, K]  1 / |w|^2, and 0 where w = 0 or |w|^2 underflows


class Activated(NamedTuple):
    """tanh and its first two derivatives at a [*batch]."""

    h: Tensor
    h_prime: Tensor
    h_second: Tensor


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x) at full precision, in every mode of differentiation: F.softplus is linear from x = 20 on."""
    positive = x > 0
    return torch.where(positive, x, 0) + torch.log1p(torch.exp(torch.where(positive, -x, x)))


def constrain(u: Tensor, w: Tensor, constraint: str) -> Constrained:
    """u_hat with w . u_hat > -1 (Rezende & Mohamed 2015, appendix A.1), docs/math.md (4), (5)."""
    alpha = (w * u).sum(-1)  # [*params, K]
    if constraint == "none":
        zero = torch.zeros_like(alpha)
        return Constrained(u, alpha, 1 + alpha, alpha, zero, zero)
    n = (w * w).sum(-1)  # [*params, K]
    nonzero = n >= torch.finfo(n.dtype).tiny
    inv_n = torch.where(nonzero, 1 / torch.where(nonzero, n, 1), 0)  # [*params, K]
    s = torch.where(nonzero, softplus(alpha), 1)  # [*params, K]
    rho = softplus(-alpha) - 1  # [*params, K]
    u_hat = u + (rho * inv_n)[..., None] * w  # [*params, K, D]
    return Constrained(u_hat, s - 1, s, alpha, rho, inv_n)


def constrain_backward(
    v: Tensor, gamma: Tensor, u: Tensor, w: Tensor, at: Constrained, constraint: str
) -> tuple[Tensor, Tensor]:
    """du and dw [*params, K, D] from v = dL/du_hat [*params, K, D] and gamma = dL/dc [*params, K], docs/math.md (6)."""
    if constraint == "none":
        return v + gamma[..., None] * w, gamma[..., None] * u
    q = (v * w).sum(-1) * at.inv_n  # [*params, K]  v . w / n
    nonzero = at.inv_n > 0
    dalpha = torch.where(nonzero, gamma * torch.sigmoid(at.alpha) - q * torch.sigmoid(-at.alpha), 0)  # [*params, K]
    du = v + dalpha[..., None] * w
    w_n = at.inv_n[..., None] * w  # w / n first: rho q / n^2 alone overflows where |w| is small
    dw = (at.rho * at.inv_n)[..., None] * v + dalpha[..., None] * u - (2 * at.rho * q)[..., None] * w_n
    return du, dw


def activate(a: Tensor) -> Activated:
    """tanh; its derivative without the cancellation of 1 - h^2, docs/math.md (7)."""
    h = torch.tanh(a)
    h_prime = 4 * torch.sigmoid(2 * a) * torch.sigmoid(-2 * a)
    return Activated(h, h_prime, -2 * h * h_prime)


def determinant(act: Activated, c: Tensor, s: Tensor) -> Tensor:
    """The determinant of one step [*batch], docs/math.md (7): near the zero of 1 + c h', a sum of positive terms."""
    x = c * act.h_prime
    return torch.where((x >= -0.5) | (c < -2), 1 + x, s - c * (act.h * act.h))


def log_abs_determinant(act: Activated, c: Tensor, s: Tensor) -> Tensor:
    """log|det| of one step [*batch], docs/math.md (8)."""
    x = c * act.h_prime
    mild = x >= -0.5
    det = torch.where(mild, 1, determinant(act, c, s))
    return torch.log1p(torch.where(mild, x, 0)) + torch.log(det.abs())


def planar_forward(
    z: Tensor, u: Tensor, w: Tensor, b: Tensor, constraint: str = "softplus"
) -> tuple[Tensor, Tensor, Tensor]:
    """z_K [*batch, D], log_det [*batch] and the pre-activations a [K, *batch], docs/math.md (1) to (3)."""
    p = constrain(u, w, constraint)
    log_det = torch.zeros_like(z[..., 0])  # [*batch]
    pre_activations = []
    for k in range(u.shape[-2]):
        a = (z * w[..., k, :]).sum(-1) + b[..., k]  # [*batch]
        act = activate(a)
        log_det = log_det + log_abs_determinant(act, p.c[..., k], p.s[..., k])
        z = z + p.u_hat[..., k, :] * act.h[..., None]  # [*batch, D]
        pre_activations.append(a)
    a = torch.stack(pre_activations) if pre_activations else log_det.new_empty((0, *log_det.shape))
    return z, log_det, a


def planar_backward(
    grad_z: Tensor, grad_log_det: Tensor, z: Tensor, u: Tensor, w: Tensor, b: Tensor, constraint: str = "softplus"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dz [*batch, D], du and dw [*params, K, D], db [*params, K]: the adjoint of `planar_forward`, docs/math.md (16).

    Written in differentiable operations, so that it serves double backward too.
    """
    p = constrain(u, w, constraint)
    z_before, pre_activations = [], []
    for k in range(u.shape[-2]):
        a = (z * w[..., k, :]).sum(-1) + b[..., k]  # [*batch]
        z_before.append(z)
        pre_activations.append(a)
        z = z + p.u_hat[..., k, :] * torch.tanh(a)[..., None]

    g = grad_z  # [*batch, D]  dL/dz_k
    v, dw, db, gamma = [], [], [], []
    for k in reversed(range(u.shape[-2])):
        act = activate(pre_activations[k])
        c = p.c[..., k]
        r = grad_log_det / determinant(act, c, p.s[..., k])  # [*batch]
        e = (g * p.u_hat[..., k, :]).sum(-1)  # [*batch]
        delta = e * act.h_prime + r * c * act.h_second  # [*batch]  dL/da_k
        params = w[..., k, :].shape
        v.append((g * act.h[..., None]).sum_to_size(params))
        dw.append((z_before[k] * delta[..., None]).sum_to_size(params))
        db.append(delta.sum_to_size(params[:-1]))
        gamma.append((r * act.h_prime).sum_to_size(params[:-1]))
        g = g + delta[..., None] * w[..., k, :]
    if not v:
        return g, torch.zeros_like(u), torch.zeros_like(w), torch.zeros_like(b)
    v, dw = (torch.stack(x[::-1], -2) for x in (v, dw))  # [*params, K, D]
    db, gamma = (torch.stack(x[::-1], -1) for x in (db, gamma))  # [*params, K]
    du, dw_constraint = constrain_backward(v, gamma, u, w, p, constraint)
    return g, du, dw + dw_constraint, db


def planar_inverse(z: Tensor, u: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """z_0 [*batch, D] from z_K, and the log_det [*batch] of this inverse map, docs/math.md (17), (18)."""
    p = constrain(u, w, "softplus")
    log_det = torch.zeros_like(z[..., 0])  # [*batch]
    for k in reversed(range(u.shape[-2])):
        c, s = p.c[..., k], p.s[..., k]
        rhs = (z * w[..., k, :]).sum(-1) + b[..., k]  # [*batch]
        act = activate(_solve(rhs, c, s))
        log_det = log_det - log_abs_determinant(act, c, s)
        z = z - p.u_hat[..., k, :] * act.h[..., None]
    return z, log_det


def _solve(rhs: Tensor, c: Tensor, s: Tensor) -> Tensor:
    """The root x [*batch] of x + c tanh(x) = rhs: safeguarded Newton inside its bracket, docs/math.md (17)."""
    with torch.no_grad():
        low, high = rhs - c.abs(), rhs + c.abs()
        x = rhs
        for _ in range(_ROOT_ITERATIONS[rhs.dtype]):
            residual, slope = _residual(x, rhs, c, s)
            low, high = torch.where(residual <= 0, x, low), torch.where(residual >= 0, x, high)
            newton = x - residual / slope
            inside = (newton >= low) & (newton <= high)
            x = torch.where(inside, newton, (low + high) / 2)
    # A Newton step doubles the order to which derivatives are right: two give the implicit function theorem's first
    # and second derivatives, docs/math.md (18), and leave the value where it is.
    for _ in range(2):
        residual, slope = _residual(x, rhs, c, s)
        x = x - residual / slope
    return x


def _residual(x: Tensor, rhs: Tensor, c: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    act = activate(x)
    return (x - act.h) + s * act.h - rhs, determinant(act, c, s)
