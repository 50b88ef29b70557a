// The checks of the operators' arguments that all backends share; a kernel that was called past them would read other
// memory. `check_kind(argument, dtype)` is the backend's own: the device and the dtype of one tensor.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <algorithm>

#include "../planar/spec.h"
#include "argument.h"

namespace vvae {

constexpr int64_t kMostParameters = int64_t(1) << 40;  // of one set: beyond, sizes in bytes could overflow

inline void check_rank(const Argument& t, int64_t rank) {
  STD_TORCH_CHECK(t.rank == rank, "vvae_fast: ", t.name, " must have rank ", rank, ", got ", t.rank);
}

inline void check_size(const Argument& t, int64_t dim, int64_t size) {
  STD_TORCH_CHECK(t.sizes[dim] == size, "vvae_fast: ", t.name, " must have size ", size, " in dimension ", dim,
                  ", got ", t.sizes[dim]);
}

inline void check_count(int64_t steps, int64_t dim) {
  STD_TORCH_CHECK(dim <= kMostParameters && steps <= kMostParameters / std::max<int64_t>(1, dim),
                  "vvae_fast: u must have at most 2^40 elements K x D, got ", steps, " x ", dim);
}

inline void check_sets(const Argument& z, int64_t sets) {
  const int64_t rows = z.sizes[0];
  STD_TORCH_CHECK(sets == 0 ? rows == 0 : rows % sets == 0, "vvae_fast: z must have a multiple of ", sets,
                  " rows, one for each parameter set, got ", rows);
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
void check_problem(const Argument& z, const Argument& u, const Argument& w, const Argument& b,
                   const CheckKind& check_kind) {
  check_rank(z, 2);
  STD_TORCH_CHECK(u.rank == 2 || u.rank == 3, "vvae_fast: u must be [K, D] or [P, K, D], got rank ", u.rank);
  check_rank(w, u.rank);
  check_rank(b, u.rank - 1);
  check_size(u, u.rank - 1, z.sizes[1]);
  for (int64_t i = 0; i < u.rank; ++i) check_size(w, i, u.sizes[i]);
  for (int64_t i = 0; i < b.rank; ++i) check_size(b, i, u.sizes[i]);
  check_kind(z, z.dtype);
  check_kind(u, z.dtype);
  check_kind(w, z.dtype);
  check_kind(b, z.dtype);
  check_count(u.sizes[u.rank - 2], z.sizes[1]);
  check_sets(z, u.rank == 3 ? u.sizes[0] : 1);
}

// What the backward takes beside z [R, D] and the parameters: grad_z [R, D]; grad_log_det [R] and a [K, R], both of the
// dtype of computation.
template <class CheckKind>
void check_saved(const Argument& grad_z, const Argument& grad_log_det, const Argument& z, int64_t steps,
                 const Argument& a, const CheckKind& check_kind) {
  const int64_t rows = z.sizes[0];
  check_rank(grad_z, 2);
  check_rank(grad_log_det, 1);
  check_rank(a, 2);
  check_size(grad_z, 0, rows);
  check_size(grad_z, 1, z.sizes[1]);
  check_size(grad_log_det, 0, rows);
  check_size(a, 0, steps);
  check_size(a, 1, rows);
  STD_TORCH_CHECK(a.tensor().is_contiguous(), "vvae_fast: ", a.name,
                  " must be contiguous, as planar_forward returned it");
  check_kind(grad_z, z.dtype);
  check_kind(grad_log_det, z.computed());
  check_kind(a, z.computed());
}

// z [R, D], a [K, R] and packed [P, K (2 D + 1)], in whose rows u, w and b are concatenated.
inline void check_packed(const Argument& z, const Argument& packed, const Argument& a) {
  check_rank(z, 2);
  check_rank(packed, 2);
  check_rank(a, 2);
  check_count(a.sizes[0], z.sizes[1]);
  check_size(packed, 1, a.sizes[0] * (2 * z.sizes[1] + 1));
}

}  // namespace vvae
