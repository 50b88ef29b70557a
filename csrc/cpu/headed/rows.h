// A tile of rows of a headed flow, docs/math.md (67): the direct recursion (1) to (8) and its adjoint (16), as in
// amortized.h, but with a row a lane throughout. The parameters of a span of steps are computed where the steps read
// them, and their gradients multiplied while they are there: neither leaves the caches.
#pragma once

#include "args.h"
#include "product.h"

namespace vvae {
namespace PLANAR_NAMESPACE {

// The rows that a pass computes, in `lanes` of whole vectors.
template <class T>
struct Part {
  const Headed<T>& p;
  int64_t first, count, lanes;

  Part(const Headed<T>& p, Rows rows)
      : p(p), first(rows.first), count(rows.count), lanes(round_up(rows.count, Simd<T>::width)) {}

  // Where step k's a, or the z [dim][rows] at the start of span i > 0, has the vector from `lane` on.
  int64_t saved_a(int64_t k, int64_t lane) const { return k * p.rows + first + lane; }
  int64_t saved_z(int64_t i, int64_t lane) const { return saved_a(p.steps + (i - 1) * p.dim, lane); }
};

// The parameters of a span, or their gradients, in the memory of the steps `of`: u, w [steps][dim][kTile], b
// [steps][kTile].
template <class T>
struct Span {
  int64_t start, steps;
  T *u, *w, *b;

  Span(Steps span, Steps of, T* memory)
      : start(span.start),
        steps(span.steps),
        u(memory + of.of_u(start) * kTile),
        w(memory + of.of_w(start) * kTile),
        b(memory + of.of_b(start) * kTile) {}
  static int64_t size(int64_t dim) { return steps_between(dim) * (2 * dim + 1) * kTile; }
};

// The parameters of a span, from context [features][kTile].
template <class T>
PLANAR_FN void compute_parameters(const Part<T>& part, const Span<T>& span, const T* context) {
  const Headed<T>& p = part.p;
  const auto compute = [&](T* to, int64_t row, int64_t rows) __attribute__((always_inline)) {
    const Factors<T> factors{p.weight + row * p.features, p.features, 1, context, kTile, p.features};
    multiply(to, kTile, factors, Start::column, p.bias + row, rows, part.lanes);
  };
  compute(span.u, p.all().of_u(span.start), span.steps * p.dim);
  compute(span.w, p.all().of_w(span.start), span.steps * p.dim);
  compute(span.b, p.all().of_b(span.start), span.steps);
}

constexpr int64_t kRun = 32;  // products of one sum: of long sums, rounding would grow with D

template <class T, int N>
struct Dots {
  typename Simd<T>::V with[N] = {};
};

// The dot products of x [dim][kTile] with others, for the rows of one vector.
template <class T, class... Others, int N = sizeof...(Others)>
PLANAR_FN Dots<T, N> dots(const T* x, int64_t dim, const Others*... others) {
  using S = Simd<T>;
  const T* const y[] = {others...};
  Dots<T, N> sum;
  for (int64_t start = 0; start < dim; start += kRun) {
    const int64_t end = start + kRun < dim ? start + kRun : dim;
    Dots<T, N> even, odd;
    int64_t d = start;
    for (; d + 2 <= end; d += 2) {
      const int64_t at = d * kTile, next = at + kTile;
      const auto x_at = S::load(x + at), x_next = S::load(x + next);
      for (int i = 0; i < N; ++i) {
        even.with[i] += x_at * S::load(y[i] + at);
        odd.with[i] += x_next * S::load(y[i] + next);
      }
    }
    if (d < end)
      for (int i = 0; i < N; ++i) even.with[i] += S::load(x + d * kTile) * S::load(y[i] + d * kTile);
    for (int i = 0; i < N; ++i) sum.with[i] += even.with[i] + odd.with[i];
  }
  return sum;
}

// z over one step, into `to`, which may be z: (1) with h u_hat = h u + (h rho / n) w. For the rows of one vector.
template <class T>
PLANAR_FN void update_lanes(const T* z, T* to, const T* u, const T* w, typename Simd<T>::V h,
                            const Constrained<Simd<T>>& step, int64_t dim) {
  using S = Simd<T>;
  const auto h_of_w = h * rho_over_n(step);
  for (int64_t d = 0; d < dim * kTile; d += kTile)
    S::store(to + d, S::load(z + d) + S::multiply_add(h, S::load(u + d), h_of_w * S::load(w + d)));
}

template <class T>
int64_t headed_forward_scratch(const Headed<T>& p) {
  return (p.dim + p.features + 3) * kTile + Span<T>::size(p.dim);
}

template <class T, class F>
void headed_forward(const HeadedForward<T>& p, Rows rows, T* scratch) {
  using S = Simd<T>;
  const F f = F::of(p.spec);
  const Part<T> part(p, rows);
  const int64_t size = p.dim * kTile;
  T* z = scratch;                          // [dim][kTile]
  T* context = z + size;                   // [features][kTile]
  T* sums = context + p.features * kTile;  // [3][kTile]
  T* memory = sums + 3 * kTile;            // of the spans
  load_tile(z, p.z.from(part.first), part.count, p.dim, part.lanes);
  load_tile(context, p.context.from(part.first), part.count, p.features, part.lanes);
  for (int64_t lane = 0; lane < part.lanes; lane += S::width) store_sum(sums + lane, no_steps<S>());
  for (int64_t i = 0; i < p.spans(); ++i) {
    const Steps steps = p.of_spans(i, i + 1);
    const Span<T> span(steps, steps, memory);
    compute_parameters(part, span, context);
    for (int64_t lane = 0; lane < part.lanes; lane += S::width) {
      const int64_t count = part.count - lane;
      if (p.saved && i > 0)
        for (int64_t d = 0; d < p.dim; ++d)
          S::store_first(p.saved + part.saved_z(i, lane) + d * p.rows, S::load(z + d * kTile + lane), count);
      auto sum = load_sum(sums + lane);
      for (int64_t k = 0; k < span.steps; ++k) {
        const T *u = span.u + k * size + lane, *w = span.w + k * size + lane;
        const auto of_w = dots(w, p.dim, u, w, z + lane);
        const auto step = constrain<S>(of_w.with[0], of_w.with[1], p.spec.constraint);
        const auto a = of_w.with[2] + S::load(span.b + k * kTile + lane);
        if (p.saved) S::store_first(p.saved + part.saved_a(span.start + k, lane), a, count);
        const auto act = activate<S>(a, f);
        add_step<S, 1>(&sum, &act, step.c, step.s, step.sunk, f);
        update_lanes(z + lane, z + lane, u, w, act.h, step, p.dim);
      }
      store_sum(sums + lane, sum);
    }
  }
  store_tile(z, Matrix<T>{p.z_K + part.first * p.dim, p.dim, 1}, part.count, p.dim);
  for (int64_t lane = 0; lane < part.lanes; lane += S::width)
    S::store_first(p.log_det + part.first + lane, value<S>(load_sum(sums + lane)), part.count - lane);
}

// One step back, for the rows of one vector: g to dL/dz before the step, and with `params` dL/du, dL/dw and dL/db to
// the places of u, w and b. z [dim][kTile] is the one before the step.
template <class T, class F>
PLANAR_FN void step_back(const Headed<T>& p, const F& f, T* u, T* w, T* b, const T* z, T* g,
                         typename Simd<T>::V lambda, const Step<T>& at, bool params) {
  using S = Simd<T>;
  const auto& [step, act] = at;
  const auto of_g = dots<T>(g, p.dim, u, w);
  const auto g_w = of_g.with[1], e = of_g.with[0] + rho_over_n(step) * g_w;
  const auto [delta, gamma] = step_adjoint<S>(e, lambda, act, step.c, step.s, unit<S>(step.s, p.spec.constraint), f);
  if (!params) {
    for (int64_t d = 0; d < p.dim * kTile; d += kTile) S::store(g + d, S::load(g + d) + delta * S::load(w + d));
    return;
  }
  const auto [dalpha, of_v, of_w_n] = constrain_backward<S>(step, act.h * g_w, gamma);
  for (int64_t d = 0; d < p.dim * kTile; d += kTile) {
    const auto u_d = S::load(u + d), w_d = S::load(w + d), gradient = S::load(g + d);
    const auto v = act.h * gradient;
    S::store(u + d, v + dalpha * w_d);
    S::store(w + d, delta * S::load(z + d) + of_v * v + dalpha * u_d + of_w_n * (step.inv_n * w_d));
    S::store(g + d, gradient + delta * w_d);
  }
  S::store(b, delta);
}

// to [rows] = the sums of x [rows][kTile] over a tile's rows; or, with `add`, so much more.
template <class T>
PLANAR_FN void sum_rows(T* to, const T* x, int64_t rows, int64_t count, bool add) {
  using S = Simd<T>;
  for (int64_t m = 0; m < rows; m += S::width) {
    typename S::V parts[S::width] = {};
    for (int64_t i = 0; i < S::width && m + i < rows; ++i)
      for (int64_t lane = 0; lane < count; lane += S::width)
        parts[i] += S::load_first(x + (m + i) * kTile + lane, count - lane);
    auto sum = sum_lanes<T>(parts);
    if (add) sum += S::load_first(to + m, rows - m);
    S::store_first(to + m, sum, rows - m);
  }
}

// (67): some rows of dweight and dbias.
template <class T>
void headed_sum_weights(const HeadedBackward<T>& p, Rows tile, const T* gradients, int64_t first, int64_t count,
                        bool add) {
  const Matrix<const T> context = p.context.from(tile.first);
  const Factors<T> factors{gradients, kTile, 1, context.data, context.row, tile.count};
  multiply<T>(p.dweight + first * p.features, p.features, factors, add ? Start::out : Start::zero, nullptr, count,
              p.features);
  sum_rows(p.dbias + first, gradients, count, tile.count, add);
}

// (67): what a span adds to dcontext [kTile][padded].
template <class T>
PLANAR_FN void add_to_context(const Part<T>& part, const Span<T>& span, T* dcontext) {
  const Headed<T>& p = part.p;
  const int64_t padded = round_up(p.features, Simd<T>::width);
  const auto add = [&](const T* gradients, int64_t row, int64_t rows) __attribute__((always_inline)) {
    const Factors<T> factors{gradients, 1, kTile, p.weight + row * p.features, p.features, rows};
    multiply<T>(dcontext, padded, factors, Start::out, nullptr, part.count, p.features);
  };
  add(span.u, p.all().of_u(span.start), span.steps * p.dim);
  add(span.w, p.all().of_w(span.start), span.steps * p.dim);
  add(span.b, p.all().of_b(span.start), span.steps);
}

// What the backward of a tile knows when it comes to a span: dL/dz behind the span, and dL/df so far.
template <class T>
struct State {
  T *g, *context, *dcontext;  // [dim][kTile], [features][kTile], [kTile][padded]

  State(const Headed<T>& p, T* memory, int64_t lane) {
    T *to_context = memory + p.dim * kTile, *to_dcontext = to_context + p.features * kTile;
    g = memory + lane, context = to_context + lane;
    dcontext = to_dcontext + lane * round_up(p.features, Simd<T>::width);
  }
  static int64_t size(const Headed<T>& p) {
    return (p.dim + p.features + round_up(p.features, Simd<T>::width)) * kTile;
  }
};

template <class T>
int64_t headed_backward_scratch(const Headed<T>& p) {
  const int64_t most = steps_between(p.dim);
  return most * (kTile / Simd<T>::width * int64_t(sizeof(Step<T>) / sizeof(T)) + p.dim * kTile) + Span<T>::size(p.dim);
}

// A span back, in the place of whose parameters their gradients come.
template <class T, class F>
PLANAR_FN void span_back(const HeadedBackward<T>& p, const Part<T>& part, const Span<T>& span, int64_t i,
                         const State<T>& state, bool params, T* scratch) {
  using S = Simd<T>;
  const F f = F::of(p.spec);
  const int64_t most = steps_between(p.dim), size = p.dim * kTile;
  Step<T>* steps = reinterpret_cast<Step<T>*>(scratch);          // [kTile / width][most]
  T* z = reinterpret_cast<T*>(steps + most * kTile / S::width);  // [most][dim][kTile]
  compute_parameters(part, span, state.context);
  if (i == 0 && params) load_tile(z, p.z.from(part.first), part.count, p.dim, part.lanes);
  for (int64_t lane = 0; lane < part.lanes; lane += S::width) {
    const int64_t count = part.count - lane;
    const auto lambda = load_strided(p.grad_log_det.data + (part.first + lane) * p.grad_log_det.stride,
                                     p.grad_log_det.stride, count);
    Step<T>* at = steps + lane / S::width * most;
    if (i > 0 && params)
      for (int64_t d = 0; d < p.dim; ++d)
        S::store(z + d * kTile + lane, S::load_first(p.saved + part.saved_z(i, lane) + d * p.rows, count));
    for (int64_t k = 0; k < span.steps; ++k) {
      const T *u = span.u + k * size + lane, *w = span.w + k * size + lane;
      const auto of_w = dots(w, p.dim, u, w);
      const auto a = S::load_first(p.saved + part.saved_a(span.start + k, lane), count);
      at[k] = {constrain<S>(of_w.with[0], of_w.with[1], p.spec.constraint), activate<S>(a, f)};
      T* z_k = z + k * size + lane;
      if (params && k + 1 < span.steps) update_lanes(z_k, z_k + size, u, w, at[k].act.h, at[k].step, p.dim);
    }
    for (int64_t k = span.steps - 1; k >= 0; --k)
      step_back(p, f, span.u + k * size + lane, span.w + k * size + lane, span.b + k * kTile + lane,
                z + k * size + lane, state.g + lane, lambda, at[k], params);
  }
}

template <class T, class F>
void headed_backward(const HeadedBackward<T>& p, Rows rows, int64_t first_span, int64_t end_span, TileMemory<T> memory,
                     T* scratch) {
  const Part<T> part(p, rows);
  const State<T> state(p, memory.state, rows.lane);
  const bool params = p.wants_params();
  const int64_t padded = round_up(p.features, Simd<T>::width);
  if (end_span == p.spans()) {
    load_tile(state.g, p.grad_z.from(part.first), part.count, p.dim, part.lanes);
    load_tile(state.context, p.context.from(part.first), part.count, p.features, part.lanes);
    if (params) fill(state.dcontext, T(0), part.count * padded);
  }
  for (int64_t i = end_span - 1; i >= first_span; --i) {
    const Steps steps = p.of_spans(i, i + 1), of_call = p.of_spans(first_span, end_span);
    T* alone = scratch + headed_backward_scratch(p) - Span<T>::size(p.dim);
    const Span<T> span = params ? Span<T>(steps, of_call, memory.gradients + rows.lane) : Span<T>(steps, steps, alone);
    span_back<T, F>(p, part, span, i, state, params, scratch);
    if (params) add_to_context(part, span, state.dcontext);
  }
  if (first_span > 0) return;
  store_tile(state.g, Matrix<T>{p.dz + part.first * p.dim, p.dim, 1}, part.count, p.dim);
  for (int64_t i = 0; i < part.count && params; ++i)
    copy(p.dcontext + (part.first + i) * p.features, state.dcontext + i * padded, p.features);
}

template <class T>
constexpr HeadedKernels<T> headed_kernels() {
  return {Simd<T>::width,
          headed_forward_scratch<T>,
          headed_backward_scratch<T>,
          State<T>::size,
          headed_sum_weights<T>,
          {headed_forward<T, StandardFlow>, headed_backward<T, StandardFlow>},
          {headed_forward<T, AnyFlow<T>>, headed_backward<T, AnyFlow<T>>}};
}

}  // namespace PLANAR_NAMESPACE
}  // namespace vvae
