// The numbers of the floating-point formats, and e^x with e^x - 1, for every kernel in C++. L is a lane type as in
// planar_math.h; here it gives splat, max, as_bits and as_float.
#pragma once

#include <stdint.h>

#include "planar_math.h"

namespace vvae {
namespace PLANAR_NAMESPACE {

// root_*: of the search (33) the most steps, the length under which a step is the last one, relative to min(|x|, 1),
// and the residual, relative to |x|, that is rounding.
template <class T>
struct Ieee;

template <>
struct Ieee<float> {
  using Bits = int32_t;
  static constexpr int mantissa = 23, exp_terms = 7, log_terms = 5;
  static constexpr Bits one = 0x3f800000, sqrt_half = 0x3f3504f3, infinity = 0x7f800000;
  static constexpr float tiny = 0x1p-126f, round = 0x1.8p23f, exp_least = -87.0f, denormal_scale = 0x1p25f;
  static constexpr float ln2_high = 0x1.62e4p-1f, ln2_low = 0x1.7f7d1cp-20f;
  static constexpr int denormal_shift = 25, root_steps = 60;
  static constexpr float root_step = 0x1p-8f, root_noise = 0x1p-24f;
};

template <>
struct Ieee<double> {
  using Bits = int64_t;
  static constexpr int mantissa = 52, exp_terms = 13, log_terms = 12;
  static constexpr Bits one = 0x3ff0000000000000, sqrt_half = 0x3fe6a09e667f3bcd, infinity = 0x7ff0000000000000;
  static constexpr double tiny = 0x1p-1022, round = 0x1.8p52, exp_least = -708.0, denormal_scale = 0x1p54;
  static constexpr double ln2_high = 0x1.62e42feep-1, ln2_low = 0x1.a39ef35793c76p-33;
  static constexpr int denormal_shift = 54, root_steps = 120;
  static constexpr double root_step = 0x1p-18, root_noise = 0x1p-53;
};

template <int N>
struct Factorial {
  static constexpr double value = N * Factorial<N - 1>::value;
};
template <>
struct Factorial<0> {
  static constexpr double value = 1;
};

// (e^r - 1 - r) / r^2 as the powers of r from I on of its series, the first at I = 2.
template <class L, class T, int I>
PLANAR_FN typename L::V exp_series(typename L::V r) {
  constexpr T coefficient = T(1 / Factorial<I>::value);
  if constexpr (I == Ieee<T>::exp_terms)
    return L::splat(coefficient);
  else
    return exp_series<L, T, I + 1>(r) * r + coefficient;
}

// e^x and e^x - 1 for x <= 0, both at full relative precision; below exp_least the value stays there. NaN stays NaN.
template <class L, class T>
PLANAR_FN typename L::Exp exp_and_minus_one(typename L::V x) {
  using Float = Ieee<T>;
  x = L::max(L::splat(Float::exp_least), x);
  const auto shifted = x * T(1.4426950408889634) + Float::round;
  const auto n = shifted - Float::round;
  const auto r = (x - n * Float::ln2_high) - n * Float::ln2_low;
  const auto q = exp_series<L, T, 2>(r);
  const auto p = r * r * q + r;
  const auto exponent = (L::as_bits(shifted) - L::as_bits(L::splat(Float::round))) << Float::mantissa;
  const auto scale = L::as_float(exponent + Float::one);
  return {scale * p + scale, scale * p + (scale - 1)};
}

}  // namespace PLANAR_NAMESPACE
}  // namespace vvae
