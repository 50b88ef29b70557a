// The products of a Sylvester layer for one row: with Q's columns, which lie in rows, and with upper triangles. Vectors
// run along the rows of the matrices. x and out are scratch memory, padded to whole vectors, with zeros behind their
// length; out may be written behind it.
#pragma once

#include "../simd/tile.h"
#include "args.h"

namespace vvae {
namespace PLANAR_NAMESPACE {

template <class T>
PLANAR_FN int64_t padded(int64_t n) {
  return round_up(n, Simd<T>::width);
}

// Of `from` [length], zeros behind.
template <class T>
PLANAR_FN void copy_in(T* to, const T* from, int64_t length) {
  using S = Simd<T>;
  for (int64_t d = 0; d < length; d += S::width) S::store(to + d, S::load_first(from + d, length - d));
}

template <class T>
PLANAR_FN void copy_out(T* to, const T* from, int64_t length) {
  using S = Simd<T>;
  for (int64_t d = 0; d < length; d += S::width) S::store_first(to + d, S::load(from + d), length - d);
}

// x in reverse order.
template <class T>
PLANAR_FN void reverse(T* to, const T* x, int64_t length) {
  for (int64_t d = 0; d < length; ++d) to[d] = x[length - 1 - d];
  for (int64_t d = length; d < padded<T>(length); ++d) to[d] = 0;
}

// The lanes from i on.
template <class T>
PLANAR_FN typename Simd<T>::I from_lane(int i) {
  typename Simd<T>::I lanes;
  for (int j = 0; j < Simd<T>::width; ++j) lanes[j] = j >= i ? -1 : 0;
  return lanes;
}

// Lane i of the result is the dot product of x with row i of A [rows][length], for up to a vector of rows.
template <class T, int N>
PLANAR_FN typename Simd<T>::V dots_of(const T* A, int rows, int64_t length, const T* x) {
  using S = Simd<T>;
  typename S::V acc[S::width] = {};
  const int count = N ? N : rows;
  int64_t d = 0;
  for (; d + S::width <= length; d += S::width) {
    const auto part = S::load(x + d);
#pragma GCC unroll 16
    for (int i = 0; i < count; ++i) acc[i] += S::load(A + i * length + d) * part;
  }
  if (d < length) {
    const auto part = S::load(x + d);
#pragma GCC unroll 16
    for (int i = 0; i < count; ++i) acc[i] += S::load_first(A + i * length + d, length - d) * part;
  }
  return sum_lanes<T>(acc);
}

// out [rows] = A x for A [rows][length].
template <class T>
PLANAR_FN void dots(T* out, const T* A, int64_t rows, int64_t length, const T* x) {
  using S = Simd<T>;
  int64_t m = 0;
  for (; m + S::width <= rows; m += S::width)
    S::store(out + m, dots_of<T, S::width>(A + m * length, S::width, length, x));
  if (m < rows) S::store(out + m, dots_of<T, 0>(A + m * length, int(rows - m), length, x));
}

// out [length] += A^T x for A [rows][length], N vectors of out.
template <class T, int N>
PLANAR_FN void combine_part(T* out, const T* A, int64_t rows, int64_t length, const T* x) {
  using S = Simd<T>;
  typename S::V acc[N];
  for (int v = 0; v < N; ++v) acc[v] = S::load(out + v * S::width);
  for (int64_t m = 0; m < rows; ++m) {
    const auto of_row = S::splat(x[m]);
    for (int v = 0; v < N; ++v) acc[v] += of_row * S::load(A + m * length + v * S::width);
  }
  for (int v = 0; v < N; ++v) S::store(out + v * S::width, acc[v]);
}

template <class T>
PLANAR_FN void combine(T* out, const T* A, int64_t rows, int64_t length, const T* x) {
  using S = Simd<T>;
  int64_t d = 0;
  for (; d + 4 * S::width <= length; d += 4 * S::width) combine_part<T, 4>(out + d, A + d, rows, length, x);
  for (; d + S::width <= length; d += S::width) combine_part<T, 1>(out + d, A + d, rows, length, x);
  if (d >= length) return;
  auto acc = S::load(out + d);
  for (int64_t m = 0; m < rows; ++m) acc += S::splat(x[m]) * S::load_first(A + m * length + d, length - d);
  S::store(out + d, acc);
}

// out [n] = A x for an upper triangle A [n][n].
template <class T>
PLANAR_FN void upper_dots(T* out, const T* A, int64_t n, const T* x) {
  using S = Simd<T>;
  for (int64_t m = 0; m < n; m += S::width) {
    typename S::V acc[S::width] = {};
    const int count = n - m < S::width ? int(n - m) : S::width;
    const auto on_diagonal = S::load(x + m);
#pragma GCC unroll 16
    for (int i = 0; i < S::width; ++i)
      if (i < count) {
        const auto part = S::load_first(A + (m + i) * n + m, n - m);
        acc[i] = S::select(from_lane<T>(i), part, S::splat(0)) * on_diagonal;
      }
    for (int64_t d = m + S::width; d < n; d += S::width) {
      const auto part = S::load(x + d);
#pragma GCC unroll 16
      for (int i = 0; i < S::width; ++i) acc[i] += S::load_first(A + (m + i) * n + d, n - d) * part;
    }
    S::store(out + m, sum_lanes<T>(acc));
  }
}

// out [n] = A^T x for an upper triangle A [n][n].
template <class T>
PLANAR_FN void upper_combine(T* out, const T* A, int64_t n, const T* x) {
  using S = Simd<T>;
  for (int64_t d = 0; d < n; d += S::width) {
    auto acc = S::splat(0);
    for (int64_t m = 0; m < d; ++m) acc += S::splat(x[m]) * S::load_first(A + m * n + d, n - d);
    const int count = n - d < S::width ? int(n - d) : S::width;
#pragma GCC unroll 16
    for (int i = 0; i < S::width; ++i)
      if (i < count) {
        const auto part = S::load_first(A + (d + i) * n + d, n - d);
        acc += S::splat(x[d + i]) * S::select(from_lane<T>(i), part, S::splat(0));
      }
    S::store(out + d, acc);
  }
}

// to [n][n] = the upper triangle of x y^T, zeros below, or that added.
template <class T>
PLANAR_FN void upper_outer(T* to, const T* x, const T* y, int64_t n, bool add) {
  using S = Simd<T>;
  for (int64_t m = 0; m < n; ++m) {
    T* row = to + m * n;
    const auto of_row = S::splat(x[m]);
    const int64_t diagonal = m / S::width * S::width;
    for (int64_t d = add ? diagonal : 0; d < n; d += S::width) {
      auto part = d < diagonal ? S::splat(0) : of_row * S::load(y + d);
      if (d == diagonal) part = S::select(from_lane<T>(int(m - diagonal)), part, S::splat(0));
      if (add) part += S::load_first(row + d, n - d);
      S::store_first(row + d, part, n - d);
    }
  }
}

// to [rows][length] = x g^T + y z^T for x, y [rows] and g, z [length], or that added.
template <class T>
PLANAR_FN void outer_pair(T* to, const T* x, const T* g, const T* y, const T* z, int64_t rows, int64_t length,
                          bool add) {
  using S = Simd<T>;
  for (int64_t d = 0; d < length; d += S::width) {
    const auto of_g = S::load(g + d), of_z = S::load(z + d);
    for (int64_t m = 0; m < rows; ++m) {
      auto part = S::splat(x[m]) * of_g + S::splat(y[m]) * of_z;
      T* at = to + m * length + d;
      if (add) part += S::load_first(at, length - d);
      S::store_first(at, part, length - d);
    }
  }
}

}  // namespace PLANAR_NAMESPACE
}  // namespace vvae
