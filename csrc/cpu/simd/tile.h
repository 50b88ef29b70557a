// Tiles of samples: a matrix [m][kTile] holds one row a latent dimension (or a step) and one lane a sample, so that the
// scan over steps and every product run side by side over samples, without any exchange between lanes.
#pragma once

#include "../../planar/log_det.h"
#include "../kernels.h"
#include "vector.h"

namespace vvae {
namespace PLANAR_NAMESPACE {

constexpr int kRegisters = PLANAR_VECTOR_BYTES == 64 ? 4 : 2;  // vectors side by side in a product's block

// out [M][kTile] += A X for X [inner][kTile], with A[m][i] at A[m * a_m + i * a_i]: one block of M rows.
template <class T, int M>
PLANAR_FN void product_block(T* out, const T* A, int64_t a_m, int64_t a_i, const T* X, int64_t inner) {
  using S = Simd<T>;
  for (int lane = 0; lane < kTile; lane += kRegisters * S::width) {
    typename S::V acc[M][kRegisters];
    for (int m = 0; m < M; ++m)
      for (int v = 0; v < kRegisters; ++v) acc[m][v] = S::load(out + m * kTile + lane + v * S::width);
    for (int64_t i = 0; i < inner; ++i) {
      typename S::V x[kRegisters];
      for (int v = 0; v < kRegisters; ++v) x[v] = S::load(X + i * kTile + lane + v * S::width);
      for (int m = 0; m < M; ++m)
        for (int v = 0; v < kRegisters; ++v) acc[m][v] += A[m * a_m + i * a_i] * x[v];
    }
    for (int m = 0; m < M; ++m)
      for (int v = 0; v < kRegisters; ++v) S::store(out + m * kTile + lane + v * S::width, acc[m][v]);
  }
}

// out [rows][kTile] += A X for X [inner][kTile].
template <class T>
PLANAR_FN void product(T* out, const T* A, int64_t a_m, int64_t a_i, const T* X, int64_t rows, int64_t inner) {
  int64_t m = 0;
  for (; m + 4 <= rows; m += 4) product_block<T, 4>(out + m * kTile, A + m * a_m, a_m, a_i, X, inner);
  for (; m < rows; ++m) product_block<T, 1>(out + m * kTile, A + m * a_m, a_m, a_i, X, inner);
}

// A matrix of sums over samples, in blocks of kBlockM x kBlockN each of which is contiguous: a block is
// what one pass of `outer` holds in registers.
constexpr int kBlockM = 4, kBlockN = PLANAR_VECTOR_BYTES == 64 ? 4 : 2;
constexpr int kBlock = kBlockM * kBlockN;

PLANAR_FN int64_t block_index(int64_t m, int64_t n, int64_t columns) {
  return ((m / kBlockM) * (columns / kBlockN) + n / kBlockN) * kBlock + (m % kBlockM) * kBlockN + n % kBlockN;
}

// out [rows][columns] in blocks += X Y^T, summed over the kTile samples; rows and columns are multiples of 4, X is
// [rows][kTile], Y [columns][kTile].
template <class T>
PLANAR_FN void outer(T* out, const T* X, const T* Y, int64_t rows, int64_t columns) {
  using S = Simd<T>;
  for (int64_t m = 0; m < rows; m += kBlockM)
    for (int64_t n = 0; n < columns; n += kBlockN) {
      typename S::V acc[kBlock] = {};
      for (int lane = 0; lane < kTile; lane += S::width) {
        typename S::V y[kBlockN];
        for (int j = 0; j < kBlockN; ++j) y[j] = S::load(Y + (n + j) * kTile + lane);
        for (int i = 0; i < kBlockM; ++i) {
          const auto x = S::load(X + (m + i) * kTile + lane);
          for (int j = 0; j < kBlockN; ++j) acc[i * kBlockN + j] += x * y[j];
        }
      }
#pragma GCC unroll 16
      for (int i = 0; i < kBlock; i += S::width) S::store(out + i, S::load(out + i) + sum_lanes<T>(acc + i));
      out += kBlock;
    }
}

template <class T>
PLANAR_FN void fill(T* p, T value, int64_t n) {
  for (int64_t i = 0; i < n; ++i) p[i] = value;
}

// A whole vector, past the caches where `stream` says so and its address allows it.
template <class T>
PLANAR_FN void store_whole(T* p, typename Simd<T>::V x, bool stream) {
  using S = Simd<T>;
  if (stream && reinterpret_cast<uintptr_t>(p) % sizeof(x) == 0) return S::stream(p, x);
  S::store(p, x);
}

// The first n elements of x to and from a row of a tile, or of its first `lanes`.
template <class T>
PLANAR_FN void load_lanes(T* to, Column<const T> x, int64_t n, T rest, int64_t lanes = kTile) {
  if (x.stride == 1) {
    for (int64_t i = 0; i < n; ++i) to[i] = x.data[i];
  } else {
    for (int64_t i = 0; i < n; ++i) to[i] = x.data[i * x.stride];
  }
  for (int64_t i = n; i < lanes; ++i) to[i] = rest;
}

template <class T>
PLANAR_FN void store_lanes(const T* from, Column<T> x, int64_t n, bool stream = false) {
  using S = Simd<T>;
  if (x.stride == 1 && n == kTile) {
    for (int64_t i = 0; i < n; i += S::width) store_whole(x.data + i, S::load(from + i), stream);
  } else if (x.stride == 1) {
    for (int64_t i = 0; i < n; ++i) x.data[i] = from[i];
  } else {
    for (int64_t i = 0; i < n; ++i) x.data[i * x.stride] = from[i];
  }
}

// The columns of a row from which on transposing vectors is faster than moving single elements.
template <class T>
constexpr int64_t kTransposed = Simd<T>::width / 2;

// tile [dim][kTile] = the transpose of rows 0..n of x, lanes behind n zero. With fewer `lanes`, whole vectors, the
// others stay as they are.
template <class T>
PLANAR_FN void load_tile(T* tile, Matrix<const T> x, int64_t n, int64_t dim, int64_t lanes = kTile) {
  using S = Simd<T>;
  constexpr int W = S::width;
  if (x.col != 1 || dim < kTransposed<T>) {
    for (int64_t d = 0; d < dim; ++d)
      load_lanes(tile + d * kTile, Column<const T>{x.data + d * x.col, x.row}, n, T(0), lanes);
    return;
  }
  for (int64_t lane = 0; lane < n; lane += W)
    for (int64_t d = 0; d < dim; d += W) {
      typename S::V block[W];
      for (int i = 0; i < W; ++i) {
        block[i] = S::splat(0);
        if (lane + i < n) block[i] = S::load_first(x.data + (lane + i) * x.row + d, dim - d);
      }
      transpose<T>(block);
      for (int i = 0; i < W; ++i)
        if (d + i < dim) S::store(tile + (d + i) * kTile + lane, block[i]);
    }
  const int64_t loaded = round_up(n, W);
  for (int64_t d = 0; d < dim && loaded < lanes; ++d) fill(tile + d * kTile + loaded, T(0), lanes - loaded);
}

// Rows 0..n of x [.][dim] = the transpose of tile [dim][kTile].
template <class T>
PLANAR_FN void store_tile(const T* tile, Matrix<T> x, int64_t n, int64_t dim, bool stream = false) {
  using S = Simd<T>;
  constexpr int W = S::width;
  if (dim < kTransposed<T>) {
    for (int64_t d = 0; d < dim; ++d) store_lanes(tile + d * kTile, Column<T>{x.data + d, x.row}, n);
    return;
  }
  for (int64_t lane = 0; lane < n; lane += W)
    for (int64_t d = 0; d < dim; d += W) {
      typename S::V block[W];
      for (int i = 0; i < W; ++i) {
        block[i] = S::splat(0);
        if (d + i < dim) block[i] = S::load(tile + (d + i) * kTile + lane);
      }
      transpose<T>(block);
      for (int i = 0; i < W && lane + i < n; ++i) {
        T* to = x.data + (lane + i) * x.row + d;
        if (d + W <= dim)
          store_whole(to, block[i], stream);
        else
          S::store_first(to, block[i], dim - d);
      }
    }
}

// The sums (26) of a tile between two chunks of steps: their parts log, high and low, [kTile] each.
template <class T>
PLANAR_FN LogDet<Simd<T>> load_sum(const T* sums) {
  using S = Simd<T>;
  return {S::load(sums), S::load(sums + kTile), S::load(sums + 2 * kTile)};
}
template <class T>
PLANAR_FN void store_sum(T* sums, const LogDet<Simd<T>>& sum) {
  using S = Simd<T>;
  S::store(sums, sum.log), S::store(sums + kTile, sum.high), S::store(sums + 2 * kTile, sum.low);
}

// Asks for the rows of x that the tile from `row` on will load: more streams than the hardware follows by itself.
template <class T>
PLANAR_FN void prefetch_tile(Matrix<const T> x, int64_t row, int64_t rows, int64_t dim) {
  if (x.col != 1) return;
  for (int64_t i = row; i < rows && i < row + kTile; ++i)
    for (int64_t d = 0; d < dim; d += int64_t(64 / sizeof(T))) __builtin_prefetch(x.data + i * x.row + d);
}

template <class T>
PLANAR_FN void copy(T* to, const T* from, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = from[i];
}

// x . y in parts, one a lane.
template <class T>
PLANAR_FN typename Simd<T>::V dot(const T* x, const T* y, int64_t n) {
  using S = Simd<T>;
  typename S::V sum{};
  for (int64_t d = 0; d < n; d += S::width) sum += S::load_first(x + d, n - d) * S::load_first(y + d, n - d);
  return sum;
}

// The first n elements at p, `stride` apart, zeros behind them.
template <class T>
PLANAR_FN typename Simd<T>::V load_strided(const T* p, int64_t stride, int64_t n) {
  using S = Simd<T>;
  if (stride == 1) return S::load_first(p, n);
  typename S::V x{};
  for (int i = 0; i < S::width; ++i)
    if (i < n) x[i] = p[i * stride];
  return x;
}

template <class T>
PLANAR_FN T* step_of(const Params<T>& p, int64_t set, int64_t k) {
  return p.data + set * p.set + k * p.step;
}

}  // namespace PLANAR_NAMESPACE
}  // namespace vvae
