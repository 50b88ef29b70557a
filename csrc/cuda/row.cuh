// How a row lies in registers: `lanes` neighbouring threads share it, and each holds `vectors` times four consecutive
// columns, so that a group of lanes reads 16 bytes a thread side by side. Columns from D on are zero.
#pragma once

#include "lane.cuh"

namespace vvae {
namespace cuda {

template <int L, int V>
struct Layout {
  static constexpr int lanes = L, vectors = V, numbers = 4 * V, columns = L * numbers;
};

// A tensor's rows as a kernel reads them.
template <class S>
struct Rows {
  const S* data;
  int64_t col;
  bool vector;  // four columns are one aligned piece of memory, and D is a multiple of four

  __device__ __forceinline__ Rows from(int64_t offset) const { return {data + offset, col, vector}; }
};

// N neighbouring numbers as they lie in memory, read and written at once. Halves are kept in whole registers, so that
// only who asks for one waits for the read.
template <class S, int N>
constexpr int kAlignment = N * sizeof(S) < 16 ? int(N * sizeof(S)) : 16;

template <class S, int N, bool = sizeof(S) == 2>
struct alignas(kAlignment<S, N>) Packed {
  S at[N];
  __device__ __forceinline__ S get(int i) const { return at[i]; }
  __device__ __forceinline__ void set(int i, S x) { at[i] = x; }
};
template <class S, int N>
struct alignas(kAlignment<S, N>) Packed<S, N, true> {
  uint32_t word[N / 2];
  __device__ __forceinline__ S get(int i) const { return {uint16_t(word[i / 2] >> 16 * (i % 2))}; }
  __device__ __forceinline__ void set(int i, S x) { word[i / 2] |= uint32_t(x.bits) << 16 * (i % 2); }  // once
};

template <class S>
using Four = Packed<S, 4>;
template <class S>
using Two = Packed<S, 2>;

template <class S>
bool aligned_to_four(const void* data) {
  return reinterpret_cast<uintptr_t>(data) % alignof(Four<S>) == 0;
}

template <class S>
Rows<S> rows_of(const Matrix<const void>& x, int64_t dim) {
  const bool vector = x.col == 1 && dim % 4 == 0 && x.row % 4 == 0 && aligned_to_four<S>(x.data);
  return {static_cast<const S*>(x.data), x.col, vector};
}

template <class S>
Rows<S> rows_of(const Params<const S>& x, int64_t dim) {
  const bool vector = x.col == 1 && dim % 4 == 0 && x.set % 4 == 0 && x.step % 4 == 0 && aligned_to_four<S>(x.data);
  return {x.data, x.col, vector};
}

template <class S>
bool writes_vectors(const Params<void>& x, int64_t dim) {
  return dim % 4 == 0 && x.set % 4 == 0 && x.step % 4 == 0 && aligned_to_four<S>(x.data);
}

// The numbers of one row that a thread holds.
template <class T, class Layout>
struct Row {
  T x[Layout::numbers];
};

template <class Layout>
__device__ __forceinline__ int lane_of_row() {
  return threadIdx.x % Layout::lanes;
}

// The first column of a thread's v-th four.
template <class Layout>
__device__ __forceinline__ int column(int v) {
  return 4 * (v * Layout::lanes + lane_of_row<Layout>());
}

// A row's numbers as they come from memory: who widens them waits for them.
template <class S, class Layout>
struct Raw {
  Four<S> four[Layout::vectors];
};

template <class Layout, class S>
__device__ __forceinline__ Raw<S, Layout> read_raw(const Rows<S>& from, int dim) {
  Raw<S, Layout> raw = {};
#pragma unroll
  for (int v = 0; v < Layout::vectors; ++v) {
    const int first = column<Layout>(v);
    if (from.vector) {
      if (first < dim) raw.four[v] = *reinterpret_cast<const Four<S>*>(from.data + first);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (first + i < dim) raw.four[v].set(i, from.data[(first + i) * from.col]);
    }
  }
  return raw;
}

template <class S, class Layout>
__device__ __forceinline__ Row<compute_t<S>, Layout> widen(const Raw<S, Layout>& raw) {
  Row<compute_t<S>, Layout> row;
#pragma unroll
  for (int i = 0; i < Layout::numbers; ++i) row.x[i] = widen(raw.four[i / 4].get(i % 4));
  return row;
}

template <class Layout, class S>
__device__ __forceinline__ Row<compute_t<S>, Layout> load_row(const Rows<S>& from, int dim) {
  return widen(read_raw<Layout>(from, dim));
}

// To contiguous columns at `to`; `vector` as in Rows.
template <class Layout, class S>
__device__ __forceinline__ void store_row(S* to, const Row<compute_t<S>, Layout>& row, int dim, bool vector) {
#pragma unroll
  for (int v = 0; v < Layout::vectors; ++v) {
    const int first = column<Layout>(v);
    Four<S> four = {};
#pragma unroll
    for (int i = 0; i < 4; ++i) four.set(i, narrow<S>(row.x[4 * v + i]));
    if (vector) {
      if (first < dim) store(reinterpret_cast<Four<S>*>(to + first), four);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (first + i < dim) store(to + first + i, four.get(i));
    }
  }
}

// A row in shared memory, padded to the layout's columns.
template <class Layout, class T>
__device__ __forceinline__ Row<T, Layout> read_row(const T* from) {
  Row<T, Layout> row;
#pragma unroll
  for (int v = 0; v < Layout::vectors; ++v) {
    const Four<T> four = *reinterpret_cast<const Four<T>*>(from + column<Layout>(v));
#pragma unroll
    for (int i = 0; i < 4; ++i) row.x[4 * v + i] = four.get(i);
  }
  return row;
}

template <class Layout, class T>
__device__ __forceinline__ void write_row(T* to, const Row<T, Layout>& row) {
#pragma unroll
  for (int v = 0; v < Layout::vectors; ++v) {
    Four<T> four;
#pragma unroll
    for (int i = 0; i < 4; ++i) four.set(i, row.x[4 * v + i]);
    *reinterpret_cast<Four<T>*>(to + column<Layout>(v)) = four;
  }
}

// y + a x
template <class T, class Layout>
__device__ __forceinline__ Row<T, Layout> add(const Row<T, Layout>& y, T a, const Row<T, Layout>& x) {
  Row<T, Layout> sum;
#pragma unroll
  for (int i = 0; i < Layout::numbers; ++i) sum.x[i] = y.x[i] + a * x.x[i];
  return sum;
}

// This thread's part of a dot product: two chains of additions, since one would wait for itself.
template <class T, class Layout>
__device__ __forceinline__ T part_of_dot(const Row<T, Layout>& x, const Row<T, Layout>& y) {
  T even = x.x[0] * y.x[0], odd = x.x[1] * y.x[1];
#pragma unroll
  for (int i = 2; i < Layout::numbers; i += 2) {
    even += x.x[i] * y.x[i];
    odd += x.x[i + 1] * y.x[i + 1];
  }
  return even + odd;
}

// The sum over a row's lanes, the same bits in each: both sides of an exchange add the same two numbers.
template <class Layout, class T>
__device__ __forceinline__ T sum_lanes(T x) {
#pragma unroll
  for (int distance = Layout::lanes / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(kAllLanes, x, distance);
  return x;
}

template <class T, class Layout>
__device__ __forceinline__ T dot(const Row<T, Layout>& x, const Row<T, Layout>& y) {
  return sum_lanes<Layout>(part_of_dot(x, y));
}

// Two sums over neighbouring lanes, a power of two of them.
template <class T>
__device__ __forceinline__ void sum_lanes(T& x, T& y, int lanes) {
  for (int distance = lanes / 2; distance > 0; distance /= 2) {
    x += __shfl_xor_sync(kAllLanes, x, distance);
    y += __shfl_xor_sync(kAllLanes, y, distance);
  }
}

}  // namespace cuda
}  // namespace vvae
