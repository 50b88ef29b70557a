// The steps that rows share, constrained once and kept in the block's memory.
#pragma once

#include "views.cuh"

namespace vvae {
namespace cuda {

constexpr int kThreads = 128;  // of a block of the direct kernels
// Groups of lanes in a block: the rows, or steps, that it has side by side at most.
template <class Layout>
constexpr int kGroups = kThreads / Layout::lanes;
// Of a block's memory, for steps: with what else a block needs it stays below the 99 KB of the smallest GPUs.
constexpr int64_t kStagedBytes = 48 * 1024;

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
    const auto raw = next;
    if (kReadsAhead<T, Layout> && start + groups < count) next = read(start + groups);
    const auto u = widen(raw.u), w = widen(raw.w);
    const auto step = constrain<Lane<T>>(dot(w, u), dot(w, w), p.constraint());
    if (i < count) {
      write_row(to.w + i * columns, w);
      write_row(to.u_hat + i * columns, add(u, rho_over_n(step), w));
      if (writes) to.numbers[i] = {widen(raw.b), step.c, step.s, T(0), step.sunk};
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

// Calls body(row, inside, for_staged) for each row of the block's groups. for_staged(f) calls f(first, count) for as many
// steps as are staged at a time, with (27)'s numbers if `next`. Groups without a row go along, for barriers and exchanges
// between lanes: a branch around them would end the instructions that the compiler can move.
template <bool next, class Layout, class P, class T, class Body>
__device__ __forceinline__ void for_each_row(const P& p, const Staged<T, Layout>& staged, const Body& body) {
  const int64_t set = blockIdx.x / p.split.programs, program = blockIdx.x % p.split.programs;
  const int group = int(threadIdx.x) / Layout::lanes, steps = p.params.steps;
  bool fresh = true;  // nothing is staged yet
  const int64_t stride = int64_t(p.split.programs) * p.split.block_rows;
  for (int64_t first_row = program * p.split.block_rows; first_row < p.split.rows_per_set; first_row += stride) {
    const bool inside = group < p.split.block_rows && first_row + group < p.split.rows_per_set;
    body(set + p.sets * (first_row + group), inside, [&](const auto& f) {
      for (int first = 0; first < steps; first += p.staged) {
        const int count = p.staged < steps - first ? p.staged : steps - first;
        if (fresh || p.staged < steps) {
          if (!fresh) __syncthreads();  // the steps before are done with
          if (next)
            stage<Layout>(p.params, set, first, count, staged);
          else
            stage_steps<Layout>(p.params, set, first, count, staged);
          __syncthreads();
          fresh = false;
        }
        f(first, count);
      }
    });
  }
}

// Takes each row z of the block's groups through all steps, and stores what becomes of it:
// pass(z, log_det, row, saves, first, count) takes it through `count` steps from `first` on, and stores its
// pre-activations if it `saves`.
template <bool inverse, class Layout, class S, class F, class T, class Pass>
__device__ __forceinline__ void pass_each_row(const SharedView<ForwardView<S, F>>& p, const Staged<T, Layout>& staged,
                                              const Pass& pass) {
  const int dim = p.params.dim;
  for_each_row<!inverse>(p, staged, [&](int64_t row, bool inside, const auto& for_staged) {
    const bool saves = p.a && inside && lane_of_row<Layout>() == 0;
    Row<T, Layout> z = {};  // [columns]
    if (inside) z = load_row<Layout>(p.z.from(row * p.z_row), dim);
    auto log_det = no_steps<Lane<T>>();
    for_staged([&](int first, int count) { pass(z, log_det, row, saves, first, count); });
    if (!inside) return;
    store_outputs<inverse, Layout>(p, row, dim, z, log_det);
  });
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
