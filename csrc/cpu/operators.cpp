// The CPU backend's operators: checks, allocates, runs, registers.
#include "planar_cpu.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <stdexcept>
#include <tuple>

#include "../allocate.h"
#include "../checks.h"
#include "passes.h"

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

// Bytes of z_K or dz from which on they are written past the caches, and from which on no longer: glibc takes such
// blocks fresh from the system, whose zeroing has just brought their pages into the caches.
constexpr int64_t kStreamBytes = int64_t(1) << 23, kFreshBytes = int64_t(1) << 25;

void check_kind(const Tensor& t, const char* name, ScalarType type) {
  STD_TORCH_CHECK(t.is_cpu(), "vvae_fast: ", name, " must be on the CPU");
  STD_TORCH_CHECK(t.scalar_type() == type, "vvae_fast: ", name, " must have z's dtype, float32 or float64");
}

void check_arguments(const Tensor& z, const Tensor& u, const Tensor& w, const Tensor& b) {
  const ScalarType type = z.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, "vvae_fast: z must be float32 or float64");
  check_problem(z, u, w, b, check_kind);
}

// The parameters of an operator call: u, w [K, D] and b [K], or u, w [P, K, D] and b [P, K].
struct Parameters {
  Tensor u, w, b;
  bool amortized;
  int64_t sets, steps;
  Parameters(const Tensor& u, const Tensor& w, const Tensor& b)
      : u(rows_contiguous(u)), w(rows_contiguous(w)), b(b), amortized(u.dim() == 3), sets(amortized ? u.size(0) : 1),
        steps(u.size(u.dim() - 2)) {}

 private:
  static Tensor rows_contiguous(const Tensor& t) {
    return t.dim() == 2 || t.stride(2) == 1 || t.size(2) == 1 ? t : torch::stable::contiguous(t);
  }
};

Tensor new_empty(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return new_contiguous(sizes, dtype_of(like), aoti_torch_device_type_cpu(), 0);
}

template <class T>
Matrix<const T> matrix(const Tensor& t) {
  return {t.const_data_ptr<T>(), t.stride(0), t.stride(1)};
}

template <class T>
Matrix<T> rows_of(Tensor& t) {
  return {t.mutable_data_ptr<T>(), t.size(1), 1};
}

// [K, D] and [P, K, D] alike, [K] and [P, K] alike: strides of the sets, the steps and, but for b, the dimensions.
template <class T>
Params<const T> params(const Tensor& t, bool amortized, bool is_b) {
  const int64_t step = amortized ? 1 : 0;
  return {t.const_data_ptr<T>(), amortized ? t.stride(0) : 0, t.stride(step), is_b ? 0 : t.stride(step + 1)};
}

// Calls f with a float or a double.
template <class F>
void with_type(const Tensor& z, const F& f) {
  if (z.scalar_type() == ScalarType::Float)
    f(float());
  else
    f(double());
}

bool leaves_caches(int64_t bytes) { return bytes >= kStreamBytes && bytes < kFreshBytes; }

// x [steps][...] in the order in which the steps are taken.
template <class X>
X ordered(const X& x, int64_t steps, bool inverse) {
  return inverse ? reversed(x, steps) : x;
}

template <class T>
Problem<T> problem(const Tensor& z, const Parameters& q, const Formulas& formulas, bool inverse) {
  const auto of_steps = [&](const Tensor& t, bool is_b) {
    return ordered(params<T>(t, q.amortized, is_b), q.steps, inverse);
  };
  return {z.size(0),           z.size(1),           q.steps,
          q.sets,              formulas,            inverse,
          matrix<T>(z),        of_steps(q.u, false), of_steps(q.w, false),
          of_steps(q.b, true), leaves_caches(z.size(0) * z.size(1) * int64_t(sizeof(T)))};
}

std::tuple<Tensor, Tensor, Tensor> forward_or_inverse(const Tensor& z, const Tensor& u, const Tensor& w,
                                                      const Tensor& b, const Formulas& formulas, bool save,
                                                      bool inverse) {
  check_arguments(z, u, w, b);
  const Parameters q(u, w, b);
  const int64_t rows = z.size(0);
  Tensor z_K = new_empty(z, {rows, z.size(1)}), log_det = new_empty(z, {rows});
  Tensor a = save ? new_empty(z, {q.steps, rows}) : new_empty(z, {0});
  with_type(z, [&](auto zero) {
    using T = decltype(zero);
    const Matrix<T> of_a{save ? a.mutable_data_ptr<T>() : nullptr, rows, 1};
    run(Forward<T>{problem<T>(z, q, formulas, inverse),
                   rows_of<T>(z_K),
                   {log_det.mutable_data_ptr<T>(), 1},
                   ordered(of_a, q.steps, inverse)},
        q.amortized, *chosen_isa().load());
  });
  return {z_K, log_det, a};
}

std::tuple<Tensor, Tensor, Tensor> planar_forward(const Tensor& z, const Tensor& u, const Tensor& w, const Tensor& b,
                                                  int64_t constraint, int64_t activation, double slope,
                                                  double log_det_eps, bool save) {
  return forward_or_inverse(z, u, w, b, formulas_of(constraint, activation, slope, log_det_eps), save, false);
}

std::tuple<Tensor, Tensor, Tensor> planar_inverse(const Tensor& z, const Tensor& u, const Tensor& w, const Tensor& b,
                                                  int64_t constraint, int64_t activation, double slope, bool save) {
  return forward_or_inverse(z, u, w, b, formulas_of(constraint, activation, slope, 0), save, true);
}

// du, dw and db where they are written, contiguous or behind one another in the rows of one tensor.
template <class T>
struct Gradients {
  Params<T> du, dw, db;
};

template <class T>
void backward_as(const Tensor& grad_z, const Tensor& grad_log_det, const Tensor& z, const Parameters& q,
                 const Tensor& a, const Formulas& formulas, bool inverse, Tensor& dz, const Gradients<T>& to) {
  const Matrix<const T> of_a{a.const_data_ptr<T>(), z.size(0), 1};
  run(Backward<T>{problem<T>(z, q, formulas, inverse),
                  matrix<T>(grad_z),
                  {grad_log_det.const_data_ptr<T>(), grad_log_det.stride(0)},
                  ordered(of_a, q.steps, inverse),
                  rows_of<T>(dz),
                  ordered(to.du, q.steps, inverse),
                  ordered(to.dw, q.steps, inverse),
                  ordered(to.db, q.steps, inverse)},
      q.amortized, *chosen_isa().load());
}

// For a caller who wants dz alone.
Tensor nothing(const Tensor& z) { return new_empty(z, {0}); }

// A gradient's memory; amortized parameter sets that no row uses have the gradient zero.
Tensor new_gradient(const Tensor& z, std::initializer_list<int64_t> sizes, int64_t rows) {
  Tensor gradient = new_empty(z, sizes);
  return rows ? gradient : torch::stable::zero_(gradient);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad_z, const Tensor& grad_log_det, const Tensor& z,
                                                    const Tensor& u, const Tensor& w, const Tensor& b, const Tensor& a,
                                                    const Formulas& formulas, bool inverse, bool params) {
  check_arguments(z, u, w, b);
  const Parameters q(u, w, b);
  check_saved(grad_z, grad_log_det, z, q.steps, a, z.scalar_type(), check_kind);
  const int64_t rows = z.size(0), steps = q.steps, dim = z.size(1);
  const bool sets = q.amortized;
  Tensor dz = new_empty(z, {rows, dim});
  if (!params) {
    with_type(z, [&](auto zero) {
      backward_as<decltype(zero)>(grad_z, grad_log_det, z, q, a, formulas, inverse, dz, {});
    });
    return {dz, nothing(z), nothing(z), nothing(z)};
  }
  Tensor du = sets ? new_gradient(z, {q.sets, steps, dim}, rows) : new_gradient(z, {steps, dim}, rows);
  Tensor dw = sets ? new_gradient(z, {q.sets, steps, dim}, rows) : new_gradient(z, {steps, dim}, rows);
  Tensor db = sets ? new_gradient(z, {q.sets, steps}, rows) : new_gradient(z, {steps}, rows);
  with_type(z, [&](auto zero) {
    using T = decltype(zero);
    const auto to = [&](Tensor& t, int64_t step) { return Params<T>{t.mutable_data_ptr<T>(), steps * step, step, 1}; };
    backward_as<T>(grad_z, grad_log_det, z, q, a, formulas, inverse, dz, {to(du, dim), to(dw, dim), to(db, 1)});
  });
  return {dz, du, dw, db};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> planar_backward(const Tensor& grad_z, const Tensor& grad_log_det,
                                                           const Tensor& z, const Tensor& u, const Tensor& w,
                                                           const Tensor& b, const Tensor& a, int64_t constraint,
                                                           int64_t activation, double slope, double log_det_eps,
                                                           bool params) {
  const Formulas formulas = formulas_of(constraint, activation, slope, log_det_eps);
  return backward(grad_z, grad_log_det, z, u, w, b, a, formulas, false, params);
}

// From the inverse's own z and the roots a, (35) and (40).
std::tuple<Tensor, Tensor, Tensor, Tensor> planar_inverse_backward(const Tensor& grad_z, const Tensor& grad_log_det,
                                                                   const Tensor& z, const Tensor& u, const Tensor& w,
                                                                   const Tensor& b, const Tensor& a, int64_t constraint,
                                                                   int64_t activation, double slope, bool params) {
  const Formulas formulas = formulas_of(constraint, activation, slope, 0);
  return backward(grad_z, grad_log_det, z, u, w, b, a, formulas, true, params);
}

// The same for amortized parameters that lie behind one another in the rows of packed [P, K (2 D + 1)]: u, w, b.
std::tuple<Tensor, Tensor> planar_backward_packed(const Tensor& grad_z, const Tensor& grad_log_det, const Tensor& z,
                                                  const Tensor& packed, const Tensor& a, int64_t constraint,
                                                  int64_t activation, double slope, double log_det_eps, bool params) {
  const Formulas formulas = formulas_of(constraint, activation, slope, log_det_eps);
  check_packed(z, packed, a);
  const int64_t rows = z.size(0), dim = z.size(1), steps = a.size(0), sets = packed.size(0);
  const int64_t width = packed.size(1);
  Tensor all = packed;
  const auto part = [&](int64_t start, int64_t size) { return torch::stable::narrow(all, 1, start, size); };
  const Tensor u = torch::stable::view(part(0, steps * dim), {sets, steps, dim});
  const Tensor w = torch::stable::view(part(steps * dim, steps * dim), {sets, steps, dim});
  const Tensor b = part(2 * steps * dim, steps);
  check_arguments(z, u, w, b);
  check_saved(grad_z, grad_log_det, z, steps, a, z.scalar_type(), check_kind);
  const Parameters q(u, w, b);
  Tensor dz = new_empty(z, {rows, dim}), dpacked = params ? new_gradient(z, {sets, width}, rows) : nothing(z);
  with_type(z, [&](auto zero) {
    using T = decltype(zero);
    if (!params) return backward_as<T>(grad_z, grad_log_det, z, q, a, formulas, false, dz, {});
    T* to = dpacked.mutable_data_ptr<T>();
    backward_as<T>(grad_z, grad_log_det, z, q, a, formulas, false, dz,
                   {{to, width, dim, 1}, {to + steps * dim, width, dim, 1}, {to + 2 * steps * dim, width, 1, 1}});
  });
  return {dz, dpacked};
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
  m.impl("planar_inverse", TORCH_BOX(&vvae::planar_inverse));
  m.impl("planar_backward", TORCH_BOX(&vvae::planar_backward));
  m.impl("planar_inverse_backward", TORCH_BOX(&vvae::planar_inverse_backward));
  m.impl("planar_backward_packed", TORCH_BOX(&vvae::planar_backward_packed));
}
