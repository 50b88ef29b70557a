// The invertible parameters of a step, docs/math.md (4) to (6), (29), (30), (38), (39).
#pragma once

#include "lane.h"
#include "spec.h"

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
// Errors: c, s, rho, rising, falling, log_c, log_s, log_rho, log_rising, log_falling.
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

}  // namespace PLANAR_NAMESPACE
}  // namespace vvae
