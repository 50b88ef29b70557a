// The gradient that the inverse passes on, dL/dz_K of docs/math.md (35), from the first step to the last. With it
// planar_backward gives those of the parameters, (36).
#pragma once

#include "planar_amortized.h"
#include "planar_shared.h"

namespace vvae {
namespace PLANAR_NAMESPACE {

template <class T>
int64_t shared_inverse_adjoint_scratch(int64_t dim) {
  return (dim + 2 * kChunk + 1) * kTile;
}

template <class T, class F>
void shared_inverse_adjoint(const InverseAdjoint<T>& p, const Prepared<T>& q, int64_t tile, T* scratch) {
  using S = Simd<T>;
  const F f = F::of(p.formulas);
  const int64_t row = tile * kTile, n = p.rows - row < kTile ? p.rows - row : kTile;
  T* g = scratch;              // [dim][kTile]
  T* mu = g + p.dim * kTile;   // [kChunk][kTile]
  T* a = mu + kChunk * kTile;  // [kChunk][kTile]
  T* lambda = a + kChunk * kTile;
  load_tile(g, p.grad_z.from(row), n, p.dim);
  load_lanes(lambda, p.grad_log_det.from(row), n, T(0));
  for (int64_t start = 0; start < p.steps; start += q.chunk) {
    const int64_t steps = p.steps - start < q.chunk ? p.steps - start : q.chunk;
    for (int64_t k = 0; k < steps; ++k) load_lanes(a + k * kTile, p.a.lanes(start + k, row), n, T(absent(f)));
    fill(mu, T(0), steps * kTile);
    product(mu, q.u_hat + start * p.dim, p.dim, 1, g, steps, p.dim);
    for (int64_t k = 0; k < steps; ++k) {
      const auto c = S::splat(q.c[start + k]), s = S::splat(q.s[start + k]);
      for (int lane = 0; lane < kTile; lane += kRegisters * S::width) {
        typename S::V e[kRegisters];
        for (int v = 0; v < kRegisters; ++v) e[v] = S::load(mu + k * kTile + lane + v * S::width);
        for (int64_t j = 0; j < k; ++j)
          for (int v = 0; v < kRegisters; ++v)
            e[v] += q.gram[(start + k) * kChunk + j] * S::load(mu + j * kTile + lane + v * S::width);
        for (int v = 0; v < kRegisters; ++v) {
          const int at = lane + v * S::width;
          const auto act = activate<S>(S::load(a + k * kTile + at), f);
          S::store(mu + k * kTile + at, root_gradient<S>(e[v], S::load(lambda + at), act, c, s, f));
        }
      }
    }
    product(g, q.w + start * p.dim, 1, p.dim, mu, p.dim, steps);
  }
  store_tile(g, p.dz.from(row), n, p.dim);
  for (int64_t i = 0; i < p.dim * kTile; i += S::width) S::store(g + i, -S::load(g + i));
  for (int64_t i = 0; i < kTile; i += S::width) S::store(lambda + i, -S::load(lambda + i));
  store_tile(g, p.minus_dz.from(row), n, p.dim);
  store_lanes(lambda, p.minus_log_det.from(row), n);
}

template <class T>
int64_t amortized_inverse_adjoint_scratch(int64_t dim) {
  return Simd<T>::width * round_up(dim, Simd<T>::width);
}

template <class T, int N, class F>
PLANAR_FN void inverse_adjoint_rows(const InverseAdjoint<T>& p, int64_t first, int count, T* g) {
  using S = Simd<T>;
  const F f = F::of(p.formulas);
  const Block<T, N> block(p, first, count);
  load_rows(g, p.grad_z, block);
  typename S::V lambda{};
  for (int i = 0; i < count; ++i) lambda[i] = p.grad_log_det.data[(first + i) * p.grad_log_det.stride];
  Adjoint<T> x = {};
  for (int64_t k = 0; k < p.steps; ++k) {
    const auto q = constrain_step(p, block, k);
    dot_gradient(p, block, g, k, x);
    const auto e = sum_lanes<T>(x.g_u) + rho_over_n(q) * sum_lanes<T>(x.g_w);
    S::store(x.delta, root_gradient<S>(e, lambda, activate<S>(load_a(p.a, k, block), f), q.c, q.s, f));
    for (int i = 0; i < count; ++i)
      for (int64_t v = 0; v < block.length(); ++v) {
        T* g_v = g + i * block.padded() + v * S::width;
        S::store(g_v, S::load(g_v) + x.delta[i] * load_row(block.w[i] + k * p.w.step, v, block));
      }
  }
  store_rows(p.dz, g, block);
  for (int64_t i = 0; i < S::width * block.padded(); i += S::width) S::store(g + i, -S::load(g + i));
  store_rows(p.minus_dz, g, block);
  S::store_first(p.minus_log_det.data + first, -lambda, count);
}

template <class T, class F>
void amortized_inverse_adjoint(const InverseAdjoint<T>& p, int64_t number, T* scratch) {
  const int64_t first = number * Simd<T>::width;
  const int count = p.rows - first < Simd<T>::width ? int(p.rows - first) : Simd<T>::width;
  with_length<T, F>(p.dim, [&](auto n) __attribute__((always_inline)) {
    inverse_adjoint_rows<T, n.value, F>(p, first, count, scratch);
  });
}

}  // namespace PLANAR_NAMESPACE
}  // namespace vvae
