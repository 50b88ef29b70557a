// A call of a headed flow, whose parameters are context weight^T + bias, docs/math.md (67), as its kernels take it. No
// torch.
#pragma once

#include <stdint.h>

#include "../../planar/args.h"
#include "../../planar/chunks.h"

namespace vvae {

// Steps between two z that the forward saves, for D > 0. The backward reaches the others from there, while the
// parameters of so many steps, twice kSpanNumbers for each row, stay in its cache.
constexpr int64_t kMostSteps = 8, kSpanNumbers = 512;
constexpr int64_t steps_between(int64_t dim) {
  const int64_t affordable = kSpanNumbers / dim;
  return affordable < 1 ? 1 : affordable < kMostSteps ? affordable : kMostSteps;
}
// Rows of what is saved, [.][rows]: a [steps], then the saved z [dim] each; the first z is the caller's.
constexpr int64_t saved_rows(int64_t steps, int64_t dim) {
  const int64_t spans = ceil_div(steps, steps_between(dim));
  return steps + (spans > 1 ? spans - 1 : 0) * dim;
}

// Some of a flow's steps. Of a tile, their parameters, or the gradients of these, are [width()][kTile] in memory: u and
// w [steps][dim] and b [steps], one after the other. Those of all steps are the rows of weight.
struct Steps {
  int64_t start, steps, dim;

  int64_t width() const { return steps * (2 * dim + 1); }
  int64_t of_u(int64_t k) const { return (k - start) * dim; }  // the first row of step k
  int64_t of_w(int64_t k) const { return (steps + k - start) * dim; }
  int64_t of_b(int64_t k) const { return 2 * steps * dim + k - start; }
};

template <class T>
struct Headed {
  FlowSpec spec;
  int64_t rows, dim, steps, features;
  Matrix<const T> z;        // [rows][dim]
  Matrix<const T> context;  // [rows][features], whose rows are contiguous
  const T* weight;          // [all().width()][features], contiguous
  const T* bias;            // [all().width()]

  Steps all() const { return {0, steps, dim}; }
  int64_t spans() const { return ceil_div(steps, steps_between(dim)); }
  Steps of_spans(int64_t begin, int64_t end) const {
    const int64_t most = steps_between(dim), stop = end * most;
    return {begin * most, (stop < steps ? stop : steps) - begin * most, dim};
  }
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
  T *dweight, *dbias;  // as weight and bias; these and dcontext are null where dz alone is wanted
  bool wants_params() const { return dbias; }  // of F = 0, dweight and dcontext have no memory
};

// Rows of a tile: whole vectors from the tile's lane `lane` on, though the last one need not be full.
struct Rows {
  int64_t first, count, lane;
};

// A tile's memory: what its backward keeps between two calls, and the gradients of the parameters of a call's steps,
// null where dz alone is wanted.
template <class T>
struct TileMemory {
  T *state, *gradients;
};

// The passes of the rows of a tile. The backward takes spans from the last to the first, some at a call.
template <class T>
struct HeadedPasses {
  void (*forward)(const HeadedForward<T>&, Rows, T* scratch);
  void (*backward)(const HeadedBackward<T>&, Rows, int64_t first_span, int64_t end_span, TileMemory<T>, T* scratch);
};

// One instruction set's, and how many elements of memory they need.
template <class T>
struct HeadedKernels {
  int lanes;  // of a vector
  int64_t (*forward_scratch)(const Headed<T>&);
  int64_t (*backward_scratch)(const Headed<T>&);
  int64_t (*state)(const Headed<T>&);
  // A tile's sums of `count` rows of dweight and dbias, from the gradients [count][kTile] that its pass left; with
  // `add`, so much more.
  void (*sum_weights)(const HeadedBackward<T>&, Rows tile, const T* gradients, int64_t first, int64_t count, bool add);
  HeadedPasses<T> tanh, any;

  const HeadedPasses<T>& passes(const Headed<T>& p) const { return p.spec.is_standard() ? tanh : any; }
};

}  // namespace vvae
