// What schedule.h and the kernels of each instruction set agree on: arguments by value, scratch sizes,
// and a table of functions. No torch.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <type_traits>

#include "../planar/args.h"
#include "../planar/chunks.h"
#include "headed/args.h"
#include "sylvester/args.h"

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
    const bool standard = p.spec.is_standard();
    return p.inverse ? (standard ? tanh_inverse : any_inverse) : (standard ? tanh : any);
  }
};

// A table of kernels for each type.
template <template <class> class Table>
struct Tables {
  Table<float> f32;
  Table<double> f64;

  template <class T>
  const Table<T>& of() const {
    if constexpr (std::is_same_v<T, float>)
      return f32;
    else
      return f64;
  }
};

struct Isa {
  const char* name;
  bool (*runs_here)();
  Tables<Kernels> planar;
  Tables<SylvesterKernels> sylvester;
  Tables<HeadedKernels> headed;
};

extern const Isa isa_avx512, isa_avx2, isa_baseline;

}  // namespace vvae
