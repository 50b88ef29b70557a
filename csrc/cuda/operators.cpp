// The CUDA backend's operators: launches go to the current stream of z's device.
#include "../operators/operators.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/core/ScalarType.h>

#include "launch.h"

namespace vvae {
namespace cuda {
namespace {

constexpr int64_t kMostNumbers = int64_t(1) << 30;  // K x D, which the kernels count in int

const char* name_of(Dtype dtype) {
  constexpr const char* names[] = {"Float", "Double", "BFloat16", "Half"};
  return names[int(dtype)];
}

const char* name_of(const Argument& t) { return torch::headeronly::toString(t.tensor().scalar_type()); }

// Asks of each tensor of a call to be on z's device.
struct CheckKind {
  const Argument& z;
  int32_t device = z.tensor().get_device_index();
  void operator()(const Argument& t, int32_t dtype) const {
    const int32_t index = t.tensor().get_device_index();
    const bool is_cuda = t.tensor().is_cuda();
    STD_TORCH_CHECK(is_cuda && index == device, "vvae_fast: ", t.name,
                    " must be on a CUDA device, the same as z; a tensor with device index ", index,
                    is_cuda ? " of CUDA" : " of another kind", " was given");
    STD_TORCH_CHECK(t.dtype == dtype, "vvae_fast: ", t.name, " must be ",
                    dtype == z.dtype ? name_of(z) : name_of(Dtype::float32), ", got ", name_of(t));
  }
};

struct Cuda {
  static constexpr bool kDzAlone = false;  // what that costs was not measured on a GPU

  static CheckKind check_kind(const Argument& z) { return CheckKind{z}; }
  static Dtype dtype(const Argument& z) {
    if (z.dtype == kFloat64) return Dtype::float64;
    if (z.dtype == aoti_torch_dtype_bfloat16()) return Dtype::bfloat16;
    if (z.dtype == aoti_torch_dtype_float16()) return Dtype::float16;
    STD_TORCH_CHECK(z.dtype == kFloat32, "vvae_fast: z must be float32, float64, bfloat16 or float16, got ",
                    name_of(z));
    return Dtype::float32;
  }
  static void check(const Problem& p) {
    const bool is_half = p.dtype == Dtype::bfloat16 || p.dtype == Dtype::float16;
    const int64_t most = most_dim(p.dtype);
    STD_TORCH_CHECK(!(p.inverse && is_half), "vvae_fast: z must be float32 or float64 for the inverse, got ",
                    name_of(p.dtype), ": convert it to float32");
    STD_TORCH_CHECK(p.dim >= 1 && p.dim <= most, "vvae_fast: z must have 1 to ", most, " columns on CUDA, got ", p.dim);
    STD_TORCH_CHECK(p.steps * p.dim < kMostNumbers,
                    "vvae_fast: u must have fewer than 2^30 elements K x D on CUDA, got ", p.steps, " x ", p.dim);
    STD_TORCH_CHECK(computes(p), "vvae_fast: z must be float32 or float64 on CUDA for other activations than tanh, for ",
                    "log_softplus and for log_det_eps, got ", name_of(p.dtype), ": convert it to float32");
  }
  static Tensor new_empty(const Argument& z, std::initializer_list<int64_t> sizes, int32_t dtype) {
    return new_contiguous(sizes, dtype, aoti_torch_device_type_cuda(), z.tensor().get_device_index());
  }
  static void make_readable(Argument&) {}

  static void run(const Forward& f, const Argument& z) {
    on_stream_of(z, [&](void* stream) { launch_forward(f, stream); });
  }
  static void run(Backward f, const Argument& z) {
    on_stream_of(z, [&](void* stream) {
      // Freed before the kernels are done, but the allocator gives it to later work of this stream only.
      const Tensor workspace = new_empty(z, {workspace_bytes(f)}, aoti_torch_dtype_uint8());
      f.workspace = workspace.mutable_data_ptr();
      launch_backward(f, stream);
    });
  }

 private:
  template <class F>
  static void on_stream_of(const Argument& z, const F& f) {
    const int32_t device = z.tensor().get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    void* stream;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
    f(stream);
  }
};

}  // namespace
}  // namespace cuda
}  // namespace vvae

STABLE_TORCH_LIBRARY_IMPL(vvae_fast, CUDA, m) { VVAE_REGISTER(m, "cuda_", vvae::cuda::Cuda); }
