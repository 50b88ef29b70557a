// The backward of rows that share their parameters, in the compact form, docs/math.md (11) to (15) by chunks: z and its
// gradient g in registers, z walked back a chunk at a time, products on tensor cores. finish.cu adds the rows' sums.
#include "compact.cuh"

namespace vvae {
namespace cuda {
namespace {

// Both z and g have to fit the registers.
using Narrow = Tiles<2, 4>;
using Wide = Tiles<1, 8>;

template <class S>
struct CompactBackward : BackwardView<S> {
  Split split;
  Grid grid;
  bool all_staged;  // every chunk has its own memory
  int shared;       // numbers of the memory for products and tiles
  float* partials;

  CompactBackward(const Backward& f, const Split& split, const Grid& grid, bool all_staged, int shared)
      : BackwardView<S>(f), split(split), grid(grid), all_staged(all_staged), shared(shared),
        partials(static_cast<float*>(f.workspace)) {}
};

// To tile [block_rows][stride] in shared memory.
template <class W>
__device__ __forceinline__ void write_tile(float* tile, const Columns<W>& x, const Grid& grid, const Place<W>& at) {
  for_each_pair(at, [&](int t, int j, int i, int row, int column) {
    *reinterpret_cast<Two<float>*>(tile + row * grid.stride + column) = {x.c[t][j][i], x.c[t][j][i + 1]};
  });
}

// partial[step][of + column] of `count` steps = x^T tile over the block's rows, for x [block_rows][kExchangeStride]: a
// warp has 8 columns at a time.
template <class W>
__device__ __forceinline__ void sum_tile(const float* x, const float* tile, int count, int dim, const Grid& grid,
                                         const Place<W>& at, float* partial, bool add) {
  const int warps = grid.row_warps * grid.column_warps;
  for (int first = 8 * int(threadIdx.x / kWarp); first < dim; first += 8 * warps) {
    float c[4] = {};
    for (int row = 0; row < grid.block_rows; row += 8) {
      Fragment<4> a;
      Fragment<2> b;
#pragma unroll
      for (int i = 0; i < 4; ++i) a.set(i, x[(row + at.m + 4 * (i / 2)) * kExchangeStride + at.n + 8 * (i % 2)]);
#pragma unroll
      for (int i = 0; i < 2; ++i) b.set(i, tile[(row + at.m + 4 * i) * grid.stride + first + at.n]);
      multiply_apart(c, a, b);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int step = at.n + 8 * (i / 2), column = first + 2 * at.m + i % 2;
      if (step < count && column < dim) accumulate(partial + step * partial_width(dim) + column, c[i], add);
    }
  }
}

template <class W, class S>
__global__ void __launch_bounds__(kMostCompactThreads, 1) compact_backward_kernel(const CompactBackward<S> p) {
  using L = Lane<float>;
  const int dim = p.params.dim, steps = p.params.steps, chunks = (steps + kChunk - 1) / kChunk;
  const int block_rows = p.grid.block_rows;
  const int64_t set = blockIdx.x / p.split.programs, program = blockIdx.x % p.split.programs;
  const Place<W> at(p.grid);
  float* shared = reinterpret_cast<float*>(shared_memory());  // products, then a tile: g at the chunk's end, z at its start
  const RowScalars<float> scalars(reinterpret_cast<char*>(shared + p.shared), block_rows, kExchangeStride);
  char* staged = reinterpret_cast<char*>(scalars.r_h_prime + block_rows * kExchangeStride);
  const int64_t chunk_bytes = Chunk::bytes(p.grid.stride);
  int staged_chunk = -1;  // where there is memory for one
  const auto need = [&](int nth, int count) {
    const Chunk chunk(staged + (p.all_staged ? nth * chunk_bytes : 0), p.grid.stride);
    if (p.all_staged ? nth > staged_chunk : nth != staged_chunk) {
      __syncthreads();  // the chunk before is done with
      stage_chunk(p.params, set, nth * kChunk, count, p.grid, chunk);
      __syncthreads();
      staged_chunk = nth;
    }
    return chunk;
  };
  const int64_t first_block_row = program * p.split.block_rows;
  const int64_t rows_apart = int64_t(p.split.programs) * p.split.block_rows;
  for (int64_t first_row = first_block_row; first_row < p.split.rows_per_set; first_row += rows_apart) {
    const TileRows rows = {set, p.sets, first_row, p.split.rows_per_set};
    auto z = load_columns(p.z, p.z_row, rows, at, dim);
    auto g = load_columns(p.grad_z, p.grad_z_row, rows, at, dim);
    const bool has = at.scans && rows.has(at.own);
    const float lambda = has ? p.grad_log_det[rows.row(at.own) * p.grad_log_det_stride] : 0.f;
    // Where the rows or the steps end, a = 0 and nothing is added to any sum.
    const auto a_of = [&](int k) { return has && k < steps ? p.a[k * p.rows + rows.row(at.own)] : 0.f; };
    for (int nth = 0; nth < chunks; ++nth) {  // forward once more, (10)
      const int first = nth * kChunk, count = kChunk < steps - first ? kChunk : steps - first;
      const Chunk chunk = need(nth, count);
      if (at.scans)
#pragma unroll
        for (int k = 0; k < kChunk; ++k) scalars.h[at.own * kExchangeStride + k] = activate<L>(a_of(first + k)).h;
      __syncthreads();
      add_steps(z, 1.f, scalars.h, chunk.u_hat, p.grid, at);
      __syncthreads();
    }
    for (int nth = chunks - 1; nth >= 0; --nth) {
      const int first = nth * kChunk, count = kChunk < steps - first ? kChunk : steps - first;
      const Chunk chunk = need(nth, count);
      multiply_by_steps(g, chunk.u_hat, p.grid, at, shared);
      __syncthreads();
      if (at.scans) {
        float e[kChunk];
        sum_columns(shared, p.grid, at.own, e);
#pragma unroll
        for (int k = kChunk - 1; k >= 0; --k) {
          const auto q = chunk.numbers[k];
          const auto act = activate<L>(a_of(first + k));
          const float r = lambda / determinant<L>(act, q.c, q.s);                      // (11)
          const float delta = e[k] * act.h_prime + r * q.c * h_second<L>(act);         // (12)
          scalars.h[at.own * kExchangeStride + k] = act.h;
          scalars.delta[at.own * kExchangeStride + k] = delta;
          scalars.r_h_prime[at.own * kExchangeStride + k] = r * act.h_prime;
#pragma unroll
          for (int before = 0; before < k; ++before) e[before] += chunk.gram[before * kChunk + k] * delta;
        }
      }
      __syncthreads();
      float* partial = partial_of(p.partials, program, p.sets, set, steps, first, dim);
      const bool add = first_row != first_block_row;
      write_tile(shared, g, p.grid, at);
      add_steps(z, -1.f, scalars.h, chunk.u_hat, p.grid, at);
      add_steps(g, 1.f, scalars.delta, chunk.w, p.grid, at);  // (13)
      __syncthreads();
      sum_tile(scalars.h, shared, count, dim, p.grid, at, partial, add);
      __syncthreads();
      write_tile(shared, z, p.grid, at);
      __syncthreads();
      sum_tile(scalars.delta, shared, count, dim, p.grid, at, partial + dim, add);
      sum_scalars(scalars, block_rows, count, dim, partial, add);
      __syncthreads();
    }
    store_columns(p.dz, g, rows, at, dim);
  }
}

// A block's memory: products and tiles, the rows' scalars, and the chunks that are staged at a time.
template <class W>
struct Memory {
  Grid grid;
  int shared;  // numbers of the products and tiles
  bool all_staged;
  int64_t bytes;

  Memory(int dim, int steps, int64_t rows_per_set) : grid(Grid::of<W>(dim, rows_per_set)) {
    const int products = grid.column_warps * kExchangeStride, rows = grid.block_rows;
    const int64_t chunks = ceil_div(steps, kChunk), chunk_bytes = Chunk::bytes(grid.stride);
    shared = rows * (products > grid.stride ? products : grid.stride);
    all_staged = chunks * chunk_bytes <= kStagedBytes / 2;
    bytes = shared * int64_t(sizeof(float)) + RowScalars<float>::bytes(rows, kChunk) +
            (all_staged ? chunks : 1) * chunk_bytes;
  }
};

template <class W, class S>
void launch_as(const Backward& f, void* stream) {
  const Memory<W> memory(f.p.dim, f.p.steps, f.p.rows / f.p.sets);
  const Split split = split_rows(f.p, memory.grid.block_rows, most_partials(f.p));
  launch(compact_backward_kernel<W, S>, "compact_backward_kernel", split.programs * f.p.sets, memory.grid.threads(),
         memory.bytes, stream, CompactBackward<S>(f, split, memory.grid, memory.all_staged, memory.shared));
  launch_finish(f, split.programs, kChunk, stream);
}

}  // namespace

int64_t compact_bytes(int dim) {
  if (dim > Wide::most_dim) return INT64_MAX;
  return dim <= Narrow::most_dim ? Memory<Narrow>(dim, 1, INT64_MAX).bytes : Memory<Wide>(dim, 1, INT64_MAX).bytes;
}

void launch_compact_backward(const Backward& f, void* stream) {
  with_half_or_float(f.p.dtype, [&](auto zero) {
    using S = decltype(zero);
    return f.p.dim <= Narrow::most_dim ? launch_as<Narrow, S>(f, stream) : launch_as<Wide, S>(f, stream);
  });
}

}  // namespace cuda
}  // namespace vvae
