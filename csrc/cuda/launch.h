// What the CUDA backend's operators ask of its kernels. No torch and no CUDA headers: a stream is a pointer here.
//
// Strides are in elements. Row r of z uses parameter set r mod sets.
#pragma once

#include <stdint.h>

#include "../formulas.h"

namespace vvae {
namespace cuda {

enum class Dtype { float32, float64, bfloat16, float16 };  // the half precisions are computed in float32

struct Matrix {  // [rows, D]
  const void* data;
  int64_t row, col;
};

struct Params {  // u, w [sets, K, D]; b [sets, K] with col = 0
  const void* data;
  int64_t set, step, col;
};

struct Gradients {  // du, dw [sets, K, D], db [sets, K]; columns are contiguous
  void* data;
  int64_t set, step;
};

struct Problem {
  Dtype dtype;  // of z, u, w, b, their gradients and z_K
  Formulas formulas;
  bool amortized;  // parameters have sets, be it one, and are not shared by all rows whatever their number
  bool inverse;    // z is what the flow gives, z_K becomes what it started from, and the steps are taken from the last one
  int64_t rows, sets;
  int dim, steps;
  Matrix z;
  Params u, w, b;
};

struct Forward {
  Problem p;
  void* z_K;      // [rows, D], contiguous
  void* log_det;  // [rows], in the dtype of computation, as is a
  void* a;        // [K, rows], contiguous; null where nothing is saved
};

struct Backward {
  Problem p;
  Matrix grad_z;             // [rows, D]
  const void* grad_log_det;  // [rows], in the dtype of computation
  int64_t grad_log_det_stride;
  const void* a;  // [K, rows], contiguous
  void* dz;       // [rows, D], contiguous
  Gradients du, dw, db;
  void* workspace;  // workspace_bytes(p), aligned to 16 bytes
};

// How z is kept and multiplied. The shape chooses, or a form is asked for to compare the two: problems that have it
// then run it.
enum class Form { automatic, direct, compact };
void set_form(Form form);

// The most columns that the kernels take.
int64_t most_dim(Dtype dtype);

// Whether the kernels compute the problem's formulas for numbers of its dtype. The inverse has none for half precisions.
bool computes(const Problem& p);

// Bytes that launch_backward needs beside its tensors.
int64_t workspace_bytes(const Problem& p);

// Launch on `stream` of the current device; rows, sets, K and D are at least 1. std::runtime_error, naming the kernel,
// where a launch fails.
void launch_forward(const Forward& p, void* stream);
void launch_backward(const Backward& p, void* stream);

}  // namespace cuda
}  // namespace vvae
