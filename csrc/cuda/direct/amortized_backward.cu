// The backward of rows with parameters of their own, docs/math.md (16), and of their inverse, (35) and (40): one launch,
// every z recomputed and kept in the workspace, then the steps back. Where a set has several rows, its threads take them
// one after the other and keep the sums of the gradients, in the precision of computation, in the workspace until the
// last.
#include "../reduce/partials.cuh"
#include "../stage.cuh"

#include "../../planar/root.h"  // last: it belongs to the lane type that is there

namespace vvae {
namespace cuda {
namespace {

template <class S, class F>
struct AmortizedBackward : BackwardView<S, F> {
  GradientsView<S> to;
  bool du_vector, dw_vector;
  compute_t<S>* kept;  // [sets][K][D]: the z before each step; a quarter of what u, w and their gradients take
  compute_t<S>* sums;  // [sets][K][2 D + 1]: u's, w's and b's gradient of a step

  explicit AmortizedBackward(const Backward& f)
      : BackwardView<S, F>(f), to(f), du_vector(writes_vectors<S>(f.du, f.dim)),
        dw_vector(writes_vectors<S>(f.dw, f.dim)), kept(static_cast<compute_t<S>*>(f.workspace)),
        sums(kept + f.sets * f.steps * f.dim) {}
};

// One step of one row, as it comes from memory.
template <class S, class Layout>
struct Saved {
  RawStep<S, Layout> step;
  compute_t<S> a;
};

// A step's gradients with those of the set's rows before.
template <class Layout, class S, class F, class T>
__device__ __forceinline__ void write_gradients(const AmortizedBackward<S, F>& p, int64_t set, int k, bool first,
                                                bool last, Row<T, Layout> du, Row<T, Layout> dw, T db) {
  const int dim = p.params.dim;
  if (!(first && last)) {
    T* sum = p.sums + (set * p.params.steps + k) * amortized_width(dim);
    const Rows<T> of_u = {sum, 1, false}, of_w = {sum + dim, 1, false};
    if (!first) {
      du = add(du, T(1), load_row<Layout>(of_u, dim));
      dw = add(dw, T(1), load_row<Layout>(of_w, dim));
      if (lane_of_row<Layout>() == 0) db += sum[2 * dim];
    }
    if (!last) {
      store_row<Layout>(sum, du, dim, false);
      store_row<Layout>(sum + dim, dw, dim, false);
      if (lane_of_row<Layout>() == 0) store(sum + 2 * dim, db);
      return;
    }
  }
  store_row<Layout>(p.to.du_of(set, k), du, dim, p.du_vector);
  store_row<Layout>(p.to.dw_of(set, k), dw, dim, p.dw_vector);
  if (lane_of_row<Layout>() == 0) store(p.to.db_of(set, k), narrow<S>(db));
}

template <class Layout, class S, class F, bool inverse>
__global__ void __launch_bounds__(kThreads, 1) amortized_backward_kernel(const AmortizedBackward<S, F> p) {
  using T = compute_t<S>;
  constexpr bool ahead = kReadsAhead<T, Layout>;
  const int dim = p.params.dim, steps = p.params.steps;
  const int64_t nth = (int64_t(blockIdx.x) * kThreads + threadIdx.x) / Layout::lanes;
  const bool inside = nth < p.sets;
  const int64_t set = inside ? nth : p.sets - 1;
  // A thread reads the numbers that it wrote itself.
  const auto kept = [&](int k) { return p.kept + (set * steps + k) * dim; };
  for (int64_t row = set; row < p.rows; row += p.sets) {
    auto z = load_row<Layout>(p.z.from(row * p.z_row), dim);                 // [columns]
    auto g = load_row<Layout>(p.grad_z.from(row * p.grad_z_row), dim);       // [columns]
    const T lambda = p.grad_log_det[row * p.grad_log_det_stride];
    const auto read = [&](int k) {
      return Saved<S, Layout>{read_step<Layout>(p.params, set, k), p.a[k * p.a_step + row]};
    };
    auto next = read(0);
    for (int k = 0; k < steps; ++k) {  // forward once more, (1)
      if (!ahead) next = read(k);
      const auto [raw, a] = next;
      if (ahead) next = read(k + 1 < steps ? k + 1 : k);
      if (inside) store_row<Layout>(kept(k), z, dim, dim % 4 == 0);
      const auto u = widen(raw.u), w = widen(raw.w);
      const auto step = constrain<Lane<T>>(dot(w, u), dot(w, w), p.params.constraint());
      const T h = activate<Lane<T>>(a, p.params.activation).h;
      z = add(z, inverse ? -h : h, add(u, rho_over_n(step), w));
    }
    for (int k = steps - 1; k >= 0; --k) {
      if (!ahead) next = read(k);
      const auto [raw, a] = next;
      if (ahead) next = read(k > 0 ? k - 1 : k);
      if (inside) z = load_row<Layout>(Rows<T>{kept(k), 1, dim % 4 == 0}, dim);
      const auto u = widen(raw.u), w = widen(raw.w);
      const auto step = constrain<Lane<T>>(dot(w, u), dot(w, w), p.params.constraint());
      const T e = dot(g, add(u, rho_over_n(step), w)), g_w = dot(g, w);
      const auto act = activate<Lane<T>>(a, p.params.activation);
      const T h = inverse ? -act.h : act.h;
      StepAdjoint<Lane<T>> x;
      if constexpr (inverse)
        x = inverse_step_adjoint<Lane<T>>(e, lambda, act, step.c, step.s, p.params.activation);
      else
        x = step_adjoint<Lane<T>>(e, lambda, act, step.c, step.s, unit<Lane<T>>(step.s, p.params.constraint()),
                                  p.params.activation);
      const auto adjoint = constrain_backward<Lane<T>>(step, h * g_w, x.gamma);  // (6)
      const T of_u = inverse ? inverse_of_u<Lane<T>>(adjoint.dalpha, x.delta, h, step) : adjoint.dalpha;
      Row<T, Layout> du, dw;
#pragma unroll
      for (int i = 0; i < Layout::numbers; ++i) {
        const T v = h * g.x[i];
        du.x[i] = v + adjoint.dalpha * w.x[i];
        dw.x[i] = x.delta * z.x[i] + adjoint.of_v * v + of_u * u.x[i] + adjoint.of_w_n * (step.inv_n * w.x[i]);
      }
      if (inside) write_gradients<Layout>(p, set, k, row == set, row + p.sets >= p.rows, du, dw, x.delta);
      g = add(g, x.delta, w);
    }
    if (inside) store_row<Layout>(p.dz + row * dim, g, dim, dim % 4 == 0);
  }
}

}  // namespace

int64_t amortized_backward_bytes(const Problem& p) {
  const int64_t number = p.dtype == Dtype::float64 ? sizeof(double) : sizeof(float);
  return number * p.sets * p.steps * (p.dim + (p.rows > p.sets ? amortized_width(p.dim) : 0));
}

void launch_amortized_backward(const Backward& f, void* stream) {
  with_backward_kernels(f, [&](auto zero, auto layout, auto activation, auto inverse) {
    using S = decltype(zero);
    using L = decltype(layout);
    using F = decltype(activation);
    launch(amortized_backward_kernel<L, S, F, inverse.value>, "amortized_backward_kernel",
           ceil_div(f.sets * L::lanes, kThreads), kThreads, 0, stream, AmortizedBackward<S, F>(f));
  });
}

}  // namespace cuda
}  // namespace vvae
