// e^x with e^x - 1, for every kernel in C++. Of the lane type L this takes splat, max, as_bits and as_float.
//
// "Errors:" here and beside the other formulas names rows of docs/math.md's table of errors and ranges.
#pragma once

#include "float_format.h"

namespace vvae {
namespace PLANAR_NAMESPACE {

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
// Errors: exp, exp_minus_one.
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
