// What the compiler's vector extensions cannot say, in the intrinsics of each vector size. Each isa_*.cpp includes this
// through simd.h, having set PLANAR_NAMESPACE and PLANAR_VECTOR_BYTES.
//
//   first(n)          the mask of the first n >= 0 lanes
//   load, store       the lanes of a mask alone touch memory; the others load `rest`
//   stream, fence     a store past the caches to a whole, aligned vector; what other threads need before they read it
//   max(a, b)         a > b ? a : b, so that a NaN in b stays
//   multiply_add      a * b + c, rounded once where the processor can. Left to the compiler, which of two products is
//                     rounded depends on what else a kernel computes
//   product_error     what rounding took from a * b = ab
//   any(x)            whether a bit of x is set
#pragma once

#include <stdint.h>
#if PLANAR_VECTOR_BYTES > 16
#include <immintrin.h>
#endif

#include "../../planar/lane.h"

namespace vvae {
namespace PLANAR_NAMESPACE {

template <class T>
struct Native;

#if PLANAR_VECTOR_BYTES == 64

template <>
struct Native<float> {
  typedef float V __attribute__((vector_size(64)));
  typedef int32_t I __attribute__((vector_size(64)));
  using Mask = __mmask16;
  PLANAR_FN Mask first(int64_t n) { return Mask(n >= 16 ? 0xffff : (1u << n) - 1); }
  PLANAR_FN V load(const float* p, Mask m, V rest) { return (V)_mm512_mask_loadu_ps((__m512)rest, m, p); }
  PLANAR_FN void store(float* p, V x, Mask m) { _mm512_mask_storeu_ps(p, m, (__m512)x); }
  PLANAR_FN void stream(float* p, V x) { _mm512_stream_ps(p, (__m512)x); }
  PLANAR_FN void fence() { _mm_sfence(); }
  PLANAR_FN V max(V a, V b) { return (V)_mm512_mask_max_ps((__m512)a, 0xffff, (__m512)a, (__m512)b); }
  PLANAR_FN V multiply_add(V a, V b, V c) { return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
  PLANAR_FN V product_error(V a, V b, V ab) { return (V)_mm512_fmsub_ps((__m512)a, (__m512)b, (__m512)ab); }
  PLANAR_FN bool any(I x) { return _mm512_test_epi32_mask((__m512i)x, (__m512i)x) != 0; }
};

template <>
struct Native<double> {
  typedef double V __attribute__((vector_size(64)));
  typedef int64_t I __attribute__((vector_size(64)));
  using Mask = __mmask8;
  PLANAR_FN Mask first(int64_t n) { return Mask(n >= 8 ? 0xff : (1u << n) - 1); }
  PLANAR_FN V load(const double* p, Mask m, V rest) { return (V)_mm512_mask_loadu_pd((__m512d)rest, m, p); }
  PLANAR_FN void store(double* p, V x, Mask m) { _mm512_mask_storeu_pd(p, m, (__m512d)x); }
  PLANAR_FN void stream(double* p, V x) { _mm512_stream_pd(p, (__m512d)x); }
  PLANAR_FN void fence() { _mm_sfence(); }
  PLANAR_FN V max(V a, V b) { return (V)_mm512_mask_max_pd((__m512d)a, 0xff, (__m512d)a, (__m512d)b); }
  PLANAR_FN V multiply_add(V a, V b, V c) { return (V)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c); }
  PLANAR_FN V product_error(V a, V b, V ab) { return (V)_mm512_fmsub_pd((__m512d)a, (__m512d)b, (__m512d)ab); }
  PLANAR_FN bool any(I x) { return _mm512_test_epi64_mask((__m512i)x, (__m512i)x) != 0; }
};

#elif PLANAR_VECTOR_BYTES == 32

template <>
struct Native<float> {
  typedef float V __attribute__((vector_size(32)));
  typedef int32_t I __attribute__((vector_size(32)));
  using Mask = I;
  PLANAR_FN Mask first(int64_t n) { return I{0, 1, 2, 3, 4, 5, 6, 7} < (int32_t)(n < 8 ? n : 8); }
  PLANAR_FN V load(const float* p, Mask m, V rest) { return m ? (V)_mm256_maskload_ps(p, (__m256i)m) : rest; }
  PLANAR_FN void store(float* p, V x, Mask m) { _mm256_maskstore_ps(p, (__m256i)m, (__m256)x); }
  PLANAR_FN void stream(float* p, V x) { _mm256_stream_ps(p, (__m256)x); }
  PLANAR_FN void fence() { _mm_sfence(); }
  PLANAR_FN V max(V a, V b) { return (V)_mm256_max_ps((__m256)a, (__m256)b); }
  PLANAR_FN V multiply_add(V a, V b, V c) { return (V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
  PLANAR_FN V product_error(V a, V b, V ab) { return (V)_mm256_fmsub_ps((__m256)a, (__m256)b, (__m256)ab); }
  PLANAR_FN bool any(I x) { return !_mm256_testz_si256((__m256i)x, (__m256i)x); }
};

template <>
struct Native<double> {
  typedef double V __attribute__((vector_size(32)));
  typedef int64_t I __attribute__((vector_size(32)));
  using Mask = I;
  PLANAR_FN Mask first(int64_t n) { return I{0, 1, 2, 3} < (n < 4 ? n : 4); }
  PLANAR_FN V load(const double* p, Mask m, V rest) { return m ? (V)_mm256_maskload_pd(p, (__m256i)m) : rest; }
  PLANAR_FN void store(double* p, V x, Mask m) { _mm256_maskstore_pd(p, (__m256i)m, (__m256d)x); }
  PLANAR_FN void stream(double* p, V x) { _mm256_stream_pd(p, (__m256d)x); }
  PLANAR_FN void fence() { _mm_sfence(); }
  PLANAR_FN V max(V a, V b) { return (V)_mm256_max_pd((__m256d)a, (__m256d)b); }
  PLANAR_FN V multiply_add(V a, V b, V c) { return (V)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c); }
  PLANAR_FN V product_error(V a, V b, V ab) { return (V)_mm256_fmsub_pd((__m256d)a, (__m256d)b, (__m256d)ab); }
  PLANAR_FN bool any(I x) { return !_mm256_testz_si256((__m256i)x, (__m256i)x); }
};

#else  // any processor

template <class T, class Bits>
struct Portable {
  static constexpr int width = PLANAR_VECTOR_BYTES / sizeof(T);
  typedef T V __attribute__((vector_size(PLANAR_VECTOR_BYTES)));
  typedef Bits I __attribute__((vector_size(PLANAR_VECTOR_BYTES)));
  using Mask = int64_t;  // how many lanes
  PLANAR_FN Mask first(int64_t n) { return n; }
  PLANAR_FN V load(const T* p, Mask n, V rest) {
    for (int i = 0; i < width; ++i)
      if (i < n) rest[i] = p[i];
    return rest;
  }
  PLANAR_FN void store(T* p, V x, Mask n) {
    for (int i = 0; i < width; ++i)
      if (i < n) p[i] = x[i];
  }
  PLANAR_FN void stream(T* p, V x) { __builtin_memcpy(p, &x, sizeof(x)); }
  PLANAR_FN void fence() {}
  PLANAR_FN V max(V a, V b) { return a > b ? a : b; }
  PLANAR_FN float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
  PLANAR_FN double fused(double a, double b, double c) { return __builtin_fma(a, b, c); }
  PLANAR_FN V multiply_add(V a, V b, V c) {
#if defined(__FP_FAST_FMA)
    for (int i = 0; i < width; ++i) c[i] = fused(a[i], b[i], c[i]);
    return c;
#else
    return a * b + c;
#endif
  }
  PLANAR_FN V product_error(V a, V b, V ab) {  // halves of the mantissas: their products are exact
    constexpr Bits halves = -(Bits(1) << (sizeof(T) == 4 ? 12 : 27));
    const V a_high = (V)((I)a & halves), b_high = (V)((I)b & halves), a_low = a - a_high, b_low = b - b_high;
    return ((a_high * b_high - ab) + a_high * b_low + a_low * b_high) + a_low * b_low;
  }
  PLANAR_FN bool any(I x) {
    Bits bits = 0;
    for (int i = 0; i < width; ++i) bits |= x[i];
    return bits != 0;
  }
};

template <>
struct Native<float> : Portable<float, int32_t> {};
template <>
struct Native<double> : Portable<double, int64_t> {};

#endif

}  // namespace PLANAR_NAMESPACE
}  // namespace vvae
