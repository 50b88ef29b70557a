// Parameters as kernels read them, and the steps that rows share, constrained once and kept in the block's memory.
#pragma once

#include "kernels.h"
#include "row.cuh"

namespace vvae {
namespace cuda {

constexpr int kThreads = 128;  // of a block of the direct kernels
// Groups of lanes in a block: the rows, or steps, that it has side by side at most.
template <class Layout>
constexpr int kGroups = kThreads / Layout::lanes;
// Of a block's memory, for steps: with what else a block needs it stays below the 99 KB of the smallest GPUs.
constexpr int64_t kStagedBytes = 48 * 1024;

// The inverse takes the steps from the last to the first: views of what is indexed by steps start there and go back.
inline int64_t first_step(const Problem& p) { return p.inverse ? p.steps - 1 : 0; }
inline int64_t onward(const Problem& p, int64_t step) { return p.inverse ? -step : step; }

// u, w [sets, K, D] and b [sets, K], and the formulas as far as the kernel does not know them. F is planar_math.h's.
template <class S, class F>
struct ParamsView {
  Rows<S> u, w;
  const S* b;
  int64_t u_set, u_step, w_set, w_step, b_set, b_step;
  int dim, steps;
  F activation;
  Constraint of_problem;

  explicit ParamsView(const Problem& p)
      : u(rows_of<S>(p.u, p.dim).from(first_step(p) * p.u.step)),
        w(rows_of<S>(p.w, p.dim).from(first_step(p) * p.w.step)),
        b(static_cast<const S*>(p.b.data) + first_step(p) * p.b.step), u_set(p.u.set), u_step(onward(p, p.u.step)),
        w_set(p.w.set), w_step(onward(p, p.w.step)), b_set(p.b.set), b_step(onward(p, p.b.step)), dim(p.dim),
        steps(p.steps), activation(F::of(p.formulas)), of_problem(p.formulas.constraint) {}

  // Kernels that know tanh have two constraints: the code of the third would lengthen every step.
  __device__ __forceinline__ Constraint constraint() const {
    if (!std::is_same<F, Tanh>::value) return of_problem;
    return of_problem == Constraint::none ? Constraint::none : Constraint::softplus;
  }
  __device__ __forceinline__ Rows<S> u_of(int64_t set, int64_t k) const { return u.from(set * u_set + k * u_step); }
  __device__ __forceinline__ Rows<S> w_of(int64_t set, int64_t k) const { return w.from(set * w_set + k * w_step); }
  __device__ __forceinline__ const S* b_of(int64_t set, int64_t k) const { return b + set * b_set + k * b_step; }
};

// The arguments of every forward and of every backward, as their kernels take them by value.
template <class S, class F>
struct ProblemView {
  ParamsView<S, F> params;
  Rows<S> z;
  int64_t z_row, rows, sets, a_step;  // a_step: from a step's pre-activations to the next one's

  explicit ProblemView(const Problem& p)
      : params(p), z(rows_of<S>(p.z, p.dim)), z_row(p.z.row), rows(p.rows), sets(p.sets), a_step(onward(p, p.rows)) {}
};

template <class S, class F>
struct ForwardView : ProblemView<S, F> {
  S* z_K;
  compute_t<S>*log_det, *a;

  explicit ForwardView(const Forward& f)
      : ProblemView<S, F>(f.p), z_K(static_cast<S*>(f.z_K)), log_det(static_cast<compute_t<S>*>(f.log_det)),
        a(f.a ? static_cast<compute_t<S>*>(f.a) + first_step(f.p) * f.p.rows : nullptr) {}
};

template <class S, class F>
struct BackwardView : ProblemView<S, F> {
  Rows<S> grad_z;
  int64_t grad_z_row, grad_log_det_stride;
  const compute_t<S>*grad_log_det, *a;
  S* dz;

  explicit BackwardView(const Backward& f)
      : ProblemView<S, F>(f.p), grad_z(rows_of<S>(f.grad_z, f.p.dim)), grad_z_row(f.grad_z.row),
        grad_log_det_stride(f.grad_log_det_stride), grad_log_det(static_cast<const compute_t<S>*>(f.grad_log_det)),
        a(static_cast<const compute_t<S>*>(f.a) + first_step(f.p) * f.p.rows), dz(static_cast<S*>(f.dz)) {}
};

// The same for rows that share their parameters. `View` is one of those above, made of `Pass`.
template <class View>
struct SharedView : View {
  Split split;
  int staged;  // steps at a time

  template <class Pass>
  SharedView(const Pass& f, const Split& split, int staged) : View(f), split(split), staged(staged) {}
};

// Where a backward's weight gradients go.
template <class S>
struct GradientsView {
  S *du, *dw, *db;
  int64_t du_set, du_step, dw_set, dw_step, db_set, db_step;

  explicit GradientsView(const Backward& f)
      : du(static_cast<S*>(f.du.data) + first_step(f.p) * f.du.step),
        dw(static_cast<S*>(f.dw.data) + first_step(f.p) * f.dw.step),
        db(static_cast<S*>(f.db.data) + first_step(f.p) * f.db.step), du_set(f.du.set),
        du_step(onward(f.p, f.du.step)), dw_set(f.dw.set), dw_step(onward(f.p, f.dw.step)), db_set(f.db.set),
        db_step(onward(f.p, f.db.step)) {}

  __device__ __forceinline__ S* du_of(int64_t set, int64_t k) const { return du + set * du_set + k * du_step; }
  __device__ __forceinline__ S* dw_of(int64_t set, int64_t k) const { return dw + set * dw_set + k * dw_step; }
  __device__ __forceinline__ S* db_of(int64_t set, int64_t k) const { return db + set * db_set + k * db_step; }
};

// One step of one set, as it comes from memory: who widens it waits for it.
template <class S, class Layout>
struct RawStep {
  Raw<S, Layout> u, w;
  S b;
};

template <class Layout, class S, class F>
__device__ __forceinline__ RawStep<S, Layout> read_step(const ParamsView<S, F>& p, int64_t set, int64_t k) {
  return {read_raw<Layout>(p.u_of(set, k), p.dim), read_raw<Layout>(p.w_of(set, k), p.dim), *p.b_of(set, k)};
}

// Whether the registers hold a step on its way beside the one that is computed.
template <class T, class Layout>
constexpr bool kReadsAhead = Layout::numbers * sizeof(T) <= 64;

template <class T>
struct alignas(16) Numbers {  // of one step; what lies behind a few of them is aligned too
  T b, c, s;
  T next;  // u_hat_k . w_{k+1}: G of (27)
  T sunk;
};

// `steps` consecutive steps of one set in shared memory.
template <class T, class Layout>
struct Staged {
  T *w, *u_hat;         // [steps][columns]
  Numbers<T>* numbers;  // [steps]

  static constexpr int64_t bytes_of_step = 2 * Layout::columns * sizeof(T) + sizeof(Numbers<T>);

  __device__ __forceinline__ Staged(char* memory, int steps)
      : w(reinterpret_cast<T*>(memory)), u_hat(w + int64_t(steps) * Layout::columns),
        numbers(reinterpret_cast<Numbers<T>*>(u_hat + int64_t(steps) * Layout::columns)) {}

  // Steps that are staged at a time: all, or else a chunk.
  static int count(int64_t steps, int64_t chunk) {
    return int(steps * bytes_of_step <= kStagedBytes ? steps : chunk < steps ? chunk : steps);
  }
};

// u_hat, c and s of the steps from `first` on, (4) and (5); a group of lanes a step. Every thread of the block calls it.
template <class Layout, class S, class F, class T = compute_t<S>>
__device__ __forceinline__ void stage_steps(const ParamsView<S, F>& p, int64_t set, int first, int count,
                                            const Staged<T, Layout>& to) {
  constexpr int groups = kGroups<Layout>, columns = Layout::columns;
  const int group = int(threadIdx.x) / Layout::lanes;
  const bool writes = lane_of_row<Layout>() == 0;
  const auto read = [&](int start) {
    return read_step<Layout>(p, set, first + (start + group < count ? start + group : count - 1));
  };
  auto next = read(0);
  for (int start = 0; start < count; start += groups) {
    const int i = start + group;
    const auto step = next;
    if (kReadsAhead<T, Layout> && start + groups < count) next = read(start + groups);
    const auto u = widen(step.u), w = widen(step.w);
    const auto q = constrain<Lane<T>>(dot(w, u), dot(w, w), p.constraint());
    if (i < count) {
      write_row(to.w + i * columns, w);
      write_row(to.u_hat + i * columns, add(u, rho_over_n(q), w));
      if (writes) to.numbers[i] = {widen(step.b), q.c, q.s, T(0), q.sunk};
    }
    if (!kReadsAhead<T, Layout> && start + groups < count) next = read(start + groups);
  }
}

// The same with what (27) needs of each step and the next.
template <class Layout, class S, class F, class T = compute_t<S>>
__device__ __forceinline__ void stage(const ParamsView<S, F>& p, int64_t set, int first, int count,
                                      const Staged<T, Layout>& to) {
  constexpr int groups = kGroups<Layout>, columns = Layout::columns;
  const int group = int(threadIdx.x) / Layout::lanes;
  const bool writes = lane_of_row<Layout>() == 0;
  stage_steps<Layout>(p, set, first, count, to);
  __syncthreads();
  for (int start = 0; start + 1 < count; start += groups) {
    const int i = start + group + 1 < count ? start + group : count - 2;
    const T next = dot(read_row<Layout>(to.u_hat + i * columns), read_row<Layout>(to.w + (i + 1) * columns));
    if (writes && i == start + group) to.numbers[i].next = next;
  }
}

// Steps of a chunk where rows are long: half of them where they would fill the block's memory.
template <class T, class Layout>
constexpr int64_t staged_chunk_of(int64_t dim) {
  constexpr int64_t most = Layout::columns * sizeof(T) > 2048 ? kChunk / 2 : kChunk;
  return chunk_of(dim) < most ? chunk_of(dim) : most;
}

inline Split split_rows(const Problem& p, int block_rows, int64_t most_programs) {
  const int64_t rows_per_set = p.rows / p.sets, blocks = ceil_div(rows_per_set, block_rows);
  return {rows_per_set, block_rows, int(blocks < most_programs ? blocks : most_programs)};
}

// Blocks of all the rows that a block's threads hold, or of fewer where that leaves most of a GPU idle.
template <class Layout>
Split split_rows(const Problem& p, int64_t most_programs) {
  constexpr int all = kGroups<Layout>, least = int(kWarp) / Layout::lanes, enough_blocks = 128;
  int block_rows = all;
  while (block_rows > least && ceil_div(p.rows / p.sets, block_rows) * p.sets < enough_blocks) block_rows /= 2;
  return split_rows(p, block_rows, most_programs);
}

}  // namespace cuda
}  // namespace vvae
