"""The scalar formulas of a planar step on Triton tensors: the twin of csrc/planar_math.h, same names, same order.

float32 or float64. No libdevice, which Triton's interpreter lacks, and none of the hardware's approximations of tanh
and exp, which miss the accuracy rule: tanh comes from e^x - 1 at full relative precision. NaN stays NaN.
"""

import triton
import triton.language as tl

SATURATED = tl.constexpr(1000.0)  # for `activate`, of rows behind the last: h' = 0, and the determinant is 1
_LOG2_E = tl.constexpr(1.4426950408889634)


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
def log_correction(x, sum):
    """What log(sum) lacks of log(1 + x) where sum is 1 + x rounded, x >= -1/2."""
    return (x - (sum - 1)) / sum


@triton.jit
def constrain(alpha, n, CONSTRAINED: tl.constexpr):
    """c, s, rho, inv_n, rising and falling, docs/math.md (4) to (6), from alpha = w . u and n = |w|^2."""
    if not CONSTRAINED:
        zero = tl.zeros_like(alpha)
        return alpha, 1 + alpha, zero, zero, zero + 1, zero
    e, _ = exp_both(-tl.abs(alpha))
    log_term = tl.log(1 + e) + log_correction(e, 1 + e)
    nonzero = n >= (2.2250738585072014e-308 if n.dtype == tl.float64 else 1.1754943508222875e-38)
    up = alpha >= 0
    p = 1 / (1 + e)
    s = tl.where(nonzero, tl.where(up, alpha, 0) + log_term, 1)
    rho = tl.where(up, 0, -alpha) + log_term - 1
    inv_n = tl.where(nonzero, 1 / tl.where(nonzero, n, 1), 0)
    rising = tl.where(nonzero, tl.where(up, p, e * p), 0)
    falling = tl.where(nonzero, tl.where(up, e * p, p), 0)
    return s - 1, s, rho, inv_n, rising, falling


@triton.jit
def constrain_backward(rho, inv_n, rising, falling, q, gamma):
    """dalpha, of_v and of_w_n: du = v + dalpha w, dw = of_v v + dalpha u + of_w_n (inv_n w), docs/math.md (6), from
    q = v . w with v = dL/du_hat, and gamma = dL/dc."""
    q_n = q * inv_n
    return gamma * rising - q_n * falling, rho * inv_n, -2 * rho * q_n


@triton.jit
def activate(a):
    """h and h', docs/math.md (2), (7); 1 + |h| = 2 / (1 + e^(-2|a|))."""
    magnitude_of_a = tl.abs(a)
    e, e_minus_one = exp_both(-2 * magnitude_of_a)
    magnitude = -e_minus_one / (2 + e_minus_one)
    root = 1 + magnitude
    saturated = magnitude_of_a > (354.0 if a.dtype == tl.float64 else 43.5)
    h_prime = tl.where(saturated, 0, e * (root * root))
    return tl.where(a < 0, -magnitude, magnitude), h_prime


@triton.jit
def h_second(h, h_prime):
    """h'' at the same point, for docs/math.md (12)."""
    return -2 * h * h_prime


@triton.jit
def determinant(h, h_prime, c, s):
    """docs/math.md (7): 1 + c h', and near its zero the same number as a sum of positive terms."""
    x = c * h_prime
    return tl.where((x >= -0.5) | (c < -2), 1 + x, s - c * (h * h))


@triton.jit
def log_abs_determinant(h, h_prime, c, s):
    """docs/math.md (8): log1p(c h') or the logarithm of the determinant itself; one logarithm serves both."""
    x = c * h_prime
    det = determinant(h, h_prime, c, s)
    lossy = (x >= -0.5) & (x <= 1.152921504606847e18)  # no correction of infinity
    return tl.log(tl.abs(det)) + tl.where(lossy, log_correction(x, det), 0)
