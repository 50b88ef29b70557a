// The CPU backend's operators, and the instruction set that its kernels use.
#include "../operators/operators.h"

#include <torch/csrc/stable/library.h>

#include <atomic>
#include <stdexcept>

#include "isa.h"
#include "headed/operators.h"
#include "schedule.h"
#include "sylvester/operators.h"

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

  static auto check_kind(const Argument& z) {
    dtype(z);
    return [](const Argument& t, int32_t dtype) {
      STD_TORCH_CHECK(t.tensor().is_cpu(), "vvae_fast: ", t.name, " must be on the CPU");
      STD_TORCH_CHECK(t.dtype == dtype, "vvae_fast: ", t.name, " must have z's dtype, float32 or float64");
    };
  }
  static Dtype dtype(const Argument& z) {
    if (z.dtype == kFloat64) return Dtype::float64;
    STD_TORCH_CHECK(z.dtype == kFloat32, "vvae_fast: z must be float32 or float64");
    return Dtype::float32;
  }
  static void check(const Problem<void>&) {}
  static Tensor new_empty(const Argument&, std::initializer_list<int64_t> sizes, int32_t dtype) {
    return new_contiguous(sizes, dtype, aoti_torch_device_type_cpu(), 0);
  }
  // A set's columns side by side.
  static void make_readable(Argument& t) {
    const int64_t last = t.rank - 1;
    if (t.strides[last] != 1 && t.sizes[last] != 1) t.make_contiguous();
  }
  template <class Pass>
  static void run(const Pass& pass, const Argument&) {
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

STABLE_TORCH_LIBRARY_IMPL(vvae_fast, CPU, m) {
  VVAE_REGISTER(m, "", vvae::Cpu);
  VVAE_REGISTER_HEADED(m, vvae::Cpu);
  VVAE_REGISTER_SYLVESTER(m, vvae::Cpu);
}
