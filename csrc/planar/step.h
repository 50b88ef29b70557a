// The scalar formulas of a planar step, once, for every kernel. Equation numbers are those of docs/math.md.
//
// L is a lane type: `L::V` is what one variable holds (a float on a GPU thread, a SIMD vector on a CPU) and L gives the
// primitives splat, select, abs, copy_sign, exp_both, log, quotient (by a number in [1, 2]), product_error, outside and
// any, the constants tiny and saturated on it and Float, its format (exponential.h). No torch, no memory; few branches
// on data, none for one lane alone.
//
// F is the activation with what it needs: `Tanh`, which nearly every flow has, or `AnyActivation`, known when the kernel
// runs. Where a formula has no F, it is the same for all.
#pragma once

#include "formulas.h"

#if defined(__CUDACC__)
#define PLANAR_FN static __device__ __forceinline__
#else
#define PLANAR_FN static inline __attribute__((always_inline))
#endif

#ifndef PLANAR_NAMESPACE
#define PLANAR_NAMESPACE portable
#endif

namespace vvae {
namespace PLANAR_NAMESPACE {

template <class L>
struct Constrained {
  typename L::V c;        // w . u_hat                                                    (5)
  typename L::V s;        // 1 + c, taken from the softplus: 1 + c would cancel           (5)
  typename L::V sunk;     // what log s lies below the least s that is held, else 0       (38)
  typename L::V rho;      // u_hat = u + rho inv_n w                                      (4)
  typename L::V inv_n;    // 1 / |w|^2, and 0 where w = 0 or |w|^2 underflows
  typename L::V rising;   // dc / dalpha over unit(s), 0 where inv_n is                   (6), (39)
  typename L::V falling;  // -drho / dalpha = sigmoid(-alpha), 0 where inv_n is           (6)
};

template <class L>
struct Activated {
  typename L::V h;        //                                                              (2)
  typename L::V h_prime;  // its derivative; tanh's is 1 - h^2, without the subtraction   (7)
};

template <class L>
struct StepAdjoint {
  typename L::V delta;  // dL/da                                                          (12), (35)
  typename L::V gamma;  // dL/dc times unit(s)                                            (15), (39)
};

template <class L>
struct AdjointParts {  // what of it does not wait for the steps after: delta = e slope + bend
  typename L::V slope, bend, gamma;
};

template <class L>
struct ConstraintAdjoint {  // (6): du = v + dalpha w, dw = of_v v + dalpha u + of_w_n (inv_n w)
  typename L::V dalpha, of_v, of_w_n;
};

// What log(sum) lacks of log(1 + x) where sum is 1 + x rounded, x >= -1/2.
template <class L>
PLANAR_FN typename L::V log_correction(typename L::V x, typename L::V sum) {
  return (x - (sum - 1)) / sum;
}

template <class L>
PLANAR_FN typename L::V log1p_of_positive(typename L::V x) {
  return L::log(1 + x) + log_correction<L>(x, 1 + x);
}

// (4), (5), or (29), from alpha = w . u and n = |w|^2. Without the constraint u_hat = u and c = alpha.
template <class L>
PLANAR_FN Constrained<L> constrain(typename L::V alpha, typename L::V n, Constraint constraint) {
  const auto zero = L::splat(0), one = L::splat(1);
  if (constraint == Constraint::none) return {alpha, 1 + alpha, zero, zero, zero, one, zero};
  const auto e = L::exp_both(-L::abs(alpha)).value;
  const auto log_term = log1p_of_positive<L>(e);
  const auto nonzero = n >= L::tiny();
  const auto up = alpha >= 0;
  const auto p = 1 / (1 + e);
  auto s = L::select(up, alpha, zero) + log_term;
  auto rho = L::select(up, zero, -alpha) + log_term - 1;
  auto rising = L::select(up, p, e * p), falling = L::select(up, e * p, p);
  if (constraint == Constraint::log_softplus) {
    const auto scale = 1 / (1 + s);  // (30)
    rising = rising * scale, falling = (falling + s) * scale;
    s = log1p_of_positive<L>(s);
    rho = s - (1 + alpha);
  }
  s = L::select(nonzero, s, one);
  const auto least = L::splat(L::Float::exp_least);  // where exp_both stops falling
  return {s - 1,
          s,
          L::select((alpha < least) & nonzero, alpha - least, zero),
          rho,
          L::select(nonzero, 1 / n, zero),
          L::select(nonzero, rising / s, zero),
          L::select(nonzero, falling, zero)};
}

// u_hat = u + rho_over_n w, (4).
template <class L>
PLANAR_FN typename L::V rho_over_n(const Constrained<L>& p) {
  return p.rho * p.inv_n;
}

// (39): where s is held, gradients of c are kept times s, for dL/dc itself grows as 1 / s.
template <class L>
PLANAR_FN typename L::V unit(typename L::V s, Constraint constraint) {
  return constraint == Constraint::none ? L::splat(1) : s;
}

// (6) from q = v . w with v = dL/du_hat, and gamma = dL/dc times unit(s).
template <class L>
PLANAR_FN ConstraintAdjoint<L> constrain_backward(const Constrained<L>& p, typename L::V q, typename L::V gamma) {
  const auto q_n = q * p.inv_n;
  return {gamma * p.rising - q_n * p.falling, rho_over_n(p), -2 * p.rho * q_n};
}

// h, h' and, from them, 1 - h' without a subtraction that cancels, and h'': the table of docs/math.md (7).
struct Tanh {
  static constexpr Tanh of(const Formulas&) { return {}; }
};

template <class T>
struct AnyActivation {
  Activation kind;
  T slope;  // leaky_relu's below 0
  T eps;    // inside the logarithm, (31)

  static constexpr AnyActivation of(const Formulas& f) { return {f.activation, T(f.slope), T(f.log_det_eps)}; }
};

// tanh: one exponential and one division serve both; 1 + |h| = 2 / (1 + e^(-2|a|)).
template <class L>
PLANAR_FN Activated<L> activate(typename L::V a, Tanh) {
  const auto e = L::exp_both(-2 * L::abs(a));
  const auto magnitude = L::quotient(-e.minus_one, 2 + e.minus_one);
  const auto root = 1 + magnitude;
  const auto h_prime = L::select(L::abs(a) > L::saturated(), L::splat(0), e.value * (root * root));
  return {L::copy_sign(magnitude, a), h_prime};
}

template <class L, class T>
PLANAR_FN Activated<L> activate(typename L::V a, const AnyActivation<T>& f) {
  const auto up = a >= 0;
  switch (f.kind) {
    case Activation::tanh: return activate<L>(a, Tanh{});
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

// 1 - h'.
template <class L>
PLANAR_FN typename L::V rest(const Activated<L>& act, Tanh) {
  return act.h * act.h;
}

template <class L, class T>
PLANAR_FN typename L::V rest(const Activated<L>& act, const AnyActivation<T>& f) {
  if (f.kind == Activation::tanh) return rest<L>(act, Tanh{});
  if (f.kind == Activation::elu) return L::select(act.h >= 0, L::splat(0), -act.h);
  return 1 - act.h_prime;
}

// h'' at the same point, for (12).
template <class L>
PLANAR_FN typename L::V h_second(const Activated<L>& act, Tanh) {
  return -2 * act.h * act.h_prime;
}

template <class L, class T>
PLANAR_FN typename L::V h_second(const Activated<L>& act, const AnyActivation<T>& f) {
  switch (f.kind) {
    case Activation::tanh: return h_second<L>(act, Tanh{});
    case Activation::elu: return L::select(act.h >= 0, L::splat(0), act.h_prime);
    case Activation::sigmoid: return act.h_prime * (1 - 2 * act.h);
    default: return L::splat(0);
  }
}

// x, further from zero by the eps of (31).
template <class L>
PLANAR_FN typename L::V beyond(typename L::V x, Tanh) {
  return x;
}

template <class L, class T>
PLANAR_FN typename L::V beyond(typename L::V x, const AnyActivation<T>& f) {
  return x + L::copy_sign(L::splat(f.eps), x);
}

// What (8) adds to 1: c h', and eps with it.
template <class L>
PLANAR_FN typename L::V excess(typename L::V x, Tanh) {
  return x;
}

template <class L, class T>
PLANAR_FN typename L::V excess(typename L::V x, const AnyActivation<T>& f) {
  return x + f.eps;
}

// (7): 1 + c h', and near its zero the same number as a sum of positive terms. c < -2 happens only without the
// constraint. With the eps of (31), the number whose logarithm is taken.
template <class L, class F>
PLANAR_FN typename L::V determinant(const Activated<L>& act, typename L::V c, typename L::V s, const F& f) {
  const auto x = c * act.h_prime;
  const auto det = L::select((x >= L::splat(-0.5)) | (c < -2), 1 + x, s - c * rest<L>(act, f));
  return beyond<L>(det, f);
}

// (8): log1p(c h') or the logarithm of the determinant itself; one logarithm serves both. sunk, (38), is all of the
// determinant where nothing else is left of it.
template <class L, class F>
PLANAR_FN typename L::V log_abs_determinant(const Activated<L>& act, typename L::V c, typename L::V s,
                                            typename L::V sunk, const F& f) {
  const auto x = c * act.h_prime, zero = L::splat(0);
  const auto det = determinant<L>(act, c, s, f);
  const auto lossy = (x >= L::splat(-0.5)) & (x <= L::splat(0x1p60));  // no correction of infinity
  const auto below = L::select(L::abs(det) < 2 * s, sunk, zero);  // never where it is lossy: there det is at least 1/2
  return L::log(L::abs(det)) + L::select(lossy, log_correction<L>(excess<L>(x, f), det), below);
}

// 1 / det for (11), 0 where lambda is 0, as it is for rows that are not there: their determinant may be 0.
template <class L>
PLANAR_FN typename L::V inverse_determinant(typename L::V /*lambda*/, const Activated<L>& act, typename L::V c,
                                            typename L::V s, Tanh f) {
  return 1 / determinant<L>(act, c, s, f);
}

template <class L, class T>
PLANAR_FN typename L::V inverse_determinant(typename L::V lambda, const Activated<L>& act, typename L::V c,
                                            typename L::V s, const AnyActivation<T>& f) {
  return L::select(lambda == 0, lambda, 1 / determinant<L>(act, c, s, f));
}

// (11), (12), (15) of one step: lambda comes last, what it multiplies stays in range (39).
template <class L, class F>
PLANAR_FN AdjointParts<L> adjoint_parts(typename L::V lambda, const Activated<L>& act, typename L::V c,
                                        typename L::V s, typename L::V unit, const F& f) {
  const auto inverse = inverse_determinant<L>(lambda, act, c, s, f);
  return {act.h_prime, lambda * (c * inverse * h_second<L>(act, f)), lambda * (unit * inverse * act.h_prime)};
}

// The same with e = dL/dz_k . u_hat.
template <class L, class F>
PLANAR_FN StepAdjoint<L> step_adjoint(typename L::V e, typename L::V lambda, const Activated<L>& act, typename L::V c,
                                      typename L::V s, typename L::V unit, const F& f) {
  const auto parts = adjoint_parts<L>(lambda, act, c, s, unit, f);
  return {e * parts.slope + parts.bend, parts.gamma};
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
  const auto lost = L::select(x >= L::splat(-0.5), excess<L>(x, f) - (det - 1), L::splat(0));
  const auto high = sum.high * factor;
  return {sum.log, high, sum.low * factor + (sum.high * lost + L::product_error(sum.high, factor, high))};
}

// Adds one step to the sums of N variables; a variable whose product leaves the range takes its logarithms at once, and
// none is touched by its neighbours.
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
