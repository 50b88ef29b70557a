// The product of headed flows: of the parameters of some steps, and of the gradients of weight and context.
#pragma once

#include "../amortized.h"

namespace vvae {
namespace PLANAR_NAMESPACE {

// A [rows][inner] with A[m][i] at A[m * a_m + i * a_i], and X [inner][columns], whose rows are contiguous.
template <class T>
struct Factors {
  const T* A;
  int64_t a_m, a_i;
  const T* X;
  int64_t x_row, inner;
};

// What A X is added to, after its sum: column has an element for each row.
enum class Start { zero, out, column };

constexpr int64_t kInner = 128;  // products of one sum: of long sums, rounding would grow with F

// M rows of V vectors, of which the last has `last` elements.
template <class T, int M, int V>
PLANAR_FN void multiply_block(T* out, int64_t out_row, const Factors<T>& f, Start start, const T* column,
                              int64_t last) {
  using S = Simd<T>;
  typename S::V acc[M][V];
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < V; ++v) acc[m][v] = S::splat(0);
  const T *A = f.A, *X = f.X;
  for (int64_t i = 0; i < f.inner; ++i, A += f.a_i, X += f.x_row) {
    typename S::V x[V];
    for (int v = 0; v < V; ++v) x[v] = v + 1 < V ? S::load(X + v * S::width) : S::load_first(X + v * S::width, last);
    for (int m = 0; m < M; ++m)
      for (int v = 0; v < V; ++v) acc[m][v] += A[m * f.a_m] * x[v];
  }
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < V; ++v) {
      T* p = out + m * out_row + v * S::width;
      const bool whole = v + 1 < V;
      if (start == Start::out) acc[m][v] += whole ? S::load(p) : S::load_first(p, last);
      if (start == Start::column) acc[m][v] += column[m];
      if (whole)
        S::store(p, acc[m][v]);
      else
        S::store_first(p, acc[m][v], last);
    }
}

// V vectors of columns, in blocks of as many rows as leave a register to each sum.
template <class T, int V>
PLANAR_FN void multiply_columns(T* out, int64_t out_row, Factors<T> f, Start start, const T* column, int64_t rows,
                                int64_t columns) {
  constexpr int M = (PLANAR_VECTOR_BYTES == 64 ? 16 : 8) / V;
  const int64_t last = columns - (V - 1) * Simd<T>::width;
  int64_t m = 0;
  for (; m + M <= rows; m += M, f.A += M * f.a_m)
    multiply_block<T, M, V>(out + m * out_row, out_row, f, start, column + m, last);
  for (; m < rows; ++m, f.A += f.a_m)
    multiply_block<T, 1, V>(out + m * out_row, out_row, f, start, column + m, last);
}

template <class T>
PLANAR_FN void multiply_run(T* out, int64_t out_row, Factors<T> f, Start start, const T* column, int64_t rows,
                            int64_t columns) {
  constexpr int64_t W = Simd<T>::width;
  for (int64_t j = 0; j < columns; j += kRegisters * W, f.X += kRegisters * W) {
    const int64_t rest = columns - j;
    if constexpr (kRegisters == 4) {
      if (rest > 3 * W) {
        multiply_columns<T, 4>(out + j, out_row, f, start, column, rows, rest < 4 * W ? rest : 4 * W);
        continue;
      }
      if (rest > 2 * W) {
        multiply_columns<T, 3>(out + j, out_row, f, start, column, rows, rest);
        continue;
      }
    }
    if (rest > W)
      multiply_columns<T, 2>(out + j, out_row, f, start, column, rows, rest < 2 * W ? rest : 2 * W);
    else
      multiply_columns<T, 1>(out + j, out_row, f, start, column, rows, rest);
  }
}

// out [rows][columns] = A X and what it is added to; rows of out are contiguous.
template <class T>
PLANAR_FN void multiply(T* out, int64_t out_row, Factors<T> f, Start start, const T* column, int64_t rows,
                        int64_t columns) {
  const int64_t inner = f.inner;
  f.inner = inner < kInner ? inner : kInner;
  multiply_run(out, out_row, f, start, column, rows, columns);
  for (int64_t i = kInner; i < inner; i += kInner) {
    f.A += kInner * f.a_i, f.X += kInner * f.x_row;
    f.inner = inner - i < kInner ? inner - i : kInner;
    multiply_run(out, out_row, f, Start::out, column, rows, columns);
  }
}

}  // namespace PLANAR_NAMESPACE
}  // namespace vvae
