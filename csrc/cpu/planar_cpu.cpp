// The CPU backend: checks, allocates, cuts the work into tiles or blocks, runs them on PyTorch's threads, registers.
#include "planar_cpu.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>
#include <tuple>

#include "kernels.h"

namespace vvae {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const Isa* kIsas[] = {&isa_avx512, &isa_avx2, &isa_baseline};

std::atomic<const Isa*>& chosen_isa() {
  static std::atomic<const Isa*> isa = [] {
    for (const Isa* candidate : kIsas)
      if (candidate->runs_here()) return candidate;
    return &isa_baseline;
  }();
  return isa;
}

constexpr int64_t kMostParameters = int64_t(1) << 40;  // of one set: beyond, sizes in bytes could overflow

// Multiply-adds that are worth waking a thread for, and the most slices of tiles whose sums are kept apart.
constexpr int64_t kGrain = int64_t(1) << 18, kMaxSlices = 32, kPartialBytes = int64_t(1) << 24;

struct Free {
  void operator()(void* p) const { std::free(p); }
};

// Cache-aligned memory that each thread keeps, at its largest so far, from call to call: a pass allocates only its
// outputs.
enum Slot { kPrepared, kPartials, kTileScratch, kSlots };

template <class T>
T* scratch(Slot slot, int64_t count) {
  struct Arena {
    std::unique_ptr<void, Free> data;
    size_t size = 0;
  };
  thread_local Arena arenas[kSlots];
  Arena& arena = arenas[slot];
  const size_t bytes = round_up(count * int64_t(sizeof(T)), 64);
  if (arena.size < bytes) {
    arena.data.reset();
    arena.data.reset(std::aligned_alloc(64, bytes));
    arena.size = arena.data ? bytes : 0;
    if (!arena.data) throw std::bad_alloc();
  }
  return static_cast<T*>(arena.data.get());
}

// Calls run(i) for every i < items, each worth `work` multiply-adds, on as many threads as that is worth.
template <class Run>
void for_each(int64_t items, int64_t work, const Run& run) {
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, work));
  const auto range = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) run(i);
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

void check_rank(const Tensor& t, const char* name, int64_t rank) {
  STD_TORCH_CHECK(t.dim() == rank, "vvae_fast: ", name, " must have rank ", rank, ", got ", t.dim());
}

void check_size(const Tensor& t, const char* name, int64_t dim, int64_t size) {
  STD_TORCH_CHECK(t.size(dim) == size, "vvae_fast: ", name, " must have size ", size, " in dimension ", dim, ", got ",
                  t.size(dim));
}

void check_kind(const Tensor& t, const char* name, ScalarType type) {
  STD_TORCH_CHECK(t.is_cpu(), "vvae_fast: ", name, " must be on the CPU");
  STD_TORCH_CHECK(t.scalar_type() == type, "vvae_fast: ", name, " must have z's dtype, float32 or float64");
}

bool is_amortized(const Tensor& u) { return u.dim() == 3; }

void check_problem(const Tensor& z, const Tensor& u, const Tensor& w, const Tensor& b) {
  const ScalarType type = z.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, "vvae_fast: z must be float32 or float64");
  check_rank(z, "z", 2);
  STD_TORCH_CHECK(u.dim() == 2 || u.dim() == 3, "vvae_fast: u must be [K, D] or [P, K, D], got rank ", u.dim());
  check_rank(w, "w", u.dim());
  check_rank(b, "b", u.dim() - 1);
  check_size(u, "u", u.dim() - 1, z.size(1));
  for (int64_t i = 0; i < u.dim(); ++i) check_size(w, "w", i, u.size(i));
  for (int64_t i = 0; i < b.dim(); ++i) check_size(b, "b", i, u.size(i));
  check_kind(z, "z", type);
  check_kind(u, "u", type);
  check_kind(w, "w", type);
  check_kind(b, "b", type);
  const int64_t steps = u.size(u.dim() - 2), dim = z.size(1);
  STD_TORCH_CHECK(dim <= kMostParameters && steps <= kMostParameters / std::max<int64_t>(1, dim),
                  "vvae_fast: u must have at most 2^40 elements K x D, got ", steps, " x ", dim);
  const int64_t sets = is_amortized(u) ? u.size(0) : 1;
  STD_TORCH_CHECK(sets == 0 ? z.size(0) == 0 : z.size(0) % sets == 0, "vvae_fast: z must have a multiple of ", sets,
                  " rows, one for each parameter set, got ", z.size(0));
}

template <class T>
Matrix<const T> matrix(const Tensor& t) {
  return {t.const_data_ptr<T>(), t.stride(0), t.stride(1)};
}

// [K, D] and [P, K, D] alike, [K] and [P, K] alike: strides of the sets, the steps and, but for b, the dimensions.
template <class T>
Params<T> params(const Tensor& t, bool amortized, bool is_b) {
  const int64_t step = amortized ? 1 : 0;
  return {t.const_data_ptr<T>(), amortized ? t.stride(0) : 0, t.stride(step), is_b ? 0 : t.stride(step + 1)};
}

template <class T>
Problem<T> problem(const Tensor& z, const Tensor& u, const Tensor& w, const Tensor& b, bool constrained) {
  const bool amortized = is_amortized(u);
  return {z.size(0),          z.size(1),   u.size(u.dim() - 2),           amortized ? u.size(0) : 1,
          constrained,        matrix<T>(z), params<T>(u, amortized, false), params<T>(w, amortized, false),
          params<T>(b, amortized, true)};
}

template <class T>
Prepared<T> prepare(const Problem<T>& p, const Kernels<T>& kernels) {
  const Prepared<T> prepared(scratch<T>(kPrepared, Prepared<T>::size(p.steps, p.dim)), p.steps, p.dim);
  kernels.prepare(p, prepared);
  return prepared;
}

template <class T>
void run_forward(const Forward<T>& p, bool amortized) {
  const Kernels<T>& kernels = chosen_isa().load()->of(T());
  if (amortized) {
    const int64_t size = kernels.amortized_scratch(p.steps, p.dim);
    for_each(ceil_div(p.rows, kernels.lanes), 4 * kernels.lanes * p.steps * p.dim,
             [&](int64_t block) { kernels.amortized_forward(p, block, scratch<T>(kTileScratch, size)); });
    return;
  }
  const Prepared<T> prepared = prepare(p, kernels);
  const int64_t size = kernels.shared_forward_scratch(p.steps, p.dim);
  for_each(ceil_div(p.rows, kTile), 2 * kTile * p.steps * p.dim,
           [&](int64_t tile) { kernels.shared_forward(p, prepared, tile, scratch<T>(kTileScratch, size)); });
}

template <class T>
void zero(T* p, int64_t count) {
  for (int64_t i = 0; i < count; ++i) p[i] = 0;
}

template <class T>
void run_amortized_backward(const Backward<T>& p, const Kernels<T>& kernels) {
  if (p.rows == 0) {  // parameter sets that no row uses
    zero(p.du, p.sets * p.steps * p.dim);
    zero(p.dw, p.sets * p.steps * p.dim);
    return zero(p.db, p.sets * p.steps);
  }
  const int64_t size = kernels.amortized_scratch(p.steps, p.dim);
  for_each(ceil_div(p.sets, kernels.lanes), 8 * kernels.lanes * p.rows / p.sets * p.steps * p.dim,
           [&](int64_t block) { kernels.amortized_backward(p, block, scratch<T>(kTileScratch, size)); });
}

template <class T>
void run_shared_backward(const Backward<T>& p, const Kernels<T>& kernels) {
  const Prepared<T> prepared = prepare(p, kernels);
  const int64_t tiles = ceil_div(p.rows, kTile), partial = Partial<T>::size(p.steps, p.dim);
  const int64_t affordable = std::max<int64_t>(1, kPartialBytes / std::max<int64_t>(1, partial * sizeof(T)));
  const int64_t slices = std::max<int64_t>(1, std::min({tiles, kMaxSlices, affordable}));
  T* partials = scratch<T>(kPartials, slices * partial);
  const int64_t size = kernels.shared_backward_scratch(p.steps, p.dim);
  for_each(slices, 5 * kTile * ceil_div(tiles, slices) * p.steps * p.dim, [&](int64_t slice) {
    zero(partials + slice * partial, partial);
    const Partial<T> sums(partials + slice * partial, p.steps, p.dim);
    for (int64_t tile = slice * tiles / slices; tile < (slice + 1) * tiles / slices; ++tile)
      kernels.shared_backward(p, prepared, sums, tile, scratch<T>(kTileScratch, size));
  });
  kernels.finish(p, prepared, partials, slices, scratch<T>(kTileScratch, 5 * round_up(p.steps, kMaxLanes)));
}

template <class T>
void forward_as(const Tensor& z, const Tensor& u, const Tensor& w, const Tensor& b, bool constrained, bool save,
                Tensor& z_K, Tensor& log_det, Tensor& a) {
  Forward<T> p{problem<T>(z, u, w, b, constrained), z_K.mutable_data_ptr<T>(), log_det.mutable_data_ptr<T>(),
               save ? a.mutable_data_ptr<T>() : nullptr};
  run_forward(p, is_amortized(u));
}

std::tuple<Tensor, Tensor, Tensor> planar_forward(const Tensor& z, const Tensor& u, const Tensor& w, const Tensor& b,
                                                  bool constrained, bool save) {
  check_problem(z, u, w, b);
  const int64_t rows = z.size(0), steps = u.size(u.dim() - 2);
  Tensor z_K = torch::stable::new_empty(z, {rows, z.size(1)}), log_det = torch::stable::new_empty(z, {rows});
  Tensor a = save ? torch::stable::new_empty(z, {steps, rows}) : torch::stable::new_empty(z, {0});
  if (z.scalar_type() == ScalarType::Float)
    forward_as<float>(z, u, w, b, constrained, save, z_K, log_det, a);
  else
    forward_as<double>(z, u, w, b, constrained, save, z_K, log_det, a);
  return {z_K, log_det, a};
}

template <class T>
void backward_as(const Tensor& grad_z, const Tensor& grad_log_det, const Tensor& z, const Tensor& u, const Tensor& w,
                 const Tensor& b, const Tensor& a, bool constrained, Tensor& dz, Tensor& du, Tensor& dw, Tensor& db) {
  const Backward<T> p{problem<T>(z, u, w, b, constrained),
                      matrix<T>(grad_z),
                      grad_log_det.const_data_ptr<T>(),
                      grad_log_det.stride(0),
                      a.const_data_ptr<T>(),
                      dz.mutable_data_ptr<T>(),
                      du.mutable_data_ptr<T>(),
                      dw.mutable_data_ptr<T>(),
                      db.mutable_data_ptr<T>()};
  const Kernels<T>& kernels = chosen_isa().load()->of(T());
  if (is_amortized(u))
    run_amortized_backward(p, kernels);
  else
    run_shared_backward(p, kernels);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> planar_backward(const Tensor& grad_z, const Tensor& grad_log_det,
                                                           const Tensor& z, const Tensor& u, const Tensor& w,
                                                           const Tensor& b, const Tensor& a, bool constrained) {
  check_problem(z, u, w, b);
  const int64_t rows = z.size(0), steps = u.size(u.dim() - 2);
  check_rank(grad_z, "grad_z", 2);
  check_rank(grad_log_det, "grad_log_det", 1);
  check_rank(a, "a", 2);
  check_size(grad_z, "grad_z", 0, rows);
  check_size(grad_z, "grad_z", 1, z.size(1));
  check_size(grad_log_det, "grad_log_det", 0, rows);
  check_size(a, "a", 0, steps);
  check_size(a, "a", 1, rows);
  STD_TORCH_CHECK(a.is_contiguous(), "vvae_fast: a must be contiguous, as planar_forward returned it");
  check_kind(grad_z, "grad_z", z.scalar_type());
  check_kind(grad_log_det, "grad_log_det", z.scalar_type());
  check_kind(a, "a", z.scalar_type());
  const bool amortized = is_amortized(u);
  const auto like_params = [&](bool matrix) {
    if (!amortized) return matrix ? torch::stable::new_empty(z, {steps, z.size(1)}) : torch::stable::new_empty(z, {steps});
    return matrix ? torch::stable::new_empty(z, {u.size(0), steps, z.size(1)})
                  : torch::stable::new_empty(z, {u.size(0), steps});
  };
  Tensor dz = torch::stable::new_empty(z, {rows, z.size(1)});
  Tensor du = like_params(true), dw = like_params(true), db = like_params(false);
  if (z.scalar_type() == ScalarType::Float)
    backward_as<float>(grad_z, grad_log_det, z, u, w, b, a, constrained, dz, du, dw, db);
  else
    backward_as<double>(grad_z, grad_log_det, z, u, w, b, a, constrained, dz, du, dw, db);
  return {dz, du, dw, db};
}

}  // namespace

std::vector<std::string> isa_levels() {
  std::vector<std::string> levels;
  for (const Isa* isa : kIsas)
    if (isa->runs_here()) levels.emplace_back(isa->name);
  return levels;
}

std::string current_isa() { return chosen_isa().load()->name; }

void set_isa(const std::string& name) {
  for (const Isa* isa : kIsas)
    if (isa->name == name && isa->runs_here()) return chosen_isa().store(isa);
  throw std::invalid_argument("no such instruction set on this machine: " + name);
}

}  // namespace vvae

STABLE_TORCH_LIBRARY_IMPL(vvae_fast, CPU, m) {
  m.impl("planar_forward", TORCH_BOX(&vvae::planar_forward));
  m.impl("planar_backward", TORCH_BOX(&vvae::planar_backward));
}
