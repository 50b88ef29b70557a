"""The scalar functions of one planar step: activations with derivatives, determinants, and the root of the inverse.

Plain PyTorch, every mode of differentiation. Shapes: a, x, rhs [*batch]; c, s of one step [*params], which broadcast.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# Bisection alone reaches the last bit of a bracket of width 200 in this many halvings; with Newton most roots take 6.
_ROOT_ITERATIONS = {torch.float32: 36, torch.float64: 66}


class Activated(NamedTuple):
    """An activation and its first two derivatives at a [*batch]."""

    h: Tensor
    h_prime: Tensor
    h_second: Tensor
    rest: Tensor  # 1 - h', without the subtraction


def activate(a: Tensor, activation: str, slope: float) -> Activated:
    """The table of docs/math.md (7); `slope` is leaky_relu's below 0."""
    return _ACTIVATIONS[activation](a, slope)


def _tanh(a: Tensor, slope: float) -> Activated:
    h = torch.tanh(a)
    h_prime = 4 * torch.sigmoid(2 * a) * torch.sigmoid(-2 * a)
    return Activated(h, h_prime, -2 * h * h_prime, h * h)


def _sigmoid(a: Tensor, slope: float) -> Activated:
    h = torch.sigmoid(a)
    h_prime = h * torch.sigmoid(-a)
    return Activated(h, h_prime, -h_prime * torch.tanh(a / 2), 1 - h_prime)


def _elu(a: Tensor, slope: float) -> Activated:
    positive = a >= 0
    below = torch.where(positive, 0, a)  # e^a of a large a would leave a NaN in the gradient
    h_prime, expm1 = torch.exp(below), torch.expm1(below)
    return Activated(torch.where(positive, a, expm1), h_prime, torch.where(positive, 0, h_prime), -expm1)


def _leaky_relu(a: Tensor, slope: float) -> Activated:
    positive, zero = a >= 0, torch.zeros_like(a)
    h_prime = torch.where(positive, zero + 1, slope)
    return Activated(a * h_prime, h_prime, zero, torch.where(positive, zero, 1 - slope))


def _linear(a: Tensor, slope: float) -> Activated:
    zero = torch.zeros_like(a)
    return Activated(a, zero + 1, zero, zero)


_ACTIVATIONS = {"tanh": _tanh, "leaky_relu": _leaky_relu, "elu": _elu, "sigmoid": _sigmoid, "linear": _linear}


def determinant(act: Activated, c: Tensor, s: Tensor) -> Tensor:
    """The determinant of one step [*batch], docs/math.md (7): near the zero of 1 + c h', a sum of positive terms."""
    x = c * act.h_prime
    return torch.where((x >= -0.5) | (c < -2), 1 + x, s - c * act.rest)


def log_abs_determinant(act: Activated, c: Tensor, s: Tensor, sunk: Tensor, eps: float = 0.0) -> Tensor:
    """log|det| of one step [*batch], docs/math.md (8), or with eps, (31). sunk, (38), is all of the determinant where
    nothing else is left of it."""
    if eps:
        det = determinant(act, c, s).abs() + eps
        log = torch.log(det)
    else:
        x = c * act.h_prime
        mild = x >= -0.5
        det = torch.where(mild, 1, determinant(act, c, s)).abs()
        log = torch.log1p(torch.where(mild, x, 0)) + torch.log(det)
    return log + torch.where(det < 2 * s, sunk, 0)


def step_adjoint(
    e: Tensor, grad: Tensor, act: Activated, c: Tensor, s: Tensor, unit: Tensor, eps: float = 0.0
) -> tuple[Tensor, Tensor]:
    """delta = dL/da and gamma = dL/dc unit of one step [*batch] from e = dL/dz_k . u_hat and the gradient of log_det,
    docs/math.md (11), (12), (15), (39), or with eps, (31)."""
    det = determinant(act, c, s)
    inverse = det.sign() / (det.abs() + eps) if eps else 1 / det
    return e * act.h_prime + grad * (c * inverse * act.h_second), grad * (unit * inverse * act.h_prime)


def solve(rhs: Tensor, c: Tensor, s: Tensor, activation: str, slope: float) -> Tensor:
    """The root x [*batch] of x + c h(x) = rhs, with its first and second derivatives, docs/math.md (17), (18)."""
    if activation == "linear":
        return rhs / s
    if activation == "leaky_relu":
        return rhs / torch.where(rhs >= 0, s, (1 - slope) + s * slope)
    x = _search(rhs.detach(), c.detach(), s.detach(), activation)
    # A Newton step doubles the order to which derivatives are right: two give those of the implicit function theorem.
    # They solve for the residual that the search left, so that the value stays where it is.
    for _ in range(2):
        residual, det = _residual(x, rhs, c, s, activation)
        x = x - (residual - residual.detach()) / det
    return x


def _search(rhs: Tensor, c: Tensor, s: Tensor, activation: str) -> Tensor:
    """Newton from the start of docs/math.md (34), a bisection where it leaves the bracket or does not halve the
    residual."""
    given = rhs
    if activation == "elu":
        rhs = rhs.clamp(max=0)
    x, low, high = _bracket(rhs, c, s, activation)
    best = x
    looks = rhs.device.type == "cpu" and not _traced()  # a GPU would wait for the answer
    tolerance = 2 * torch.finfo(rhs.dtype).eps
    size = least = torch.full_like(low, torch.inf)  # |residual| of the iteration before, and of the best one
    done = settled = torch.zeros_like(low, dtype=torch.bool)  # a row is done one iteration after it has settled
    for _ in range(_ROOT_ITERATIONS[rhs.dtype]):
        residual, det = _residual(x, rhs, c, s, activation)
        low, high = torch.where(residual <= 0, x, low), torch.where(residual >= 0, x, high)
        before, size = size, residual.abs()
        better = (size <= least) & ~done
        best, least = torch.where(better, x, best), torch.where(better, size, least)
        done, settled = settled, settled | (size <= tolerance * (x.abs() + rhs.abs()))
        if looks and done.all():
            break
        newton = x - residual / det
        inside = (newton >= low) & (newton <= high) & (2 * size <= before)
        x = torch.where(inside, newton, (low + high) / 2)
    return torch.where(given >= 0, given / s, best) if activation == "elu" else best


def _traced() -> bool:
    """Whether no value can be asked for: inside torch.compile, torch.func and traces."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active()


def _bracket(rhs: Tensor, c: Tensor, s: Tensor, activation: str) -> tuple[Tensor, Tensor, Tensor]:
    """Where the search starts, docs/math.md (34), and the bracket that holds the root."""
    if activation != "sigmoid":
        return _odd_bracket(rhs, c, s)
    start, _, _ = _odd_bracket((rhs - c / 2) / 2, c / 4, 1 + c / 4)  # (37)
    return 2 * start, rhs - c.clamp(min=0), rhs - c.clamp(max=0)


def _odd_bracket(rhs: Tensor, c: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same where h has the sign of its argument, |h| <= |x| and |h| <= 1."""
    size = rhs.abs()
    linear, flat = size / s, size - c
    start = torch.where(c < 0, torch.minimum(linear, flat), torch.maximum(linear, flat)).copysign(rhs)
    return start, torch.minimum(start, rhs), torch.maximum(start, rhs)


def _residual(x: Tensor, rhs: Tensor, c: Tensor, s: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """x + c h(x) - rhs and its derivative by x, both [*batch]."""
    act = activate(x, activation, slope=1.0)
    return (x - act.h) + s * act.h - rhs, determinant(act, c, s)
