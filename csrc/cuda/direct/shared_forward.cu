// The forward of rows that share their parameters, in the direct form: z in registers, one launch, docs/math.md (1) to
// (8). A step's pre-activation is taken from z two steps earlier and the last h, (27), so that only the activations of
// consecutive steps wait for each other; dot products and updates go on beside them.
#include "../stage.cuh"

namespace vvae {
namespace cuda {
namespace {

constexpr int64_t kMostForwardPrograms = 1024;  // of a set: a few for each SM of a large GPU, which stage once

template <class S, class F>
using SharedForward = SharedView<ForwardView<S, F>>;

template <class Layout, class S, class F>
__global__ void __launch_bounds__(kThreads, 1) shared_forward_kernel(const SharedForward<S, F> p) {
  using T = compute_t<S>;
  const Staged<T, Layout> staged(shared_memory(), p.staged);
  pass_each_row<false>(p, staged, [&](auto& z, auto& log_det, int64_t row, bool saves, int first, int count) {
    T a = dot(z, read_row<Layout>(staged.w)) + staged.numbers[0].b;
    int64_t a_at = first * p.rows + row;
    // What the next step needs of the block's memory is on its way while this one is computed.
    auto step = staged.numbers[0];
    auto w_after = read_row<Layout>(staged.w + (count > 1 ? 1 : 0) * Layout::columns);
    for (int k = 0; k < count; ++k) {
      const int after = k + 1 < count ? k + 1 : k, second = k + 2 < count ? k + 2 : after;
      const auto u_hat = read_row<Layout>(staged.u_hat + k * Layout::columns);
      const T part = part_of_dot(z, w_after);
      const auto act = activate<Lane<T>>(a, p.params.activation);
      if (saves) store(p.a + a_at, a);
      a_at += p.rows;
      const auto now = step;
      step = staged.numbers[after];
      w_after = read_row<Layout>(staged.w + second * Layout::columns);
      z = add(z, act.h, u_hat);
      a = (sum_lanes<Layout>(part) + step.b) + now.next * act.h;  // (27)
      add_step<Lane<T>, 1>(&log_det, &act, now.c, now.s, now.sunk, p.params.activation);
    }
  });
}

}  // namespace

void launch_shared_forward(const Forward& f, void* stream) {
  with_kernels(f, [&](auto zero, auto layout, auto activation) {
    using S = decltype(zero);
    using T = compute_t<S>;
    using L = decltype(layout);
    using F = decltype(activation);
    const int staged = Staged<T, L>::count(f.steps, staged_chunk_of<T, L>(f.dim));
    const Split split = split_rows<L>(f, kMostForwardPrograms);
    launch(shared_forward_kernel<L, S, F>, "shared_forward_kernel", split.programs * f.sets, kThreads,
           staged * Staged<T, L>::bytes_of_step, stream, SharedForward<S, F>(f, split, staged));
  });
}

}  // namespace cuda
}  // namespace vvae
