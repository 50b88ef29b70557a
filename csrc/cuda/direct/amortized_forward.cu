// The forward of rows with parameters of their own, docs/math.md (1) to (8): z in registers, one launch, u and w read
// once. The next step's parameters are on their way while a step is computed.
#include "../stage.cuh"

namespace vvae {
namespace cuda {
namespace {

template <class Layout, class S, class F>
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
    const T a = dot(w, z) + b;
    const auto act = activate<Lane<T>>(a, p.params.activation);
    if (p.a && inside && lane_of_row<Layout>() == 0) store(p.a + k * p.rows + row, a);
    add_step<Lane<T>, 1>(&log_det, &act, step.c, step.s, step.sunk, p.params.activation);
    z = add(z, act.h, u_hat);
  }
  if (!inside) return;
  store_row<Layout>(p.z_K + row * dim, z, dim, dim % 4 == 0);
  if (lane_of_row<Layout>() == 0) store(p.log_det + row, value<Lane<T>>(log_det));
}

}  // namespace

void launch_amortized_forward(const Forward& f, void* stream) {
  with_kernels(f, [&](auto zero, auto layout, auto activation) {
    using S = decltype(zero);
    using L = decltype(layout);
    using F = decltype(activation);
    launch(amortized_forward_kernel<L, S, F>, "amortized_forward_kernel", ceil_div(f.rows * L::lanes, kThreads),
           kThreads, 0, stream, ForwardView<S, F>(f));
  });
}

}  // namespace cuda
}  // namespace vvae
