// Sums over rows, in two stages of fixed order and without atomics: a block of each program sums the rows of its tile
// chunk by chunk into the program's own memory, and finish.cu adds the programs.
#pragma once

#include "../kernels.h"
#include "../row.cuh"

namespace vvae {
namespace cuda {

// Sums over a program's rows for one step: v [D], dw [D], then the step's row of S = H^T Delta with that of its
// transpose [kChunk], db and gamma.
constexpr int kTail = kChunk + 2;
__host__ __device__ constexpr int64_t partial_width(int64_t dim) { return 2 * dim + kTail; }

// The same for one step of the amortized kernels: du [D], dw [D] and db of the set's rows so far.
__host__ __device__ constexpr int64_t amortized_width(int64_t dim) { return 2 * dim + 1; }

// Programs of a set for which there is memory, and that finish.cu still adds quickly.
inline int64_t most_partials(const Problem& p) {
  constexpr int64_t most_numbers = int64_t(1) << 24, most_programs = 256;
  const int64_t fit = most_numbers / (p.sets * p.steps * partial_width(p.dim));
  return fit < 1 ? 1 : fit < most_programs ? fit : most_programs;
}

// Numbers of all programs' sums; what lies behind them is aligned for vectors.
inline int64_t partial_numbers(const Problem& p, int64_t programs) {
  return round_up(programs * p.sets * p.steps * partial_width(p.dim), 4);
}

// z [block_rows][D] where each chunk of a program's rows starts, but for the first, whose z is the caller's: what the
// forward sweep keeps for the way back, once more for each block of rows. Four numbers at a time.
template <class T>
struct KeptStarts {
  T* data;
  int chunks, block_rows;

  // Numbers for all programs.
  static int64_t numbers(const Problem& p, int64_t programs, int chunks, int block_rows, int64_t columns) {
    return programs * p.sets * (chunks - 1) * block_rows * columns;
  }
  // Of the nth chunk, from the second one on.
  __device__ __forceinline__ T* of(int64_t owner, int nth, int64_t columns) const {
    return data + (owner * (chunks - 1) + nth - 1) * block_rows * columns;
  }
};

// Steps from one row to the next: spreads the rows of a warp over the banks, and keeps four steps together aligned.
__host__ __device__ constexpr int scalar_stride(int chunk) { return chunk + 4; }

// What (14) and (15) sum, for the rows of a tile and the steps of a chunk; [rows][stride] each.
template <class T>
struct RowScalars {
  int stride;
  T *h, *delta, *gamma;

  static int64_t bytes(int rows, int chunk) { return 3 * int64_t(rows) * scalar_stride(chunk) * sizeof(T); }

  __device__ __forceinline__ RowScalars(char* memory, int rows, int stride)
      : stride(stride), h(reinterpret_cast<T*>(memory)), delta(h + rows * stride), gamma(delta + rows * stride) {}
};

// Where the sums of a program, set and step are.
template <class T>
__device__ __forceinline__ T* partial_of(T* partials, int64_t program, int64_t sets, int64_t set, int64_t steps,
                                         int64_t step, int64_t dim) {
  return partials + ((program * sets + set) * steps + step) * partial_width(dim);
}

template <class T>
__device__ __forceinline__ void accumulate(T* to, T x, bool add) {
  store(to, add ? *to + x : x);
}

// db and gamma of a chunk's steps over the rows of a tile; one sum a thread. `partial` is of the chunk's first step.
template <class T>
__device__ __forceinline__ void sum_ends(const RowScalars<T>& x, int rows, int count, int64_t dim, T* partial,
                                         bool add) {
  for (int i = int(threadIdx.x); i < 2 * count; i += int(blockDim.x)) {
    const int step = i / 2;
    const T* y = (i % 2 == 0 ? x.delta : x.gamma) + step;
    T sum = 0;
#pragma unroll 4
    for (int row = 0; row < rows; ++row) sum += y[row * x.stride];
    accumulate(partial + step * partial_width(dim) + 2 * dim + kChunk + i % 2, sum, add);
  }
}

// The chunk's S with its transpose over the rows of a tile; one sum a thread. The flow's S has no diagonal, its
// inverse's has one for (40) where w = 0.
template <class T>
__device__ __forceinline__ void sum_pairs(const RowScalars<T>& x, int rows, int count, int64_t dim, T* partial,
                                          bool add, bool diagonal) {
  for (int i = int(threadIdx.x); i < count * count; i += int(blockDim.x)) {
    const int step = i / count, other = i % count;
    if (diagonal ? step > other : step >= other) continue;
    T sum = 0;
#pragma unroll 4
    for (int row = 0; row < rows; ++row) sum += x.h[row * x.stride + step] * x.delta[row * x.stride + other];
    accumulate(partial + step * partial_width(dim) + 2 * dim + other, sum, add);
    if (step != other) accumulate(partial + other * partial_width(dim) + 2 * dim + step, sum, add);
  }
}

}  // namespace cuda
}  // namespace vvae
