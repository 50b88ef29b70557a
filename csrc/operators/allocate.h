// Outputs of the operators.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <initializer_list>

namespace vvae {

// An uninitialized contiguous tensor of up to four dimensions. The C interface itself: the dispatcher would cost a
// microsecond.
inline torch::stable::Tensor new_contiguous(std::initializer_list<int64_t> sizes, int32_t dtype, int32_t device_type,
                                            int32_t device_index) {
  int64_t strides[4] = {}, stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= std::max<int64_t>(1, sizes.begin()[i])) strides[i] = stride;
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(sizes.size(), sizes.begin(), strides, dtype, device_type, device_index, &handle));
  return torch::stable::Tensor(handle);
}

}  // namespace vvae
