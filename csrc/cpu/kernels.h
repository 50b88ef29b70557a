// What the driver (planar_cpu.cpp) and the kernels of each instruction set agree on: arguments by value, scratch sizes,
// and a table of functions. No torch.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "../chunks.h"
#include "../formulas.h"

namespace vvae {

constexpr int kTile = 64;       // samples of a tile: z, the pre-activations and H of one tile stay in L2
constexpr int kMaxLanes = 16;   // the widest vector: 64 bytes of float
static_assert(kTile % kChunk == 0, "no chunk of steps lies in two tiles of steps");

// Steps of a span of chunks: the backward keeps z where a span starts, and reaches the rest through the triangle of
// (14). No more steps than dimensions, for the same reason, and no more than the triangle is worth.
constexpr int kMaxSpan = 64;
constexpr int64_t span_of(int64_t dim) {
  const int64_t chunk = chunk_of(dim), most = dim < kMaxSpan ? dim : kMaxSpan;
  return most < chunk ? chunk : most / chunk * chunk;
}

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

// Every by-th row, element or lane from the first on.
template <class T>
Matrix<T> every(const Matrix<T>& x, int64_t first, int64_t by) {
  return {x.data + first * x.row, by * x.row, x.col};
}
template <class T>
Column<T> every(const Column<T>& x, int64_t first, int64_t by) {
  return {x.data + first * x.stride, by * x.stride};
}
template <class T>
Matrix<T> every_lane(const Matrix<T>& x, int64_t first, int64_t by) {
  return {x.data ? x.data + first * x.col : nullptr, x.row, by * x.col};
}

// x [steps][...] from its last step to its first.
template <class T>
Matrix<T> reversed(const Matrix<T>& x, int64_t steps) {
  return {x.data && steps ? x.data + (steps - 1) * x.row : x.data, -x.row, x.col};
}

template <class T>
struct Params {  // element [set][step][d] at data[set * set_stride + step * step_stride + d * col]
  T* data;
  int64_t set, step, col;
  Params of_set(int64_t i) const { return {data + i * set, 0, step, col}; }
};

template <class T>
Params<T> reversed(const Params<T>& x, int64_t steps) {
  return {steps ? x.data + (steps - 1) * x.step : x.data, x.set, -x.step, x.col};
}

// Row r of z uses parameter set r mod sets. The inverse has its steps in the order in which it takes them, the flow's
// last one first: all that is indexed by steps runs backwards through memory.
template <class T>
struct Problem {
  int64_t rows, dim, steps, sets;
  Formulas formulas;
  bool inverse;  // z is what the flow gives, z_K becomes what it started from, and log_det the inverse map's
  Matrix<const T> z;
  Params<const T> u, w, b;
  bool stream;  // outputs so large that they leave the caches before anyone reads them
};

template <class T>
struct Forward : Problem<T> {
  Matrix<T> z_K;  // [rows][dim], columns contiguous
  Column<T> log_det;
  Matrix<T> a;  // [steps][rows], data null where nothing is saved
};

template <class T>
struct Backward : Problem<T> {
  Matrix<const T> grad_z;
  Column<const T> grad_log_det;
  Matrix<const T> a;     // [steps][rows]
  Matrix<T> dz;          // [rows][dim], columns contiguous
  Params<T> du, dw, db;  // columns contiguous; data null where dz alone is wanted
  bool wants_params() const { return db.data; }  // of D = 0, du and dw have no memory
};

// Shared parameters, prepared once a pass: contiguous, constrained, with the Gram matrix of each chunk.
template <class T>
struct Prepared {
  int64_t chunk, span;
  T *u_hat, *w;                                    // [steps][dim]
  T* gram;                                         // [steps][kChunk]: [j][i] = u_hat_j . w_k, k step i of j's chunk
  T *b, *alpha, *n, *c, *s, *sunk, *unit, *inv_n;  // [padded steps]
  static int64_t size(int64_t steps, int64_t dim) {
    return 2 * steps * dim + steps * kChunk + 8 * round_up(steps, kMaxLanes);
  }
  Prepared(T* p, int64_t steps, int64_t dim) {
    const int64_t padded = round_up(steps, kMaxLanes);
    chunk = chunk_of(dim), span = span_of(dim);
    u_hat = p, w = u_hat + steps * dim, gram = w + steps * dim;
    b = gram + steps * kChunk, alpha = b + padded, n = alpha + padded, c = n + padded;
    s = c + padded, sunk = s + padded, unit = sunk + padded, inv_n = unit + padded;
  }
};

// The sums over samples of one slice of the tiles; slices are added in order, so the bits do not depend on threads.
// Nothing is summed where dz alone is wanted.
template <class T>
struct Partial {
  T *du_hat, *dw;       // [padded steps][padded dim] in blocks
  T* triangle;          // [padded steps / chunk][span][chunk] in blocks: S of docs/math.md (14); a chunk fills the rows
                        // of its span up to its own
  T *db, *gamma;        // [padded steps][kMaxLanes], a sum a lane
  static int64_t size(int64_t steps, int64_t dim) {
    const int64_t padded = round_up(steps, kChunk);
    return padded * (2 * round_up(dim, 4) + span_of(dim) + 2 * kMaxLanes);
  }
  Partial(T* p, int64_t steps, int64_t dim) {
    const int64_t padded = round_up(steps, kChunk), matrix = padded * round_up(dim, 4);
    du_hat = p, dw = du_hat + matrix, triangle = dw + matrix;
    db = triangle + padded * span_of(dim), gamma = db + padded * kMaxLanes;
  }
};

// What depends on the activation and on the direction.
template <class T>
struct Passes {
  void (*shared_forward)(const Forward<T>&, const Prepared<T>&, int64_t tile, T* scratch);
  void (*shared_backward)(const Backward<T>&, const Prepared<T>&, const Partial<T>&, int64_t tile, T* scratch);
  void (*amortized_forward)(const Forward<T>&, int64_t block, T* scratch);
  void (*amortized_backward)(const Backward<T>&, int64_t block, T* scratch);
};

template <class T>
struct Kernels {
  int lanes;  // rows of an amortized block
  int64_t (*prepare_scratch)(int64_t dim);
  void (*prepare)(const Problem<T>&, const Prepared<T>&, T* scratch);
  void (*finish)(const Backward<T>&, const Prepared<T>&, T* partials, int64_t slices, T* scratch);
  int64_t (*shared_forward_scratch)(int64_t steps, int64_t dim);
  int64_t (*shared_backward_scratch)(int64_t steps, int64_t dim);
  int64_t (*amortized_forward_scratch)(int64_t steps, int64_t dim);
  int64_t (*amortized_backward_scratch)(int64_t steps, int64_t dim);
  Passes<T> tanh, any, tanh_inverse, any_inverse;

  const Passes<T>& passes(const Problem<T>& p) const {
    const bool is_tanh = p.formulas.is_tanh();
    return p.inverse ? (is_tanh ? tanh_inverse : any_inverse) : (is_tanh ? tanh : any);
  }
};

struct Isa {
  const char* name;
  bool (*runs_here)();
  Kernels<float> f32;
  Kernels<double> f64;
  const Kernels<float>& of(float) const { return f32; }
  const Kernels<double>& of(double) const { return f64; }
};

extern const Isa isa_avx512, isa_avx2, isa_baseline;

}  // namespace vvae
