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

// x to the first n > 0 elements at p, or added to them.
template <class T>
PLANAR_FN void put(T* p, typename Simd<T>::V x, int64_t n, bool add) {
  using S = Simd<T>;
  S::store_first(p, add ? x + S::load_first(p, n) : x, n);
}

template <class T>
PLANAR_FN void negate(T* x, int64_t length) {
  using S = Simd<T>;
  for (int64_t d = 0; d < length; d += S::width) S::store(x + d, -S::load(x + d));
}

// x in reverse order.
template <class T>
PLANAR_FN void reverse(T* to, const T* x, int64_t length) {
  for (int64_t d = 0; d < length; ++d) to[d] = x[length - 1 - d];
  for (int64_t d = length; d < padded<T>(length); ++d) to[d] = 0;
}

// x with zeros in the lanes up to i, or from i on.
template <class T>
PLANAR_FN typename Simd<T>::V after_lane(typename Simd<T>::V x, int i) {
  typename Simd<T>::I lanes{};
  for (int j = 0; j < Simd<T>::width; ++j) lanes[j] = j > i ? -1 : 0;
  return Simd<T>::select(lanes, x, Simd<T>::splat(0));
}

template <class T>
PLANAR_FN typename Simd<T>::V before_lane(typename Simd<T>::V x, int i) {
  typename Simd<T>::I lanes{};
  for (int j = 0; j < Simd<T>::width; ++j) lanes[j] = j < i ? -1 : 0;
  return Simd<T>::select(lanes, x, Simd<T>::splat(0));
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

// out [n] = (U + diagonal) x, where U is what lies above the diagonal of A [n][n].
template <class T>
PLANAR_FN void upper_dots(T* out, const T* A, const T* diagonal, int64_t n, const T* x) {
  using S = Simd<T>;
  for (int64_t m = 0; m < n; m += S::width) {
    typename S::V acc[S::width] = {};
    const int count = n - m < S::width ? int(n - m) : S::width;
    const auto here = S::load(x + m);
#pragma GCC unroll 16
    for (int i = 0; i < S::width; ++i)
      if (i < count) acc[i] = after_lane<T>(S::load_first(A + (m + i) * n + m, n - m), i) * here;
    for (int64_t d = m + S::width; d < n; d += S::width) {
      const auto part = S::load(x + d);
#pragma GCC unroll 16
      for (int i = 0; i < S::width; ++i) acc[i] += S::load_first(A + (m + i) * n + d, n - d) * part;
    }
    S::store(out + m, sum_lanes<T>(acc) + S::load_first(diagonal + m, n - m) * here);
  }
}

// out [n] = (L + diagonal) x, where L is what lies below the diagonal of A [n][n].
template <class T>
PLANAR_FN void lower_dots(T* out, const T* A, const T* diagonal, int64_t n, const T* x) {
  using S = Simd<T>;
  for (int64_t m = 0; m < n; m += S::width) {
    typename S::V acc[S::width] = {};
    const int count = n - m < S::width ? int(n - m) : S::width;
    const auto here = S::load(x + m);
    const auto rows = [&](int of_block) __attribute__((always_inline)) {
      for (int64_t d = 0; d < m; d += S::width) {
        const auto part = S::load(x + d);
#pragma GCC unroll 16
        for (int i = 0; i < of_block; ++i) acc[i] += S::load(A + (m + i) * n + d) * part;
      }
    };
    count == S::width ? rows(S::width) : rows(count);
#pragma GCC unroll 16
    for (int i = 0; i < S::width; ++i)
      if (i < count) acc[i] += before_lane<T>(S::load_first(A + (m + i) * n + m, n - m), i) * here;
    S::store(out + m, sum_lanes<T>(acc) + S::load_first(diagonal + m, n - m) * here);
  }
}

// out [n] = (U + diagonal)^T x, where U is what lies above the diagonal of A [n][n].
template <class T>
PLANAR_FN void upper_combine(T* out, const T* A, const T* diagonal, int64_t n, const T* x) {
  using S = Simd<T>;
  for (int64_t d = 0; d < n; d += S::width) {
    auto acc = S::load_first(diagonal + d, n - d) * S::load(x + d);
    for (int64_t m = 0; m < d; ++m) acc += S::splat(x[m]) * S::load_first(A + m * n + d, n - d);
    const int count = n - d < S::width ? int(n - d) : S::width;
#pragma GCC unroll 16
    for (int i = 0; i < S::width; ++i)
      if (i < count) acc += S::splat(x[d + i]) * after_lane<T>(S::load_first(A + (d + i) * n + d, n - d), i);
    S::store(out + d, acc);
  }
}

// out [n] = (L + diagonal)^T x, where L is what lies below the diagonal of A [n][n].
template <class T>
PLANAR_FN void lower_combine(T* out, const T* A, const T* diagonal, int64_t n, const T* x) {
  using S = Simd<T>;
  for (int64_t d = 0; d < n; d += S::width) {
    auto acc = S::load_first(diagonal + d, n - d) * S::load(x + d);
    const int count = n - d < S::width ? int(n - d) : S::width;
#pragma GCC unroll 16
    for (int i = 0; i < S::width; ++i)
      if (i < count) acc += S::splat(x[d + i]) * before_lane<T>(S::load_first(A + (d + i) * n + d, n - d), i);
    for (int64_t m = d + S::width; m < n; ++m) acc += S::splat(x[m]) * S::load(A + m * n + d);
    S::store(out + d, acc);
  }
}

// to [n][n] = x y^T above the diagonal, and u v^T below it, or zeros where there is no u; or that added.
template <class T>
PLANAR_FN void triangles(T* to, const T* x, const T* y, const T* u, const T* v, int64_t n, bool add) {
  using S = Simd<T>;
  for (int64_t m = 0; m < n; ++m) {
    T* row = to + m * n;
    const auto above = S::splat(x[m]), below = S::splat(u ? u[m] : 0);
    const int64_t block = m / S::width * S::width;
    for (int64_t d = 0; d < block && (u || !add); d += S::width)
      put(row + d, u ? below * S::load(v + d) : S::splat(0), n - d, add);
    auto part = after_lane<T>(above * S::load(y + block), int(m - block));
    if (u) part += before_lane<T>(below * S::load(v + block), int(m - block));
    put(row + block, part, n - block, add);
    for (int64_t d = block + S::width; d < n; d += S::width) put(row + d, above * S::load(y + d), n - d, add);
  }
}

// to [rows][length] = x g^T + y z^T for x, y [rows] and g, z [length], or that added.
template <class T>
PLANAR_FN void outer_pair(T* to, const T* x, const T* g, const T* y, const T* z, int64_t rows, int64_t length,
                          bool add) {
  using S = Simd<T>;
  for (int64_t d = 0; d < length; d += S::width) {
    const auto of_g = S::load(g + d), of_z = S::load(z + d);
    for (int64_t m = 0; m < rows; ++m)
      put(to + m * length + d, S::splat(x[m]) * of_g + S::splat(y[m]) * of_z, length - d, add);
  }
}

}  // namespace PLANAR_NAMESPACE
}  // namespace vvae
