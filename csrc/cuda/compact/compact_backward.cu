// The backward of rows that share their parameters, in the compact form, docs/math.md (11) to (15) by chunks: g in
// registers, z kept where a chunk starts, products on tensor cores. finish.cu adds the rows' sums.
#include "chunk.cuh"

namespace vvae {
namespace cuda {
namespace {

// Both z and g have to fit the registers.
using Narrow = Tiles<2, 4>;
using Wide = Tiles<1, 8>;

template <class S>
struct CompactBackward : BackwardView<S, StandardFlow> {
  Split split;
  BlockShape block;
  bool all_staged;  // every chunk has its own memory
  int shared;       // numbers of the memory for products and tiles
  float* partials;
  KeptStarts<float> kept;  // a warp's numbers as its threads hold them, side by side

  CompactBackward(const Backward& f, const Split& split, const BlockShape& block, bool all_staged, int shared)
      : BackwardView<S, StandardFlow>(f), split(split), block(block), all_staged(all_staged), shared(shared),
        partials(static_cast<float*>(f.workspace)),
        kept{partials + partial_numbers(f, split.programs), int(ceil_div(f.steps, kChunk)), block.rows} {}
};

// z of a warp's rows and columns to memory and back, the threads of a block side by side.
template <class W>
__device__ __forceinline__ void keep(float* to, const Columns<W>& z) {
#pragma unroll
  for (int tile = 0; tile < W::row_tiles; ++tile)
#pragma unroll
    for (int j = 0; j < W::column_tiles; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) store(to + ((tile * W::column_tiles + j) * 4 + i) * blockDim.x, z.c[tile][j][i]);
}

template <class W>
__device__ __forceinline__ Columns<W> recall(const float* from) {
  Columns<W> z;
#pragma unroll
  for (int tile = 0; tile < W::row_tiles; ++tile)
#pragma unroll
    for (int j = 0; j < W::column_tiles; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) z.c[tile][j][i] = from[((tile * W::column_tiles + j) * 4 + i) * blockDim.x];
  return z;
}

// To tile [block_rows][stride] in shared memory.
template <class W>
__device__ __forceinline__ void write_tile(float* tile, const Columns<W>& x, const BlockShape& block, const Place<W>& at) {
  for_each_pair(at, [&](int t, int j, int i, int row, int column) {
    *reinterpret_cast<Two<float>*>(tile + row * block.stride + column) = {{x.c[t][j][i], x.c[t][j][i + 1]}};
  });
}

// x^T y over the block's rows, for x [rows][kExchangeStride] and y [rows][y_stride]: a warp has 8 of y's columns at a
// time. Calls write(step, column, sum).
template <class F>
__device__ __forceinline__ void multiply_rows(const float* x, const float* y, int y_stride, int columns, int rows,
                                              const F& write) {
  const int lane = int(threadIdx.x % kWarp), n = lane / 4, m = lane % 4, warps = int(blockDim.x / kWarp);
  for (int first = 8 * int(threadIdx.x / kWarp); first < columns; first += 8 * warps) {
    float c[4] = {};
    for (int row = 0; row < rows; row += 8) {
      Fragment<4> a;
      Fragment<2> b;
#pragma unroll
      for (int i = 0; i < 4; ++i) a.set(i, x[(row + m + 4 * (i / 2)) * kExchangeStride + n + 8 * (i % 2)]);
#pragma unroll
      for (int i = 0; i < 2; ++i) b.set(i, y[(row + m + 4 * i) * y_stride + first + n]);
      multiply_apart(c, a, b);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) write(n + 8 * (i / 2), first + 2 * m + i % 2, c[i]);
  }
}

// A chunk's sums over the block's rows, to the program's partial sums of the chunk's first step.
struct ChunkSums {
  float* partial;
  int count, dim;
  bool add;

  __device__ __forceinline__ void operator()(int step, int64_t at, float sum) const {
    accumulate(partial + step * partial_width(dim) + at, sum, add);
  }
};

// The columns of v or dw, whose first is `of`, from steps' scalars x and a tile of z or g.
__device__ __forceinline__ void sum_columns_of(int of, const float* x, const float* tile, const BlockShape& block,
                                               const ChunkSums& to) {
  multiply_rows(x, tile, block.stride, to.dim, block.rows, [&](int step, int column, float sum) {
    if (step < to.count && column < to.dim) to(step, of + column, sum);
  });
}

// The chunk's S with its transpose, db and gamma.
__device__ __forceinline__ void sum_scalars_of(const RowScalars<float>& x, const BlockShape& block,
                                               const ChunkSums& to) {
  multiply_rows(x.h, x.delta, kExchangeStride, kChunk, block.rows, [&](int step, int other, float sum) {
    if (step >= other || other >= to.count) return;
    to(step, 2 * to.dim + other, sum);
    to(other, 2 * to.dim + step, sum);
  });
  sum_ends(x, block.rows, to.count, to.dim, to.partial, to.add);
}

template <class W, class S>
__global__ void __launch_bounds__(kMostCompactThreads, 1) compact_backward_kernel(const CompactBackward<S> p) {
  using L = Lane<float>;
  const int dim = p.params.dim, steps = p.params.steps, chunks = (steps + kChunk - 1) / kChunk;
  const int block_rows = p.block.rows;
  const int64_t set = blockIdx.x / p.split.programs, program = blockIdx.x % p.split.programs;
  const Place<W> at(p.block);
  float* shared = reinterpret_cast<float*>(shared_memory());  // products, then a tile: g at the chunk's end, z at its start
  const RowScalars<float> scalars(reinterpret_cast<char*>(shared + p.shared), block_rows, kExchangeStride);
  float* slope = scalars.gamma + block_rows * kExchangeStride;  // [rows][kExchangeStride]: h'
  char* staged = reinterpret_cast<char*>(slope + block_rows * kExchangeStride);
  const int64_t chunk_bytes = Chunk::bytes(p.block.stride);
  int staged_chunk = -1;  // where there is memory for one
  const auto need = [&](int nth, int count) {
    const Chunk chunk(staged + (p.all_staged ? nth * chunk_bytes : 0), p.block.stride);
    if (p.all_staged ? nth > staged_chunk : nth != staged_chunk) {
      __syncthreads();  // the chunk before is done with
      stage_chunk(p.params, set, nth * kChunk, count, p.block, chunk);
      __syncthreads();
      staged_chunk = nth;
    }
    return chunk;
  };
  // What a step's activation gives does not wait for another step: every thread has a row and some steps.
  const int row = int(threadIdx.x) % block_rows, first_step = int(threadIdx.x) / block_rows;
  const int steps_apart = int(blockDim.x) / block_rows;
  const int64_t first_block_row = program * p.split.block_rows;
  const int64_t rows_apart = int64_t(p.split.programs) * p.split.block_rows;
  for (int64_t first_row = first_block_row; first_row < p.split.rows_per_set; first_row += rows_apart) {
    const TileRows rows = {set, p.sets, first_row, p.split.rows_per_set};
    auto z = load_columns(p.z, p.z_row, rows, at, dim);  // where a chunk of the forward sweep ends
    auto g = load_columns(p.grad_z, p.grad_z_row, rows, at, dim);
    const bool has = rows.has(row);
    const float lambda = has ? p.grad_log_det[rows.row(row) * p.grad_log_det_stride] : 0.f;
    const auto a_of = [&](int k) { return has && k < steps ? p.a[k * p.rows + rows.row(row)] : 0.f; };
    const auto kept = [&](int nth) {
      return p.kept.of(program * p.sets + set, nth, p.block.columns) + threadIdx.x;
    };
    for (int nth = 0; nth + 1 < chunks; ++nth) {  // forward once more, (10), to where the last chunk starts
      const int first = nth * kChunk;
      const Chunk chunk = need(nth, kChunk);
#pragma unroll 4
      for (int k = first_step; k < kChunk; k += steps_apart)
        scalars.h[row * kExchangeStride + k] = activate<L>(a_of(first + k), p.params.activation).h;
      __syncthreads();
      add_steps(z, scalars.h, chunk.u_hat, p.block, at);
      keep(kept(nth + 1), z);
      __syncthreads();
    }
    for (int nth = chunks - 1; nth >= 0; --nth) {
      const int first = nth * kChunk, count = kChunk < steps - first ? kChunk : steps - first;
      const Chunk chunk = need(nth, count);
#pragma unroll 4
      for (int k = first_step; k < kChunk; k += steps_apart) {
        const auto act = activate<L>(a_of(first + k), p.params.activation);
        const float c = chunk.numbers[k].c, s = chunk.numbers[k].s;
        AdjointParts<L> x = {};  // where the rows end the determinant may be 0
        if (has) x = adjoint_parts<L>(lambda, act, c, s, unit<L>(s, p.params.constraint()), p.params.activation);
        const int to = row * kExchangeStride + k;
        scalars.h[to] = act.h;
        scalars.gamma[to] = x.gamma;
        slope[to] = x.slope;
        scalars.delta[to] = x.bend;  // so far
      }
      multiply_by_steps(g, chunk.u_hat, p.block, at, shared);
      __syncthreads();
      if (at.scans) {
        float e[kChunk];
        sum_columns(shared, p.block, at.own, e);
#pragma unroll
        for (int k = kChunk - 1; k >= 0; --k) {
          const int own = at.own * kExchangeStride + k;
          const float delta = e[k] * slope[own] + scalars.delta[own];  // (12)
          scalars.delta[own] = delta;
#pragma unroll
          for (int before = 0; before < k; ++before) e[before] += chunk.gram[k * kChunk + before] * delta;
        }
      }
      __syncthreads();
      const ChunkSums sums = {partial_of(p.partials, program, p.sets, set, steps, first, dim), count, dim,
                              first_row != first_block_row};
      write_tile(shared, g, p.block, at);
      add_steps(g, scalars.delta, chunk.w, p.block, at);  // (13)
      __syncthreads();
      sum_columns_of(0, scalars.h, shared, p.block, sums);
      __syncthreads();
      write_tile(shared, nth > 0 ? recall<W>(kept(nth)) : load_columns(p.z, p.z_row, rows, at, dim), p.block, at);
      __syncthreads();
      sum_columns_of(dim, scalars.delta, shared, p.block, sums);
      sum_scalars_of(scalars, p.block, sums);
      __syncthreads();
    }
    store_columns(p.dz, g, rows, at, dim);
  }
}

// A block's memory: products and tiles, the rows' scalars, and the chunks that are staged at a time.
template <class W>
struct Memory {
  BlockShape block;
  int shared;  // numbers of the products and tiles
  bool all_staged;
  int64_t bytes;

  Memory(int dim, int steps, int64_t rows_per_set) : block(BlockShape::of<W>(dim, rows_per_set)) {
    const int products = block.column_warps * kExchangeStride, rows = block.rows;
    const int64_t chunks = ceil_div(steps, kChunk), chunk_bytes = Chunk::bytes(block.stride);
    shared = rows * (products > block.stride ? products : block.stride);
    all_staged = chunks * chunk_bytes <= kStagedBytes / 2;
    bytes = shared * int64_t(sizeof(float)) + RowScalars<float>::bytes(rows, kChunk) +
            rows * kExchangeStride * int64_t(sizeof(float)) + (all_staged ? chunks : 1) * chunk_bytes;
  }
};

template <class W, class S>
void launch_as(const Backward& f, void* stream) {
  const Memory<W> memory(f.dim, f.steps, f.rows / f.sets);
  const Split split = split_rows(f, memory.block.rows, most_partials(f));
  launch(compact_backward_kernel<W, S>, "compact_backward_kernel", split.programs * f.sets, memory.block.threads(),
         memory.bytes, stream, CompactBackward<S>(f, split, memory.block, memory.all_staged, memory.shared));
  launch_finish(f, split.programs, kChunk, stream);
}

template <class W>
int64_t bytes_as(const Problem& p) {
  const BlockShape block = BlockShape::of<W>(p.dim, p.rows / p.sets);
  const int64_t programs = split_rows(p, block.rows, most_partials(p)).programs;
  const int chunks = int(ceil_div(p.steps, kChunk));
  return sizeof(float) *
         (partial_numbers(p, programs) + KeptStarts<float>::numbers(p, programs, chunks, block.rows, block.columns));
}

}  // namespace

int64_t compact_backward_bytes(const Problem& p) {
  return p.dim <= Narrow::most_dim ? bytes_as<Narrow>(p) : bytes_as<Wide>(p);
}

int64_t compact_bytes(int dim) {
  if (dim > Wide::most_dim) return INT64_MAX;
  return dim <= Narrow::most_dim ? Memory<Narrow>(dim, 1, INT64_MAX).bytes : Memory<Wide>(dim, 1, INT64_MAX).bytes;
}

void launch_compact_backward(const Backward& f, void* stream) {
  with_half_or_float(f.dtype, [&](auto zero) {
    using S = decltype(zero);
    return f.dim <= Narrow::most_dim ? launch_as<Narrow, S>(f, stream) : launch_as<Wide, S>(f, stream);
  });
}

}  // namespace cuda
}  // namespace vvae
