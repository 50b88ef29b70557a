// The forward of rows with parameters of their own, docs/math.md (1) to (8), and their inverse, (17): z in registers, one
// launch, u and w read once. The next step's parameters are on their way while a step is computed. A row's lanes search
// for its root side by side.
#include "../stage.cuh"

#include "../../planar/root.h"  // last: it belongs to the lane type that is there

namespace vvae {
namespace cuda {
namespace {

template <class Layout, class S, class F, bool inverse>
__global__ void __launch_bounds__(kThreads, 1) amortized_forward_kernel(const ForwardView<S, F> p) {
  using T = compute_t<S>;
  const int dim = p.params.dim, steps = p.params.steps;
  const int64_t nth = (int64_t(blockIdx.x) * kThreads + threadIdx.x) / Layout::lanes;
  const bool inside = nth < p.rows;
  const int64_t row = inside ? nth : p.rows - 1, set = row % p.sets;
  auto z = load_row<Layout>(p.z.from(row * p.z_row), dim);  // [columns]
  auto raw = read_step<Layout>(p.params, set, 0);
  auto log_det = no_steps<Lane<T>>();
  for (int k = 0; k < steps; ++k) {
    const auto u = widen(raw.u), w = widen(raw.w);
    const T b = widen(raw.b);
    raw = read_step<Layout>(p.params, set, k + 1 < steps ? k + 1 : k);
    const auto step = constrain<Lane<T>>(dot(w, u), dot(w, w), p.params.constraint());
    const auto u_hat = add(u, rho_over_n(step), w);
    T a = dot(w, z) + b;
    if constexpr (inverse) {
      const T rhs = a;
      solve<Lane<T>, 1>(&a, &rhs, step.c, step.s, p.params.activation);
    }
    const auto act = activate<Lane<T>>(a, p.params.activation);
    if (p.a && inside && lane_of_row<Layout>() == 0) store(p.a + k * p.a_step + row, a);
    add_step<Lane<T>, 1>(&log_det, &act, step.c, step.s, step.sunk, p.params.activation);
    z = add(z, inverse ? -act.h : act.h, u_hat);
  }
  if (!inside) return;
  store_outputs<inverse, Layout>(p, row, dim, z, log_det);
}

}  // namespace

void launch_amortized_forward(const Forward& f, void* stream) {
  with_forward_kernels(f, [&](auto zero, auto layout, auto activation, auto inverse) {
    using S = decltype(zero);
    using L = decltype(layout);
    using F = decltype(activation);
    launch(amortized_forward_kernel<L, S, F, inverse.value>, "amortized_forward_kernel",
           ceil_div(f.rows * L::lanes, kThreads), kThreads, 0, stream, ForwardView<S, F>(f));
  });
}

}  // namespace cuda
}  // namespace vvae
