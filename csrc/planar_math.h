// The scalar formulas of a planar step, once, for every kernel. Equation numbers are those of docs/math.md.
//
// L is a lane type: `L::V` is what one variable holds (a float on a GPU thread, a SIMD vector on a CPU) and L gives the
// primitives splat, select, abs, copy_sign, exp_both, log, quotient (by a number in [1, 2]), product_error, outside and
// any, the constants tiny and saturated on it and Float, its format (exponential.h). No torch, no memory; few branches
// on data, none for one lane alone.
#pragma once

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
  typename L::V rho;      // u_hat = u + rho inv_n w                                      (4)
  typename L::V inv_n;    // 1 / |w|^2, and 0 where w = 0 or |w|^2 underflows
  typename L::V rising;   // dc / dalpha = sigmoid(alpha), 0 where inv_n is               (6)
  typename L::V falling;  // -drho / dalpha = sigmoid(-alpha), 0 where inv_n is           (6)
};

template <class L>
struct Activated {
  typename L::V h;        // tanh(a)
  typename L::V h_prime;  // 1 - h^2, without the subtraction                             (7)
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

// (4), (5) from alpha = w . u and n = |w|^2. Without the constraint u_hat = u and c = alpha.
template <class L>
PLANAR_FN Constrained<L> constrain(typename L::V alpha, typename L::V n, bool constrained) {
  const auto zero = L::splat(0), one = L::splat(1);
  if (!constrained) return {alpha, 1 + alpha, zero, zero, one, zero};
  const auto e = L::exp_both(-L::abs(alpha)).value;
  const auto log_term = L::log(1 + e) + log_correction<L>(e, 1 + e);  // log1p(e)
  const auto nonzero = n >= L::tiny();
  const auto up = alpha >= 0;
  const auto p = 1 / (1 + e);
  const auto s = L::select(nonzero, L::select(up, alpha, zero) + log_term, one);
  return {s - 1,
          s,
          L::select(up, zero, -alpha) + log_term - 1,
          L::select(nonzero, 1 / n, zero),
          L::select(nonzero, L::select(up, p, e * p), zero),
          L::select(nonzero, L::select(up, e * p, p), zero)};
}

// u_hat = u + rho_over_n w, (4).
template <class L>
PLANAR_FN typename L::V rho_over_n(const Constrained<L>& p) {
  return p.rho * p.inv_n;
}

// (6) from q = v . w with v = dL/du_hat, and gamma = dL/dc.
template <class L>
PLANAR_FN ConstraintAdjoint<L> constrain_backward(const Constrained<L>& p, typename L::V q, typename L::V gamma) {
  const auto q_n = q * p.inv_n;
  return {gamma * p.rising - q_n * p.falling, rho_over_n(p), -2 * p.rho * q_n};
}

// (2), (7): one exponential and one division serve tanh and its derivative; 1 + |h| = 2 / (1 + e^(-2|a|)).
template <class L>
PLANAR_FN Activated<L> activate(typename L::V a) {
  const auto e = L::exp_both(-2 * L::abs(a));
  const auto magnitude = L::quotient(-e.minus_one, 2 + e.minus_one);
  const auto root = 1 + magnitude;
  const auto h_prime = L::select(L::abs(a) > L::saturated(), L::splat(0), e.value * (root * root));
  return {L::copy_sign(magnitude, a), h_prime};
}

// h'' at the same point, for (12).
template <class L>
PLANAR_FN typename L::V h_second(const Activated<L>& act) {
  return -2 * act.h * act.h_prime;
}

// (7): 1 + c h', and near its zero the same number as a sum of positive terms. c < -2 happens only without the
// constraint.
template <class L>
PLANAR_FN typename L::V determinant(const Activated<L>& act, typename L::V c, typename L::V s) {
  const auto x = c * act.h_prime;
  return L::select((x >= L::splat(-0.5)) | (c < -2), 1 + x, s - c * (act.h * act.h));
}

// (8): log1p(c h') or the logarithm of the determinant itself; one logarithm serves both.
template <class L>
PLANAR_FN typename L::V log_abs_determinant(const Activated<L>& act, typename L::V c, typename L::V s) {
  const auto x = c * act.h_prime;
  const auto det = determinant<L>(act, c, s);
  const auto lossy = (x >= L::splat(-0.5)) & (x <= L::splat(0x1p60));  // no correction of infinity
  return L::log(L::abs(det)) + L::select(lossy, log_correction<L>(x, det), L::splat(0));
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
template <class L>
PLANAR_FN LogDet<L> multiplied(const LogDet<L>& sum, const Activated<L>& act, typename L::V c, typename L::V s) {
  const auto x = c * act.h_prime;
  const auto det = determinant<L>(act, c, s);
  const auto factor = L::abs(det);
  const auto lost = L::select(x >= L::splat(-0.5), x - (det - 1), L::splat(0));
  const auto high = sum.high * factor;
  return {sum.log, high, sum.low * factor + (sum.high * lost + L::product_error(sum.high, factor, high))};
}

// Adds one step to the sums of N variables; a variable whose product leaves the range takes its logarithms at once, and
// none is touched by its neighbours.
template <class L, int N>
PLANAR_FN void add_step(LogDet<L>* sum, const Activated<L>* act, typename L::V c, typename L::V s) {
  LogDet<L> next[N];
  auto outside = L::outside(L::splat(1));  // none yet
  for (int i = 0; i < N; ++i) {
    next[i] = multiplied<L>(sum[i], act[i], c, s);
    outside = outside | L::outside(next[i].high);
  }
  if (L::any(outside))
    for (int i = 0; i < N; ++i) {
      const auto ordinary = L::outside(next[i].high) == 0;
      const auto log = value<L>(sum[i]) + log_abs_determinant<L>(act[i], c, s);
      next[i] = {L::select(ordinary, sum[i].log, log), L::select(ordinary, next[i].high, L::splat(1)),
                 L::select(ordinary, next[i].low, L::splat(0))};
    }
  for (int i = 0; i < N; ++i) sum[i] = next[i];
}

// The roots x of x + c h(x) = rhs for N variables, (17), from c > -1 and s = 1 + c: Halley's steps (33), a bisection
// where one leaves the bracket. A variable that has its root stays, whatever the others need. x may be rhs.
template <class L, int N>
PLANAR_FN void solve(typename L::V* x, const typename L::V* rhs, typename L::V c, typename L::V s) {
  using V = typename L::V;
  const V inv_s = 1 / s;
  V r[N], sign[N], low[N], high[N];
  decltype(c < s) open[N];
  for (int i = 0; i < N; ++i) {  // the root has the sign of rhs: from here on both are positive
    sign[i] = rhs[i], r[i] = L::abs(rhs[i]);
    const auto linear = r[i] * inv_s, flat = r[i] - c;
    x[i] = L::select((flat > linear) ^ (c < 0), flat, linear);  // (34)
    low[i] = L::select(c < 0, r[i], x[i]), high[i] = L::select(c < 0, x[i], r[i]);
    open[i] = r[i] >= 0;
  }
  for (int iteration = 0; iteration < L::Float::root_steps; ++iteration) {
    auto some = L::outside(L::splat(1));  // none yet
    for (int i = 0; i < N; ++i) {
      const auto act = activate<L>(x[i]);
      const auto det = determinant<L>(act, c, s);
      const auto residual = (x[i] - act.h) + s * act.h - r[i];
      low[i] = L::select(residual <= 0, x[i], low[i]), high[i] = L::select(residual >= 0, x[i], high[i]);
      const auto halley = x[i] - residual * det / (det * det - residual * (c * h_second<L>(act)) / 2);
      const auto inside = (halley >= low[i]) & (halley <= high[i]);
      const auto next = L::select(inside, halley, (low[i] + high[i]) / 2);
      const auto step = L::select(inside, L::abs(next - x[i]), high[i] - low[i]);
      const auto moves = open[i] & (L::abs(residual) > x[i] * L::Float::root_noise);
      const auto scale = L::select(x[i] < 1, x[i], L::splat(1));
      x[i] = L::select(moves, next, x[i]);
      open[i] = moves & (step > scale * L::Float::root_step);
      some = some | open[i];
    }
    if (!L::any(some)) break;
  }
  for (int i = 0; i < N; ++i) x[i] = L::copy_sign(x[i], sign[i]);
}

// mu = dL/dR of one step of the inverse from e = dL/dz_{k-1} . u_hat, (35).
template <class L>
PLANAR_FN typename L::V root_gradient(typename L::V e, typename L::V lambda, const Activated<L>& act, typename L::V c,
                                      typename L::V s) {
  const auto det = determinant<L>(act, c, s);
  return -(e * act.h_prime + lambda * c * h_second<L>(act) / det) / det;
}

}  // namespace PLANAR_NAMESPACE
}  // namespace vvae
