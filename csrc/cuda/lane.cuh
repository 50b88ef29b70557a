// The numbers of a CUDA thread: how they lie in memory, and the lane type that planar/ computes with.
#pragma once

#define PLANAR_NAMESPACE cuda

#include "device.h"  // first: on the host it is what says __device__

#include <math.h>

#include <type_traits>

#include "../planar/exp.h"
#include "../planar/log_det.h"
#include "launch.h"

namespace vvae {
namespace cuda {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

template <class S>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <class S>
using compute_t = typename ComputeOf<S>::type;

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(bfloat16 x) { return __int_as_float(int(uint32_t(x.bits) << 16)); }

// To the nearest, ties to even.
template <class S>
__device__ __forceinline__ S narrow(compute_t<S> x) {
  return x;
}

// The conversions that are instructions.
#if defined(__CUDACC__)
__device__ __forceinline__ float widen(float16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
template <>
__device__ __forceinline__ float16 narrow<float16>(float x) {
  float16 y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}
template <>
__device__ __forceinline__ bfloat16 narrow<bfloat16>(float x) {
  bfloat16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}
#else
inline float widen(float16 x) {
  const int exponent = x.bits >> 10 & 31, mantissa = x.bits & 1023;
  const float size = exponent == 31 ? (mantissa ? NAN : INFINITY)
                                    : exponent ? ::ldexp(1024.f + mantissa, exponent - 25) : ::ldexp(float(mantissa), -24);
  return x.bits >> 15 ? -size : size;
}
template <>
inline float16 narrow<float16>(float x) {
  const uint16_t sign = uint16_t(uint32_t(__float_as_int(x)) >> 31 << 15);
  const float size = ::fabs(x);
  if (size != size) return {uint16_t(sign | 0x7e00)};
  if (size >= 65520) return {uint16_t(sign | 0x7c00)};
  const int exponent = size < 0x1p-14f ? -14 : ::ilogb(size);
  const int mantissa = int(::nearbyint(::ldexp(size, 10 - exponent)));  // with the leading 1 of a normal number
  return {uint16_t(sign | (((exponent + 14) << 10) + mantissa))};
}
template <>
inline bfloat16 narrow<bfloat16>(float x) {
  const auto bits = uint32_t(__float_as_int(x));
  return {x != x ? uint16_t(0x7fff) : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
#endif

// a / b for b in [1, 2]: what the division is without the branch for other b, which would end the instructions that the
// compiler can move.
__device__ __forceinline__ double quotient_of(double a, double b) { return a / b; }
#if defined(__CUDACC__)
__device__ __forceinline__ float quotient_of(float a, float b) {
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(b));
  const float q = a * inverse;
  return fmaf(fmaf(-q, b, a), inverse, q);
}
#else
inline float quotient_of(float a, float b) { return a / b; }
#endif

__device__ __forceinline__ float float_of(uint32_t bits) { return __int_as_float(int(bits)); }
__device__ __forceinline__ double float_of(uint64_t bits) { return __longlong_as_double((long long)(bits)); }
__device__ __forceinline__ uint32_t bits_of(float x) { return uint32_t(__float_as_int(x)); }
__device__ __forceinline__ uint64_t bits_of(double x) { return uint64_t(__double_as_longlong(x)); }

// planar/'s L for one number of a thread.
template <class T>
struct Lane {
  using V = T;
  using Float = Ieee<T>;
  using Bits = std::make_unsigned_t<typename Float::Bits>;  // they wrap
  struct Exp {
    T value, minus_one;
  };

  PLANAR_FN T splat(T x) { return x; }
  PLANAR_FN T select(bool mask, T yes, T no) { return mask ? yes : no; }
  PLANAR_FN T abs(T x) { return ::fabs(x); }
  PLANAR_FN T max(T a, T b) { return a > b ? a : b; }  // a NaN in b stays
  PLANAR_FN T copy_sign(T magnitude, T x) { return ::copysign(magnitude, x); }
  PLANAR_FN T tiny() { return Float::tiny; }
  PLANAR_FN T saturated() { return -Float::exp_least / 2; }
  PLANAR_FN Bits as_bits(T x) { return bits_of(x); }
  PLANAR_FN T as_float(Bits x) { return float_of(x); }
  PLANAR_FN Exp exp_both(T x) { return exp_and_minus_one<Lane, T>(x); }
  PLANAR_FN T log(T x) { return ::log(x); }
  PLANAR_FN T quotient(T a, T b) { return quotient_of(a, b); }
  PLANAR_FN T multiply_add(T a, T b, T c) { return ::fma(a, b, c); }
  PLANAR_FN T product_error(T a, T b, T ab) { return ::fma(a, b, -ab); }
  // Nonzero where x > 0 has an exponent outside the middle half of its type's, or is NaN.
  PLANAR_FN Bits outside(T x) {
    constexpr Bits eighth = Bits(1) << (8 * sizeof(Bits) - 3);
    return ((as_bits(x) + eighth) ^ (2 * eighth)) & ~(2 * eighth - 1);
  }
  PLANAR_FN bool any(Bits x) { return __any_sync(kAllLanes, x != 0); }  // of the warp: a branch that no lane takes alone
};

}  // namespace cuda
}  // namespace vvae
