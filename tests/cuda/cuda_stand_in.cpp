// Stands in for the CUDA kernels and for CUDA itself, so that the operators of csrc/cuda/operators.cpp run on the
// CPU: simple sums that read every input by its strides and write every output. tests/cuda/test_cuda_operators.py has them
// too.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>

#include "launch.h"

namespace {

int guards = 0;
int the_stream;

}  // namespace

// Bound within this library by -Bsymbolic: tensors on the CPU pass for tensors on a GPU.
extern "C" {
int32_t aoti_torch_device_type_cuda() { return aoti_torch_device_type_cpu(); }
AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = reinterpret_cast<DeviceGuardHandle>(&++guards);
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) {
  --guards;
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = &the_stream;
  return AOTI_TORCH_SUCCESS;
}
}

namespace vvae {
namespace cuda {
namespace {

template <class F>
void with_type(Dtype dtype, const F& f) {
  if (dtype == Dtype::float32) f(float(), float());
  if (dtype == Dtype::float64) f(double(), double());
  if (dtype == Dtype::bfloat16) f(torch::headeronly::BFloat16(), float());
  if (dtype == Dtype::float16) f(torch::headeronly::Half(), float());
}

template <class T>
double at(const Matrix<const void>& m, int64_t r, int64_t d) {
  return double(static_cast<const T*>(m.data)[r * m.row + d * m.col]);
}

template <class T>
double at(const Params<const void>& p, int64_t s, int64_t k, int64_t d) {
  return double(static_cast<const T*>(p.data)[s * p.set + k * p.step + d * p.col]);
}

template <class T>
T& at(const Params<void>& g, int64_t s, int64_t k, int64_t d) {
  return static_cast<T*>(g.data)[s * g.set + k * g.step + d];
}

void check_launch(const Problem& p, void* stream) {
  if (guards != 1) throw std::runtime_error("launched without a device guard");
  if (stream != &the_stream) throw std::runtime_error("launched on another stream than the current one");
  if (p.rows < 1 || p.sets < 1 || p.dim < 1 || p.steps < 1) throw std::runtime_error("launched with nothing to do");
  if (p.dim == 13) throw std::runtime_error("vvae_fast: the kernel unlucky could not be launched: 13 columns");
}

}  // namespace

void set_form(Form) {}
int64_t most_dim(Dtype dtype) { return dtype == Dtype::float64 ? 16 : 32; }
int64_t workspace_bytes(const Problem& p) { return p.rows; }

bool computes(const Problem& p) {
  const bool is_double = p.dtype == Dtype::float64;
  return p.spec.is_standard() || is_double || p.dtype == Dtype::float32;
}

namespace {

// x, with the other sign for the inverse.
double signed_by(const Problem& p, double x) { return p.inverse ? -x : x; }

}  // namespace

void launch_forward(const Forward& f, void* stream) {
  const Problem& p = f;
  const double sign = signed_by(p, 1);
  check_launch(p, stream);
  with_type(p.dtype, [&](auto element, auto number) {
    using T = decltype(element);
    using C = decltype(number);
    for (int64_t r = 0; r < p.rows; ++r) {
      const int64_t s = r % p.sets;
      const FlowSpec& g = p.spec;
      double sum_b = int(g.constraint) + 4 * int(g.activation) + g.slope + g.log_det_eps;
      for (int k = 0; k < p.steps; ++k) {
        sum_b += (k + 1) * at<T>(p.b, s, k, 0);
        if (f.a.data) static_cast<C*>(f.a.data)[k * p.rows + r] = C(at<T>(p.b, s, k, 0) + at<T>(p.z, r, 0));
      }
      static_cast<C*>(f.log_det.data)[r] = C(sign * sum_b);
      for (int d = 0; d < p.dim; ++d) {
        double sum = at<T>(p.z, r, d);
        for (int k = 0; k < p.steps; ++k) sum += sign * (k + 1) * (at<T>(p.u, s, k, d) - 2 * at<T>(p.w, s, k, d));
        static_cast<T*>(f.z_K.data)[r * p.dim + d] = T(sum);
      }
    }
  });
}

void launch_backward(const Backward& f, void* stream) {
  const Problem& p = f;
  check_launch(p, stream);
  if (reinterpret_cast<uintptr_t>(f.workspace) % 16) throw std::runtime_error("the workspace is not aligned");
  std::memset(f.workspace, 0xff, size_t(workspace_bytes(p)));
  with_type(p.dtype, [&](auto element, auto number) {
    using T = decltype(element);
    using C = decltype(number);
    const C* grad_log_det = static_cast<const C*>(f.grad_log_det.data);
    const auto lambda = [&](int64_t r) { return signed_by(p, grad_log_det[r * f.grad_log_det.stride]); };
    for (int64_t s = 0; s < p.sets; ++s)
      for (int k = 0; k < p.steps; ++k) {
        double sum_a = 0;
        for (int64_t r = s; r < p.rows; r += p.sets) sum_a += double(static_cast<const C*>(f.a.data)[k * p.rows + r]);
        at<T>(f.db, s, k, 0) = T(at<T>(p.b, s, k, 0) + sum_a + p.spec.slope + p.spec.log_det_eps);
        for (int d = 0; d < p.dim; ++d) {
          double sum_grad = 0;
          for (int64_t r = s; r < p.rows; r += p.sets) sum_grad += at<T>(f.grad_z, r, d) - lambda(r);
          at<T>(f.du, s, k, d) = T(at<T>(p.u, s, k, d) + sum_grad + int(p.spec.constraint));
          at<T>(f.dw, s, k, d) = T(at<T>(p.w, s, k, d) + int(p.spec.activation));
        }
      }
    for (int64_t r = 0; r < p.rows; ++r)
      for (int d = 0; d < p.dim; ++d)
        static_cast<T*>(f.dz.data)[r * p.dim + d] = T(at<T>(f.grad_z, r, d) + lambda(r) + at<T>(p.z, r, d));
  });
}

}  // namespace cuda
}  // namespace vvae
