// The determinant of a step, its logarithm, its part of the adjoint, and sums of logarithms: docs/math.md (7), (8), (11),
// (12), (15), (26), (31), (39).
#pragma once

#include "activation.h"
#include "constraint.h"

namespace vvae {
namespace PLANAR_NAMESPACE {

template <class L>
struct StepAdjoint {
  typename L::V delta;  // dL/da                                                          (12), (35)
  typename L::V gamma;  // dL/dc times unit(s)                                            (15), (39)
};

template <class L>
struct AdjointParts {  // what of it does not wait for the steps after
  typename L::V slope, bend, gamma;
};

// x, further from zero by the eps of (31).
template <class L>
PLANAR_FN typename L::V away_from_zero(typename L::V x, StandardFlow) {
  return x;
}

template <class L, class T>
PLANAR_FN typename L::V away_from_zero(typename L::V x, const AnyFlow<T>& f) {
  return x + L::copy_sign(L::splat(f.eps), x);
}

// What (8) adds to 1: c h', and eps with it.
template <class L>
PLANAR_FN typename L::V det_minus_one(typename L::V x, StandardFlow) {
  return x;
}

template <class L, class T>
PLANAR_FN typename L::V det_minus_one(typename L::V x, const AnyFlow<T>& f) {
  return x + f.eps;
}

// (7): 1 + c h', and near its zero the same number as a sum of positive terms. c < -2 happens only without the
// constraint. With the eps of (31), the number whose logarithm is taken. Errors: determinant.
template <class L, class F>
PLANAR_FN typename L::V determinant(const Activated<L>& act, typename L::V c, typename L::V s, const F& f) {
  const auto x = c * act.h_prime;
  const auto det = L::select((x >= L::splat(-0.5)) | (c < -2), 1 + x, s - c * one_minus_slope<L>(act, f));
  return away_from_zero<L>(det, f);
}

// (8): log1p(c h') or the logarithm of the determinant itself; one logarithm serves both. sunk, (38), is all of the
// determinant where nothing else is left of it. Errors: log_abs_determinant, log_abs_determinant_eps.
template <class L, class F>
PLANAR_FN typename L::V log_abs_determinant(const Activated<L>& act, typename L::V c, typename L::V s,
                                            typename L::V sunk, const F& f) {
  const auto x = c * act.h_prime, zero = L::splat(0);
  const auto det = determinant<L>(act, c, s, f);
  const auto lossy = (x >= L::splat(-0.5)) & (x <= L::splat(0x1p60));  // no correction of infinity
  const auto below = L::select(L::abs(det) < 2 * s, sunk, zero);  // never where it is lossy: there det is at least 1/2
  return L::log(L::abs(det)) + L::select(lossy, log_correction<L>(det_minus_one<L>(x, f), det), below);
}

// 1 / det for (11), 0 where lambda is 0, as it is for rows that are not there: their determinant may be 0.
// Errors: inverse_determinant.
template <class L>
PLANAR_FN typename L::V inverse_determinant(typename L::V /*lambda*/, const Activated<L>& act, typename L::V c,
                                            typename L::V s, StandardFlow f) {
  return 1 / determinant<L>(act, c, s, f);
}

template <class L, class T>
PLANAR_FN typename L::V inverse_determinant(typename L::V lambda, const Activated<L>& act, typename L::V c,
                                            typename L::V s, const AnyFlow<T>& f) {
  return L::select(lambda == 0, lambda, 1 / determinant<L>(act, c, s, f));
}

// (11), (12), (15) of one step: lambda comes last, what it multiplies stays in range (39).
template <class L, class F>
PLANAR_FN AdjointParts<L> adjoint_parts(typename L::V lambda, const Activated<L>& act, typename L::V c,
                                        typename L::V s, typename L::V unit, const F& f) {
  const auto inverse = inverse_determinant<L>(lambda, act, c, s, f);
  return {act.h_prime, lambda * (c * inverse * h_second<L>(act, f)), lambda * (unit * inverse * act.h_prime)};
}

// delta of (12) or mu of (35), by the same instruction whatever else a kernel computes: with the gradients of the
// parameters or without, the bits are the same.
template <class L>
PLANAR_FN typename L::V delta_of(typename L::V e, const AdjointParts<L>& parts) {
  return L::multiply_add(e, parts.slope, parts.bend);
}

// adjoint_parts with e = dL/dz_k . u_hat.
template <class L, class F>
PLANAR_FN StepAdjoint<L> step_adjoint(typename L::V e, typename L::V lambda, const Activated<L>& act, typename L::V c,
                                      typename L::V s, typename L::V unit, const F& f) {
  const auto parts = adjoint_parts<L>(lambda, act, c, s, unit, f);
  return {delta_of<L>(e, parts), parts.gamma};
}

// (26): the sum of (8) over steps as log + log(high + low): high + low is the product of the determinants since the
// last logarithm, low what rounding took from high. One logarithm serves all steps whose product stays ordinary.
template <class L>
struct LogDet {
  typename L::V log, high, low;
};

template <class L>
PLANAR_FN LogDet<L> no_steps() {
  return {L::splat(0), L::splat(1), L::splat(0)};
}

template <class L>
PLANAR_FN typename L::V value(const LogDet<L>& sum) {
  return sum.log + (L::log(sum.high) + sum.low / sum.high);
}

// sum with one more step, where its product is ordinary.
template <class L, class F>
PLANAR_FN LogDet<L> multiplied(const LogDet<L>& sum, const Activated<L>& act, typename L::V c, typename L::V s,
                               const F& f) {
  const auto x = c * act.h_prime;
  const auto det = determinant<L>(act, c, s, f);
  const auto factor = L::abs(det);
  const auto lost = L::select(x >= L::splat(-0.5), det_minus_one<L>(x, f) - (det - 1), L::splat(0));
  const auto high = sum.high * factor;
  return {sum.log, high, sum.low * factor + (sum.high * lost + L::product_error(sum.high, factor, high))};
}

// Adds one step to the sums of N variables; a variable whose product leaves the range takes its logarithms at once, and
// none is touched by its neighbours. Errors: log_det.
template <class L, int N, class F>
PLANAR_FN void add_step(LogDet<L>* sum, const Activated<L>* act, typename L::V c, typename L::V s, typename L::V sunk,
                        const F& f) {
  LogDet<L> next[N];
  auto outside = L::outside(L::splat(1)) | (sunk < 0);  // none yet, or each
  for (int i = 0; i < N; ++i) {
    next[i] = multiplied<L>(sum[i], act[i], c, s, f);
    outside = outside | L::outside(next[i].high);
  }
  if (L::any(outside))
    for (int i = 0; i < N; ++i) {
      const auto ordinary = (L::outside(next[i].high) == 0) & (sunk == 0);
      const auto log = value<L>(sum[i]) + log_abs_determinant<L>(act[i], c, s, sunk, f);
      next[i] = {L::select(ordinary, sum[i].log, log), L::select(ordinary, next[i].high, L::splat(1)),
                 L::select(ordinary, next[i].low, L::splat(0))};
    }
  for (int i = 0; i < N; ++i) sum[i] = next[i];
}

}  // namespace PLANAR_NAMESPACE
}  // namespace vvae
