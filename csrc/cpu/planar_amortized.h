// Amortized parameters: the direct recursion of docs/math.md (1) to (8) and its adjoint (16). No two rows share
// weights, so there is no product to gain: one pass reads u and w once. Vectors run along the latent dimension for the dot
// products and updates, and over the rows of a block (one a lane) for everything scalar. While one step's activation is
// under way, the next step's parameters are read and constrained: nothing waits for memory alone.
#pragma once

#include "tile.h"

namespace vvae {
namespace PLANAR_NAMESPACE {

// The rows of a block: row i of the block is row first + i of z and uses parameter set set[i].
template <class T>
struct Block {
  using S = Simd<T>;
  int64_t dim, padded;    // padded: dim rounded up to whole vectors
  typename S::Mask last;  // the lanes of a row's last vector
  int64_t first;
  int count;
  int64_t set[S::width];

  Block(const Problem<T>& p, int64_t first, int count)
      : dim(p.dim), padded(round_up(p.dim, S::width)), first(first), count(count) {
    last = S::first(dim - padded + S::width);
    for (int i = 0; i < count; ++i) set[i] = (first + i) % p.sets;
  }
  bool whole(int64_t d) const { return d + S::width <= dim; }
};

// Vector d .. d + width of a row in the caller's memory, zeros behind dim.
template <class T>
PLANAR_FN typename Simd<T>::V load_row(const T* row, int64_t d, const Block<T>& block) {
  using S = Simd<T>;
  return block.whole(d) ? S::load(row + d) : S::load(row + d, block.last, S::splat(0));
}

template <class T>
PLANAR_FN void store_row(T* row, int64_t d, typename Simd<T>::V x, const Block<T>& block) {
  using S = Simd<T>;
  if (block.whole(d)) return S::store(row + d, x);
  S::store(row + d, x, block.last);
}

// to [width][padded] = the block's rows of x, zeros behind dim.
template <class T>
PLANAR_FN void load_rows(T* to, Matrix<const T> x, const Block<T>& block) {
  using S = Simd<T>;
  for (int i = 0; i < block.count; ++i) {
    const T* row = x.data + (block.first + i) * x.row;
    T* copy = to + i * block.padded;
    if (x.col == 1) {
      for (int64_t d = 0; d < block.dim; d += S::width) S::store(copy + d, load_row(row, d, block));
    } else {
      for (int64_t d = 0; d < block.padded; ++d) copy[d] = d < block.dim ? row[d * x.col] : T(0);
    }
  }
}

template <class T>
PLANAR_FN void store_rows(Matrix<T> to, const T* from, const Block<T>& block) {
  using S = Simd<T>;
  for (int i = 0; i < block.count; ++i) {
    T* row = to.data + (block.first + i) * to.row;
    for (int64_t d = 0; d < block.dim; d += S::width) store_row(row, d, S::load(from + i * block.padded + d), block);
  }
}

// Step k's a [width] of the block.
template <class T>
PLANAR_FN typename Simd<T>::V load_a(Matrix<const T> a, int64_t k, const Block<T>& block) {
  return Simd<T>::load_first(a.data + k * a.row + block.first, block.count);
}

// The constraint of step k for every row, a row a lane, from w . u and w . w.
template <class T>
PLANAR_FN Constrained<Simd<T>> constrain_step(const Problem<T>& p, const Block<T>& block, int64_t k) {
  using S = Simd<T>;
  typename S::V alpha[S::width] = {}, n[S::width] = {};
  for (int i = 0; i < block.count; ++i) {
    const T *u_row = step_of(p.u, block.set[i], k), *w_row = step_of(p.w, block.set[i], k);
    typename S::V of_u{}, of_w{};
    for (int64_t d = 0; d < block.dim; d += S::width) {
      const auto u = load_row(u_row, d, block), w = load_row(w_row, d, block);
      of_u += w * u;
      of_w += w * w;
    }
    alpha[i] = of_u, n[i] = of_w;
  }
  return constrain<S>(sum_lanes<T>(alpha), sum_lanes<T>(n), p.constrained);
}

// What a row adds to z at one step, (1): h u_hat = h u + h_of_w w with h_of_w = h rho / n. One row a lane.
template <class T>
struct Update {
  T h[Simd<T>::width], h_of_w[Simd<T>::width];
  Update(typename Simd<T>::V x, const Constrained<Simd<T>>& q) {
    Simd<T>::store(h, x);
    Simd<T>::store(h_of_w, x * (q.rho * q.inv_n));
  }
};

template <class T>
PLANAR_FN void update(const Problem<T>& p, const Block<T>& block, T* z, int64_t k, const Update<T>& by) {
  using S = Simd<T>;
  for (int i = 0; i < block.count; ++i) {
    const T *u_row = step_of(p.u, block.set[i], k), *w_row = step_of(p.w, block.set[i], k);
    const auto h = S::splat(by.h[i]), h_of_w = S::splat(by.h_of_w[i]);
    T* row = z + i * block.padded;
    for (int64_t d = 0; d < block.dim; d += S::width)
      S::store(row + d, S::load(row + d) + (h * load_row(u_row, d, block) + h_of_w * load_row(w_row, d, block)));
  }
}

// w . z of step k for every row, a row a lane, where `by`, if any, first takes z over step k - 1.
template <class T>
PLANAR_FN typename Simd<T>::V dot_step(const Problem<T>& p, const Block<T>& block, T* z, int64_t k,
                                       const Update<T>* by) {
  using S = Simd<T>;
  typename S::V dots[S::width] = {};
  for (int i = 0; i < block.count; ++i) {
    const T* w_row = step_of(p.w, block.set[i], k);
    T* row = z + i * block.padded;
    typename S::V sum{};
    if (by) {
      const T *u_last = step_of(p.u, block.set[i], k - 1), *w_last = step_of(p.w, block.set[i], k - 1);
      const auto h = S::splat(by->h[i]), h_of_w = S::splat(by->h_of_w[i]);
      for (int64_t d = 0; d < block.dim; d += S::width) {
        const auto x = S::load(row + d) + (h * load_row(u_last, d, block) + h_of_w * load_row(w_last, d, block));
        S::store(row + d, x);
        sum += load_row(w_row, d, block) * x;
      }
    } else {
      for (int64_t d = 0; d < block.dim; d += S::width) sum += load_row(w_row, d, block) * S::load(row + d);
    }
    dots[i] = sum;
  }
  return sum_lanes<T>(dots);
}

template <class T>
int64_t amortized_forward_scratch(int64_t steps, int64_t dim) {
  return Simd<T>::width * (round_up(dim, Simd<T>::width) + steps);
}

template <class T>
void amortized_forward(const Forward<T>& p, int64_t number, T* scratch) {
  using S = Simd<T>;
  const int64_t first = number * S::width;
  const int count = p.rows - first < S::width ? int(p.rows - first) : S::width;
  const Block<T> block(p, first, count);
  T* z = scratch;                      // [width][padded]
  T* b = z + S::width * block.padded;  // [steps][width]
  fill(b, T(0), p.steps * S::width);
  for (int i = 0; i < count; ++i)
    for (int64_t k = 0; k < p.steps; ++k) b[k * S::width + i] = *step_of(p.b, block.set[i], k);
  load_rows(z, p.z, block);
  auto log_det = no_steps<S>();
  if (p.steps) {
    auto w_z = dot_step<T>(p, block, z, 0, nullptr);
    auto q = constrain_step(p, block, 0);
    for (int64_t k = 0;; ++k) {
      const auto a = w_z + S::load(b + k * S::width);
      if (p.a.data) S::store_first(p.a.data + k * p.a.row + first, a, count);
      const auto act = activate<S>(a);
      add_step<S, 1>(&log_det, &act, q.c, q.s);
      const Update<T> by(act.h, q);
      if (k + 1 == p.steps) {
        update(p, block, z, k, by);
        break;
      }
      q = constrain_step(p, block, k + 1);
      w_z = dot_step(p, block, z, k + 1, &by);
    }
  }
  store_rows(p.z_K, z, block);
  S::store_first(p.log_det.data + first, value<S>(log_det), count);
}

// What the forward recursion left of one step, a row a lane.
template <class T>
struct Step {
  Constrained<Simd<T>> q;
  Activated<Simd<T>> act;
};

// What step k's rows multiply by, (16), one row a lane; the dot products g . u and g . w of the step before.
template <class T>
struct Adjoint {
  static constexpr int width = Simd<T>::width;
  T h[width], h_of_w[width], delta[width], dalpha[width], of_v[width], of_w_n[width], inv_n[width];
  typename Simd<T>::V g_u[width], g_w[width];
};

// The dot products of g with the first step that the adjoint meets.
template <class T>
PLANAR_FN void dot_gradient(const Problem<T>& p, const Block<T>& block, const T* g, int64_t k, Adjoint<T>& x) {
  using S = Simd<T>;
  for (int i = 0; i < block.count; ++i) {
    const T *u_row = step_of(p.u, block.set[i], k), *w_row = step_of(p.w, block.set[i], k);
    typename S::V of_u{}, of_w{};
    for (int64_t d = 0; d < block.dim; d += S::width) {
      const auto gradient = S::load(g + i * block.padded + d);
      of_u += gradient * load_row(u_row, d, block);
      of_w += gradient * load_row(w_row, d, block);
    }
    x.g_u[i] = of_u, x.g_w[i] = of_w;
  }
}

// z back to z_{k-1}, du, dw and db of step k, g to dL/dz_{k-1} and its dot products with step k - 1; `add` where an
// earlier sample of the same sets wrote.
template <class T>
PLANAR_FN void step_back(const Backward<T>& p, const Block<T>& block, T* z, T* g, int64_t k, Adjoint<T>& x, bool add) {
  using S = Simd<T>;
  for (int i = 0; i < block.count; ++i) {
    const int64_t set = block.set[i], before = k ? k - 1 : 0;
    const T *u_row = step_of(p.u, set, k), *w_row = step_of(p.w, set, k);
    const T *u_next = step_of(p.u, set, before), *w_next = step_of(p.w, set, before);
    T *du = step_of(p.du, set, k), *dw = step_of(p.dw, set, k), *db = step_of(p.db, set, k);
    T *z_row = z + i * block.padded, *g_row = g + i * block.padded;
    const auto h = S::splat(x.h[i]), h_of_w = S::splat(x.h_of_w[i]), delta = S::splat(x.delta[i]);
    const auto dalpha = S::splat(x.dalpha[i]), of_v = S::splat(x.of_v[i]), of_w_n = S::splat(x.of_w_n[i]);
    const auto inv_n = S::splat(x.inv_n[i]);
    typename S::V of_u{}, of_w{};
    for (int64_t d = 0; d < block.dim; d += S::width) {
      const auto u = load_row(u_row, d, block), w = load_row(w_row, d, block), gradient = S::load(g_row + d);
      const auto v = h * gradient;
      const auto z_before = S::load(z_row + d) - (h * u + h_of_w * w);
      auto u_sum = v + dalpha * w, w_sum = delta * z_before + of_v * v + dalpha * u + of_w_n * (inv_n * w);
      if (add) u_sum += load_row(du, d, block), w_sum += load_row(dw, d, block);
      store_row(du, d, u_sum, block);
      store_row(dw, d, w_sum, block);
      const auto g_before = gradient + delta * w;
      S::store(z_row + d, z_before);
      S::store(g_row + d, g_before);
      of_u += g_before * load_row(u_next, d, block);
      of_w += g_before * load_row(w_next, d, block);
    }
    x.g_u[i] = of_u, x.g_w[i] = of_w;
    *db = add ? *db + x.delta[i] : x.delta[i];
  }
}

template <class T>
int64_t amortized_backward_scratch(int64_t steps, int64_t dim) {
  return Simd<T>::width * 2 * round_up(dim, Simd<T>::width) + steps * int64_t(sizeof(Step<T>) / sizeof(T));
}

// One block of rows, sample `sample` of the parameter sets from `first_set` on: forward once more from the saved
// pre-activations to z_K (u and w come into the cache), then the steps back.
template <class T>
PLANAR_FN void backward_rows(const Backward<T>& p, int64_t first_set, int count, int64_t sample, T* scratch) {
  using S = Simd<T>;
  const Block<T> block(p, sample * p.sets + first_set, count);
  Step<T>* steps = reinterpret_cast<Step<T>*>(scratch);                                     // [steps]
  T *z = reinterpret_cast<T*>(steps + p.steps), *g = z + S::width * block.padded;           // [width][padded]
  load_rows(z, p.z, block);
  load_rows(g, p.grad_z, block);
  typename S::V lambda{};
  for (int i = 0; i < count; ++i) lambda[i] = p.grad_log_det.data[(block.first + i) * p.grad_log_det.stride];
  for (int64_t k = 0; k < p.steps; ++k) {
    steps[k] = {constrain_step(p, block, k), activate<S>(load_a(p.a, k, block))};
    if (k) update(p, block, z, k - 1, Update<T>(steps[k - 1].act.h, steps[k - 1].q));
  }
  if (p.steps) update(p, block, z, p.steps - 1, Update<T>(steps[p.steps - 1].act.h, steps[p.steps - 1].q));
  Adjoint<T> x = {};
  if (p.steps) dot_gradient(p, block, g, p.steps - 1, x);
  for (int64_t k = p.steps - 1; k >= 0; --k) {
    const auto& [q, act] = steps[k];
    const auto g_u = sum_lanes<T>(x.g_u), g_w = sum_lanes<T>(x.g_w);
    const auto r = lambda / determinant<S>(act, q.c, q.s);
    const auto of_w = q.rho * q.inv_n;
    const auto adjoint = constrain_backward<S>(q, act.h * g_w, r * act.h_prime);
    S::store(x.h, act.h);
    S::store(x.h_of_w, act.h * of_w);
    S::store(x.delta, (g_u + of_w * g_w) * act.h_prime + r * q.c * h_second<S>(act));
    S::store(x.dalpha, adjoint.dalpha);
    S::store(x.of_v, adjoint.of_v);
    S::store(x.of_w_n, adjoint.of_w_n);
    S::store(x.inv_n, q.inv_n);
    step_back(p, block, z, g, k, x, sample > 0);
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
