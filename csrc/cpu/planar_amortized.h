// Amortized parameters: the direct recursion of docs/math.md (1) to (8) and its adjoint (16). No two rows share weights,
// so there is no product to gain: one pass reads u and w once. Vectors run along the latent dimension for the dot
// products and updates, and over the rows of a block (one a lane) for everything scalar.
#pragma once

#include "tile.h"

namespace vvae {
namespace PLANAR_NAMESPACE {

// The rows of a block: row i of the block is row first + i of z and uses parameter set set[i].
template <class T>
struct Block {
  static constexpr int width = Simd<T>::width;
  int64_t dim, padded;  // padded: dim rounded up to whole vectors
  int64_t first;
  int count;
  int64_t set[width];

  Block(const Problem<T>& p, int64_t first, int count)
      : dim(p.dim), padded(round_up(p.dim, width)), first(first), count(count) {
    const int64_t first_set = first % p.sets;
    for (int i = 0; i < count; ++i) set[i] = first_set + i < p.sets ? first_set + i : (first_set + i) % p.sets;
  }
};

// The vector d .. d + width of one row's parameters, gathered where they are not contiguous.
template <class T>
PLANAR_FN typename Simd<T>::V load_params(const T* row, int64_t col, int64_t d, int64_t dim) {
  using S = Simd<T>;
  if (col == 1) return S::load_first(row + d, dim - d);
  typename S::V x{};
  for (int i = 0; i < S::width; ++i)
    if (d + i < dim) x[i] = row[(d + i) * col];
  return x;
}

template <class T>
PLANAR_FN const T* step_of(const Params<T>& p, int64_t set, int64_t k) {
  return p.data + set * p.set + k * p.step;
}

template <class T>
PLANAR_FN void load_rows(T* to, Matrix<const T> from, const Block<T>& block) {
  fill(to, T(0), Block<T>::width * block.padded);
  for (int i = 0; i < block.count; ++i)
    for (int64_t d = 0; d < block.dim; ++d)
      to[i * block.padded + d] = from.data[(block.first + i) * from.row + d * from.col];
}

template <class T>
PLANAR_FN void store_rows(T* to, const T* from, const Block<T>& block) {
  for (int i = 0; i < block.count; ++i) copy(to + (block.first + i) * block.dim, from + i * block.padded, block.dim);
}

// The block's part of x, one element for each row of z, a row a lane.
template <class T>
PLANAR_FN typename Simd<T>::V load_lanes(const T* x, const Block<T>& block) {
  return Simd<T>::load_first(x + block.first, block.count);
}

// w . x, w . u and w . w of every row at step k, a row a lane; x [width][padded].
template <class T>
struct Products {
  typename Simd<T>::V w_x, alpha, n;
};

template <class T>
PLANAR_FN Products<T> products_of(const Problem<T>& p, const Block<T>& block, const T* x, int64_t k) {
  using S = Simd<T>;
  typename S::V w_x[S::width] = {}, alpha[S::width] = {}, n[S::width] = {};
  for (int i = 0; i < block.count; ++i) {
    const T *u_row = step_of(p.u, block.set[i], k), *w_row = step_of(p.w, block.set[i], k);
    typename S::V sum_x{}, sum_u{}, sum_w{};
    for (int64_t d = 0; d < block.dim; d += S::width) {
      const auto u = load_params(u_row, p.u.col, d, block.dim), w = load_params(w_row, p.w.col, d, block.dim);
      sum_x += w * S::load(x + i * block.padded + d);
      sum_u += w * u;
      sum_w += w * w;
    }
    w_x[i] = sum_x, alpha[i] = sum_u, n[i] = sum_w;
  }
  return {sum_lanes<T>(w_x), sum_lanes<T>(alpha), sum_lanes<T>(n)};
}

// z += h u_hat for every row, (1): h u_hat = h u + h_of_w w with h_of_w = h rho / n.
template <class T>
PLANAR_FN void update(const Problem<T>& p, const Block<T>& block, T* z, int64_t k, typename Simd<T>::V h,
                      typename Simd<T>::V h_of_w) {
  using S = Simd<T>;
  for (int i = 0; i < block.count; ++i) {
    const T *u_row = step_of(p.u, block.set[i], k), *w_row = step_of(p.w, block.set[i], k);
    T* row = z + i * block.padded;
    for (int64_t d = 0; d < block.dim; d += S::width) {
      const auto u = load_params(u_row, p.u.col, d, block.dim), w = load_params(w_row, p.w.col, d, block.dim);
      S::store(row + d, S::load(row + d) + (h[i] * u + h_of_w[i] * w));
    }
  }
}

template <class T>
int64_t amortized_scratch(int64_t steps, int64_t dim) {
  return 2 * Simd<T>::width * (round_up(dim, Simd<T>::width) + steps);
}

template <class T>
void amortized_forward(const Forward<T>& p, int64_t number, T* z) {
  using S = Simd<T>;
  const int64_t first = number * S::width;
  const int count = p.rows - first < S::width ? int(p.rows - first) : S::width;
  const Block<T> block(p, first, count);
  load_rows(z, p.z, block);
  auto log_det = S::splat(0);
  for (int64_t k = 0; k < p.steps; ++k) {
    const auto dots = products_of(p, block, z, k);
    const auto q = constrain<S>(dots.alpha, dots.n, p.constrained);
    typename S::V b{};
    for (int i = 0; i < S::width; ++i)
      if (i < count) b[i] = *step_of(p.b, block.set[i], k);
    const auto a = dots.w_x + b;
    const auto act = activate<S>(a);
    log_det += log_abs_determinant<S>(act, q.c, q.s);
    update(p, block, z, k, act.h, act.h * (q.rho * q.inv_n));
    if (p.a) S::store_first(p.a + k * p.rows + first, a, count);
  }
  store_rows(p.z_K, z, block);
  S::store_first(p.log_det + first, log_det, count);
}

// g . u and g . w of every row at step k, a row a lane.
template <class T>
PLANAR_FN void dot_gradient(const Problem<T>& p, const Block<T>& block, const T* g, int64_t k, typename Simd<T>::V& g_u,
                            typename Simd<T>::V& g_w) {
  using S = Simd<T>;
  typename S::V of_u[S::width] = {}, of_w[S::width] = {};
  for (int i = 0; i < block.count; ++i) {
    const T *u_row = step_of(p.u, block.set[i], k), *w_row = step_of(p.w, block.set[i], k);
    typename S::V sum_u{}, sum_w{};
    for (int64_t d = 0; d < block.dim; d += S::width) {
      const auto x = S::load(g + i * block.padded + d);
      sum_u += x * load_params(u_row, p.u.col, d, block.dim);
      sum_w += x * load_params(w_row, p.w.col, d, block.dim);
    }
    of_u[i] = sum_u, of_w[i] = sum_w;
  }
  g_u = sum_lanes<T>(of_u);
  g_w = sum_lanes<T>(of_w);
}

// What step k's rows multiply by, a row a lane, (16).
template <class T>
struct Coefficients {
  typename Simd<T>::V h, h_of_w, delta, inv_n;
  ConstraintAdjoint<Simd<T>> adjoint;
};

// z back to z_{k-1}, du and dw of step k, and g to dL/dz_{k-1}; `add` where an earlier sample of the same sets wrote.
template <class T>
PLANAR_FN void step_back(const Backward<T>& p, const Block<T>& block, T* z, T* g, int64_t k, const Coefficients<T>& q,
                         bool add) {
  using S = Simd<T>;
  for (int i = 0; i < block.count; ++i) {
    const T *u_row = step_of(p.u, block.set[i], k), *w_row = step_of(p.w, block.set[i], k);
    T *du = p.du + (block.set[i] * p.steps + k) * p.dim, *dw = p.dw + (block.set[i] * p.steps + k) * p.dim;
    T *z_row = z + i * block.padded, *g_row = g + i * block.padded;
    const T h = q.h[i], h_of_w = q.h_of_w[i], delta = q.delta[i];
    const T dalpha = q.adjoint.dalpha[i], of_v = q.adjoint.of_v[i], of_w_n = q.adjoint.of_w_n[i], inv_n = q.inv_n[i];
    for (int64_t d = 0; d < block.dim; d += S::width) {
      const int64_t left = block.dim - d;
      const auto u = load_params(u_row, p.u.col, d, block.dim), w = load_params(w_row, p.w.col, d, block.dim);
      const auto v = h * S::load(g_row + d);
      const auto before = S::load(z_row + d) - (h * u + h_of_w * w);
      auto u_sum = v + dalpha * w, w_sum = delta * before + of_v * v + dalpha * u + of_w_n * (inv_n * w);
      if (add) u_sum += S::load_first(du + d, left), w_sum += S::load_first(dw + d, left);
      S::store_first(du + d, u_sum, left);
      S::store_first(dw + d, w_sum, left);
      S::store(z_row + d, before);
      S::store(g_row + d, S::load(g_row + d) + delta * w);
    }
    T& db = p.db[block.set[i] * p.steps + k];
    db = add ? db + delta : delta;
  }
}

// One block of rows, sample `sample` of the parameter sets from `first_set` on: forward once more from the saved
// pre-activations to z_K (u and w come into the cache), then the steps back.
template <class T>
PLANAR_FN void backward_rows(const Backward<T>& p, int64_t first_set, int count, int64_t sample, T* scratch) {
  using S = Simd<T>;
  const Block<T> block(p, sample * p.sets + first_set, count);
  T *z = scratch, *g = z + S::width * block.padded;
  T *alpha = g + S::width * block.padded, *n = alpha + S::width * p.steps;
  load_rows(z, p.z, block);
  load_rows(g, p.grad_z, block);
  typename S::V lambda{};
  for (int i = 0; i < count; ++i) lambda[i] = p.grad_log_det[(block.first + i) * p.grad_log_det_stride];
  for (int64_t k = 0; k < p.steps; ++k) {
    const auto dots = products_of(p, block, z, k);
    const auto q = constrain<S>(dots.alpha, dots.n, p.constrained);
    const auto h = activate<S>(load_lanes(p.a + k * p.rows, block)).h;
    update(p, block, z, k, h, h * (q.rho * q.inv_n));
    S::store(alpha + k * S::width, dots.alpha);
    S::store(n + k * S::width, dots.n);
  }
  for (int64_t k = p.steps - 1; k >= 0; --k) {
    const auto q = constrain<S>(S::load(alpha + k * S::width), S::load(n + k * S::width), p.constrained);
    const auto act = activate<S>(load_lanes(p.a + k * p.rows, block));
    typename S::V g_u, g_w;
    dot_gradient(p, block, g, k, g_u, g_w);
    const auto r = lambda / determinant<S>(act, q.c, q.s);
    const auto e = g_u + q.rho * q.inv_n * g_w;
    const auto delta = e * act.h_prime + r * q.c * h_second<S>(act);
    const auto adjoint = constrain_backward<S>(q, act.h * g_w, r * act.h_prime);
    step_back(p, block, z, g, k, Coefficients<T>{act.h, act.h * (q.rho * q.inv_n), delta, q.inv_n, adjoint}, sample > 0);
  }
  store_rows(p.dz, g, block);
}

template <class T>
void amortized_backward(const Backward<T>& p, int64_t number, T* scratch) {
  const int64_t first_set = number * Simd<T>::width;
  const int count = p.sets - first_set < Simd<T>::width ? int(p.sets - first_set) : Simd<T>::width;
  for (int64_t sample = 0; sample < p.rows / p.sets; ++sample) backward_rows(p, first_set, count, sample, scratch);
}

}  // namespace PLANAR_NAMESPACE
}  // namespace vvae
