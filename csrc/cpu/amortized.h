// Amortized parameters: the direct recursion of docs/math.md (1) to (8) and its adjoint (16). No two rows share
// weights, so there is no product to gain: one pass reads u and w once. Vectors run along the latent dimension for the
// dot products and updates, and over the rows of a block (one a lane) for everything scalar. While one step's
// activation is under way, the next step's parameters are read and constrained: nothing waits for memory alone.
#pragma once

#include "../planar/root.h"
#include "simd/tile.h"

namespace vvae {
namespace PLANAR_NAMESPACE {

// The rows of a block: row i of the block is row first + i of z and uses parameter set set[i]. A row is N vectors long;
// N = 0 stands for any number.
template <class T, int N>
struct Block {
  using S = Simd<T>;
  int64_t dim, vectors;   // vectors of a row
  typename S::Mask last;  // the lanes of a row's last vector
  int64_t first;
  int count;
  const T *u[S::width], *w[S::width];  // the first step of each row's set
  int64_t set[S::width];

  Block(const Problem<T>& p, int64_t first, int count)
      : dim(p.dim), vectors(ceil_div(p.dim, S::width)), first(first), count(count) {
    last = S::first(dim - (vectors - 1) * S::width);
    for (int i = 0; i < count; ++i) {
      set[i] = (first + i) % p.sets;
      u[i] = p.u.data + set[i] * p.u.set, w[i] = p.w.data + set[i] * p.w.set;
    }
  }
  int64_t length() const { return N ? N : vectors; }
  int64_t padded() const { return length() * S::width; }
};

// Vector v of a row in the caller's memory, zeros behind dim.
template <class T, int N>
PLANAR_FN typename Simd<T>::V load_row(const T* row, int64_t v, const Block<T, N>& block) {
  using S = Simd<T>;
  const T* p = row + v * S::width;
  return v + 1 < block.length() ? S::load(p) : S::load(p, block.last, S::splat(0));
}

template <class T, int N>
PLANAR_FN void store_row(T* row, int64_t v, typename Simd<T>::V x, const Block<T, N>& block) {
  using S = Simd<T>;
  T* p = row + v * S::width;
  if ((v + 1) * S::width <= block.dim) return S::store(p, x);
  S::store(p, x, block.last);
}

// to [width][padded] = the block's rows of x, zeros behind dim.
template <class T, int N>
PLANAR_FN void load_rows(T* to, Matrix<const T> x, const Block<T, N>& block) {
  using S = Simd<T>;
  for (int i = 0; i < block.count; ++i) {
    const T* row = x.data + (block.first + i) * x.row;
    T* to_row = to + i * block.padded();
    if (x.col == 1) {
      for (int64_t v = 0; v < block.length(); ++v) S::store(to_row + v * S::width, load_row(row, v, block));
    } else {
      for (int64_t d = 0; d < block.padded(); ++d) to_row[d] = d < block.dim ? row[d * x.col] : T(0);
    }
  }
}

template <class T, int N>
PLANAR_FN void store_rows(Matrix<T> to, const T* from, const Block<T, N>& block) {
  using S = Simd<T>;
  for (int i = 0; i < block.count; ++i) {
    T* row = to.data + (block.first + i) * to.row;
    for (int64_t v = 0; v < block.length(); ++v)
      store_row(row, v, S::load(from + i * block.padded() + v * S::width), block);
  }
}

// Step k's a [width] of the block.
template <class T, int N>
PLANAR_FN typename Simd<T>::V load_a(Matrix<const T> a, int64_t k, const Block<T, N>& block) {
  return Simd<T>::load_first(a.data + k * a.row + block.first, block.count);
}

// The constraint of step k for every row, a row a lane, from w . u and w . w.
template <class T, int N>
PLANAR_FN Constrained<Simd<T>> constrain_step(const Problem<T>& p, const Block<T, N>& block, int64_t k) {
  using S = Simd<T>;
  typename S::V alpha[S::width], n[S::width];
  const int64_t u_k = k * p.u.step, w_k = k * p.w.step;
  const int count = block.count;
  for (int i = 0; i < count; ++i) {
    const T *u_row = block.u[i] + u_k, *w_row = block.w[i] + w_k;
    typename S::V of_u{}, of_w{};
    for (int64_t v = 0; v < block.length(); ++v) {
      const auto u = load_row(u_row, v, block), w = load_row(w_row, v, block);
      of_u += w * u;
      of_w += w * w;
    }
    alpha[i] = of_u, n[i] = of_w;
  }
  for (int i = count; i < S::width; ++i) alpha[i] = n[i] = S::splat(0);
  return constrain<S>(sum_lanes<T>(alpha), sum_lanes<T>(n), p.spec.constraint);
}

// What a row adds to z at one step, (1): h u_hat = h u + h_of_w w with h_of_w = h rho / n. One row a lane.
template <class T>
struct Update {
  T h[Simd<T>::width], h_of_w[Simd<T>::width];
  Update(typename Simd<T>::V x, const Constrained<Simd<T>>& step) {
    Simd<T>::store(h, x);
    Simd<T>::store(h_of_w, x * rho_over_n(step));
  }
};

// z over step k for every row, into `to`, which may be z; then w . z of the step `next`, a row a lane.
template <class T, int N>
PLANAR_FN typename Simd<T>::V update(const Problem<T>& p, const Block<T, N>& block, const T* z, T* to, int64_t k,
                                     int64_t next, const Update<T>& by) {
  using S = Simd<T>;
  typename S::V dots[S::width];
  const int64_t u_k = k * p.u.step, w_k = k * p.w.step, w_next_k = next * p.w.step;
  const int count = block.count;
  for (int i = 0; i < count; ++i) {
    const T *u_row = block.u[i] + u_k, *w_row = block.w[i] + w_k, *w_next = block.w[i] + w_next_k;
    const auto h = S::splat(by.h[i]), h_of_w = S::splat(by.h_of_w[i]);
    const T* row = z + i * block.padded();
    T* to_row = to + i * block.padded();
    typename S::V sum{};
    for (int64_t v = 0; v < block.length(); ++v) {
      const auto x = S::load(row + v * S::width) + (h * load_row(u_row, v, block) + h_of_w * load_row(w_row, v, block));
      S::store(to_row + v * S::width, x);
      sum += load_row(w_next, v, block) * x;
    }
    dots[i] = sum;
  }
  for (int i = count; i < S::width; ++i) dots[i] = S::splat(0);
  return sum_lanes<T>(dots);
}

// w . z of step k.
template <class T, int N>
PLANAR_FN typename Simd<T>::V first_dot(const Problem<T>& p, const Block<T, N>& block, const T* z, int64_t k) {
  using S = Simd<T>;
  typename S::V dots[S::width] = {};
  for (int i = 0; i < block.count; ++i)
    for (int64_t v = 0; v < block.length(); ++v)
      dots[i] += load_row(block.w[i] + k * p.w.step, v, block) * S::load(z + i * block.padded() + v * S::width);
  return sum_lanes<T>(dots);
}

template <class T>
int64_t amortized_forward_scratch(int64_t steps, int64_t dim) {
  return Simd<T>::width * (round_up(dim, Simd<T>::width) + steps);
}

// The flow or its inverse, whose steps are in the order in which it takes them and which leaves the roots a of (17).
template <class T, int N, class F, bool inverse>
PLANAR_FN void forward_rows(const Forward<T>& p, int64_t first, int count, T* scratch) {
  using S = Simd<T>;
  const F f = F::of(p.spec);
  const Block<T, N> block(p, first, count);
  T* z = scratch;                        // [width][padded]
  T* b = z + S::width * block.padded();  // [steps][width]
  fill(b, T(0), p.steps * S::width);
  for (int i = 0; i < count; ++i)
    for (int64_t k = 0; k < p.steps; ++k) b[k * S::width + i] = *step_of(p.b, block.set[i], k);
  load_rows(z, p.z, block);
  auto log_det = no_steps<S>();
  if (p.steps) {
    auto w_z = first_dot(p, block, z, 0);
    auto step = constrain_step(p, block, 0);
    for (int64_t k = 0; k < p.steps; ++k) {
      const int64_t next = k + 1 < p.steps ? k + 1 : k;
      auto a = w_z + S::load(b + k * S::width);
      if constexpr (inverse) solve<S, 1>(&a, &a, step.c, step.s, f);
      if (p.a.data) S::store_first(p.a.data + k * p.a.row + first, a, count);
      const auto act = activate<S>(a, f);
      add_step<S, 1>(&log_det, &act, step.c, step.s, step.sunk, f);
      const Update<T> by(inverse ? -act.h : act.h, step);
      if (next != k) step = constrain_step(p, block, next);
      w_z = update(p, block, z, z, k, next, by);
    }
  }
  store_rows(p.z_K, z, block);
  const auto sum = value<S>(log_det);
  S::store_first(p.log_det.data + first, inverse ? -sum : sum, count);
}

template <int N>
struct Length {
  static constexpr int value = N;
};

// Runs with the length of a row, in vectors, known to the compiler where it is short, for tanh: four times the code.
template <class T, class F, class Run>
PLANAR_FN void with_length(int64_t dim, const Run& run) {
  if constexpr (sizeof(F) > sizeof(StandardFlow)) return run(Length<0>{});
  switch (ceil_div(dim, Simd<T>::width)) {
    case 1: return run(Length<1>{});
    case 2: return run(Length<2>{});
    case 3: return run(Length<3>{});
    case 4: return run(Length<4>{});
    default: return run(Length<0>{});
  }
}

template <class T, class F, bool inverse>
void amortized_forward(const Forward<T>& p, int64_t number, T* scratch) {
  const int64_t first = number * Simd<T>::width;
  const int count = p.rows - first < Simd<T>::width ? int(p.rows - first) : Simd<T>::width;
  with_length<T, F>(p.dim, [&](auto n) __attribute__((always_inline)) {
    forward_rows<T, n.value, F, inverse>(p, first, count, scratch);
  });
}

// What the forward recursion left of one step, a row a lane.
template <class T>
struct Step {
  Constrained<Simd<T>> step;
  Activated<Simd<T>> act;
};

// What step k's rows multiply by, (16), one row a lane; the dot products g . u and g . w of the step before.
template <class T>
struct Adjoint {
  static constexpr int width = Simd<T>::width;
  T h[width], delta[width], dalpha[width], of_u[width], of_v[width], of_w_n[width], inv_n[width];
  typename Simd<T>::V g_u[width], g_w[width];
};

// The dot products of g with the first step that the adjoint meets.
template <class T, int N>
PLANAR_FN void dot_gradient(const Problem<T>& p, const Block<T, N>& block, const T* g, int64_t k, Adjoint<T>& x) {
  using S = Simd<T>;
  for (int i = 0; i < block.count; ++i) {
    const T *u_row = block.u[i] + k * p.u.step, *w_row = block.w[i] + k * p.w.step;
    typename S::V of_u{}, of_w{};
    for (int64_t v = 0; v < block.length(); ++v) {
      const auto gradient = S::load(g + i * block.padded() + v * S::width);
      of_u += gradient * load_row(u_row, v, block);
      of_w += gradient * load_row(w_row, v, block);
    }
    x.g_u[i] = of_u, x.g_w[i] = of_w;
  }
}

// du, dw and db of step k from the z before it, g to dL/dz_{k-1} and its dot products with step k - 1; `add` where an
// earlier sample of the same sets wrote.
template <class T, int N>
PLANAR_FN void step_back(const Backward<T>& p, const Block<T, N>& block, const T* z, T* g, int64_t k, Adjoint<T>& x,
                         bool add) {
  using S = Simd<T>;
  const int64_t before = k ? k - 1 : 0;
  const int64_t u_k = k * p.u.step, w_k = k * p.w.step, u_before = before * p.u.step, w_before = before * p.w.step;
  const int count = block.count;
  for (int i = 0; i < count; ++i) {
    const int64_t set = block.set[i];
    const T *u_row = block.u[i] + u_k, *w_row = block.w[i] + w_k;
    const T *u_earlier = block.u[i] + u_before, *w_earlier = block.w[i] + w_before;
    T *du = step_of(p.du, set, k), *dw = step_of(p.dw, set, k), *db = step_of(p.db, set, k);
    const T* z_row = z + i * block.padded();
    T* g_row = g + i * block.padded();
    const auto h = S::splat(x.h[i]), delta = S::splat(x.delta[i]);
    const auto dalpha = S::splat(x.dalpha[i]), of_v = S::splat(x.of_v[i]), of_w_n = S::splat(x.of_w_n[i]);
    const auto of_u = S::splat(x.of_u[i]), inv_n = S::splat(x.inv_n[i]);
    typename S::V g_u{}, g_w{};
    for (int64_t v = 0; v < block.length(); ++v) {
      T* g_v = g_row + v * S::width;
      const auto u = load_row(u_row, v, block), w = load_row(w_row, v, block), gradient = S::load(g_v);
      const auto of_h = h * gradient;
      auto u_sum = of_h + dalpha * w;
      auto w_sum = delta * S::load(z_row + v * S::width) + of_v * of_h + of_u * u + of_w_n * (inv_n * w);
      if (add) u_sum += load_row<T, N>(du, v, block), w_sum += load_row<T, N>(dw, v, block);
      store_row(du, v, u_sum, block);
      store_row(dw, v, w_sum, block);
      const auto g_before = gradient + delta * w;
      S::store(g_v, g_before);
      g_u += g_before * load_row(u_earlier, v, block);
      g_w += g_before * load_row(w_earlier, v, block);
    }
    x.g_u[i] = g_u, x.g_w[i] = g_w;
    *db = add ? *db + x.delta[i] : x.delta[i];
  }
}

// The same of g alone: no du, dw and db.
template <class T, int N>
PLANAR_FN void gradient_back(const Backward<T>& p, const Block<T, N>& block, T* g, int64_t k, Adjoint<T>& x) {
  using S = Simd<T>;
  const int64_t before = k ? k - 1 : 0;
  const int count = block.count;
  for (int i = 0; i < count; ++i) {
    const T *w_row = block.w[i] + k * p.w.step;
    const T *u_earlier = block.u[i] + before * p.u.step, *w_earlier = block.w[i] + before * p.w.step;
    T* g_row = g + i * block.padded();
    const auto delta = S::splat(x.delta[i]);
    typename S::V g_u{}, g_w{};
    for (int64_t v = 0; v < block.length(); ++v) {
      T* g_v = g_row + v * S::width;
      const auto g_before = S::load(g_v) + delta * load_row(w_row, v, block);
      S::store(g_v, g_before);
      g_u += g_before * load_row(u_earlier, v, block);
      g_w += g_before * load_row(w_earlier, v, block);
    }
    x.g_u[i] = g_u, x.g_w[i] = g_w;
  }
}

template <class T>
int64_t amortized_backward_scratch(int64_t steps, int64_t dim) {
  return Simd<T>::width * (steps + 1) * round_up(dim, Simd<T>::width) + steps * int64_t(sizeof(Step<T>) / sizeof(T));
}

// One block of rows, sample `sample` of the parameter sets from `first_set` on: forward once more from the saved
// pre-activations, keeping every z (u and w come into the cache), then the steps back. dz alone needs no z.
template <class T, int N, class F, bool inverse>
PLANAR_FN void backward_rows(const Backward<T>& p, int64_t first_set, int count, int64_t sample, T* scratch) {
  using S = Simd<T>;
  const F f = F::of(p.spec);
  const bool params = p.wants_params();
  const Block<T, N> block(p, sample * p.sets + first_set, count);
  const int64_t size = S::width * block.padded();
  Step<T>* steps = reinterpret_cast<Step<T>*>(scratch);                        // [steps]
  T *g = reinterpret_cast<T*>(steps + p.steps), *z = g + size;                 // [width][padded], [steps][width][padded]
  load_rows(g, p.grad_z, block);
  if (p.steps && params) load_rows(z, p.z, block);
  typename S::V lambda{};
  for (int i = 0; i < count; ++i) lambda[i] = p.grad_log_det.data[(block.first + i) * p.grad_log_det.stride];
  for (int64_t k = 0; k < p.steps; ++k) {
    steps[k] = {constrain_step(p, block, k), activate<S>(load_a(p.a, k, block), f)};
    if (k == 0 || !params) continue;
    const auto& [step, act] = steps[k - 1];
    update(p, block, z + (k - 1) * size, z + k * size, k - 1, k, Update<T>(inverse ? -act.h : act.h, step));
  }
  const int64_t last = p.steps - 1;
  Adjoint<T> x = {};
  if (p.steps) dot_gradient(p, block, g, last, x);
  for (int64_t k = last; k >= 0; --k) {
    const auto& [step, act] = steps[k];
    const auto g_u = sum_lanes<T>(x.g_u), g_w = sum_lanes<T>(x.g_w);
    const auto e = g_u + rho_over_n(step) * g_w, h = inverse ? -act.h : act.h;
    StepAdjoint<S> scalars;
    if constexpr (inverse)
      scalars = inverse_step_adjoint<S>(e, lambda, act, step.c, step.s, f);
    else
      scalars = step_adjoint<S>(e, lambda, act, step.c, step.s, unit<S>(step.s, p.spec.constraint), f);
    S::store(x.delta, scalars.delta);
    if (!params) {
      gradient_back(p, block, g, k, x);
      continue;
    }
    const auto adjoint = constrain_backward<S>(step, h * g_w, scalars.gamma);
    S::store(x.h, h);
    S::store(x.dalpha, adjoint.dalpha);
    S::store(x.of_u, inverse ? inverse_of_u<S>(adjoint.dalpha, scalars.delta, h, step) : adjoint.dalpha);
    S::store(x.of_v, adjoint.of_v);
    S::store(x.of_w_n, adjoint.of_w_n);
    S::store(x.inv_n, step.inv_n);
    step_back(p, block, z + k * size, g, k, x, sample > 0);
  }
  store_rows(p.dz, g, block);
}

template <class T, class F, bool inverse>
void amortized_backward(const Backward<T>& p, int64_t number, T* scratch) {
  const int64_t first_set = number * Simd<T>::width;
  const int count = p.sets - first_set < Simd<T>::width ? int(p.sets - first_set) : Simd<T>::width;
  with_length<T, F>(p.dim, [&](auto n) __attribute__((always_inline)) {
    for (int64_t sample = 0; sample < p.rows / p.sets; ++sample)
      backward_rows<T, n.value, F, inverse>(p, first_set, count, sample, scratch);
  });
}

}  // namespace PLANAR_NAMESPACE
}  // namespace vvae
