// The last launch of a backward with shared parameters, a block a step: adds the programs' sums in a fixed order, then
// S of (14) and the constraint's adjoint (6).
#include "../stage.cuh"
#include "partials.cuh"

namespace vvae {
namespace cuda {
namespace {

constexpr int kFinishThreads = 256, kFinishWarps = kFinishThreads / int(kWarp);

template <class S>
struct Finish {
  ParamsView<S, AnyFlow<compute_t<S>>> params;
  int64_t sets;
  int programs, chunk, slices;  // slices: of the programs, added side by side
  bool inverse;
  const compute_t<S>* partials;
  GradientsView<S> to;

  Finish(const Backward& f, int programs, int chunk, int slices)
      : params(f), sets(f.sets), programs(programs), chunk(chunk), slices(slices),
        inverse(f.inverse), partials(static_cast<const compute_t<S>*>(f.workspace)), to(f) {}
};

template <class S>
__global__ void __launch_bounds__(kFinishThreads, 1) finish_kernel(const Finish<S> p) {
  using T = compute_t<S>;
  auto* of_steps = reinterpret_cast<Constrained<Lane<T>>*>(shared_memory());  // [kChunk], up to this step
  T* of_warps = reinterpret_cast<T*>(of_steps + kChunk);                      // [kFinishWarps]
  T* slices = of_warps + kFinishWarps;  // [slices][width]: sums of programs; the first becomes the sum of all
  const int thread = int(threadIdx.x), warp = thread / int(kWarp), lane = thread % int(kWarp);
  const int steps = p.params.steps, dim = p.params.dim;
  const int64_t set = blockIdx.x / steps, width = partial_width(dim);
  const int step = int(blockIdx.x % steps), first = step / p.chunk * p.chunk, own = step - first;
  const int count = p.chunk < steps - first ? p.chunk : steps - first;

  for (int j = warp; j <= own; j += kFinishWarps) {
    const auto u = p.params.u_of(set, first + j), w = p.params.w_of(set, first + j);
    T alpha = 0, n = 0;
    for (int d = lane; d < dim; d += int(kWarp)) {
      const T u_d = widen(u.data[d * u.col]), w_d = widen(w.data[d * w.col]);
      alpha += w_d * u_d;
      n += w_d * w_d;
    }
    sum_lanes(alpha, n, int(kWarp));
    if (lane == 0) of_steps[j] = constrain<Lane<T>>(alpha, n, p.params.constraint());
  }
  const int a_slice = kFinishThreads / p.slices, slice = thread / a_slice;
  for (int64_t i = thread % a_slice; i < width; i += a_slice) {
    const int64_t other = i - 2 * dim;
    if (other >= 0 && other < kChunk && ((other == own && !p.inverse) || other >= count)) continue;  // nobody wrote them
    T sum = 0;
    for (int program = slice; program < p.programs; program += p.slices)
      sum += partial_of(p.partials, program, p.sets, set, steps, step, dim)[i];
    slices[slice * width + i] = sum;
  }
  __syncthreads();
  for (int64_t i = thread; i < width; i += kFinishThreads)
    for (int other = 1; other < p.slices; ++other) slices[i] += slices[other * width + i];
  __syncthreads();

  T *v = slices, *dw = slices + dim;  // [dim] each
  const T* s = slices + 2 * dim;      // [kChunk]
  const bool at_zero = p.inverse && of_steps[own].inv_n == 0;  // w = 0: z_{k-1} in place of z_k, (40)
  const auto w = p.params.w_of(set, step), u = p.params.u_of(set, step);
  T v_dot_w = 0, none = 0;
  for (int d = thread; d < dim; d += kFinishThreads) {
    T v_d = v[d], dw_d = dw[d];
    for (int j = 0; j < count; ++j) {
      if (j == own && !at_zero) continue;
      const T w_j = widen(p.params.w_of(set, first + j).data[d * w.col]);
      if (j > own) {
        v_d += s[j] * w_j;
      } else {
        const T u_j = widen(p.params.u_of(set, first + j).data[d * u.col]);
        dw_d += s[j] * (u_j + rho_over_n(of_steps[j]) * w_j);
      }
    }
    v[d] = v_d, dw[d] = dw_d;
    v_dot_w += v_d * widen(w.data[d * w.col]);
  }
  sum_lanes(v_dot_w, none, int(kWarp));
  if (lane == 0) of_warps[warp] = v_dot_w;
  __syncthreads();
  v_dot_w = 0;
  for (int i = 0; i < kFinishWarps; ++i) v_dot_w += of_warps[i];
  const auto constrained = of_steps[own];
  const T gamma = s[kChunk + 1];
  const auto adjoint = constrain_backward<Lane<T>>(constrained, v_dot_w, gamma);  // (6)
  for (int d = thread; d < dim; d += kFinishThreads) {
    const T u_d = widen(u.data[d * u.col]), w_d = widen(w.data[d * w.col]);
    const T through_u_hat = adjoint.of_v * v[d] + adjoint.dalpha * u_d + adjoint.of_w_n * (constrained.inv_n * w_d);
    store(p.to.du_of(set, step) + d, narrow<S>(v[d] + adjoint.dalpha * w_d));
    store(p.to.dw_of(set, step) + d, narrow<S>(dw[d] + through_u_hat));
  }
  if (thread == 0) store(p.to.db_of(set, step), narrow<S>(s[kChunk]));
}

}  // namespace

void launch_finish(const Backward& f, int programs, int chunk, void* stream) {
  with_type(f.dtype, [&](auto zero) {
    using S = decltype(zero);
    using T = compute_t<S>;
    const int64_t bytes = partial_width(f.dim) * int64_t(sizeof(T));
    const int64_t others = kChunk * sizeof(Constrained<Lane<T>>) + kFinishWarps * sizeof(T);
    const int slices = bytes <= 5 * 1024 ? 8 : 2;  // within the memory that any block has
    launch(finish_kernel<S>, "finish_kernel", f.sets * f.steps, kFinishThreads, others + slices * bytes, stream,
           Finish<S>(f, programs, chunk, slices));
  });
}

}  // namespace cuda
}  // namespace vvae
