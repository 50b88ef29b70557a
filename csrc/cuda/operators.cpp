// The CUDA backend's operators: checks, allocates, launches on the current stream of z's device, registers.
#include "planar_cuda.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "../allocate.h"
#include "../checks.h"

namespace vvae {
namespace cuda {
namespace {

constexpr int64_t kMostNumbers = int64_t(1) << 30;  // K x D, which the kernels count in int

Dtype dtype(ScalarType type) {
  if (type == ScalarType::Double) return Dtype::float64;
  if (type == ScalarType::BFloat16) return Dtype::bfloat16;
  if (type == ScalarType::Half) return Dtype::float16;
  STD_TORCH_CHECK(type == ScalarType::Float, "vvae_fast: z must be float32, float64, bfloat16 or float16, got ",
                  torch::headeronly::toString(type));
  return Dtype::float32;
}

ScalarType computed_type(const Tensor& z) {
  return z.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// What check_problem and check_saved ask of one tensor of a call.
struct CheckKind {
  int32_t device;
  explicit CheckKind(const Tensor& z) : device(z.get_device_index()) {}
  void operator()(const Tensor& t, const char* name, ScalarType type) const {
    STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == device, "vvae_fast: ", name,
                    " must be on a CUDA device, the same as z; a tensor with device index ", t.get_device_index(),
                    t.is_cuda() ? " of CUDA" : " of another kind", " was given");
    STD_TORCH_CHECK(t.scalar_type() == type, "vvae_fast: ", name, " must be ", torch::headeronly::toString(type),
                    ", got ", torch::headeronly::toString(t.scalar_type()));
  }
};

Tensor new_on(const Tensor& z, std::initializer_list<int64_t> sizes, int32_t dtype) {
  return new_contiguous(sizes, dtype, aoti_torch_device_type_cuda(), z.get_device_index());
}

Tensor new_empty(const Tensor& z, std::initializer_list<int64_t> sizes) { return new_on(z, sizes, dtype_of(z)); }

// In the dtype of computation.
Tensor new_computed(const Tensor& z, std::initializer_list<int64_t> sizes) {
  const bool is_double = computed_type(z) == ScalarType::Double;
  return new_on(z, sizes, is_double ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32());
}

void* current_stream(int32_t device) {
  void* stream;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return stream;
}

Matrix matrix(const Tensor& t) { return {t.const_data_ptr(), t.stride(0), t.stride(1)}; }

// [K, D] and [P, K, D] alike, [K] and [P, K] alike.
Params params(const Tensor& t, bool amortized, bool is_b) {
  const int64_t step = amortized ? 1 : 0;
  return {t.const_data_ptr(), amortized ? t.stride(0) : 0, t.stride(step), is_b ? 0 : t.stride(step + 1)};
}

Problem problem(const Tensor& z, bool amortized, bool inverse, int64_t sets, int64_t steps, const Formulas& formulas,
                const Params& u, const Params& w, const Params& b) {
  const Dtype type = dtype(z.scalar_type());
  const int64_t dim = z.size(1), most = most_dim(type);
  STD_TORCH_CHECK(dim >= 1 && dim <= most, "vvae_fast: z must have 1 to ", most, " columns on CUDA, got ", dim);
  STD_TORCH_CHECK(steps * dim < kMostNumbers, "vvae_fast: u must have fewer than 2^30 elements K x D on CUDA, got ",
                  steps, " x ", dim);
  const Problem p = {type, formulas, amortized, inverse, z.size(0), sets, int(dim), int(steps), matrix(z), u, w, b};
  STD_TORCH_CHECK(computes(p), "vvae_fast: z must be float32 or float64 on CUDA for other activations than tanh, for ",
                  "log_softplus and for log_det_eps, got ", torch::headeronly::toString(z.scalar_type()),
                  ": convert it to float32");
  return p;
}

Problem problem(const Tensor& z, const Tensor& u, const Tensor& w, const Tensor& b, const Formulas& formulas,
                bool inverse = false) {
  const bool amortized = u.dim() == 3;
  return problem(z, amortized, inverse, amortized ? u.size(0) : 1, u.size(u.dim() - 2), formulas,
                 params(u, amortized, false), params(w, amortized, false), params(b, amortized, true));
}

bool launches(const Problem& p) { return p.rows > 0 && p.steps > 0; }

std::tuple<Tensor, Tensor, Tensor> map(const Problem& p, const Tensor& z, bool save) {
  Tensor z_K = new_empty(z, {p.rows, p.dim}), log_det = new_computed(z, {p.rows});
  Tensor a = save ? new_computed(z, {p.steps, p.rows}) : new_computed(z, {0});
  if (launches(p)) {
    const int32_t device = z.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    launch_forward({p, z_K.mutable_data_ptr(), log_det.mutable_data_ptr(), save ? a.mutable_data_ptr() : nullptr},
                   current_stream(device));
  } else {
    torch::stable::copy_(z_K, z);
    torch::stable::zero_(log_det);
  }
  return {z_K, log_det, a};
}

std::tuple<Tensor, Tensor, Tensor> planar_forward(const Tensor& z, const Tensor& u, const Tensor& w, const Tensor& b,
                                                  int64_t constraint, int64_t activation, double slope,
                                                  double log_det_eps, bool save) {
  const Formulas formulas = formulas_of(constraint, activation, slope, log_det_eps);
  check_problem(z, u, w, b, CheckKind(z));
  return map(problem(z, u, w, b, formulas), z, save);
}

// The kernels of the inverse have numbers that they compute with alone.
void check_inverse(const Tensor& z) {
  STD_TORCH_CHECK(z.scalar_type() == computed_type(z), "vvae_fast: z must be float32 or float64 for the inverse, got ",
                  torch::headeronly::toString(z.scalar_type()), ": convert it to float32");
}

std::tuple<Tensor, Tensor, Tensor> planar_inverse(const Tensor& z, const Tensor& u, const Tensor& w, const Tensor& b,
                                                  int64_t constraint, int64_t activation, double slope, bool save) {
  const Formulas formulas = formulas_of(constraint, activation, slope, 0);
  check_problem(z, u, w, b, CheckKind(z));
  check_inverse(z);
  return map(problem(z, u, w, b, formulas, true), z, save);
}

// Fills dz and `weights`, in which du, dw and db lie.
void backward_into(const Problem& p, const Tensor& grad_z, const Tensor& grad_log_det, const Tensor& z,
                   const Tensor& a, Tensor& dz, const Gradients& du, const Gradients& dw, const Gradients& db,
                   std::initializer_list<Tensor*> weights) {
  if (launches(p)) {
    const int32_t device = z.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    // Freed before the kernels are done, but the allocator gives it to later work of this stream only.
    const Tensor workspace = new_on(z, {workspace_bytes(p)}, aoti_torch_dtype_uint8());
    launch_backward({p, matrix(grad_z), grad_log_det.const_data_ptr(), grad_log_det.stride(0), a.const_data_ptr(),
                     dz.mutable_data_ptr(), du, dw, db, workspace.mutable_data_ptr()},
                    current_stream(device));
  } else {
    torch::stable::copy_(dz, grad_z);
    for (Tensor* t : weights) torch::stable::zero_(*t);
  }
}

// dz, and du, dw and db as tensors of their own. Without `params` the kernels compute them all the same, and they are
// dropped: what that costs was not measured on a GPU.
std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Problem& p, const Tensor& grad_z, const Tensor& grad_log_det,
                                                    const Tensor& z, const Tensor& a, bool params) {
  const int64_t steps = p.steps, dim = p.dim;
  const bool sets = p.amortized;
  Tensor dz = new_empty(z, {p.rows, p.dim});
  Tensor du = sets ? new_empty(z, {p.sets, steps, dim}) : new_empty(z, {steps, dim});
  Tensor dw = sets ? new_empty(z, {p.sets, steps, dim}) : new_empty(z, {steps, dim});
  Tensor db = sets ? new_empty(z, {p.sets, steps}) : new_empty(z, {steps});
  const auto to = [&](const Tensor& t, int64_t step) { return Gradients{t.mutable_data_ptr(), steps * step, step}; };
  backward_into(p, grad_z, grad_log_det, z, a, dz, to(du, dim), to(dw, dim), to(db, 1), {&du, &dw, &db});
  if (!params) return {dz, new_empty(z, {0}), new_empty(z, {0}), new_empty(z, {0})};
  return {dz, du, dw, db};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> planar_backward(const Tensor& grad_z, const Tensor& grad_log_det,
                                                           const Tensor& z, const Tensor& u, const Tensor& w,
                                                           const Tensor& b, const Tensor& a, int64_t constraint,
                                                           int64_t activation, double slope, double log_det_eps,
                                                           bool params) {
  const Formulas formulas = formulas_of(constraint, activation, slope, log_det_eps);
  const CheckKind check_kind(z);
  check_problem(z, u, w, b, check_kind);
  const Problem p = problem(z, u, w, b, formulas);
  check_saved(grad_z, grad_log_det, z, p.steps, a, computed_type(z), check_kind);
  return backward(p, grad_z, grad_log_det, z, a, params);
}

// From the inverse's own z and the roots a, (35) and (40).
std::tuple<Tensor, Tensor, Tensor, Tensor> planar_inverse_backward(const Tensor& grad_z, const Tensor& grad_log_det,
                                                                   const Tensor& z, const Tensor& u, const Tensor& w,
                                                                   const Tensor& b, const Tensor& a, int64_t constraint,
                                                                   int64_t activation, double slope, bool params) {
  const Formulas formulas = formulas_of(constraint, activation, slope, 0);
  const CheckKind check_kind(z);
  check_problem(z, u, w, b, check_kind);
  check_inverse(z);
  const Problem p = problem(z, u, w, b, formulas, true);
  check_saved(grad_z, grad_log_det, z, p.steps, a, computed_type(z), check_kind);
  return backward(p, grad_z, grad_log_det, z, a, params);
}

// The same for amortized parameters that lie behind one another in the rows of packed [P, K (2 D + 1)]: u, w, b.
std::tuple<Tensor, Tensor> planar_backward_packed(const Tensor& grad_z, const Tensor& grad_log_det, const Tensor& z,
                                                  const Tensor& packed, const Tensor& a, int64_t constraint,
                                                  int64_t activation, double slope, double log_det_eps, bool params) {
  const Formulas formulas = formulas_of(constraint, activation, slope, log_det_eps);
  const CheckKind check_kind(z);
  check_packed(z, packed, a);
  check_kind(z, "z", z.scalar_type());
  check_kind(packed, "packed", z.scalar_type());
  const int64_t steps = a.size(0), dim = z.size(1), sets = packed.size(0), width = packed.size(1);
  check_sets(z, sets);
  check_saved(grad_z, grad_log_det, z, steps, a, computed_type(z), check_kind);
  const int64_t set = packed.stride(0), col = packed.stride(1), bytes = int64_t(packed.element_size());
  const char* from = static_cast<const char*>(packed.const_data_ptr());
  const auto part = [&](int64_t start, int64_t step, int64_t c) {
    return Params{from + start * col * bytes, set, step * col, c};
  };
  const Problem p = problem(z, true, false, sets, steps, formulas, part(0, dim, col), part(steps * dim, dim, col),
                            part(2 * steps * dim, 1, 0));
  Tensor dz = new_empty(z, {p.rows, p.dim}), dpacked = new_empty(z, {sets, width});
  char* to = static_cast<char*>(dpacked.mutable_data_ptr());
  backward_into(p, grad_z, grad_log_det, z, a, dz, {to, width, dim}, {to + steps * dim * bytes, width, dim},
           {to + 2 * steps * dim * bytes, width, 1}, {&dpacked});
  if (!params) dpacked = new_empty(z, {0});
  return {dz, dpacked};
}

}  // namespace
}  // namespace cuda
}  // namespace vvae

STABLE_TORCH_LIBRARY_IMPL(vvae_fast, CUDA, m) {
  m.impl("cuda_planar_forward", TORCH_BOX(&vvae::cuda::planar_forward));
  m.impl("cuda_planar_inverse", TORCH_BOX(&vvae::cuda::planar_inverse));
  m.impl("cuda_planar_backward", TORCH_BOX(&vvae::cuda::planar_backward));
  m.impl("cuda_planar_inverse_backward", TORCH_BOX(&vvae::cuda::planar_inverse_backward));
  m.impl("cuda_planar_backward_packed", TORCH_BOX(&vvae::cuda::planar_backward_packed));
}
