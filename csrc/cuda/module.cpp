// The Python module vvae_fast._C_cuda: importing it registers the CUDA operators; it answers how it was built.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "launch.h"

#define VVAE_STRING(x) #x
#define VVAE_EXPAND(x) VVAE_STRING(x)

namespace {

using vvae::Dtype;
using vvae::cuda::Form;

pybind11::dict build_facts() {
  pybind11::dict facts;
  facts["nvcc"] = VVAE_FAST_NVCC;
  facts["architectures"] = VVAE_FAST_CUDA_ARCHITECTURES;
  facts["torch_headers"] = VVAE_FAST_TORCH_VERSION;
  facts["torch_abi"] = VVAE_EXPAND(TORCH_TARGET_VERSION);
  return facts;
}

void set_form(const std::string& name) {
  if (name == "automatic") return vvae::cuda::set_form(Form::automatic);
  if (name == "direct") return vvae::cuda::set_form(Form::direct);
  if (name == "compact") return vvae::cuda::set_form(Form::compact);
  throw std::invalid_argument("the form must be automatic, direct or compact, got " + name);
}

int64_t most_dim(const std::string& name) {
  if (name == "float32") return vvae::cuda::most_dim(Dtype::float32);
  if (name == "float64") return vvae::cuda::most_dim(Dtype::float64);
  if (name == "bfloat16") return vvae::cuda::most_dim(Dtype::bfloat16);
  if (name == "float16") return vvae::cuda::most_dim(Dtype::float16);
  throw std::invalid_argument("the dtype must be float32, float64, bfloat16 or float16, got " + name);
}

}  // namespace

PYBIND11_MODULE(_C_cuda, m) {
  m.doc() = "The CUDA kernels of vvae_fast.";
  m.def("build_facts", &build_facts, "How this module was built.");
  m.def("set_form", &set_form, "Makes the kernels take a form that the shape would not choose, to compare the two.");
  m.def("most_dim", &most_dim, "The most columns that the kernels take of a dtype.");
}
