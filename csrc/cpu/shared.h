// Shared parameters: the compact form of docs/math.md (9) to (15), a tile of samples at a time, chunk by chunk of
// steps.
#pragma once

#include "../planar/root.h"
#include "simd/tile.h"

namespace vvae {
namespace PLANAR_NAMESPACE {

// gram[j][i] = u_hat_j . w_k for step k, the i-th of j's chunk; only those behind j are read. The rows j < end from
// `first` on, at most four of one chunk; w [dim][kTile] holds the steps from `start` on.
template <class T>
PLANAR_FN void gram_rows(const Prepared<T>& flow, const T* w, int64_t first, int64_t end, int64_t start, int64_t dim) {
  using S = Simd<T>;
  const int64_t chunk = (first - start) / flow.chunk * flow.chunk;  // the lane where it starts
  const T* u[4];
  for (int j = 0; j < 4; ++j) u[j] = flow.u_hat + (first + j < end ? first + j : first) * dim;
  for (int64_t i = 0; i < flow.chunk; i += S::width) {
    const auto mask = S::first(flow.chunk - i);
    typename S::V sum[4] = {};
    for (int64_t d = 0; d < dim; ++d) {
      const auto w_d = S::load(w + d * kTile + chunk + i, mask, S::splat(0));
      for (int j = 0; j < 4; ++j) sum[j] += u[j][d] * w_d;
    }
    for (int j = 0; j < 4; ++j)
      if (first + j < end) S::store(flow.gram + (first + j) * kChunk + i, sum[j], mask);
  }
}

template <class T>
int64_t prepare_scratch(int64_t dim) {
  return 2 * dim * kTile;
}

// Contiguous u_hat and w, the constraint (4), (5) and each chunk's Gram matrix, a tile of steps at a time.
template <class T>
void prepare(const Problem<T>& p, const Prepared<T>& flow, T* scratch) {
  using S = Simd<T>;
  T *u = scratch, *w = u + p.dim * kTile;  // [dim][kTile], a step a lane
  for (int64_t start = 0; start < p.steps; start += kTile) {
    const int64_t n = p.steps - start < kTile ? p.steps - start : kTile;
    load_tile(u, Matrix<const T>{p.u.data + start * p.u.step, p.u.step, p.u.col}, n, p.dim);
    load_tile(w, Matrix<const T>{p.w.data + start * p.w.step, p.w.step, p.w.col}, n, p.dim);
    for (int64_t lane = 0; lane < n; lane += S::width) {
      typename S::V alpha{}, norm{};
      for (int64_t d = 0; d < p.dim; ++d) {
        const auto w_d = S::load(w + d * kTile + lane);
        alpha += w_d * S::load(u + d * kTile + lane);
        norm += w_d * w_d;
      }
      const auto x = constrain<S>(alpha, norm, p.spec.constraint);
      const int64_t k = start + lane;
      S::store(flow.alpha + k, alpha), S::store(flow.n + k, norm), S::store(flow.inv_n + k, x.inv_n);
      S::store(flow.c + k, x.c), S::store(flow.s + k, x.s), S::store(flow.sunk + k, x.sunk);
      S::store(flow.unit + k, unit<S>(x.s, p.spec.constraint));
      for (int64_t d = 0; d < p.dim; ++d) {
        T* u_d = u + d * kTile + lane;
        S::store(u_d, S::load(u_d) + x.rho * x.inv_n * S::load(w + d * kTile + lane));
      }
    }
    store_tile(u, Matrix<T>{flow.u_hat + start * p.dim, p.dim, 1}, n, p.dim);
    store_tile(w, Matrix<T>{flow.w + start * p.dim, p.dim, 1}, n, p.dim);
    for (int64_t k = start; k < start + n; ++k) flow.b[k] = p.b.data[k * p.b.step];
    for (int64_t j = 0; j < n; j += 4) gram_rows(flow, w, start + j, start + (j + 4 < n ? j + 4 : n), start, p.dim);
  }
}

template <class T>
int64_t shared_forward_scratch(int64_t /*steps*/, int64_t dim) {
  return (dim + 2 * kChunk + 3) * kTile;
}

// h of the steps of one chunk from P = z W^T + b in a, and the sums with these steps: (9), (7), (26). The inverse leaves
// -h and the roots a of (17).
template <class T, bool inverse, class F>
PLANAR_FN void scan(T* a, T* h, T* sums, const Prepared<T>& flow, int64_t start, int64_t steps, const F& f) {
  using S = Simd<T>;
  for (int lane = 0; lane < kTile; lane += kRegisters * S::width) {
    LogDet<S> sum[kRegisters];
    for (int v = 0; v < kRegisters; ++v) sum[v] = load_sum(sums + lane + v * S::width);
    for (int64_t k = 0; k < steps; ++k) {
      const auto c = S::splat(flow.c[start + k]), s = S::splat(flow.s[start + k]), sunk = S::splat(flow.sunk[start + k]);
      typename S::V acc[kRegisters];
      for (int v = 0; v < kRegisters; ++v) acc[v] = S::load(a + k * kTile + lane + v * S::width);
      for (int64_t j = 0; j < k; ++j)
        for (int v = 0; v < kRegisters; ++v)
          acc[v] += flow.gram[(start + j) * kChunk + k] * S::load(h + j * kTile + lane + v * S::width);
      if constexpr (inverse) solve<S, kRegisters>(acc, acc, c, s, f);
      Activated<S> act[kRegisters];
      for (int v = 0; v < kRegisters; ++v) {
        act[v] = activate<S>(acc[v], f);
        S::store(a + k * kTile + lane + v * S::width, acc[v]);
        S::store(h + k * kTile + lane + v * S::width, inverse ? -act[v].h : act[v].h);
      }
      add_step<S, kRegisters>(sum, act, c, s, sunk, f);
    }
    for (int v = 0; v < kRegisters; ++v) store_sum(sums + lane + v * S::width, sum[v]);
  }
}

// log_det [kTile] in the place of the sums' logarithms; the inverse map's is its negative.
template <class T, bool inverse>
PLANAR_FN void take_logarithms(T* sums) {
  using S = Simd<T>;
  for (int lane = 0; lane < kTile; lane += S::width) {
    const auto log_det = value<S>(load_sum(sums + lane));
    S::store(sums + lane, inverse ? 0 - log_det : log_det);
  }
}

// The flow or its inverse, whose steps are in the order in which it takes them.
template <class T, class F, bool inverse>
void shared_forward(const Forward<T>& p, const Prepared<T>& flow, int64_t tile, T* scratch) {
  const F f = F::of(p.spec);
  const int64_t row = tile * kTile, n = p.rows - row < kTile ? p.rows - row : kTile;
  T* z = scratch;              // [dim][kTile]
  T* a = z + p.dim * kTile;    // [kChunk][kTile]
  T* h = a + kChunk * kTile;   // [kChunk][kTile]
  T* sums = h + kChunk * kTile;  // [3][kTile]
  load_tile(z, p.z.from(row), n, p.dim);
  prefetch_tile(p.z, row + kTile, p.rows, p.dim);
  for (int lane = 0; lane < kTile; lane += Simd<T>::width) store_sum(sums + lane, no_steps<Simd<T>>());
  for (int64_t start = 0; start < p.steps; start += flow.chunk) {
    const int64_t steps = p.steps - start < flow.chunk ? p.steps - start : flow.chunk;
    for (int64_t k = 0; k < steps; ++k) fill(a + k * kTile, flow.b[start + k], kTile);
    product(a, flow.w + start * p.dim, p.dim, 1, z, steps, p.dim);  // P = z W^T + b
    scan<T, inverse>(a, h, sums, flow, start, steps, f);
    product(z, flow.u_hat + start * p.dim, 1, p.dim, h, p.dim, steps);  // (10)
    if (p.a.data)
      for (int64_t k = 0; k < steps; ++k) store_lanes(a + k * kTile, p.a.lanes(start + k, row), n, p.stream);
  }
  store_tile(z, p.z_K.from(row), n, p.dim, p.stream);
  take_logarithms<T, inverse>(sums);
  store_lanes(sums, p.log_det.from(row), n);
  if (p.stream) Simd<T>::fence();
}

template <class T>
int64_t shared_backward_scratch(int64_t steps, int64_t dim) {
  const int64_t padded = round_up(dim, 4);
  return (ceil_div(steps, span_of(dim)) * padded + padded + 2 * round_up(steps, kChunk) + kChunk + 1) * kTile;
}

// The pre-activation of samples behind the last, whose gradients are zeros and have to stay so: h is small, and the
// determinant is 1 wherever the gradient of its logarithm divides by it.
PLANAR_FN int padding_preactivation(StandardFlow) { return 1000; }
template <class T>
PLANAR_FN int padding_preactivation(const AnyFlow<T>& f) {
  return f.kind == Activation::tanh || f.kind == Activation::sigmoid ? 1000 : 0;
}

// H, of the inverse -H, and h' of every step from the saved pre-activations; missing steps hold zeros.
template <class T, bool inverse, class F>
PLANAR_FN void activate_tile(const Backward<T>& p, int64_t row, int64_t n, T* h, T* h_prime, const F& f) {
  using S = Simd<T>;
  const int64_t padded = round_up(p.steps, kChunk);
  fill(h + p.steps * kTile, T(0), (padded - p.steps) * kTile);
  for (int64_t k = 0; k < p.steps; ++k) {
    load_lanes(h + k * kTile, p.a.lanes(k, row), n, T(padding_preactivation(f)));
    for (int64_t lane = 0; lane < kTile; lane += S::width) {
      const auto act = activate<S>(S::load(h + k * kTile + lane), f);
      S::store(h + k * kTile + lane, inverse ? -act.h : act.h);
      S::store(h_prime + k * kTile + lane, act.h_prime);
    }
  }
}

// delta of the steps of one chunk from Q = g U^T in delta, last step first: (11), (12) or (35); with `params` db and
// gamma by lane.
template <class T, bool inverse, bool params, class F>
PLANAR_FN void scan_back(T* delta, const T* h, const T* h_prime, const T* lambda, const Prepared<T>& flow,
                         const Partial<T>& sums, int64_t start, int64_t steps, const F& f) {
  using S = Simd<T>;
  for (int64_t k = steps - 1; k >= 0; --k) {
    const auto c = S::splat(flow.c[start + k]), s = S::splat(flow.s[start + k]), unit = S::splat(flow.unit[start + k]);
    [[maybe_unused]] typename S::V db{}, gamma{};
    if constexpr (params) {
      db = S::load(sums.db + (start + k) * kMaxLanes);
      gamma = S::load(sums.gamma + (start + k) * kMaxLanes);
    }
    for (int lane = 0; lane < kTile; lane += kRegisters * S::width) {
      typename S::V e[kRegisters];
      for (int v = 0; v < kRegisters; ++v) e[v] = S::load(delta + k * kTile + lane + v * S::width);
      for (int64_t j = k + 1; j < steps; ++j)
        for (int v = 0; v < kRegisters; ++v)
          e[v] += flow.gram[(start + k) * kChunk + j] * S::load(delta + j * kTile + lane + v * S::width);
      for (int v = 0; v < kRegisters; ++v) {
        const int at = lane + v * S::width;
        const auto h_at = S::load(h + k * kTile + at), lambda_at = S::load(lambda + at);
        const Activated<S> act{inverse ? -h_at : h_at, S::load(h_prime + k * kTile + at)};
        StepAdjoint<S> x;
        if constexpr (inverse)
          x = inverse_step_adjoint<S>(e[v], lambda_at, act, c, s, f);
        else
          x = step_adjoint<S>(e[v], lambda_at, act, c, s, unit, f);
        S::store(delta + k * kTile + at, x.delta);
        if constexpr (params) {
          db += x.delta;
          gamma += x.gamma;  // (15)
        }
      }
    }
    if constexpr (params) {
      S::store(sums.db + (start + k) * kMaxLanes, db);
      S::store(sums.gamma + (start + k) * kMaxLanes, gamma);
    }
  }
}

template <class T, class F, bool inverse>
void shared_backward(const Backward<T>& p, const Prepared<T>& flow, const Partial<T>& sums, int64_t tile, T* scratch) {
  const F f = F::of(p.spec);
  const int64_t row = tile * kTile, n = p.rows - row < kTile ? p.rows - row : kTile;
  const int64_t padded_dim = round_up(p.dim, 4), padded_steps = round_up(p.steps, kChunk);
  const bool params = p.wants_params();
  const int64_t spans = params ? ceil_div(p.steps, flow.span) : 0;  // dz alone needs no z
  T* z = scratch;                             // [spans][padded dim][kTile]: z where each span starts
  T* g = z + spans * padded_dim * kTile;      // [padded dim][kTile]
  T* h = g + padded_dim * kTile;              // [padded steps][kTile]
  T* h_prime = h + padded_steps * kTile;      // [padded steps][kTile]
  T* delta = h_prime + padded_steps * kTile;  // [kChunk][kTile]
  T* lambda = delta + kChunk * kTile;
  load_tile(g, p.grad_z.from(row), n, p.dim);
  fill(g + p.dim * kTile, T(0), (padded_dim - p.dim) * kTile);
  load_lanes(lambda, p.grad_log_det.from(row), n, T(0));
  activate_tile<T, inverse>(p, row, n, h, h_prime, f);
  prefetch_tile(p.grad_z, row + kTile, p.rows, p.dim);
  if (params) prefetch_tile(p.z, row + kTile, p.rows, p.dim);
  if (spans) {
    load_tile(z, p.z.from(row), n, p.dim);
    fill(z + p.dim * kTile, T(0), (padded_dim - p.dim) * kTile);
  }
  for (int64_t span = 1; span < spans; ++span) {  // (10), once more
    T* next = z + span * padded_dim * kTile;
    const int64_t start = (span - 1) * flow.span;
    copy(next, next - padded_dim * kTile, padded_dim * kTile);
    product(next, flow.u_hat + start * p.dim, 1, p.dim, h + start * kTile, p.dim, flow.span);
  }
  for (int64_t start = (p.steps - 1) / flow.chunk * flow.chunk; start >= 0 && p.steps; start -= flow.chunk) {
    const int64_t steps = p.steps - start < flow.chunk ? p.steps - start : flow.chunk;
    const T* h_chunk = h + start * kTile;
    fill(delta, T(0), kChunk * kTile);
    product(delta, flow.u_hat + start * p.dim, p.dim, 1, g, steps, p.dim);  // Q = g U^T
    if (params) {
      const int64_t span = start / flow.span, before = start - span * flow.span;  // the span's steps before the chunk
      scan_back<T, inverse, true>(delta, h_chunk, h_prime + start * kTile, lambda, flow, sums, start, steps, f);
      const int64_t rows = round_up(steps, 4);
      outer(sums.du_hat + start * padded_dim, h_chunk, g, rows, padded_dim);                           // (14)
      outer(sums.dw + start * padded_dim, delta, z + span * padded_dim * kTile, rows, padded_dim);     // (14)
      outer(sums.triangle + start * flow.span, h_chunk - before * kTile, delta, before + rows, flow.chunk);  // (14)
    } else {
      scan_back<T, inverse, false>(delta, h_chunk, h_prime + start * kTile, lambda, flow, sums, start, steps, f);
    }
    product(g, flow.w + start * p.dim, 1, p.dim, delta, p.dim, steps);                                  // (13)
  }
  store_tile(g, p.dz.from(row), n, p.dim, p.stream);
  if (p.stream) Simd<T>::fence();
}

// Row m of a matrix of sums in blocks, columns [0, dim).
template <class T>
PLANAR_FN void unblock_row(T* row, const T* sums, int64_t m, int64_t dim) {
  const T* from = sums + block_index(m, 0, round_up(dim, 4));
  int64_t n = 0;
  for (; n + kBlockN <= dim; n += kBlockN) __builtin_memcpy(row + n, from + n * kBlockM, kBlockN * sizeof(T));
  for (int64_t i = n; i < dim; ++i) row[i] = from[n * kBlockM + i - n];
}

// The sums over samples of step k: v = dL/du_hat and dL/dw without the constraint's part, with the triangle of (14).
template <class T>
PLANAR_FN void triangle_sums(T* v, T* dw, const Prepared<T>& flow, const Partial<T>& sums, int64_t k, int64_t steps,
                             int64_t dim, bool inverse) {
  using S = Simd<T>;
  const int64_t start = k / flow.chunk * flow.chunk, end = start + flow.chunk < steps ? start + flow.chunk : steps;
  const int64_t span = k / flow.span * flow.span, matrix = start * round_up(dim, 4);
  const T* triangle = sums.triangle + start * flow.span;  // [steps of the span][steps of the chunk]
  unblock_row(v, sums.du_hat + matrix, k - start, dim);
  unblock_row(dw, sums.dw + matrix, k - start, dim);
  const int64_t before = inverse && flow.inv_n[k] == 0 ? k + 1 : k;  // w = 0: z_{k-1} in place of z_k, (40)
  T of_w[kChunk], of_u[kMaxSpan];
  for (int64_t j = k + 1; j < end; ++j) of_w[j - start] = triangle[block_index(k - span, j - start, flow.chunk)];
  for (int64_t j = span; j < before; ++j) of_u[j - span] = triangle[block_index(j - span, k - start, flow.chunk)];
  for (int64_t d = 0; d < dim; d += S::width) {
    const auto mask = S::first(dim - d);
    const auto zero = S::splat(0);
    auto v_d = S::load(v + d, mask, zero), dw_d = S::load(dw + d, mask, zero);
    for (int64_t j = k + 1; j < end; ++j) v_d += of_w[j - start] * S::load(flow.w + j * dim + d, mask, zero);
    for (int64_t j = span; j < before; ++j) dw_d += of_u[j - span] * S::load(flow.u_hat + j * dim + d, mask, zero);
    S::store(v + d, v_d, mask);
    S::store(dw + d, dw_d, mask);
  }
}

// Adds the slices in order, then the triangle's part of (14) and the constraint's adjoint (6).
template <class T>
void finish(const Backward<T>& p, const Prepared<T>& flow, T* partials, int64_t slices, T* scratch) {
  using S = Simd<T>;
  const int64_t size = Partial<T>::size(p.steps, p.dim), padded = round_up(p.steps, kMaxLanes);
  for (int64_t slice = 1; slice < slices; ++slice)
    for (int64_t i = 0; i < size; ++i) partials[i] += partials[slice * size + i];
  const Partial<T> sums(partials, p.steps, p.dim);
  T *dalpha = scratch, *of_v = dalpha + padded, *of_w_n = of_v + padded;
  for (int64_t k = 0; k < p.steps; ++k)
    triangle_sums(step_of(p.du, 0, k), step_of(p.dw, 0, k), flow, sums, k, p.steps, p.dim, p.inverse);
  for (int64_t k = 0; k < p.steps; k += S::width) {
    typename S::V of_b[S::width], of_c[S::width], of_w[S::width] = {};
    for (int64_t i = 0; i < S::width; ++i) {
      of_b[i] = S::load(sums.db + (k + i) * kMaxLanes);
      of_c[i] = S::load(sums.gamma + (k + i) * kMaxLanes);
      if (k + i < p.steps) of_w[i] = dot<T>(step_of(p.du, 0, k + i), flow.w + (k + i) * p.dim, p.dim);
    }
    const auto db = sum_lanes<T>(of_b), gamma = sum_lanes<T>(of_c), v_dot_w = sum_lanes<T>(of_w);
    for (int64_t i = 0; i < S::width && k + i < p.steps; ++i) *step_of(p.db, 0, k + i) = db[i];
    const auto at = constrain<S>(S::load(flow.alpha + k), S::load(flow.n + k), p.spec.constraint);
    const auto x = constrain_backward<S>(at, v_dot_w, gamma);
    S::store(dalpha + k, x.dalpha);
    S::store(of_v + k, x.of_v);
    S::store(of_w_n + k, x.of_w_n);
  }
  for (int64_t k = 0; k < p.steps; ++k) {
    T *du = step_of(p.du, 0, k), *dw = step_of(p.dw, 0, k);
    const T *w_row = flow.w + k * p.dim, *u_row = step_of(p.u, 0, k);
    for (int64_t d = 0; d < p.dim; d += S::width) {
      const int64_t left = p.dim - d;
      const auto v = S::load_first(du + d, left), w = S::load_first(w_row + d, left);
      const auto u = load_strided(u_row + d * p.u.col, p.u.col, left);
      S::store_first(du + d, v + dalpha[k] * w, left);
      S::store_first(dw + d, S::load_first(dw + d, left) + (of_v[k] * v + dalpha[k] * u + of_w_n[k] * (flow.inv_n[k] * w)),
                     left);
    }
  }
}

}  // namespace PLANAR_NAMESPACE
}  // namespace vvae
