// What the driver (planar_cpu.cpp) and the kernels of each instruction set agree on: arguments by value, scratch sizes,
// and a table of functions. No torch.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace vvae {

constexpr int kTile = 64;       // samples of a tile: z, the pre-activations and H of one tile stay in L2
constexpr int kChunk = 16;      // the most steps of a chunk of the compact form, docs/math.md (9)
constexpr int kMaxLanes = 16;   // the widest vector: 64 bytes of float

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
constexpr int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }

// Steps of a chunk: many more than dim would sum more vectors than the space has dimensions, and cancel.
constexpr int64_t chunk_of(int64_t dim) { return dim >= 16 ? kChunk : dim >= 8 ? 8 : 4; }

template <class T>
struct Matrix {  // element [i][j] at data[i * row + j * col]
  T* data;
  int64_t row, col;
  Matrix from(int64_t i) const { return {data + i * row, row, col}; }
};

template <class T>
struct Params {  // element [set][step][d] at data[set * set_stride + step * step_stride + d * col]
  const T* data;
  int64_t set, step, col;
};

template <class T>
struct Problem {  // row r of z uses parameter set r mod sets
  int64_t rows, dim, steps, sets;
  bool constrained;
  Matrix<const T> z;
  Params<T> u, w, b;
};

template <class T>
struct Forward : Problem<T> {
  T* z_K;      // [rows][dim]
  T* log_det;  // [rows]
  T* a;        // [steps][rows], or null where nothing is saved
};

template <class T>
struct Backward : Problem<T> {
  Matrix<const T> grad_z;
  const T* grad_log_det;
  int64_t grad_log_det_stride;
  const T* a;   // [steps][rows]
  T* dz;        // [rows][dim]
  T *du, *dw;   // [sets][steps][dim]
  T* db;        // [sets][steps]
};

// Shared parameters, prepared once a pass: contiguous, constrained, with the Gram matrix of each chunk.
template <class T>
struct Prepared {
  int64_t chunk;
  T *u_hat, *w;                               // [steps][dim]
  T* gram;                                    // [steps][kChunk]: [j][i] = u_hat_j . w_k, k step i of j's chunk
  T *b, *alpha, *n, *c, *s, *rho, *inv_n;     // [padded steps]
  static int64_t size(int64_t steps, int64_t dim) {
    return 2 * steps * dim + steps * kChunk + 7 * round_up(steps, kMaxLanes);
  }
  Prepared(T* p, int64_t steps, int64_t dim) {
    const int64_t padded = round_up(steps, kMaxLanes);
    chunk = chunk_of(dim);
    u_hat = p, w = u_hat + steps * dim, gram = w + steps * dim;
    b = gram + steps * kChunk, alpha = b + padded, n = alpha + padded, c = n + padded;
    s = c + padded, rho = s + padded, inv_n = rho + padded;
  }
};

// The sums over samples of one slice of the tiles; slices are added in order, so the bits do not depend on threads.
template <class T>
struct Partial {
  T *du_hat, *dw;       // [padded steps][padded dim] in blocks
  T* triangle;          // [padded steps][kChunk] in blocks: each chunk's S of docs/math.md (14)
  T *db, *gamma;        // [padded steps][kMaxLanes], a sum a lane
  static int64_t size(int64_t steps, int64_t dim) {
    const int64_t padded = round_up(steps, kChunk);
    return padded * (2 * round_up(dim, 4) + kChunk + 2 * kMaxLanes);
  }
  Partial(T* p, int64_t steps, int64_t dim) {
    const int64_t padded = round_up(steps, kChunk), matrix = padded * round_up(dim, 4);
    du_hat = p, dw = du_hat + matrix, triangle = dw + matrix;
    db = triangle + padded * kChunk, gamma = db + padded * kMaxLanes;
  }
};

template <class T>
struct Kernels {
  int lanes;  // rows of an amortized block
  void (*prepare)(const Problem<T>&, const Prepared<T>&);
  int64_t (*shared_forward_scratch)(int64_t steps, int64_t dim);
  void (*shared_forward)(const Forward<T>&, const Prepared<T>&, int64_t tile, T* scratch);
  int64_t (*shared_backward_scratch)(int64_t steps, int64_t dim);
  void (*shared_backward)(const Backward<T>&, const Prepared<T>&, const Partial<T>&, int64_t tile, T* scratch);
  void (*finish)(const Backward<T>&, const Prepared<T>&, T* partials, int64_t slices, T* scratch);
  int64_t (*amortized_scratch)(int64_t steps, int64_t dim);
  void (*amortized_forward)(const Forward<T>&, int64_t block, T* scratch);
  void (*amortized_backward)(const Backward<T>&, int64_t block, T* scratch);
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
