"""The formulas of a planar step on Triton tensors: the twin of csrc/planar's exp.h, constraint.h, activation.h and
log_det.h, with the same names.

float32 or float64. No libdevice, which Triton's interpreter lacks, and none of the hardware's approximations of tanh
and exp, which miss the accuracy rule: tanh comes from e^x - 1 at full relative precision. NaN stays NaN.

CONSTRAINT is a name of spec.CONSTRAINTS, F an `AnyFlow`: kernels are compiled for them.
"""

import functools
from typing import NamedTuple

import triton
import triton.language as tl

from vvae_fast.spec import FlowSpec

_LOG2_E = tl.constexpr(1.4426950408889634)


class AnyFlow(NamedTuple):
    """The activation and its numbers, for which a kernel is compiled: Triton would round numbers to float32 if they
    were arguments."""

    kind: str  # a name of spec.ACTIVATIONS
    slope: float  # leaky_relu's below 0
    eps: float  # inside the logarithm, docs/math.md (31)
    # Of rows and steps that a block has too many. Their gradients are 0 and stay 0: with this pre-activation h is
    # small, and the determinant is 1 wherever a gradient divides by it.
    padding_preactivation: float

    @classmethod
    @functools.cache
    def of(cls, spec: FlowSpec) -> "AnyFlow":
        kind = spec.activation
        slope = float(spec.slope) if kind == "leaky_relu" else 1.0  # so the others compile once for every slope
        return cls(kind, slope, float(spec.log_det_eps), 1000.0 if kind in ("tanh", "sigmoid") else 0.0)


@triton.jit
def exp_both(x):
    """e^x and e^x - 1 for x <= 0, both at full relative precision; they stop falling next to the denormals."""
    if x.dtype == tl.float64:
        x = tl.where(x < -708.0, -708.0, x)
        shifted = x * _LOG2_E + 6755399441055744.0  # 1.5 2^52: the last bits hold the nearest whole number
        n = shifted - 6755399441055744.0
        r = (x - n * 0.6931471803691238) - n * 1.9082149292705877e-10
        q = r * (1.0 / 6227020800) + 1.0 / 479001600
        q = q * r + 1.0 / 39916800
        q = q * r + 1.0 / 3628800
        q = q * r + 1.0 / 362880
        q = q * r + 1.0 / 40320
        q = q * r + 1.0 / 5040
        scale = ((shifted.to(tl.int64, bitcast=True) << 52) + 0x3FF0000000000000).to(tl.float64, bitcast=True)
    else:
        x = tl.where(x < -87.0, -87.0, x)
        shifted = x * _LOG2_E + 12582912.0  # 1.5 2^23
        n = shifted - 12582912.0
        r = (x - n * 0.693145751953125) - n * 1.428606765330187e-06
        q = tl.full(x.shape, 1.0 / 5040, tl.float32)
        scale = ((shifted.to(tl.int32, bitcast=True) << 23) + 0x3F800000).to(tl.float32, bitcast=True)
    q = q * r + 1.0 / 720
    q = q * r + 1.0 / 120
    q = q * r + 1.0 / 24
    q = q * r + 1.0 / 6
    q = q * r + 0.5
    p = r * r * q + r
    return scale * p + scale, scale * p + (scale - 1)


@triton.jit
def quotient(x, y):
    """x / y to nearly a rounding: `/` is off by up to 2 units in the last place of float32. For y in [1, 2]; PTX's
    exact division takes so many registers that kernels spill."""
    if y.dtype == tl.float64:
        return x / y
    else:
        inverse = 1 / y
        q = x * inverse
        return q + (x - q * y) * inverse  # fused: the remainder is exact


@triton.jit
def log_correction(x, sum):
    """What log(sum) lacks of log(1 + x) where sum is 1 + x rounded, x >= -1/2."""
    return (x - (sum - 1)) / sum


@triton.jit
def log1p_of_positive(x):
    return tl.log(1 + x) + log_correction(x, 1 + x)


@triton.jit
def constrain(alpha, n, CONSTRAINT: tl.constexpr):
    """c, s, sunk, rho, inv_n, rising, falling from alpha = w . u and n = |w|^2, docs/math.md (4) to (6) or (29), (30).

    sunk, (38): how far log s lies below that of the least s that is held, else 0. rising is dc/dalpha over unit(s),
    (39); falling is -drho/dalpha.
    """
    if CONSTRAINT == "none":
        zero = tl.zeros_like(alpha)
        return alpha, 1 + alpha, zero, zero, zero, zero + 1, zero
    e, _ = exp_both(-tl.abs(alpha))
    log_term = log1p_of_positive(e)
    nonzero = n >= (2.2250738585072014e-308 if n.dtype == tl.float64 else 1.1754943508222875e-38)
    up = alpha >= 0
    p = 1 / (1 + e)
    s = tl.where(up, alpha, 0) + log_term
    rho = tl.where(up, 0, -alpha) + log_term - 1
    rising = tl.where(up, p, e * p)
    falling = tl.where(up, e * p, p)
    if CONSTRAINT == "log_softplus":
        scale = 1 / (1 + s)  # (30)
        rising, falling = rising * scale, (falling + s) * scale
        s = log1p_of_positive(s)
        rho = s - (1 + alpha)
    s = tl.where(nonzero, s, 1)
    least = -708.0 if alpha.dtype == tl.float64 else -87.0  # where exp_both stops falling
    sunk = tl.where((alpha < least) & nonzero, alpha - least, 0)
    inv_n = tl.where(nonzero, 1 / tl.where(nonzero, n, 1), 0)
    return s - 1, s, sunk, rho, inv_n, tl.where(nonzero, rising / s, 0), tl.where(nonzero, falling, 0)


@triton.jit
def unit(s, CONSTRAINT: tl.constexpr):
    """docs/math.md (39): gradients of c are kept times this, because dL/dc itself grows as 1 / s."""
    if CONSTRAINT == "none":
        return tl.full(s.shape, 1, s.dtype)
    else:
        return s


@triton.jit
def constrain_backward(rho, inv_n, rising, falling, q, gamma):
    """dalpha, of_v and of_w_n: du = v + dalpha w, dw = of_v v + dalpha u + of_w_n (inv_n w), docs/math.md (6), from
    q = v . w with v = dL/du_hat, and gamma = dL/dc times unit(s)."""
    q_n = q * inv_n
    return gamma * rising - q_n * falling, rho * inv_n, -2 * rho * q_n


@triton.jit
def tanh(a):
    """tanh and its derivative, docs/math.md (7); 1 + |h| = 2 / (1 + e^(-2|a|))."""
    magnitude_of_a = tl.abs(a)
    e, e_minus_one = exp_both(-2 * magnitude_of_a)
    magnitude = -e_minus_one / (2 + e_minus_one)
    root = 1 + magnitude
    saturated = magnitude_of_a > (354.0 if a.dtype == tl.float64 else 43.5)
    h_prime = tl.where(saturated, 0, e * (root * root))
    return tl.where(a < 0, -magnitude, magnitude), h_prime


@triton.jit
def activate(a, F: tl.constexpr):
    """h and h', docs/math.md (2) and the table of (7)."""
    one = tl.full(a.shape, 1, a.dtype)
    up = a >= 0
    if F.kind == "tanh":
        h, h_prime = tanh(a)
    elif F.kind == "leaky_relu":
        h_prime = tl.where(up, one, F.slope)
        h = a * h_prime
    elif F.kind == "elu":
        h_prime, e_minus_one = exp_both(tl.where(up, 0, a))
        h = tl.where(up, a, e_minus_one)
    elif F.kind == "sigmoid":
        e, _ = exp_both(-tl.abs(a))
        h = quotient(tl.where(up, one, e), 1 + e)  # its error is that of the root where x + c h cancels, (17)
        h_prime = h * (tl.where(up, e, one) / (1 + e))
    else:
        h, h_prime = a, one
    return h, h_prime


@triton.jit
def one_minus_slope(h, h_prime, F: tl.constexpr):
    """1 - h', without a subtraction that cancels."""
    if F.kind == "tanh":
        return h * h
    elif F.kind == "elu":
        return tl.where(h >= 0, 0, -h)
    else:
        return 1 - h_prime


@triton.jit
def h_second(h, h_prime, F: tl.constexpr):
    """h'' at the same point, for docs/math.md (12)."""
    if F.kind == "tanh":
        return -2 * h * h_prime
    elif F.kind == "elu":
        return tl.where(h >= 0, 0, h_prime)
    elif F.kind == "sigmoid":
        return h_prime * (1 - 2 * h)
    else:
        return tl.zeros_like(h)


@triton.jit
def away_from_zero(x, F: tl.constexpr):
    """x, further from zero by the eps of docs/math.md (31)."""
    if F.eps == 0:
        return x
    else:
        return tl.where(x < 0, x - F.eps, x + F.eps)


@triton.jit
def det_minus_one(x, F: tl.constexpr):
    """x = c h', and the eps of docs/math.md (31) with it: what (8) adds to 1."""
    if F.eps == 0:
        return x
    else:
        return x + F.eps


@triton.jit
def determinant(h, h_prime, c, s, F: tl.constexpr):
    """docs/math.md (7): 1 + c h', and near its zero the same number as a sum of positive terms. With the eps of (31) it
    is the number whose logarithm is taken."""
    x = c * h_prime
    return away_from_zero(tl.where((x >= -0.5) | (c < -2), 1 + x, s - c * one_minus_slope(h, h_prime, F)), F)


@triton.jit
def log_abs_determinant(h, h_prime, c, s, sunk, F: tl.constexpr):
    """docs/math.md (8): log1p(c h') or the logarithm of the determinant itself; one logarithm serves both. sunk, (38),
    counts where s is all that is left of the determinant."""
    x = c * h_prime
    det = determinant(h, h_prime, c, s, F)
    lossy = (x >= -0.5) & (x <= 1.152921504606847e18)  # no correction of infinity
    below = tl.where(tl.abs(det) < 2 * s, sunk, 0)  # never where it is lossy: there det is no less than 1/2
    return tl.log(tl.abs(det)) + tl.where(lossy, log_correction(det_minus_one(x, F), det), below)


@triton.jit
def inverse_determinant(lambda_, h, h_prime, c, s, F: tl.constexpr):
    """1 / det for docs/math.md (11), 0 where lambda is 0. lambda is 0 in rows behind the last, whose determinant may be
    0; with tanh it is 1 there."""
    inverse = 1 / determinant(h, h_prime, c, s, F)
    if F.kind == "tanh":
        return inverse
    else:
        return tl.where(lambda_ == 0, lambda_, inverse)


@triton.jit
def adjoint_parts(lambda_, h, h_prime, c, s, unit, F: tl.constexpr):
    """slope, bend and gamma of one step: delta = dL/da is e slope + bend and gamma is dL/dc times unit, docs/math.md
    (11), (12), (15). lambda is multiplied last: its factor stays in range, (39)."""
    inverse = inverse_determinant(lambda_, h, h_prime, c, s, F)
    return h_prime, lambda_ * (c * inverse * h_second(h, h_prime, F)), lambda_ * (unit * inverse * h_prime)


@triton.jit
def step_adjoint(e, lambda_, h, h_prime, c, s, unit, F: tl.constexpr):
    """delta and gamma, with e = dL/dz_k . u_hat."""
    slope, bend, gamma = adjoint_parts(lambda_, h, h_prime, c, s, unit, F)
    return e * slope + bend, gamma
