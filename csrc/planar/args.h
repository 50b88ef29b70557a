// A call as the kernels take it, on the CPU and on a GPU. No torch.
//
// Strides are in elements. T is the type of the numbers, or void where only a kernel knows it.
#pragma once

#include <stdint.h>

#include "spec.h"

namespace vvae {

enum class Dtype { float32, float64, bfloat16, float16 };  // the half precisions are computed in float32

template <class T>
struct Column {  // element [i] at data[i * stride]
  T* data;
  int64_t stride;
  Column from(int64_t i) const { return {data + i * stride, stride}; }
};

template <class T>
struct Matrix {  // element [i][j] at data[i * row + j * col]
  T* data;
  int64_t row, col;
  Matrix from(int64_t i) const { return {data + i * row, row, col}; }
  Column<T> lanes(int64_t i, int64_t j) const { return {data + i * row + j * col, col}; }  // row i from column j on
};

template <class T>
struct Params {  // element [set][step][d] at data[set * set_stride + step * step_stride + d * col]; b has col = 0
  T* data;
  int64_t set, step, col;
  Params of_set(int64_t i) const { return {data + i * set, 0, step, col}; }
};

// Row r of z uses parameter set r mod sets.
template <class T>
struct Problem {
  Dtype dtype;  // of z, u, w, b, their gradients and z_K; everything else is in the dtype of computation
  FlowSpec spec;
  bool inverse;    // z is what the flow gives, z_K becomes what it started from, and log_det the inverse map's
  bool amortized;  // parameters have sets, be it one, and are not shared by all rows whatever their number
  int64_t rows, dim, steps, sets;
  Matrix<const T> z;
  Params<const T> u, w, b;
  bool stream = false;  // the CPU's: outputs so large that they leave the caches before anyone reads them

  bool is_empty() const { return rows == 0 || steps == 0; }
};

template <class T>
struct Forward : Problem<T> {
  Matrix<T> z_K;      // [rows][dim], contiguous
  Column<T> log_det;  // contiguous
  Matrix<T> a;        // [steps][rows], contiguous; data null where nothing is saved
};

template <class T>
struct Backward : Problem<T> {
  Matrix<const T> grad_z;
  Column<const T> grad_log_det;
  Matrix<const T> a;     // [steps][rows], contiguous
  Matrix<T> dz;          // [rows][dim], contiguous
  Params<T> du, dw, db;  // columns contiguous; data null where dz alone is wanted
  void* workspace;       // what the backend asked for beside the tensors
  bool wants_params() const { return db.data; }  // of D = 0, du and dw have no memory
};

// x [.][steps][.] with its steps in the order in which they are taken, for the inverse from the last to the first: then
// all that is indexed by steps runs backwards through memory.
template <class T, class V>
Params<T> taken(const Params<V>& x, const Problem<void>& p) {
  T* data = static_cast<T*>(x.data);
  if (!p.inverse || !data) return {data, x.set, x.step, x.col};
  return {data + (p.steps - 1) * x.step, x.set, -x.step, x.col};
}

// The same of x [steps][.].
template <class T, class V>
Matrix<T> taken(const Matrix<V>& x, const Problem<void>& p) {
  const Params<T> steps = taken<T>(Params<V>{x.data, 0, x.row, x.col}, p);
  return {steps.data, steps.step, steps.col};
}

}  // namespace vvae
