// The five operators, once for every backend: checks, allocates, runs. Shapes are those of vvae_fast's schemas.
//
// A Backend B gives, as static functions,
//   check_kind(z)               a function of (argument, dtype) that refuses a tensor that is not of z's kind
//   dtype(z)                    z's dtype as a Dtype, if its kernels have it
//   check(problem)              refuses what else its kernels do not compute
//   new_empty(z, sizes, dtype)  a contiguous tensor on z's device
//   make_readable(t)            copies amortized parameters where its kernels do not read their strides
//   run(forward, z), run(backward, z)   a problem that is not empty
// and kDzAlone, whether it saves time for a caller who wants dz alone; where not, all gradients are computed and
// dropped.
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

inline Matrix<const void> matrix_of(const Argument& t) {
  return {t.tensor().const_data_ptr(), t.strides[0], t.strides[1]};
}

// Of u, w [K, D] and b [K], or [P, K, D] and [P, K].
inline Parameters parameters_of(const Argument& u, const Argument& w, const Argument& b) {
  const bool amortized = u.rank == 3;
  const int64_t step = amortized ? 1 : 0;
  const auto of = [&](const Argument& t, int64_t col) {
    return Params<const void>{t.tensor().const_data_ptr(), amortized ? t.strides[0] : 0, t.strides[step], col};
  };
  return {{of(u, u.strides[step + 1]), of(w, w.strides[step + 1]), of(b, 0)}, u.sizes[step],
          amortized ? u.sizes[0] : 1, amortized};
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

  static Tensor new_empty(const Argument& z, std::initializer_list<int64_t> sizes) {
    return B::new_empty(z, sizes, z.dtype);
  }
  static Tensor new_computed(const Argument& z, std::initializer_list<int64_t> sizes) {
    return B::new_empty(z, sizes, z.computed());
  }

  static Problem<void> problem(const Argument& z, const Parameters& p, const FlowSpec& spec, bool inverse) {
    const Problem<void> problem = {B::dtype(z), spec, inverse, p.amortized, z.sizes[0], z.sizes[1], p.steps,
                                   p.sets, matrix_of(z), p.u, p.w, p.b};
    B::check(problem);
    return problem;
  }
  static Problem<void> problem(const Argument& z, Argument& u, Argument& w, const Argument& b, const FlowSpec& spec,
                               bool inverse) {
    if (u.rank == 3) {
      B::make_readable(u);
      B::make_readable(w);
    }
    return problem(z, parameters_of(u, w, b), spec, inverse);
  }

  static Three forward(const Tensor& z_, const Tensor& u_, const Tensor& w_, const Tensor& b_, const FlowSpec& spec,
                       bool save, bool inverse) {
    const Argument z(z_, "z"), b(b_, "b");
    Argument u(u_, "u"), w(w_, "w");
    check_problem(z, u, w, b, B::check_kind(z));
    const Problem<void> p = problem(z, u, w, b, spec, inverse);
    Tensor z_K = new_empty(z, {p.rows, p.dim}), log_det = new_computed(z, {p.rows});
    Tensor a = save ? new_computed(z, {p.steps, p.rows}) : new_computed(z, {0});
    if (p.is_empty()) {
      torch::stable::copy_(z_K, z_);
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
  static Tensor backward_into(const Problem<void>& p, const Argument& grad_z, const Argument& grad_log_det,
                              const Argument& z, const Argument& a, const Weights<void>& to,
                              std::initializer_list<Tensor*> weights) {
    Tensor dz = new_empty(z, {p.rows, p.dim});
    if (p.is_empty()) {
      torch::stable::copy_(dz, grad_z.tensor());
      for (Tensor* t : weights) torch::stable::zero_(*t);
    } else {
      B::run(Backward<void>{p,
                            matrix_of(grad_z),
                            {grad_log_det.tensor().const_data_ptr(), grad_log_det.strides[0]},
                            {a.tensor().const_data_ptr(), p.rows, 1},
                            {dz.mutable_data_ptr(), p.dim, 1},
                            to.u,
                            to.w,
                            to.b,
                            nullptr},
             z);
    }
    return dz;
  }

  static Four backward(const Tensor& grad_z_, const Tensor& grad_log_det_, const Tensor& z_, const Tensor& u_,
                       const Tensor& w_, const Tensor& b_, const Tensor& a_, const FlowSpec& spec, bool params,
                       bool inverse) {
    const Argument grad_z(grad_z_, "grad_z"), grad_log_det(grad_log_det_, "grad_log_det");
    const Argument z(z_, "z"), b(b_, "b"), a(a_, "a");
    Argument u(u_, "u"), w(w_, "w");
    const auto check_kind = B::check_kind(z);
    check_problem(z, u, w, b, check_kind);
    const Problem<void> p = problem(z, u, w, b, spec, inverse);
    check_saved(grad_z, grad_log_det, z, p.steps, a, check_kind);
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
  static std::tuple<Tensor, Tensor> planar_backward_packed(const Tensor& grad_z_, const Tensor& grad_log_det_,
                                                           const Tensor& z_, const Tensor& packed_, const Tensor& a_,
                                                           int64_t constraint, int64_t activation, double slope,
                                                           double log_det_eps, bool params) {
    const FlowSpec spec = spec_of(constraint, activation, slope, log_det_eps);
    const Argument grad_z(grad_z_, "grad_z"), grad_log_det(grad_log_det_, "grad_log_det"), z(z_, "z"), a(a_, "a");
    Argument packed(packed_, "packed");
    const auto check_kind = B::check_kind(z);
    check_packed(z, packed, a);
    check_kind(z, z.dtype);
    check_kind(packed, z.dtype);
    const int64_t steps = a.sizes[0], dim = z.sizes[1], sets = packed.sizes[0], width = packed.sizes[1];
    check_sets(z, sets);
    check_saved(grad_z, grad_log_det, z, steps, a, check_kind);
    B::make_readable(packed);
    const int64_t size = int64_t(packed_.element_size());
    const Weights<const void> from =
        parts_of(packed.tensor().const_data_ptr(), size, packed.strides[0], packed.strides[1], steps, dim);
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
