// One pass over a problem: cut into tiles of samples or blocks of rows, run on PyTorch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <new>

#include "kernels.h"

namespace vvae {

constexpr int64_t kCompactRows = 16;  // rows of one parameter set from which on the compact form is the faster one
constexpr int64_t kThreadedRows = 8 * kTile;  // rows of one set from which on threads share its tiles
constexpr int64_t kGrain = int64_t(1) << 18;  // multiply-adds that are worth waking a thread for

// Slices of tiles, whose sums are kept apart: the least tiles of one, and the most of them in number and in memory.
constexpr int64_t kTilesOfSlice = 2, kMaxSlices = 32, kPartialBytes = int64_t(1) << 24;

struct Free {
  void operator()(void* p) const { std::free(p); }
};

// Cache-aligned memory that each thread keeps, at its largest so far, from call to call: a pass allocates only its
// outputs.
enum Slot { kPrepared, kPartials, kTileScratch, kSlots };

template <class T>
T* arena(Slot slot, int64_t count) {
  struct Arena {
    std::unique_ptr<void, Free> data;
    size_t size = 0;
  };
  thread_local Arena arenas[kSlots];
  Arena& mine = arenas[slot];
  const size_t bytes = round_up(count * int64_t(sizeof(T)), 64);
  if (mine.size < bytes) {
    mine.data.reset();
    mine.data.reset(std::aligned_alloc(64, bytes));
    mine.size = mine.data ? bytes : 0;
    if (!mine.data) throw std::bad_alloc();
  }
  return static_cast<T*>(mine.data.get());
}

// Calls run(i) for every i < items, each worth `work` multiply-adds, on as many threads as that is worth. The last
// item, which may be short, comes first, since parallel_for gives the first of two threads the odd one.
template <class Run>
void for_each(int64_t items, int64_t work, const Run& run) {
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, work));
  const auto range = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) run(items - 1 - i);
  };
  if (items <= grain) return range(0, items);
  std::mutex guard;
  std::exception_ptr error;  // an exception that crossed the C boundary would lose its kind and its message
  torch::stable::parallel_for(0, items, grain, [&](int64_t begin, int64_t end) {
    try {
      range(begin, end);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(guard);
      error = std::current_exception();
    }
  });
  if (error) std::rethrow_exception(error);
}

// Every by-th row, element or lane from the first on.
template <class T>
Matrix<T> every(const Matrix<T>& x, int64_t first, int64_t by) {
  return {x.data + first * x.row, by * x.row, x.col};
}
template <class T>
Column<T> every(const Column<T>& x, int64_t first, int64_t by) {
  return {x.data + first * x.stride, by * x.stride};
}
template <class T>
Matrix<T> every_lane(const Matrix<T>& x, int64_t first, int64_t by) {
  return {x.data ? x.data + first * x.col : nullptr, x.row, by * x.col};
}

// The rows of one parameter set as a problem of their own, whose parameters they share.
template <class T>
void to_set(Problem<T>& p, int64_t set) {
  p.z = every(p.z, set, p.sets);
  p.u = p.u.of_set(set), p.w = p.w.of_set(set), p.b = p.b.of_set(set);
  p.rows /= p.sets, p.sets = 1;
}

template <class T>
Forward<T> of_set(Forward<T> p, int64_t set) {
  p.z_K = every(p.z_K, set, p.sets), p.log_det = every(p.log_det, set, p.sets), p.a = every_lane(p.a, set, p.sets);
  to_set(p, set);
  return p;
}

template <class T>
Backward<T> of_set(Backward<T> p, int64_t set) {
  p.grad_z = every(p.grad_z, set, p.sets), p.grad_log_det = every(p.grad_log_det, set, p.sets);
  p.a = every_lane(p.a, set, p.sets), p.dz = every(p.dz, set, p.sets);
  p.du = p.du.of_set(set), p.dw = p.dw.of_set(set), p.db = p.db.of_set(set);
  to_set(p, set);
  return p;
}

template <class T>
Prepared<T> prepare(const Problem<T>& p, const Kernels<T>& kernels) {
  const Prepared<T> prepared(arena<T>(kPrepared, Prepared<T>::size(p.steps, p.dim)), p.steps, p.dim);
  kernels.prepare(p, prepared, arena<T>(kTileScratch, kernels.prepare_scratch(p.dim)));
  return prepared;
}

template <class T>
void run_shared(const Forward<T>& p, const Kernels<T>& kernels) {
  const Prepared<T> prepared = prepare(p, kernels);
  const int64_t size = kernels.shared_forward_scratch(p.steps, p.dim);
  const auto tile_pass = kernels.passes(p).shared_forward;
  for_each(ceil_div(p.rows, kTile), 2 * kTile * p.steps * p.dim,
           [&](int64_t tile) { tile_pass(p, prepared, tile, arena<T>(kTileScratch, size)); });
}

template <class T>
void run_shared(const Backward<T>& p, const Kernels<T>& kernels) {
  const Prepared<T> prepared = prepare(p, kernels);
  const int64_t tiles = ceil_div(p.rows, kTile), size = kernels.shared_backward_scratch(p.steps, p.dim);
  const auto tile_pass = kernels.passes(p).shared_backward;
  if (!p.wants_params())
    return for_each(tiles, 2 * kTile * p.steps * p.dim, [&](int64_t tile) {
      tile_pass(p, prepared, Partial<T>(nullptr, 0, 0), tile, arena<T>(kTileScratch, size));
    });
  const int64_t partial = Partial<T>::size(p.steps, p.dim);
  const int64_t affordable = std::max<int64_t>(1, kPartialBytes / std::max<int64_t>(1, partial * sizeof(T)));
  const int64_t slices = std::max<int64_t>(1, std::min({ceil_div(tiles, kTilesOfSlice), kMaxSlices, affordable}));
  T* partials = arena<T>(kPartials, slices * partial);
  for_each(slices, 5 * kTile * ceil_div(tiles, slices) * p.steps * p.dim, [&](int64_t slice) {
    std::fill_n(partials + slice * partial, partial, T(0));
    const Partial<T> sums(partials + slice * partial, p.steps, p.dim);
    for (int64_t tile = slice * tiles / slices; tile < (slice + 1) * tiles / slices; ++tile)
      tile_pass(p, prepared, sums, tile, arena<T>(kTileScratch, size));
  });
  kernels.finish(p, prepared, partials, slices, arena<T>(kTileScratch, 3 * round_up(p.steps, kMaxLanes)));
}

template <class T>
void run_direct(const Forward<T>& p, const Kernels<T>& kernels) {
  const int64_t size = kernels.amortized_forward_scratch(p.steps, p.dim);
  const auto block_pass = kernels.passes(p).amortized_forward;
  for_each(ceil_div(p.rows, kernels.lanes), 4 * kernels.lanes * p.steps * p.dim,
           [&](int64_t block) { block_pass(p, block, arena<T>(kTileScratch, size)); });
}

template <class T>
void run_direct(const Backward<T>& p, const Kernels<T>& kernels) {
  const int64_t size = kernels.amortized_backward_scratch(p.steps, p.dim);
  const auto block_pass = kernels.passes(p).amortized_backward;
  for_each(ceil_div(p.sets, kernels.lanes), 8 * kernels.lanes * p.rows / p.sets * p.steps * p.dim,
           [&](int64_t block) { block_pass(p, block, arena<T>(kTileScratch, size)); });
}

// Bytes of z_K or dz from which on they are written past the caches, and from which on no longer: glibc takes such
// blocks fresh from the system, whose zeroing has just brought their pages into the caches.
constexpr int64_t kStreamBytes = int64_t(1) << 23, kFreshBytes = int64_t(1) << 25;

template <class T>
Problem<T> typed(const Problem<void>& p) {
  const int64_t bytes = p.rows * p.dim * int64_t(sizeof(T));
  return {p.dtype,
          p.spec,
          p.inverse,
          p.amortized,
          p.rows,
          p.dim,
          p.steps,
          p.sets,
          {static_cast<const T*>(p.z.data), p.z.row, p.z.col},
          taken<const T>(p.u, p),
          taken<const T>(p.w, p),
          taken<const T>(p.b, p),
          bytes >= kStreamBytes && bytes < kFreshBytes};
}

template <class T>
Forward<T> typed(const Forward<void>& p) {
  const Problem<void>& problem = p;
  return {typed<T>(problem),
          {static_cast<T*>(p.z_K.data), p.z_K.row, p.z_K.col},
          {static_cast<T*>(p.log_det.data), p.log_det.stride},
          taken<T>(p.a, p)};
}

template <class T>
Backward<T> typed(const Backward<void>& p) {
  const Problem<void>& problem = p;
  return {typed<T>(problem),
          {static_cast<const T*>(p.grad_z.data), p.grad_z.row, p.grad_z.col},
          {static_cast<const T*>(p.grad_log_det.data), p.grad_log_det.stride},
          taken<const T>(p.a, p),
          {static_cast<T*>(p.dz.data), p.dz.row, p.dz.col},
          taken<T>(p.du, p),
          taken<T>(p.dw, p),
          taken<T>(p.db, p),
          nullptr};
}

// Any of the passes: the direct recursion where every row, or few rows, have a set of their own, the compact form
// where many share one, side by side over the sets unless each set alone can keep threads busy.
template <class T, class Pass>
void run_typed(const Pass& call, const Isa& isa) {
  const auto& kernels = isa.planar.of<T>();
  const auto p = typed<T>(call);
  if (!p.amortized) return run_shared(p, kernels);
  const int64_t rows = p.rows / p.sets;
  if (rows < kCompactRows) return run_direct(p, kernels);
  const auto run_set = [&](int64_t set) { run_shared(of_set(p, set), kernels); };
  if (rows < kThreadedRows) return for_each(p.sets, 2 * rows * p.steps * p.dim, run_set);
  for (int64_t set = 0; set < p.sets; ++set) run_set(set);
}

template <class Pass>
void run(const Pass& call, const Isa& isa) {
  return call.dtype == Dtype::float64 ? run_typed<double>(call, isa) : run_typed<float>(call, isa);
}

}  // namespace vvae
