// The forward of rows that share their parameters, in the compact form, docs/math.md (9), (10) by chunks: products on
// tensor cores around a scan, z in registers, one launch.
#include "chunk.cuh"

namespace vvae {
namespace cuda {
namespace {

using W = Tiles<2, 8>;
constexpr int64_t kMostForwardPrograms = 256;  // of a set: what large GPUs run at once, so that each stages once

template <class S>
struct CompactForward : ForwardView<S, StandardFlow> {
  Split split;
  BlockShape block;
  bool all_staged;  // every chunk has its own memory

  CompactForward(const Forward& f, const Split& split, const BlockShape& block, bool all_staged)
      : ForwardView<S, StandardFlow>(f), split(split), block(block), all_staged(all_staged) {}
};

constexpr int kVoted = 8;  // steps between two votes on whether a product is ordinary: each vote is waited for

// `kVoted` steps from `first` on where the product of one of the warp's rows leaves its range: with a vote and perhaps a
// logarithm each.
template <class F>
__device__ __forceinline__ LogDet<Lane<float>> add_one_by_one(LogDet<Lane<float>> log_det, const float* a,
                                                              const Chunk& chunk, int first, const F& f) {
#pragma unroll 1
  for (int k = first; k < first + kVoted; ++k) {
    const auto step = chunk.numbers[k];
    const auto act = activate<Lane<float>>(a[k], f);
    add_step<Lane<float>, 1>(&log_det, &act, step.c, step.s, step.sunk, f);
  }
  return log_det;
}

template <class S>
__global__ void __launch_bounds__(kMostCompactThreads, 1) compact_forward_kernel(const CompactForward<S> p) {
  using L = Lane<float>;
  const int dim = p.params.dim, steps = p.params.steps, chunks = (steps + kChunk - 1) / kChunk;
  const int64_t set = blockIdx.x / p.split.programs, program = blockIdx.x % p.split.programs;
  const Place<W> at(p.block);
  float* products = reinterpret_cast<float*>(shared_memory());  // [column_warps][block_rows][kExchangeStride]
  float* h = products + p.block.column_warps * p.block.rows * kExchangeStride;  // [block_rows][kExchangeStride]
  char* staged = reinterpret_cast<char*>(h + p.block.rows * kExchangeStride);
  const int64_t chunk_bytes = Chunk::bytes(p.block.stride);
  const int64_t first_block_row = program * p.split.block_rows;
  const int64_t rows_apart = int64_t(p.split.programs) * p.split.block_rows;
  for (int64_t first_row = first_block_row; first_row < p.split.rows_per_set; first_row += rows_apart) {
    const TileRows rows = {set, p.sets, first_row, p.split.rows_per_set};
    auto z = load_columns(p.z, p.z_row, rows, at, dim);
    auto log_det = no_steps<L>();
    const bool saves = p.a && rows.has(at.own);
    for (int nth = 0; nth < chunks; ++nth) {
      const int first = nth * kChunk, count = kChunk < steps - first ? kChunk : steps - first;
      const Chunk chunk(staged + (p.all_staged ? nth * chunk_bytes : 0), p.block.stride);
      if (!p.all_staged || first_row == first_block_row) {
        __syncthreads();  // the chunk before is done with
        stage_chunk(p.params, set, first, count, p.block, chunk);
        __syncthreads();
      }
      multiply_by_steps(z, chunk.w, p.block, at, products);
      __syncthreads();
      if (at.scans) {
        float a_k[kChunk], *a_own = products + at.own * kExchangeStride;
        sum_columns(products, p.block, at.own, a_k);
        auto product = log_det;  // if it stays ordinary in every row
        auto outside = L::outside(1);
#pragma unroll
        for (int k = 0; k < kChunk; ++k) {
          const auto step = chunk.numbers[k];
          a_k[k] += step.b;
          const auto act = activate<L>(a_k[k], p.params.activation);
          product = multiplied<L>(product, act, step.c, step.s, p.params.activation);
          outside |= L::outside(product.high);  // so is every product with an s that is sunk
          h[at.own * kExchangeStride + k] = act.h;
          a_own[k] = a_k[k];
          if (k % kVoted == kVoted - 1) {
            if (L::any(outside)) product = add_one_by_one(log_det, a_own, chunk, k + 1 - kVoted, p.params.activation);
            log_det = product, outside = L::outside(1);
          }
#pragma unroll
          for (int after = k + 1; after < kChunk; ++after) a_k[after] += chunk.gram[k * kChunk + after] * act.h;
        }
        if (saves)
#pragma unroll 1
          for (int k = 0; k < count; ++k) store(p.a + (first + k) * p.rows + rows.row(at.own), a_own[k]);
      }
      __syncthreads();
      add_steps(z, h, chunk.u_hat, p.block, at);
    }
    store_columns(p.z_K, z, rows, at, dim);
    if (at.scans && rows.has(at.own)) store(p.log_det + rows.row(at.own), value<L>(log_det));
  }
}

}  // namespace

void launch_compact_forward(const Forward& f, void* stream) {
  with_half_or_float(f.dtype, [&](auto zero) {
    using S = decltype(zero);
    const BlockShape block = BlockShape::of<W>(f.dim, f.rows / f.sets);
    const int64_t exchanged = (block.column_warps + 1) * block.rows * kExchangeStride * int64_t(sizeof(float));
    const int64_t chunks = ceil_div(f.steps, kChunk), bytes = chunks * Chunk::bytes(block.stride);
    const bool all_staged = bytes <= kStagedBytes;
    const Split split = split_rows(f, block.rows, kMostForwardPrograms);
    launch(compact_forward_kernel<S>, "compact_forward_kernel", split.programs * f.sets, block.threads(),
           exchanged + (all_staged ? bytes : Chunk::bytes(block.stride)), stream,
           CompactForward<S>(f, split, block, all_staged));
  });
}

}  // namespace cuda
}  // namespace vvae
