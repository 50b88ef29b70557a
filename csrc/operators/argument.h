// A tensor among an operator's arguments. Its facts are asked for once: each question to libtorch is a call of its C
// interface, and the checks want some facts several times.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

namespace vvae {

using torch::stable::Tensor;

// libtorch's numbers of the dtypes.
inline const int32_t kFloat32 = aoti_torch_dtype_float32(), kFloat64 = aoti_torch_dtype_float64();

inline int32_t dtype_of(const Tensor& t) {
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
  return dtype;
}

// Lives no longer than the tensor. Hidden like Tensor, which it contains.
class __attribute__((visibility("hidden"))) Argument {
 public:
  const char* name;
  const int64_t *sizes, *strides;
  int64_t rank;
  int32_t dtype;

  Argument(const Tensor& tensor, const char* name_) : name(name_), given(tensor) { ask(); }
  Argument(const Argument&) = delete;

  const Tensor& tensor() const { return copy ? *copy : given; }
  // The dtype of computation.
  int32_t computed() const { return dtype == kFloat64 ? kFloat64 : kFloat32; }
  void make_contiguous() {
    copy.emplace(torch::stable::contiguous(given));
    ask();
  }

 private:
  const Tensor& given;
  std::optional<Tensor> copy;

  void ask() {
    int64_t *of_sizes, *of_strides;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(tensor().get(), &of_sizes));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(tensor().get(), &of_strides));
    sizes = of_sizes;
    strides = of_strides;
    rank = tensor().dim();
    dtype = dtype_of(tensor());
  }
};

}  // namespace vvae
