"""The scalar equation of a step's inverse, docs/math.md (17), (33) to (35), (37), (39), (40), on Triton tensors.

The twin of csrc/planar/root.h, with the same names. Shapes: x and rhs [R], one number a row; c and s [R], or [1] where
parameters are shared.
"""

import triton
import triton.language as tl

from vvae_fast.triton.math import activate, determinant, h_second


@triton.jit
def bracket(rhs, c, inv_s):
    """Where the search (33) for the root of x + c h(x) = rhs starts, and the bracket that holds the root, docs/math.md
    (34): h has the sign of its argument, |h| <= |x| and |h| <= 1; from 1 / s."""
    r = tl.abs(rhs)
    linear, flat = r * inv_s, r - c
    start = tl.where((flat > linear) ^ (c < 0), flat, linear)
    start = tl.where(rhs < 0, -start, start)
    swap = start > rhs
    return start, tl.where(swap, rhs, start), tl.where(swap, start, rhs)


@triton.jit
def bracket_of(rhs, c, s, F: tl.constexpr):
    """The same for the activation; sigmoid is 1/2 and half a tanh, docs/math.md (37)."""
    if F.kind == "sigmoid":
        quarter = c / 4
        start, _, _ = bracket((rhs - c / 2) / 2, quarter, 1 / (1 + quarter))
        down = c < 0
        return 2 * start, tl.where(down, rhs, rhs - c), tl.where(down, rhs - c, rhs)
    else:
        return bracket(rhs, c, 1 / s)


@triton.jit
def magnitude(x, rhs, F: tl.constexpr):
    """The size beside which a residual is rounding: |x|, which bounds all terms where h has the sign of x."""
    if F.kind == "sigmoid":
        return tl.abs(x) + tl.abs(rhs)
    else:
        return tl.abs(x)


@triton.jit
def search(rhs, c, s, F: tl.constexpr):
    """The roots by Halley's steps, docs/math.md (33), and a bisection where such a step leaves the bracket. A row that
    has found its root keeps it while others go on."""
    # As in csrc/planar/float_format.h. A step shorter than last_step, relative to min(|x|, 1), is the last one; a
    # residual below noise, relative to `magnitude`, is rounding.
    most: tl.constexpr = 120 if rhs.dtype == tl.float64 else 60
    last_step: tl.constexpr = 2.0**-18 if rhs.dtype == tl.float64 else 2.0**-8
    noise: tl.constexpr = 2.0**-53 if rhs.dtype == tl.float64 else 2.0**-24
    x, low, high = bracket_of(rhs, c, s, F)
    open = rhs == rhs
    iteration = 0
    while (iteration < most) & (tl.max(open.to(tl.int32), 0) > 0):
        h, h_prime = activate(x, F)
        det = determinant(h, h_prime, c, s, F)
        residual = (x - h) + s * h - rhs
        size = magnitude(x, rhs, F)
        low = tl.where(residual <= 0, x, low)
        high = tl.where(residual >= 0, x, high)
        inverse = 1 / det
        newton = residual * inverse  # quotients: det * det would overflow
        halley = x - newton / (1 - newton * (c * inverse * h_second(h, h_prime, F)) / 2)
        inside = (halley >= low) & (halley <= high)
        next = tl.where(inside, halley, (low + high) / 2)
        step = tl.where(inside, tl.abs(next - x), high - low)
        moves = open & (tl.abs(residual) > size * noise)
        x = tl.where(moves, next, x)
        open = moves & (step > tl.where(size < 1, size, 1) * last_step)
        iteration += 1
    return x


@triton.jit
def solve(rhs, c, s, F: tl.constexpr):
    """The roots x of x + c h(x) = rhs, docs/math.md (17), from c > -1 and s = 1 + c."""
    if (F.kind == "tanh") | (F.kind == "sigmoid"):
        return search(rhs, c, s, F)
    elif F.kind == "elu":
        return tl.where(rhs > 0, rhs / s, search(tl.where(rhs > 0, 0, rhs), c, s, F))
    elif F.kind == "leaky_relu":
        return rhs / tl.where(rhs > 0, s, (1 - F.slope) + s * F.slope)
    else:
        return rhs / s


@triton.jit
def inverse_adjoint_parts(lambda_, h, h_prime, c, s, F: tl.constexpr):
    """slope, bend and gamma of one step of the inverse, (35), (39): mu = dL/dR is e slope + bend; gamma is dL/dc times
    s, without mu's share."""
    inverse = 1 / determinant(h, h_prime, c, s, F)
    bend = -lambda_ * (c * inverse * h_second(h, h_prime, F)) * inverse
    return -h_prime * inverse, bend, -lambda_ * (s * inverse * h_prime)


@triton.jit
def gamma_of_root(mu, s, h):
    """mu's share of gamma; h is that of the reversed flow, docs/math.md (40)."""
    return mu * s * h


@triton.jit
def inverse_step_adjoint(e, lambda_, h, h_prime, c, s, F: tl.constexpr):
    """mu and gamma, with e = dL/dz_{k-1} . u_hat."""
    slope, bend, gamma = inverse_adjoint_parts(lambda_, h, h_prime, c, s, F)
    mu = e * slope + bend
    return mu, gamma + gamma_of_root(mu, s, -h)


@triton.jit
def inverse_of_u(dalpha, delta_h, inv_n):
    """The factor of u in dw, docs/math.md (6). Where w = 0 it also turns the z_k of (40) into z_{k-1}: there it is
    delta_h, the sum of delta h over a set's rows, with the reversed flow's h."""
    return tl.where(inv_n == 0, delta_h, dalpha)
