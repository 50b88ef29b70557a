// The five operators, once for every backend: checks, allocates, runs. Shapes are those of vvae_fast's schemas.
//
// A Backend B gives, as static functions,
//   check_kind(z)               a function of (tensor, name, type) that refuses a tensor that is not of z's kind
//   dtype(type)                 a ScalarType as a Dtype, if its kernels have it
//   check(problem)              refuses what else its kernels do not compute
//   new_empty(z, sizes, dtype)  a contiguous tensor on z's device
//   readable(t, amortized)      t, or a copy with strides that its kernels read
//   run(forward, z), run(backward, z)   a problem that is not empty
// and kDzAlone, whether it saves time for a caller who wants dz alone; where not, all gradients are computed and dropped.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <tuple>
#include <type_traits>

#include "../planar/args.h"
#include "allocate.h"
#include "checks.h"

namespace vvae {

// u, w [sets][K][D] and b [sets][K], or their gradients.
template <class T>
struct Weights {
  Params<T> u, w, b;
};

struct Parameters : Weights<const void> {
  int64_t steps, sets;
  bool amortized;
};

inline Matrix<const void> matrix_of(const Tensor& t) { return {t.const_data_ptr(), t.stride(0), t.stride(1)}; }

// Of u, w [K, D] and b [K], or [P, K, D] and [P, K].
inline Parameters parameters_of(const Tensor& u, const Tensor& w, const Tensor& b) {
  const bool amortized = u.dim() == 3;
  const int64_t step = amortized ? 1 : 0;
  const auto of = [&](const Tensor& t, int64_t col) {
    return Params<const void>{t.const_data_ptr(), amortized ? t.stride(0) : 0, t.stride(step), col};
  };
  return {{of(u, u.stride(step + 1)), of(w, w.stride(step + 1)), of(b, 0)}, u.size(step), amortized ? u.size(0) : 1,
          amortized};
}

// The parts of packed [P, K (2 D + 1)], from elements 0, K D and 2 K D of a row on.
template <class T>
Weights<T> parts_of(T* packed, int64_t element_size, int64_t row, int64_t col, int64_t steps, int64_t dim) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  const auto part = [&](int64_t start, int64_t step, int64_t of_column) {
    return Params<T>{static_cast<Byte*>(packed) + start * col * element_size, row, step * col, of_column};
  };
  return {part(0, dim, col), part(steps * dim, dim, col), part(2 * steps * dim, 1, 0)};
}

template <class B>
struct Operators {
  using Three = std::tuple<Tensor, Tensor, Tensor>;
  using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;

  static ScalarType computed(const Tensor& z) {
    return z.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  }
  static Tensor new_empty(const Tensor& z, std::initializer_list<int64_t> sizes) {
    return B::new_empty(z, sizes, dtype_of(z));
  }
  static Tensor new_computed(const Tensor& z, std::initializer_list<int64_t> sizes) {
    const bool is_double = computed(z) == ScalarType::Double;
    return B::new_empty(z, sizes, is_double ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32());
  }

  static Problem<void> problem(const Tensor& z, const Parameters& p, const FlowSpec& spec, bool inverse) {
    const Problem<void> problem = {B::dtype(z.scalar_type()), spec, inverse, p.amortized, z.size(0), z.size(1), p.steps,
                                   p.sets, matrix_of(z), p.u, p.w, p.b};
    B::check(problem);
    return problem;
  }

  static Three forward(const Tensor& z, const Tensor& u_, const Tensor& w_, const Tensor& b, const FlowSpec& spec,
                       bool save, bool inverse) {
    check_problem(z, u_, w_, b, B::check_kind(z));
    const Tensor u = B::readable(u_, u_.dim() == 3), w = B::readable(w_, u_.dim() == 3);
    const Problem<void> p = problem(z, parameters_of(u, w, b), spec, inverse);
    Tensor z_K = new_empty(z, {p.rows, p.dim}), log_det = new_computed(z, {p.rows});
    Tensor a = save ? new_computed(z, {p.steps, p.rows}) : new_computed(z, {0});
    if (p.is_empty()) {
      torch::stable::copy_(z_K, z);
      torch::stable::zero_(log_det);
    } else {
      B::run(Forward<void>{p,
                           {z_K.mutable_data_ptr(), p.dim, 1},
                           {log_det.mutable_data_ptr(), 1},
                           {save ? a.mutable_data_ptr() : nullptr, p.rows, 1}},
             z);
    }
    return {z_K, log_det, a};
  }

  // dz; du, dw and db go to `to`, whose memory is `weights`.
  static Tensor backward_into(const Problem<void>& p, const Tensor& grad_z, const Tensor& grad_log_det, const Tensor& z,
                              const Tensor& a, const Weights<void>& to, std::initializer_list<Tensor*> weights) {
    Tensor dz = new_empty(z, {p.rows, p.dim});
    if (p.is_empty()) {
      torch::stable::copy_(dz, grad_z);
      for (Tensor* t : weights) torch::stable::zero_(*t);
    } else {
      B::run(Backward<void>{p,
                            matrix_of(grad_z),
                            {grad_log_det.const_data_ptr(), grad_log_det.stride(0)},
                            {a.const_data_ptr(), p.rows, 1},
                            {dz.mutable_data_ptr(), p.dim, 1},
                            to.u,
                            to.w,
                            to.b,
                            nullptr},
             z);
    }
    return dz;
  }

  static Four backward(const Tensor& grad_z, const Tensor& grad_log_det, const Tensor& z, const Tensor& u_,
                       const Tensor& w_, const Tensor& b, const Tensor& a, const FlowSpec& spec, bool params,
                       bool inverse) {
    const auto check_kind = B::check_kind(z);
    check_problem(z, u_, w_, b, check_kind);
    const Tensor u = B::readable(u_, u_.dim() == 3), w = B::readable(w_, u_.dim() == 3);
    const Problem<void> p = problem(z, parameters_of(u, w, b), spec, inverse);
    check_saved(grad_z, grad_log_det, z, p.steps, a, computed(z), check_kind);
    const auto nothing = [&] { return new_empty(z, {0}); };
    if (!params && B::kDzAlone)
      return {backward_into(p, grad_z, grad_log_det, z, a, {}, {}), nothing(), nothing(), nothing()};
    const auto weights = [&] {
      return p.amortized ? new_empty(z, {p.sets, p.steps, p.dim}) : new_empty(z, {p.steps, p.dim});
    };
    Tensor du = weights(), dw = weights();
    Tensor db = p.amortized ? new_empty(z, {p.sets, p.steps}) : new_empty(z, {p.steps});
    const auto whole = [&](Tensor& t, int64_t step) {
      return Params<void>{t.mutable_data_ptr(), p.steps * step, step, 1};
    };
    const Weights<void> to = {whole(du, p.dim), whole(dw, p.dim), whole(db, 1)};
    const Tensor dz = backward_into(p, grad_z, grad_log_det, z, a, to, {&du, &dw, &db});
    if (!params) return {dz, nothing(), nothing(), nothing()};
    return {dz, du, dw, db};
  }

  static Three planar_forward(const Tensor& z, const Tensor& u, const Tensor& w, const Tensor& b, int64_t constraint,
                              int64_t activation, double slope, double log_det_eps, bool save) {
    return forward(z, u, w, b, spec_of(constraint, activation, slope, log_det_eps), save, false);
  }

  static Three planar_inverse(const Tensor& z, const Tensor& u, const Tensor& w, const Tensor& b, int64_t constraint,
                              int64_t activation, double slope, bool save) {
    return forward(z, u, w, b, spec_of(constraint, activation, slope, 0), save, true);
  }

  static Four planar_backward(const Tensor& grad_z, const Tensor& grad_log_det, const Tensor& z, const Tensor& u,
                              const Tensor& w, const Tensor& b, const Tensor& a, int64_t constraint, int64_t activation,
                              double slope, double log_det_eps, bool params) {
    const FlowSpec spec = spec_of(constraint, activation, slope, log_det_eps);
    return backward(grad_z, grad_log_det, z, u, w, b, a, spec, params, false);
  }

  // From the inverse's own z and the roots a, docs/math.md (35) and (40).
  static Four planar_inverse_backward(const Tensor& grad_z, const Tensor& grad_log_det, const Tensor& z,
                                      const Tensor& u, const Tensor& w, const Tensor& b, const Tensor& a,
                                      int64_t constraint, int64_t activation, double slope, bool params) {
    const FlowSpec spec = spec_of(constraint, activation, slope, 0);
    return backward(grad_z, grad_log_det, z, u, w, b, a, spec, params, true);
  }

  // The same for amortized parameters whose u, w and b are concatenated in the rows of packed [P, K (2 D + 1)].
  static std::tuple<Tensor, Tensor> planar_backward_packed(const Tensor& grad_z, const Tensor& grad_log_det,
                                                           const Tensor& z, const Tensor& packed_, const Tensor& a,
                                                           int64_t constraint, int64_t activation, double slope,
                                                           double log_det_eps, bool params) {
    const FlowSpec spec = spec_of(constraint, activation, slope, log_det_eps);
    const auto check_kind = B::check_kind(z);
    check_packed(z, packed_, a);
    check_kind(z, "z", z.scalar_type());
    check_kind(packed_, "packed", z.scalar_type());
    check_sets(z, packed_.size(0));
    const Tensor packed = B::readable(packed_, true);
    const int64_t steps = a.size(0), dim = z.size(1), sets = packed.size(0), width = packed.size(1);
    const int64_t size = int64_t(packed.element_size());
    check_saved(grad_z, grad_log_det, z, steps, a, computed(z), check_kind);
    const Weights<const void> from =
        parts_of(packed.const_data_ptr(), size, packed.stride(0), packed.stride(1), steps, dim);
    const Problem<void> p = problem(z, {from, steps, sets, true}, spec, false);
    if (!params && B::kDzAlone) return {backward_into(p, grad_z, grad_log_det, z, a, {}, {}), new_empty(z, {0})};
    Tensor dpacked = new_empty(z, {sets, width});
    const Weights<void> to = parts_of(dpacked.mutable_data_ptr(), size, width, 1, steps, dim);
    const Tensor dz = backward_into(p, grad_z, grad_log_det, z, a, to, {&dpacked});
    if (!params) dpacked = new_empty(z, {0});
    return {dz, dpacked};
  }
};

// In STABLE_TORCH_LIBRARY_IMPL(vvae_fast, ..., library): what a backend registers, its names after `prefix`.
#define VVAE_REGISTER(library, prefix, B)                                                              \
  library.impl(prefix "planar_forward", TORCH_BOX(&vvae::Operators<B>::planar_forward));                \
  library.impl(prefix "planar_inverse", TORCH_BOX(&vvae::Operators<B>::planar_inverse));                \
  library.impl(prefix "planar_backward", TORCH_BOX(&vvae::Operators<B>::planar_backward));              \
  library.impl(prefix "planar_inverse_backward", TORCH_BOX(&vvae::Operators<B>::planar_inverse_backward)); \
  library.impl(prefix "planar_backward_packed", TORCH_BOX(&vvae::Operators<B>::planar_backward_packed))

}  // namespace vvae
