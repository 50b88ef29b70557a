// Shared parameters: the compact form of docs/math.md (9) to (15), a tile of samples at a time, chunk by chunk of steps.
#pragma once

#include "tile.h"

namespace vvae {
namespace PLANAR_NAMESPACE {

// Contiguous u_hat and w, the constraint (4), (5) and each chunk's Gram matrix.
template <class T>
void prepare(const Problem<T>& p, const Prepared<T>& q) {
  using S = Simd<T>;
  for (int64_t k = 0; k < p.steps; ++k) {
    T *u = q.u_hat + k * p.dim, *w = q.w + k * p.dim;
    for (int64_t d = 0; d < p.dim; ++d) {
      u[d] = p.u.data[k * p.u.step + d * p.u.col];
      w[d] = p.w.data[k * p.w.step + d * p.w.col];
    }
    q.b[k] = p.b.data[k * p.b.step];
    q.alpha[k] = dot(w, u, p.dim);
    q.n[k] = dot(w, w, p.dim);
  }
  const int64_t padded = round_up(p.steps, kMaxLanes);
  fill(q.alpha + p.steps, T(0), padded - p.steps);
  fill(q.n + p.steps, T(0), padded - p.steps);
  for (int64_t k = 0; k < p.steps; k += S::width) {
    const auto x = constrain<S>(S::load(q.alpha + k), S::load(q.n + k), p.constrained);
    S::store(q.c + k, x.c);
    S::store(q.s + k, x.s);
    S::store(q.rho + k, x.rho);
    S::store(q.inv_n + k, x.inv_n);
  }
  for (int64_t k = 0; k < p.steps; ++k) {
    const T scale = q.rho[k] * q.inv_n[k];
    T *u = q.u_hat + k * p.dim, *w = q.w + k * p.dim;
    for (int64_t d = 0; d < p.dim; ++d) u[d] += scale * w[d];
  }
  for (int64_t j = 0; j < p.steps; ++j) {
    const int64_t start = j / q.chunk * q.chunk;
    for (int64_t i = 0; i < q.chunk; ++i) {
      const int64_t k = start + i;
      q.gram[j * kChunk + i] = k > j && k < p.steps ? dot(q.u_hat + j * p.dim, q.w + k * p.dim, p.dim) : T(0);
    }
  }
}

template <class T>
int64_t shared_forward_scratch(int64_t, int64_t dim) {
  return (dim + 2 * kChunk + 1) * kTile;
}

// h and log_det of the steps of one chunk from P = z W^T + b in a: (9), (7), (26).
template <class T>
PLANAR_FN void scan(T* a, T* h, T* log_det, const Prepared<T>& q, int64_t start, int64_t steps) {
  using S = Simd<T>;
  for (int lane = 0; lane < kTile; lane += kRegisters * S::width) {
    LogDet<S> sum[kRegisters];
    for (int v = 0; v < kRegisters; ++v) sum[v] = no_steps<S>();
    for (int64_t k = 0; k < steps; ++k) {
      typename S::V acc[kRegisters];
      for (int v = 0; v < kRegisters; ++v) acc[v] = S::load(a + k * kTile + lane + v * S::width);
      for (int64_t j = 0; j < k; ++j)
        for (int v = 0; v < kRegisters; ++v)
          acc[v] += q.gram[(start + j) * kChunk + k] * S::load(h + j * kTile + lane + v * S::width);
      Activated<S> act[kRegisters];
      for (int v = 0; v < kRegisters; ++v) {
        act[v] = activate<S>(acc[v]);
        S::store(a + k * kTile + lane + v * S::width, acc[v]);
        S::store(h + k * kTile + lane + v * S::width, act[v].h);
      }
      add_step<S, kRegisters>(sum, act, S::splat(q.c[start + k]), S::splat(q.s[start + k]));
    }
    for (int v = 0; v < kRegisters; ++v) {
      T* to = log_det + lane + v * S::width;
      S::store(to, S::load(to) + value<S>(sum[v]));
    }
  }
}

template <class T>
void shared_forward(const Forward<T>& p, const Prepared<T>& q, int64_t tile, T* scratch) {
  const int64_t row = tile * kTile, n = p.rows - row < kTile ? p.rows - row : kTile;
  T* z = scratch;              // [dim][kTile]
  T* a = z + p.dim * kTile;    // [kChunk][kTile]
  T* h = a + kChunk * kTile;   // [kChunk][kTile]
  T* log_det = h + kChunk * kTile;
  load_tile(z, p.z.from(row), n, p.dim);
  fill(log_det, T(0), kTile);
  for (int64_t start = 0; start < p.steps; start += q.chunk) {
    const int64_t steps = p.steps - start < q.chunk ? p.steps - start : q.chunk;
    for (int64_t k = 0; k < steps; ++k) fill(a + k * kTile, q.b[start + k], kTile);
    product(a, q.w + start * p.dim, p.dim, 1, z, steps, p.dim);  // P = z W^T + b
    scan(a, h, log_det, q, start, steps);
    product(z, q.u_hat + start * p.dim, 1, p.dim, h, p.dim, steps);  // (10)
    if (p.a)
      for (int64_t k = 0; k < steps; ++k) copy(p.a + (start + k) * p.rows + row, a + k * kTile, n);
  }
  store_tile(z, p.z_K + row * p.dim, n, p.dim);
  copy(p.log_det + row, log_det, n);
}

template <class T>
int64_t shared_backward_scratch(int64_t steps, int64_t dim) {
  const int64_t padded = round_up(dim, 4);
  return (ceil_div(steps, chunk_of(dim)) * padded + padded + 2 * round_up(steps, kChunk) + kChunk + 1) * kTile;
}

// Samples behind the last have this pre-activation: there h' = 0 and the determinant is 1, so that their zero
// gradients stay zeros.
constexpr int kSaturated = 1000;

// H and h' of every step from the saved pre-activations; steps behind the last hold zeros.
template <class T>
PLANAR_FN void activate_tile(const Backward<T>& p, int64_t row, int64_t n, T* h, T* h_prime) {
  using S = Simd<T>;
  const int64_t padded = round_up(p.steps, kChunk);
  fill(h + p.steps * kTile, T(0), (padded - p.steps) * kTile);
  for (int64_t k = 0; k < p.steps; ++k)
    for (int64_t lane = 0; lane < kTile; lane += S::width) {
      const auto a = lane < n ? S::load_first(p.a + k * p.rows + row + lane, n - lane, kSaturated) : S::splat(kSaturated);
      const auto act = activate<S>(a);
      S::store(h + k * kTile + lane, act.h);
      S::store(h_prime + k * kTile + lane, act.h_prime);
    }
}

// delta of the steps of one chunk from Q = g U^T in delta, last step first: (11), (12); db and gamma by lane.
template <class T>
PLANAR_FN void scan_back(T* delta, const T* h, const T* h_prime, const T* lambda, const Prepared<T>& q,
                         const Partial<T>& sums, int64_t start, int64_t steps) {
  using S = Simd<T>;
  for (int64_t k = steps - 1; k >= 0; --k) {
    const auto c = S::splat(q.c[start + k]), s = S::splat(q.s[start + k]);
    auto db = S::load(sums.db + (start + k) * kMaxLanes), gamma = S::load(sums.gamma + (start + k) * kMaxLanes);
    for (int lane = 0; lane < kTile; lane += kRegisters * S::width) {
      typename S::V e[kRegisters];
      for (int v = 0; v < kRegisters; ++v) e[v] = S::load(delta + k * kTile + lane + v * S::width);
      for (int64_t j = k + 1; j < steps; ++j)
        for (int v = 0; v < kRegisters; ++v)
          e[v] += q.gram[(start + k) * kChunk + j] * S::load(delta + j * kTile + lane + v * S::width);
      for (int v = 0; v < kRegisters; ++v) {
        const int at = lane + v * S::width;
        const Activated<S> act{S::load(h + k * kTile + at), S::load(h_prime + k * kTile + at)};
        const auto r = S::load(lambda + at) / determinant<S>(act, c, s);
        const auto x = e[v] * act.h_prime + r * c * h_second<S>(act);
        S::store(delta + k * kTile + at, x);
        db += x;
        gamma += r * act.h_prime;  // (15)
      }
    }
    S::store(sums.db + (start + k) * kMaxLanes, db);
    S::store(sums.gamma + (start + k) * kMaxLanes, gamma);
  }
}

template <class T>
void shared_backward(const Backward<T>& p, const Prepared<T>& q, const Partial<T>& sums, int64_t tile, T* scratch) {
  const int64_t row = tile * kTile, n = p.rows - row < kTile ? p.rows - row : kTile;
  const int64_t dim = round_up(p.dim, 4), chunks = ceil_div(p.steps, q.chunk), padded = round_up(p.steps, kChunk);
  T* z = scratch;                         // [chunks][dim][kTile]: z where each chunk starts
  T* g = z + chunks * dim * kTile;        // [dim][kTile]
  T* h = g + dim * kTile;                 // [padded steps][kTile]
  T* h_prime = h + padded * kTile;        // [padded steps][kTile]
  T* delta = h_prime + padded * kTile;    // [kChunk][kTile]
  T* lambda = delta + kChunk * kTile;
  load_tile(g, p.grad_z.from(row), n, p.dim);
  fill(g + p.dim * kTile, T(0), (dim - p.dim) * kTile);
  for (int64_t i = 0; i < kTile; ++i) lambda[i] = i < n ? p.grad_log_det[(row + i) * p.grad_log_det_stride] : T(0);
  activate_tile(p, row, n, h, h_prime);
  if (chunks) {
    load_tile(z, p.z.from(row), n, p.dim);
    fill(z + p.dim * kTile, T(0), (dim - p.dim) * kTile);
  }
  for (int64_t chunk = 1; chunk < chunks; ++chunk) {  // the chunk starts, as the forward pass had them
    T* next = z + chunk * dim * kTile;
    const int64_t start = (chunk - 1) * q.chunk;
    copy(next, next - dim * kTile, dim * kTile);
    product(next, q.u_hat + start * p.dim, 1, p.dim, h + start * kTile, p.dim, q.chunk);
  }
  for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
    const int64_t start = chunk * q.chunk, steps = p.steps - start < q.chunk ? p.steps - start : q.chunk;
    const T* h_chunk = h + start * kTile;
    fill(delta, T(0), kChunk * kTile);
    product(delta, q.u_hat + start * p.dim, p.dim, 1, g, steps, p.dim);  // Q = g U^T
    scan_back(delta, h_chunk, h_prime + start * kTile, lambda, q, sums, start, steps);
    const int64_t rows = round_up(steps, 4);
    outer(sums.du_hat + start * dim, h_chunk, g, rows, dim);                              // (14)
    outer(sums.dw + start * dim, delta, z + chunk * dim * kTile, rows, dim);              // (14)
    outer(sums.triangle + start * kChunk, h_chunk, delta, rows, q.chunk);                 // (14)
    product(g, q.w + start * p.dim, 1, p.dim, delta, p.dim, steps);                       // (13)
  }
  store_tile(g, p.dz + row * p.dim, n, p.dim);
}

// Adds the slices in order, then the triangle's part of (14) and the constraint's adjoint (6).
template <class T>
void finish(const Backward<T>& p, const Prepared<T>& q, T* partials, int64_t slices, T* scratch) {
  using S = Simd<T>;
  const int64_t size = Partial<T>::size(p.steps, p.dim), dim = round_up(p.dim, 4), padded = round_up(p.steps, kMaxLanes);
  for (int64_t slice = 1; slice < slices; ++slice)
    for (int64_t i = 0; i < size; ++i) partials[i] += partials[slice * size + i];
  const Partial<T> sums(partials, p.steps, p.dim);
  T *gamma = scratch, *v_dot_w = gamma + padded, *dalpha = v_dot_w + padded, *of_v = dalpha + padded, *of_w_n = of_v + padded;
  fill(scratch, T(0), 5 * padded);
  for (int64_t k = 0; k < p.steps; ++k) {
    const int64_t start = k / q.chunk * q.chunk, end = start + q.chunk < p.steps ? start + q.chunk : p.steps;
    const T* triangle = sums.triangle + start * kChunk;
    T *v = p.du + k * p.dim, *dw = p.dw + k * p.dim;
    for (int64_t d = 0; d < p.dim; ++d) {
      v[d] = sums.du_hat[start * dim + block_index(k - start, d, dim)];
      dw[d] = sums.dw[start * dim + block_index(k - start, d, dim)];
    }
    for (int64_t j = k + 1; j < end; ++j) {
      const T x = triangle[block_index(k - start, j - start, q.chunk)];
      for (int64_t d = 0; d < p.dim; ++d) v[d] += x * q.w[j * p.dim + d];
    }
    for (int64_t j = start; j < k; ++j) {
      const T x = triangle[block_index(j - start, k - start, q.chunk)];
      for (int64_t d = 0; d < p.dim; ++d) dw[d] += x * q.u_hat[j * p.dim + d];
    }
    T db = 0;
    for (int i = 0; i < S::width; ++i) {
      db += sums.db[k * kMaxLanes + i];
      gamma[k] += sums.gamma[k * kMaxLanes + i];
    }
    p.db[k] = db;
    v_dot_w[k] = dot(v, q.w + k * p.dim, p.dim);
  }
  for (int64_t k = 0; k < p.steps; k += S::width) {
    const auto at = constrain<S>(S::load(q.alpha + k), S::load(q.n + k), p.constrained);
    const auto x = constrain_backward<S>(at, S::load(v_dot_w + k), S::load(gamma + k));
    S::store(dalpha + k, x.dalpha);
    S::store(of_v + k, x.of_v);
    S::store(of_w_n + k, x.of_w_n);
  }
  for (int64_t k = 0; k < p.steps; ++k) {
    const T* w = q.w + k * p.dim;
    T *du = p.du + k * p.dim, *dw = p.dw + k * p.dim;
    for (int64_t d = 0; d < p.dim; ++d) {
      const T v = du[d], u = p.u.data[k * p.u.step + d * p.u.col];
      du[d] = v + dalpha[k] * w[d];
      dw[d] += of_v[k] * v + dalpha[k] * u + of_w_n[k] * (q.inv_n[k] * w[d]);
    }
  }
}

}  // namespace PLANAR_NAMESPACE
}  // namespace vvae
