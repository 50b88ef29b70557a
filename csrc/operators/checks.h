// The checks of the operators' arguments that all backends share; a kernel that was called past them would read other
// memory. `check_kind(t, name, type)` is the backend's own: the device and the dtype of one tensor.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>

#include "../planar/spec.h"

namespace vvae {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kMostParameters = int64_t(1) << 40;  // of one set: beyond, sizes in bytes could overflow

inline void check_rank(const Tensor& t, const char* name, int64_t rank) {
  STD_TORCH_CHECK(t.dim() == rank, "vvae_fast: ", name, " must have rank ", rank, ", got ", t.dim());
}

inline void check_size(const Tensor& t, const char* name, int64_t dim, int64_t size) {
  STD_TORCH_CHECK(t.size(dim) == size, "vvae_fast: ", name, " must have size ", size, " in dimension ", dim, ", got ",
                  t.size(dim));
}

inline void check_count(int64_t steps, int64_t dim) {
  STD_TORCH_CHECK(dim <= kMostParameters && steps <= kMostParameters / std::max<int64_t>(1, dim),
                  "vvae_fast: u must have at most 2^40 elements K x D, got ", steps, " x ", dim);
}

inline void check_sets(const Tensor& z, int64_t sets) {
  STD_TORCH_CHECK(sets == 0 ? z.size(0) == 0 : z.size(0) % sets == 0, "vvae_fast: z must have a multiple of ", sets,
                  " rows, one for each parameter set, got ", z.size(0));
}

// Names as their places in vvae_fast/shapes.py.
inline FlowSpec spec_of(int64_t constraint, int64_t activation, double slope, double log_det_eps) {
  STD_TORCH_CHECK(constraint >= 0 && constraint <= int64_t(Constraint::log_softplus),
                  "vvae_fast: constraint must be in [0, ", int64_t(Constraint::log_softplus), "], got ", constraint);
  STD_TORCH_CHECK(activation >= 0 && activation <= int64_t(Activation::linear),
                  "vvae_fast: activation must be in [0, ", int64_t(Activation::linear), "], got ", activation);
  return {Constraint(constraint), Activation(activation), slope, log_det_eps};
}

// z [R, D]; u, w [K, D] and b [K], or u, w [P, K, D] and b [P, K].
template <class CheckKind>
void check_problem(const Tensor& z, const Tensor& u, const Tensor& w, const Tensor& b, const CheckKind& check_kind) {
  check_rank(z, "z", 2);
  STD_TORCH_CHECK(u.dim() == 2 || u.dim() == 3, "vvae_fast: u must be [K, D] or [P, K, D], got rank ", u.dim());
  check_rank(w, "w", u.dim());
  check_rank(b, "b", u.dim() - 1);
  check_size(u, "u", u.dim() - 1, z.size(1));
  for (int64_t i = 0; i < u.dim(); ++i) check_size(w, "w", i, u.size(i));
  for (int64_t i = 0; i < b.dim(); ++i) check_size(b, "b", i, u.size(i));
  const ScalarType type = z.scalar_type();
  check_kind(z, "z", type);
  check_kind(u, "u", type);
  check_kind(w, "w", type);
  check_kind(b, "b", type);
  check_count(u.size(u.dim() - 2), z.size(1));
  check_sets(z, u.dim() == 3 ? u.size(0) : 1);
}

// What the backward takes beside z [R, D] and the parameters: grad_z [R, D]; grad_log_det [R] and a [K, R], both of the
// type of computation.
template <class CheckKind>
void check_saved(const Tensor& grad_z, const Tensor& grad_log_det, const Tensor& z, int64_t steps, const Tensor& a,
                 ScalarType computed, const CheckKind& check_kind) {
  const int64_t rows = z.size(0);
  check_rank(grad_z, "grad_z", 2);
  check_rank(grad_log_det, "grad_log_det", 1);
  check_rank(a, "a", 2);
  check_size(grad_z, "grad_z", 0, rows);
  check_size(grad_z, "grad_z", 1, z.size(1));
  check_size(grad_log_det, "grad_log_det", 0, rows);
  check_size(a, "a", 0, steps);
  check_size(a, "a", 1, rows);
  STD_TORCH_CHECK(a.is_contiguous(), "vvae_fast: a must be contiguous, as planar_forward returned it");
  check_kind(grad_z, "grad_z", z.scalar_type());
  check_kind(grad_log_det, "grad_log_det", computed);
  check_kind(a, "a", computed);
}

// z [R, D], a [K, R] and packed [P, K (2 D + 1)], in whose rows u, w and b are concatenated.
inline void check_packed(const Tensor& z, const Tensor& packed, const Tensor& a) {
  check_rank(z, "z", 2);
  check_rank(packed, "packed", 2);
  check_rank(a, "a", 2);
  check_count(a.size(0), z.size(1));
  check_size(packed, "packed", 1, a.size(0) * (2 * z.size(1) + 1));
}

}  // namespace vvae
