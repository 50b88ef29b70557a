// The arguments of every kernel, by value.
#pragma once

#include "dispatch.cuh"
#include "kernels.h"

namespace vvae {
namespace cuda {

// u, w [sets, K, D] and b [sets, K], and the formulas as far as the kernel does not know them. F is planar/activation.h's.
template <class S, class F>
struct ParamsView {
  Rows<S> u, w;
  const S* b;
  int64_t u_set, u_step, w_set, w_step, b_set, b_step;
  int dim, steps;
  F activation;
  Constraint of_problem;

  explicit ParamsView(const Problem& p)
      : ParamsView(p, taken<const S>(p.u, p), taken<const S>(p.w, p), taken<const S>(p.b, p)) {}
  ParamsView(const Problem& p, const Params<const S>& u, const Params<const S>& w, const Params<const S>& b)
      : u(rows_of(u, p.dim)), w(rows_of(w, p.dim)), b(b.data), u_set(u.set), u_step(u.step), w_set(w.set),
        w_step(w.step), b_set(b.set), b_step(b.step), dim(int(p.dim)), steps(int(p.steps)), activation(F::of(p.spec)),
        of_problem(p.spec.constraint) {}

  // Kernels that know tanh have two constraints: the code of the third would lengthen every step.
  __device__ __forceinline__ Constraint constraint() const {
    if (!std::is_same<F, StandardFlow>::value) return of_problem;
    return of_problem == Constraint::none ? Constraint::none : Constraint::softplus;
  }
  __device__ __forceinline__ Rows<S> u_of(int64_t set, int64_t k) const { return u.from(set * u_set + k * u_step); }
  __device__ __forceinline__ Rows<S> w_of(int64_t set, int64_t k) const { return w.from(set * w_set + k * w_step); }
  __device__ __forceinline__ const S* b_of(int64_t set, int64_t k) const { return b + set * b_set + k * b_step; }
};

// The arguments of every forward and of every backward, as their kernels take them by value.
template <class S, class F>
struct ProblemView {
  ParamsView<S, F> params;
  Rows<S> z;
  int64_t z_row, rows, sets, a_step;  // a_step: from a step's pre-activations to the next one's

  explicit ProblemView(const Problem& p)
      : params(p), z(rows_of<S>(p.z, p.dim)), z_row(p.z.row), rows(p.rows), sets(p.sets), a_step(p.inverse ? -p.rows : p.rows) {}
};

template <class S, class F>
struct ForwardView : ProblemView<S, F> {
  S* z_K;
  compute_t<S>*log_det, *a;

  explicit ForwardView(const Forward& f)
      : ProblemView<S, F>(f), z_K(static_cast<S*>(f.z_K.data)), log_det(static_cast<compute_t<S>*>(f.log_det.data)),
        a(taken<compute_t<S>>(f.a, f).data) {}
};

// What a forward, or an inverse, leaves of one row.
template <bool inverse, class Layout, class S, class F, class LogDet, class T = compute_t<S>>
__device__ __forceinline__ void store_outputs(const ForwardView<S, F>& p, int64_t row, int dim,
                                              const Row<T, Layout>& z, const LogDet& log_det) {
  store_row<Layout>(p.z_K + row * dim, z, dim, dim % 4 == 0);
  const T sum_of_logs = value<Lane<T>>(log_det);
  if (lane_of_row<Layout>() == 0) store(p.log_det + row, inverse ? -sum_of_logs : sum_of_logs);
}

template <class S, class F>
struct BackwardView : ProblemView<S, F> {
  Rows<S> grad_z;
  int64_t grad_z_row, grad_log_det_stride;
  const compute_t<S>*grad_log_det, *a;
  S* dz;

  explicit BackwardView(const Backward& f)
      : ProblemView<S, F>(f), grad_z(rows_of<S>(f.grad_z, f.dim)), grad_z_row(f.grad_z.row),
        grad_log_det_stride(f.grad_log_det.stride),
        grad_log_det(static_cast<const compute_t<S>*>(f.grad_log_det.data)), a(taken<const compute_t<S>>(f.a, f).data),
        dz(static_cast<S*>(f.dz.data)) {}
};

// The same for rows that share their parameters. `View` is one of those above, made of `Pass`.
template <class View>
struct SharedView : View {
  Split split;
  int staged;  // steps at a time

  template <class Pass>
  SharedView(const Pass& f, const Split& split, int staged) : View(f), split(split), staged(staged) {}
};

// Where a backward's weight gradients go.
template <class S>
struct GradientsView {
  S *du, *dw, *db;
  int64_t du_set, du_step, dw_set, dw_step, db_set, db_step;

  explicit GradientsView(const Backward& f) : GradientsView(taken<S>(f.du, f), taken<S>(f.dw, f), taken<S>(f.db, f)) {}
  GradientsView(const Params<S>& du, const Params<S>& dw, const Params<S>& db)
      : du(du.data), dw(dw.data), db(db.data), du_set(du.set), du_step(du.step), dw_set(dw.set), dw_step(dw.step),
        db_set(db.set), db_step(db.step) {}

  __device__ __forceinline__ S* du_of(int64_t set, int64_t k) const { return du + set * du_set + k * du_step; }
  __device__ __forceinline__ S* dw_of(int64_t set, int64_t k) const { return dw + set * dw_set + k * dw_step; }
  __device__ __forceinline__ S* db_of(int64_t set, int64_t k) const { return db + set * db_set + k * db_step; }
};

}  // namespace cuda
}  // namespace vvae
