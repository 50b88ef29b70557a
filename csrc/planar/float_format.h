// The numbers of the floating-point formats, for every kernel in C++.
#pragma once

#include <stdint.h>

#include "lane.h"

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

}  // namespace PLANAR_NAMESPACE
}  // namespace vvae
