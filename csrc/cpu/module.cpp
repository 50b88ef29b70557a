// The Python module vvae_fast._C: importing it registers the operators; it answers how it was built.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "isa.h"

#define VVAE_STRING(x) #x
#define VVAE_EXPAND(x) VVAE_STRING(x)

namespace {

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#else
  return "gcc " __VERSION__;
#endif
}

pybind11::dict build_facts() {
  pybind11::dict facts;
  facts["version"] = VVAE_FAST_VERSION;
  facts["compiler"] = compiler();
  facts["torch_headers"] = VVAE_FAST_TORCH_VERSION;
  facts["torch_abi"] = VVAE_EXPAND(TORCH_TARGET_VERSION);
  facts["cuda_build"] = VVAE_FAST_CUDA_BUILD;
  return facts;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled kernels of vvae_fast.";
  m.def("build_facts", &build_facts, "How this module was built.");
  m.def("isa_levels", &vvae::isa_levels, "The instruction sets that the CPU kernels can use here, widest first.");
  m.def("isa", &vvae::current_isa, "The instruction set that the CPU kernels use.");
  m.def("set_isa", &vvae::set_isa, "Makes the CPU kernels use another instruction set.");
}
