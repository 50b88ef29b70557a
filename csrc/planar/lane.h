// What every formula is written in. Equation numbers here and in what includes this are those of docs/math.md.
//
// L is a lane type: `L::V` is what one variable holds (a float on a GPU thread, a SIMD vector on a CPU) and L gives the
// primitives splat, select, abs, copy_sign, exp_both, log, quotient (by a number in [1, 2]), multiply_add, product_error,
// outside and any, the constants tiny and saturated on it and Float, its format (float_format.h). No torch, no memory;
// few branches on data, none for one lane alone.
#pragma once

#if defined(__CUDACC__)
#define PLANAR_FN static __device__ __forceinline__
#else
#define PLANAR_FN static inline __attribute__((always_inline))
#endif

#ifndef PLANAR_NAMESPACE
#define PLANAR_NAMESPACE portable
#endif
