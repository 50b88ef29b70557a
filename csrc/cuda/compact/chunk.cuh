// What the compact kernels share, docs/math.md section 3 by chunks: a warp has some rows and columns of z in the
// fragments of mma.cuh; warps side by side have the rows' other columns. Between the products of a chunk, one lane scans
// a row's steps.
#pragma once

#include "../reduce/partials.cuh"
#include "../stage.cuh"
#include "mma.cuh"

namespace vvae {
namespace cuda {

constexpr int kMostWarps = 8, kMostCompactThreads = kMostWarps * int(kWarp);

// What a warp has of z: R times 16 rows and N times 8 columns.
template <int R, int N>
struct Tiles {
  static constexpr int row_tiles = R, column_tiles = N, rows = 16 * R, columns = 8 * N, most_dim = columns * kMostWarps;
};

// How a block's warps share out rows and columns.
struct BlockShape {
  int row_warps, column_warps;
  int rows, columns;  // of all warps
  int stride;         // of rows in shared memory: four of them are side by side in the banks, as fragments are read

  // Four warps at least, but no more rows than a set has.
  template <class W>
  static BlockShape of(int dim, int64_t rows_per_set) {
    const int column_warps = int(ceil_div(dim, W::columns));
    int row_warps = column_warps >= 4 ? 1 : column_warps >= 2 ? 2 : 4;
    while (row_warps > 1 && row_warps / 2 * W::rows >= rows_per_set) row_warps /= 2;
    return {row_warps, column_warps, row_warps * W::rows, column_warps * W::columns, column_warps * W::columns + 8};
  }
  int threads() const { return row_warps * column_warps * int(kWarp); }
};

// Where a warp is in its block.
template <class W>
struct Place {
  int lane, n, m;  // n and m as in mma.cuh
  int column_warp;
  int first_row, first_column;  // of the block's
  bool scans;                   // this lane scans the row `own` of the block
  int own;

  __device__ __forceinline__ explicit Place(const BlockShape& block)
      : lane(int(threadIdx.x % kWarp)), n(lane / 4), m(lane % 4),
        column_warp(int(threadIdx.x / kWarp) % block.column_warps),
        first_row(int(threadIdx.x / kWarp) / block.column_warps * W::rows), first_column(column_warp * W::columns),
        scans(column_warp == 0 && lane < W::rows), own(first_row + lane) {}
};

// z, or its gradient, of a warp's rows and columns, as c of mma.cuh.
template <class W>
struct Columns {
  float c[W::row_tiles][W::column_tiles][4];
};

// The left side that a tile of eight columns is, with its columns in mma.cuh's own order.
template <class W>
__device__ __forceinline__ Fragment<4> as_left(const Columns<W>& z, int tile, int j) {
  Fragment<4> a;
  a.set(0, z.c[tile][j][0]);
  a.set(1, z.c[tile][j][2]);
  a.set(2, z.c[tile][j][1]);
  a.set(3, z.c[tile][j][3]);
  return a;
}

// Calls f(tile, j, i, row of the block, column) for each pair of neighbours, c[i] and c[i + 1], that the lane holds.
template <class W, class F>
__device__ __forceinline__ void for_each_pair(const Place<W>& at, const F& f) {
#pragma unroll
  for (int tile = 0; tile < W::row_tiles; ++tile)
#pragma unroll
    for (int j = 0; j < W::column_tiles; ++j)
#pragma unroll
      for (int i = 0; i < 4; i += 2)
        f(tile, j, i, at.first_row + 16 * tile + at.n + 4 * i, at.first_column + 8 * j + 2 * at.m);
}

// The rows of one set that a block has: row i of them is row set + sets (first + i) of z.
struct TileRows {
  int64_t set, sets, first, count;

  __device__ __forceinline__ bool has(int i) const { return first + i < count; }
  __device__ __forceinline__ int64_t row(int i) const { return set + sets * (first + i); }
};

template <class W, class S>
__device__ __forceinline__ Columns<W> load_columns(const Rows<S>& x, int64_t x_row, const TileRows& rows,
                                                   const Place<W>& at, int dim) {
  Columns<W> z;
  Two<S> raw[W::row_tiles][W::column_tiles][2];  // every read is on its way before one is waited for
  if (x.vector) {
    for_each_pair(at, [&](int tile, int j, int i, int row, int column) {
      Two<S> two = {};
      if (rows.has(row) && column < dim)
        two = *reinterpret_cast<const Two<S>*>(x.data + rows.row(row) * x_row + column);
      raw[tile][j][i / 2] = two;
    });
  } else {
    for_each_pair(at, [&](int tile, int j, int i, int row, int column) {
      Two<S> two = {};
      const S* from = x.data + rows.row(row) * x_row + column * x.col;
      if (rows.has(row) && column < dim) two.set(0, from[0]);
      if (rows.has(row) && column + 1 < dim) two.set(1, from[x.col]);
      raw[tile][j][i / 2] = two;
    });
  }
  for_each_pair(at, [&](int tile, int j, int i, int, int) {
    z.c[tile][j][i] = widen(raw[tile][j][i / 2].get(0));
    z.c[tile][j][i + 1] = widen(raw[tile][j][i / 2].get(1));
  });
  return z;
}

template <class W, class S>
__device__ __forceinline__ void store_columns(S* to, const Columns<W>& z, const TileRows& rows, const Place<W>& at,
                                              int dim) {
  for_each_pair(at, [&](int tile, int j, int i, int row, int column) {
    if (!rows.has(row) || column >= dim) return;
    Two<S> two = {};
#pragma unroll
    for (int side = 0; side < 2; ++side) two.set(side, narrow<S>(z.c[tile][j][i + side]));
    S* at_column = to + rows.row(row) * dim + column;
    if (dim % 2 == 0) return store(reinterpret_cast<Two<S>*>(at_column), two);
    store(at_column, two.get(0));
    if (column + 1 < dim) store(at_column + 1, two.get(1));
  });
}

// A chunk's parameters in shared memory; missing steps have w = u_hat = 0 and change nothing.
struct Chunk {
  float *w, *u_hat;         // [kChunk][stride]
  float* gram;              // [kChunk][kChunk]: G of (9), u_hat_j . w_k at [j][k] and at [k][j] for j < k
  Numbers<float>* numbers;  // [kChunk]; no next

  __host__ __device__ static int64_t bytes(int stride) {
    return kChunk * (2 * int64_t(stride) + kChunk) * int64_t(sizeof(float)) + kChunk * int64_t(sizeof(Numbers<float>));
  }
  __device__ __forceinline__ Chunk(char* memory, int stride)
      : w(reinterpret_cast<float*>(memory)), u_hat(w + kChunk * stride), gram(u_hat + kChunk * stride),
        numbers(reinterpret_cast<Numbers<float>*>(gram + kChunk * kChunk)) {}
};

// (4), (5) and G of (9) of `count` steps from `first` on, a group of lanes a step: by the columns alone, so that sums
// have the same bits in every block. Every thread of the block calls it.
template <class S, class F>
__device__ __forceinline__ void stage_chunk(const ParamsView<S, F>& p, int64_t set, int first, int count,
                                            const BlockShape& block, const Chunk& to) {
  constexpr int at_once = 8;  // reads on their way
  const int lanes = block.columns > 256 ? 16 : 8, lane = int(threadIdx.x) % lanes;
  const int groups = int(blockDim.x) / lanes;
  for (int start = 0; start < kChunk; start += groups) {
    const int i = start + int(threadIdx.x) / lanes;
    const bool inside = i < count, writes = i < kChunk;
    const auto u = p.u_of(set, inside ? first + i : first), w = p.w_of(set, inside ? first + i : first);
    float *w_i = to.w + i * block.stride, *u_i = to.u_hat + i * block.stride;
    const float b = inside ? widen(*p.b_of(set, first + i)) : 0.f;
    float alpha = 0, n = 0;
    for (int first_d = lane; first_d < block.columns; first_d += at_once * lanes) {
      float u_d[at_once], w_d[at_once];
#pragma unroll
      for (int e = 0; e < at_once; ++e) {
        const int d = first_d + e * lanes;
        const bool there = inside && d < p.dim;
        u_d[e] = there ? widen(u.data[d * u.col]) : 0.f;
        w_d[e] = there ? widen(w.data[d * w.col]) : 0.f;
      }
#pragma unroll
      for (int e = 0; e < at_once; ++e) {
        const int d = first_d + e * lanes;
        alpha += w_d[e] * u_d[e];
        n += w_d[e] * w_d[e];
        if (writes && d < block.columns) w_i[d] = w_d[e], u_i[d] = u_d[e];
      }
    }
    sum_lanes(alpha, n, lanes);
    if (!writes) continue;
    const auto step = constrain<Lane<float>>(alpha, n, p.constraint());
    const float of_w = rho_over_n(step);
    for (int d = lane; d < block.columns; d += lanes) u_i[d] += of_w * w_i[d];
    if (lane == 0) to.numbers[i] = {b, inside ? step.c : 0.f, inside ? step.s : 1.f, 0.f, inside ? step.sunk : 0.f};
  }
  __syncthreads();
  for (int pair = int(threadIdx.x); pair < kChunk * kChunk; pair += int(blockDim.x)) {
    const int j = pair / kChunk, k = pair % kChunk;
    float sum[4] = {};
    if (j < k)
      for (int d = 0; d < block.columns; d += 4) {
        const Four<float> u_hat = *reinterpret_cast<const Four<float>*>(to.u_hat + j * block.stride + d);
        const Four<float> w_k = *reinterpret_cast<const Four<float>*>(to.w + k * block.stride + d);
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[e] += u_hat.get(e) * w_k.get(e);
      }
    if (j < k) to.gram[j * kChunk + k] = to.gram[k * kChunk + j] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
  }
}

// Rows' products with the steps of a chunk, of one warp's columns each: [column_warps][block_rows][kExchangeStride].
constexpr int kExchangeStride = scalar_stride(kChunk);

// x [rows][steps] = z v^T, for v [kChunk][stride] in shared memory.
template <class W>
__device__ __forceinline__ void multiply_by_steps(const Columns<W>& z, const float* v, const BlockShape& block,
                                                  const Place<W>& at, float* x) {
  float c[W::row_tiles][2][4] = {};
#pragma unroll
  for (int j = 0; j < W::column_tiles; ++j) {
    Fragment<2> b[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float* of_step = v + (8 * half + at.n) * block.stride + at.first_column + 8 * j + 2 * at.m;
      const Two<float> two = *reinterpret_cast<const Two<float>*>(of_step);
      b[half].set(0, two.get(0));
      b[half].set(1, two.get(1));
    }
#pragma unroll
    for (int tile = 0; tile < W::row_tiles; ++tile) {
      const auto a = as_left(z, tile, j);
      multiply_apart(c[tile][0], a, b[0]);
      multiply_apart(c[tile][1], a, b[1]);
    }
  }
  x += (at.column_warp * block.rows + at.first_row) * kExchangeStride;
#pragma unroll
  for (int tile = 0; tile < W::row_tiles; ++tile)
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        x[(16 * tile + at.n + 8 * (i / 2)) * kExchangeStride + 8 * half + 2 * at.m + i % 2] = c[tile][half][i];
}

// A row's products over all columns.
__device__ __forceinline__ void sum_columns(const float* x, const BlockShape& block, int row, float (&sum)[kChunk]) {
#pragma unroll
  for (int k = 0; k < kChunk; ++k) sum[k] = x[row * kExchangeStride + k];
  for (int warp = 1; warp < block.column_warps; ++warp)
#pragma unroll
    for (int k = 0; k < kChunk; ++k) sum[k] += x[(warp * block.rows + row) * kExchangeStride + k];
}

// z += x v, for x [block_rows][kExchangeStride] of the rows' steps and v [kChunk][stride], in shared memory.
template <class W>
__device__ __forceinline__ void add_steps(Columns<W>& z, const float* x, const float* v, const BlockShape& block,
                                          const Place<W>& at) {
  Fragment<4> a[W::row_tiles][2];
#pragma unroll
  for (int tile = 0; tile < W::row_tiles; ++tile)
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        a[tile][half].set(i, x[(at.first_row + 16 * tile + at.n + 8 * (i % 2)) * kExchangeStride + 8 * half + at.m +
                               4 * (i / 2)]);
#pragma unroll
  for (int j = 0; j < W::column_tiles; ++j) {
    Fragment<2> b[2];
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int i = 0; i < 2; ++i)
        b[half].set(i, v[(8 * half + at.m + 4 * i) * block.stride + at.first_column + 8 * j + at.n]);
#pragma unroll
    for (int tile = 0; tile < W::row_tiles; ++tile) {
      float c[4] = {};
      multiply(c, a[tile][0], b[0]);
      multiply(c, a[tile][1], b[1]);
#pragma unroll
      for (int i = 0; i < 4; ++i) z.c[tile][j][i] += c[i];
    }
  }
}

}  // namespace cuda
}  // namespace vvae
