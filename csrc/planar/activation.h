// The activations and their derivatives, the table of docs/math.md (7).
//
// F is the activation with what it needs: `StandardFlow`, which nearly every flow has and which is compiled in, or
// `AnyFlow`, known when the kernel runs. Where a formula has no F, it is the same for all.
#pragma once

#include "lane.h"
#include "spec.h"

namespace vvae {
namespace PLANAR_NAMESPACE {

template <class L>
struct Activated {
  typename L::V h;        //                                                              (2)
  typename L::V h_prime;  // its derivative; tanh's is 1 - h^2, without the subtraction   (7)
};

// h, h' and, from them, 1 - h' without a subtraction that cancels, and h'': the table of docs/math.md (7).
struct StandardFlow {
  static constexpr StandardFlow of(const FlowSpec&) { return {}; }
};

template <class T>
struct AnyFlow {
  Activation kind;
  T slope;  // leaky_relu's below 0
  T eps;    // inside the logarithm, (31)

  static constexpr AnyFlow of(const FlowSpec& f) { return {f.activation, T(f.slope), T(f.log_det_eps)}; }
};

// tanh: one exponential and one division serve both; 1 + |h| = 2 / (1 + e^(-2|a|)). Errors: tanh, tanh_slope.
template <class L>
PLANAR_FN Activated<L> activate(typename L::V a, StandardFlow) {
  const auto e = L::exp_both(-2 * L::abs(a));
  const auto magnitude = L::quotient(-e.minus_one, 2 + e.minus_one);
  const auto root = 1 + magnitude;
  const auto h_prime = L::select(L::abs(a) > L::saturated(), L::splat(0), e.value * (root * root));
  return {L::copy_sign(magnitude, a), h_prime};
}

// Errors: sigmoid, sigmoid_slope, elu, elu_slope, leaky_relu.
template <class L, class T>
PLANAR_FN Activated<L> activate(typename L::V a, const AnyFlow<T>& f) {
  const auto up = a >= 0;
  switch (f.kind) {
    case Activation::tanh: return activate<L>(a, StandardFlow{});
    case Activation::leaky_relu: {
      const auto h_prime = L::select(up, L::splat(1), L::splat(f.slope));
      return {a * h_prime, h_prime};
    }
    case Activation::elu: {
      const auto e = L::exp_both(L::select(up, L::splat(0), a));
      return {L::select(up, a, e.minus_one), e.value};
    }
    case Activation::sigmoid: {
      const auto e = L::exp_both(-L::abs(a)).value;
      const auto h = L::select(up, L::splat(1), e) / (1 + e);
      return {h, h * (L::select(up, e, L::splat(1)) / (1 + e))};
    }
    default: return {a, L::splat(1)};
  }
}

// 1 - h'. Errors: tanh_one_minus_slope, sigmoid_one_minus_slope, elu_one_minus_slope.
template <class L>
PLANAR_FN typename L::V one_minus_slope(const Activated<L>& act, StandardFlow) {
  return act.h * act.h;
}

template <class L, class T>
PLANAR_FN typename L::V one_minus_slope(const Activated<L>& act, const AnyFlow<T>& f) {
  if (f.kind == Activation::tanh) return one_minus_slope<L>(act, StandardFlow{});
  if (f.kind == Activation::elu) return L::select(act.h >= 0, L::splat(0), -act.h);
  return 1 - act.h_prime;
}

// h'' at the same point, for (12). Errors: tanh_second, sigmoid_second, elu_second.
template <class L>
PLANAR_FN typename L::V h_second(const Activated<L>& act, StandardFlow) {
  return -2 * act.h * act.h_prime;
}

template <class L, class T>
PLANAR_FN typename L::V h_second(const Activated<L>& act, const AnyFlow<T>& f) {
  switch (f.kind) {
    case Activation::tanh: return h_second<L>(act, StandardFlow{});
    case Activation::elu: return L::select(act.h >= 0, L::splat(0), act.h_prime);
    case Activation::sigmoid: return act.h_prime * (1 - 2 * act.h);
    default: return L::splat(0);
  }
}

}  // namespace PLANAR_NAMESPACE
}  // namespace vvae
