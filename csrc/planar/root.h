// The scalar equation of a step's inverse, docs/math.md (17), (33) to (35), (37), (39) and (40), for every kernel. L and
// F are those of lane.h and activation.h; for the search F is AnyFlow only for activations that need one.
#pragma once

#include "log_det.h"

namespace vvae {
namespace PLANAR_NAMESPACE {

// Where the search (33) for the root of x + c h(x) = rhs starts, and the bracket that holds the root.
template <class L>
struct Bracket {
  typename L::V start, low, high;
};

// (34): h has the sign of its argument, |h| <= |x| and |h| <= 1; from 1 / s.
template <class L>
PLANAR_FN Bracket<L> bracket(typename L::V rhs, typename L::V c, typename L::V inv_s) {
  const auto r = L::abs(rhs), linear = r * inv_s, flat = r - c;
  const auto start = L::copy_sign(L::select((flat > linear) ^ (c < 0), flat, linear), rhs);
  const auto swap = start > rhs;
  return {start, L::select(swap, rhs, start), L::select(swap, start, rhs)};
}

template <class L>
PLANAR_FN Bracket<L> bracket(typename L::V rhs, typename L::V c, typename L::V inv_s, StandardFlow) {
  return bracket<L>(rhs, c, inv_s);
}

// sigmoid is 1/2 and half a tanh, (37).
template <class L, class T>
PLANAR_FN Bracket<L> bracket(typename L::V rhs, typename L::V c, typename L::V inv_s, const AnyFlow<T>& f) {
  if (f.kind != Activation::sigmoid) return bracket<L>(rhs, c, inv_s);
  const auto quarter = c / 4;
  const auto start = 2 * bracket<L>((rhs - c / 2) / 2, quarter, 1 / (1 + quarter)).start;
  const auto down = c < 0;
  return {start, L::select(down, rhs, rhs - c), L::select(down, rhs - c, rhs)};
}

// The size beside which a residual is rounding: |x|, which bounds all terms where h has the sign of x.
template <class L>
PLANAR_FN typename L::V magnitude(typename L::V x, typename L::V /*rhs*/, StandardFlow) {
  return L::abs(x);
}

template <class L, class T>
PLANAR_FN typename L::V magnitude(typename L::V x, typename L::V rhs, const AnyFlow<T>& f) {
  return f.kind == Activation::sigmoid ? L::abs(x) + L::abs(rhs) : L::abs(x);
}

// The roots by Halley's steps (33), a bisection where one leaves the bracket. A variable that has its root stays,
// whatever the others need. x may be rhs.
template <class L, int N, class F>
PLANAR_FN void search(typename L::V* x, const typename L::V* rhs, typename L::V c, typename L::V s, const F& f) {
  using V = typename L::V;
  const V inv_s = 1 / s;
  V r[N], low[N], high[N];
  decltype(c < s) open[N];
  for (int i = 0; i < N; ++i) {
    r[i] = rhs[i];
    const auto at = bracket<L>(r[i], c, inv_s, f);
    x[i] = at.start, low[i] = at.low, high[i] = at.high;
    open[i] = r[i] == r[i];
  }
  for (int iteration = 0; iteration < L::Float::root_steps; ++iteration) {
    auto some = L::outside(L::splat(1));  // none yet
    for (int i = 0; i < N; ++i) {
      const auto act = activate<L>(x[i], f);
      const auto det = determinant<L>(act, c, s, f);
      const auto residual = (x[i] - act.h) + s * act.h - r[i];
      const auto size = magnitude<L>(x[i], r[i], f);
      low[i] = L::select(residual <= 0, x[i], low[i]), high[i] = L::select(residual >= 0, x[i], high[i]);
      const auto inverse = 1 / det, newton = residual * inverse;  // quotients: det * det would overflow
      const auto halley = x[i] - newton / (1 - newton * (c * inverse * h_second<L>(act, f)) / 2);
      const auto inside = (halley >= low[i]) & (halley <= high[i]);
      const auto next = L::select(inside, halley, (low[i] + high[i]) / 2);
      const auto step = L::select(inside, L::abs(next - x[i]), high[i] - low[i]);
      const auto moves = open[i] & (L::abs(residual) > size * L::Float::root_noise);
      const auto scale = L::select(size < 1, size, L::splat(1));
      x[i] = L::select(moves, next, x[i]);
      open[i] = moves & (step > scale * L::Float::root_step);
      some = some | open[i];
    }
    if (!L::any(some)) break;
  }
}

// The roots x of x + c h(x) = rhs for N variables, (17), from c > -1 and s = 1 + c. x may be rhs.
template <class L, int N>
PLANAR_FN void solve(typename L::V* x, const typename L::V* rhs, typename L::V c, typename L::V s, StandardFlow f) {
  search<L, N>(x, rhs, c, s, f);
}

template <class L, int N, class T>
PLANAR_FN void solve(typename L::V* x, const typename L::V* rhs, typename L::V c, typename L::V s,
                     const AnyFlow<T>& f) {
  if (f.kind == Activation::tanh || f.kind == Activation::sigmoid) return search<L, N>(x, rhs, c, s, f);
  typename L::V r[N], curved[N];
  for (int i = 0; i < N; ++i) r[i] = rhs[i], curved[i] = L::select(r[i] > 0, L::splat(0), r[i]);
  if (f.kind == Activation::elu) {
    search<L, N>(curved, curved, c, s, f);
    for (int i = 0; i < N; ++i) x[i] = L::select(r[i] > 0, r[i] / s, curved[i]);
    return;
  }
  const auto below = f.kind == Activation::leaky_relu ? (1 - f.slope) + s * f.slope : s;
  for (int i = 0; i < N; ++i) x[i] = r[i] / L::select(r[i] > 0, s, below);
}

// mu = dL/dR of one step of the inverse and dL/dc times s, (35) and (39); mu's share of gamma is not in it yet.
template <class L, class F>
PLANAR_FN AdjointParts<L> inverse_adjoint_parts(typename L::V lambda, const Activated<L>& act, typename L::V c,
                                                typename L::V s, const F& f) {
  const auto inverse = 1 / determinant<L>(act, c, s, f);
  return {-act.h_prime * inverse, -lambda * (c * inverse * h_second<L>(act, f)) * inverse,
          -lambda * (s * inverse * act.h_prime)};
}

// mu's share of gamma; h is that of the reversed flow, (40).
template <class L>
PLANAR_FN typename L::V gamma_of_root(typename L::V mu, typename L::V s, typename L::V h) {
  return mu * s * h;
}

// The same with e = dL/dz_{k-1} . u_hat.
template <class L, class F>
PLANAR_FN StepAdjoint<L> inverse_step_adjoint(typename L::V e, typename L::V lambda, const Activated<L>& act,
                                              typename L::V c, typename L::V s, const F& f) {
  const auto parts = inverse_adjoint_parts<L>(lambda, act, c, s, f);
  const auto mu = delta_of<L>(e, parts);
  return {mu, parts.gamma + gamma_of_root<L>(mu, s, -act.h)};
}

// What dw has of u, (6): where w = 0, also what makes z_k of (40) z_{k-1}. h is that of the reversed flow.
template <class L>
PLANAR_FN typename L::V inverse_of_u(typename L::V dalpha, typename L::V delta, typename L::V h,
                                     const Constrained<L>& p) {
  return L::select(p.inv_n == 0, delta * h, dalpha);
}

}  // namespace PLANAR_NAMESPACE
}  // namespace vvae
