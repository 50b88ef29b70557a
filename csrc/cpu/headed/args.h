// A call of a headed flow, whose parameters are context weight^T + bias, docs/math.md (67), as its kernels take it. No
// torch.
#pragma once

#include <stdint.h>

#include "../../planar/args.h"
#include "../../planar/chunks.h"

namespace vvae {

// Steps between two z that the forward saves. The backward reaches the others from there, while the parameters of so
// many steps stay in its cache.
constexpr int64_t kMostSteps = 8;
constexpr int64_t steps_between(int64_t dim) {
  const int64_t affordable = 512 / (dim < 1 ? 1 : dim);
  return affordable < 1 ? 1 : affordable < kMostSteps ? affordable : kMostSteps;
}
// Rows of what is saved, [.][rows]: a [steps], then the saved z [dim] each; the first z is the caller's.
constexpr int64_t saved_rows(int64_t steps, int64_t dim) {
  const int64_t spans = ceil_div(steps, steps_between(dim));
  return steps + (spans > 1 ? spans - 1 : 0) * dim;
}

template <class T>
struct Headed {
  FlowSpec spec;
  int64_t rows, dim, steps, features;
  Matrix<const T> z;        // [rows][dim]
  Matrix<const T> context;  // [rows][features], whose rows are contiguous
  const T* weight;          // [width][features], contiguous: rows for u, for w, then for b
  const T* bias;            // [width]

  int64_t width() const { return steps * (2 * dim + 1); }
  int64_t of_u(int64_t k) const { return k * dim; }  // the first row of step k in weight and bias
  int64_t of_w(int64_t k) const { return (steps + k) * dim; }
  int64_t of_b(int64_t k) const { return 2 * steps * dim + k; }
};

template <class T>
struct HeadedForward : Headed<T> {
  T *z_K, *log_det;  // [rows][dim], [rows]
  T* saved;          // [saved_rows][rows], null where nothing is saved
};

template <class T>
struct HeadedBackward : Headed<T> {
  Matrix<const T> grad_z;
  Column<const T> grad_log_det;
  const T* saved;
  T *dz, *dcontext;    // [rows][dim], [rows][features]
  T *dweight, *dbias;  // [width][features], [width]; these and dcontext are null where dz alone is wanted
  T* gradients;        // [width][kTile]: of a tile's parameters, which its pass leaves there
  bool wants_params() const { return dbias; }  // of F = 0, dweight and dcontext have no memory
};

// Rows `first` to `first + count`, at most kTile, which start at a whole vector.
struct Rows {
  int64_t first, count;
};

// The passes of the rows of a tile, or of some of them.
template <class T>
struct HeadedPasses {
  void (*forward)(const HeadedForward<T>&, Rows, T* scratch);
  void (*backward)(const HeadedBackward<T>&, Rows, T* scratch);
};

// One instruction set's, and how many elements of scratch memory they need.
template <class T>
struct HeadedKernels {
  int lanes;  // of a vector
  int64_t (*forward_scratch)(const Headed<T>&);
  int64_t (*backward_scratch)(const Headed<T>&);
  // A tile's sums of `count` rows of dweight and dbias, from the gradients [count][kTile] that its pass left; with `add`
  // so much more.
  void (*sum_weights)(const HeadedBackward<T>&, Rows tile, const T* gradients, int64_t first, int64_t count, bool add);
  HeadedPasses<T> tanh, any;

  const HeadedPasses<T>& passes(const Headed<T>& p) const { return p.spec.is_standard() ? tanh : any; }
};

}  // namespace vvae
