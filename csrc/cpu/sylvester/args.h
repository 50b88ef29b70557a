// A call of a Sylvester flow as its kernels take it, docs/math.md (57). Everything is in the dtype of computation, and
// contiguous but for the sets. No torch.
#pragma once

#include <stdint.h>

#include "../../planar/chunks.h"
#include "../../planar/spec.h"

namespace vvae {

template <class T>
struct Sets {  // of a parameter: that of set i at data + i * stride; data null where there is none
  T* data;
  int64_t stride;
  T* of(int64_t set) const { return data ? data + set * stride : nullptr; }
};

// Row r of z uses parameter set r mod sets.
template <class T>
struct Sylvester {
  FlowSpec spec;
  bool inverse;
  int64_t rows, dim, layers, units, sets;
  const T* z;             // [rows][dim]
  Sets<const T> columns;  // [layers][units][dim]: the columns of Q; none for the triangular kind
  // [layers][units][units], of which only the triangle above the diagonal is read. Without r_tilde, the triangle of r
  // below its diagonal is that of R~, transposed.
  Sets<const T> r, r_tilde;
  Sets<const T> d, d_tilde, b, s;  // [layers][units]: the diagonals of R and R~, b, and 1 + d d_tilde

  // Multiply-adds of one row that is taken once.
  int64_t work() const { return layers * units * ((columns.data ? 2 * dim : 0) + units); }
};

// Of the inverse z is what the flow gives, z_L becomes what it started from, and `saved` holds the roots a in place of
// p = Q^T z.
template <class T>
struct SylvesterForward : Sylvester<T> {
  T* z_L;      // [rows][dim]
  T* log_det;  // [rows]
  T* saved;    // [layers][rows][units], null where nothing is saved
};

// The gradients of one parameter set.
template <class T>
struct SylvesterGradients {
  T *columns, *r, *r_tilde, *d, *d_tilde, *b, *s;
};

template <class T>
struct SylvesterBackward : Sylvester<T> {
  const T *grad_z, *grad_log_det, *saved;
  T* dz;
  Sets<T> dcolumns, dr, dr_tilde, dd, dd_tilde, db, ds;
  SylvesterGradients<T> of_set(int64_t i) const {
    return {dcolumns.of(i), dr.of(i), dr_tilde.of(i), dd.of(i), dd_tilde.of(i), db.of(i), ds.of(i)};
  }
};

// The passes of one row, by direction and activation. The backward writes the gradients of the row's set, or adds to
// them.
template <class T>
struct SylvesterPasses {
  void (*forward)(const SylvesterForward<T>&, int64_t row, T* scratch);
  void (*backward)(const SylvesterBackward<T>&, int64_t row, const SylvesterGradients<T>& to, bool add, T* scratch);
};

// One instruction set's, and how many elements of scratch memory they need.
template <class T>
struct SylvesterKernels {
  int64_t (*forward_scratch)(const Sylvester<T>&);
  int64_t (*backward_scratch)(const Sylvester<T>&);
  SylvesterPasses<T> tanh, any, tanh_inverse, any_inverse;

  const SylvesterPasses<T>& passes(const Sylvester<T>& f) const {
    const bool standard = f.spec.is_standard();
    return f.inverse ? (standard ? tanh_inverse : any_inverse) : (standard ? tanh : any);
  }
};

}  // namespace vvae
