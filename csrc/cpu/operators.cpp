// The CPU backend's operators, and the instruction set that its kernels use.
#include "../operators/operators.h"

#include <torch/csrc/stable/library.h>

#include <atomic>
#include <stdexcept>

#include "isa.h"
#include "schedule.h"

namespace vvae {
namespace {

constexpr const Isa* kIsas[] = {&isa_avx512, &isa_avx2, &isa_baseline};

std::atomic<const Isa*>& chosen_isa() {
  static std::atomic<const Isa*> isa = [] {
    for (const Isa* candidate : kIsas)
      if (candidate->runs_here()) return candidate;
    return &isa_baseline;
  }();
  return isa;
}

struct Cpu {
  static constexpr bool kDzAlone = true;

  static auto check_kind(const Tensor& z) {
    dtype(z.scalar_type());
    return [](const Tensor& t, const char* name, ScalarType type) {
      STD_TORCH_CHECK(t.is_cpu(), "vvae_fast: ", name, " must be on the CPU");
      STD_TORCH_CHECK(t.scalar_type() == type, "vvae_fast: ", name, " must have z's dtype, float32 or float64");
    };
  }
  static Dtype dtype(ScalarType type) {
    if (type == ScalarType::Double) return Dtype::float64;
    STD_TORCH_CHECK(type == ScalarType::Float, "vvae_fast: z must be float32 or float64");
    return Dtype::float32;
  }
  static void check(const Problem<void>&) {}
  static Tensor new_empty(const Tensor&, std::initializer_list<int64_t> sizes, int32_t dtype) {
    return new_contiguous(sizes, dtype, aoti_torch_device_type_cpu(), 0);
  }
  // A set's columns side by side.
  static Tensor readable(const Tensor& t, bool amortized) {
    const int64_t last = t.dim() - 1;
    return !amortized || t.stride(last) == 1 || t.size(last) == 1 ? t : torch::stable::contiguous(t);
  }
  template <class Pass>
  static void run(const Pass& pass, const Tensor&) {
    vvae::run(pass, *chosen_isa().load());
  }
};

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

STABLE_TORCH_LIBRARY_IMPL(vvae_fast, CPU, m) { VVAE_REGISTER(m, "", vvae::Cpu); }
