// The inverse of rows that share their parameters, docs/math.md (17): z in registers, one launch for all steps. A row's
// lanes search for its root side by side, as they would wait otherwise.
#include "../stage.cuh"

#include "../../planar/root.h"  // last: it belongs to the lane type that is there

namespace vvae {
namespace cuda {
namespace {

constexpr int64_t kMostInversePrograms = 1024;  // of a set: a few for each SM of a large GPU, which stage once

template <class Layout, class T, class F>
__global__ void __launch_bounds__(kThreads, 1) shared_inverse_kernel(const SharedView<ForwardView<T, F>> p) {
  const Staged<T, Layout> staged(shared_memory(), p.staged);
  pass_each_row<true>(p, staged, [&](auto& z, auto& log_det, int64_t row, bool saves, int first, int count) {
    for (int k = 0; k < count; ++k) {
      const auto step = staged.numbers[k];
      const T rhs = dot(z, read_row<Layout>(staged.w + k * Layout::columns)) + step.b;
      T a;
      solve<Lane<T>, 1>(&a, &rhs, step.c, step.s, p.params.activation);
      const auto act = activate<Lane<T>>(a, p.params.activation);
      if (saves) store(p.a + (first + k) * p.a_step + row, a);
      add_step<Lane<T>, 1>(&log_det, &act, step.c, step.s, step.sunk, p.params.activation);
      z = add(z, -act.h, read_row<Layout>(staged.u_hat + k * Layout::columns));
    }
  });
}

}  // namespace

void launch_shared_inverse(const Forward& f, void* stream) {
  with_few_kernels(f, [&](auto zero, auto layout, auto activation) {
    using T = decltype(zero);
    using L = decltype(layout);
    using F = decltype(activation);
    const int staged = Staged<T, L>::count(f.steps, staged_chunk_of<T, L>(f.dim));
    const Split split = split_rows<L>(f, kMostInversePrograms);
    launch(shared_inverse_kernel<L, T, F>, "shared_inverse_kernel", split.programs * f.sets, kThreads,
           staged * Staged<T, L>::bytes_of_step, stream, SharedView<ForwardView<T, F>>(f, split, staged));
  });
}

}  // namespace cuda
}  // namespace vvae
