// One SIMD vector of T and its primitives, in the compiler's vector extensions. Each isa_*.cpp includes this once,
// having set PLANAR_NAMESPACE and PLANAR_VECTOR_BYTES. Everything is forced inline: no code of one instruction set can
// be linked into another.
#pragma once

#include <stdint.h>

#include "../../planar/exp.h"
#include "native.h"

namespace vvae {
namespace PLANAR_NAMESPACE {

template <class T>
struct Simd : Native<T> {
  using Float = Ieee<T>;
  using Bits = typename Float::Bits;
  using V = typename Native<T>::V;
  using I = typename Native<T>::I;  // also what a comparison gives
  using Native<T>::load;
  using Native<T>::store;
  static constexpr int width = PLANAR_VECTOR_BYTES / sizeof(T);
  typedef T Unaligned __attribute__((vector_size(PLANAR_VECTOR_BYTES), aligned(alignof(T)), may_alias));

  struct Exp {
    V value, minus_one;
  };

  PLANAR_FN V splat(T x) { return x - V{}; }
  PLANAR_FN V load(const T* p) { return *reinterpret_cast<const Unaligned*>(p); }
  PLANAR_FN void store(T* p, V x) { *reinterpret_cast<Unaligned*>(p) = x; }
  PLANAR_FN V select(I mask, V yes, V no) { return mask ? yes : no; }
  PLANAR_FN V copy_sign(V magnitude, V x) {
    return as_float(as_bits(magnitude) | (as_bits(x) & as_bits(splat(T(-0.0)))));
  }
  PLANAR_FN V abs(V x) { return as_float(as_bits(x) & ~as_bits(splat(T(-0.0)))); }
  PLANAR_FN V tiny() { return splat(Float::tiny); }
  PLANAR_FN V saturated() { return splat(-Float::exp_least / 2); }  // from here on e^(-2|a|) is next to denormal
  PLANAR_FN I as_bits(V x) { return reinterpret_cast<I>(x); }
  PLANAR_FN V as_float(I x) { return reinterpret_cast<V>(x); }

  // The first n > 0 elements at p, `rest` behind them.
  PLANAR_FN V load_first(const T* p, int64_t n, T rest = 0) {
    return n >= width ? load(p) : load(p, Native<T>::first(n), splat(rest));
  }

  PLANAR_FN void store_first(T* p, V x, int64_t n) {
    if (n >= width) return store(p, x);
    store(p, x, Native<T>::first(n));
  }

  // Nonzero where x > 0 has an exponent outside the middle half of its type's, or is NaN.
  PLANAR_FN I outside(V x) {
    constexpr Bits eighth = Bits(1) << (8 * sizeof(Bits) - 3);
    return ((as_bits(x) + eighth) ^ (2 * eighth)) & ~(2 * eighth - 1);
  }

  PLANAR_FN V max(V a, V b) { return Native<T>::max(a, b); }
  PLANAR_FN V quotient(V a, V b) { return a / b; }
  PLANAR_FN Exp exp_both(V x) { return exp_and_minus_one<Simd, T>(x); }

  // log x for x >= 0, -inf at 0; NaN stays NaN. Errors: log.
  PLANAR_FN V log(V x) {
    const I small = x < Float::tiny;
    const V scaled = select(small, x * Float::denormal_scale, x);
    const I shifted = as_bits(scaled) + (Float::one - Float::sqrt_half);
    const I exponent = (shifted >> Float::mantissa) - (Float::one >> Float::mantissa);
    const V m = as_float((shifted & ((Bits(1) << Float::mantissa) - 1)) + Float::sqrt_half);
    const V e = to_float(exponent) - select(small, splat(Float::denormal_shift), V{});
    const V f = m - 1;  // m in [sqrt(1/2), sqrt(2)): log m = 2 atanh(f / (2 + f))
    const V t = f / (2 + f);
    const V t2 = t * t;
    V q = splat(T(2. / (2 * Float::log_terms + 1)));
#pragma GCC unroll 16
    for (int i = Float::log_terms - 1; i >= 1; --i) q = q * t2 + T(2. / (2 * i + 1));
    const V half_square = f * f * T(0.5);
    const V low = t * (half_square + t2 * q) + e * Float::ln2_low;
    const V y = e * Float::ln2_high + (f - (half_square - low));
    const V ends = select(x == 0, splat(-T(__builtin_inf())), x);  // 0, inf and NaN
    return select((as_bits(x) < Float::infinity) & (x > 0), y, ends);
  }

  // Integers well inside the mantissa to T: AVX2 has no such conversion for 64 bits.
  PLANAR_FN V to_float(I n) { return as_float(n + as_bits(splat(Float::round))) - Float::round; }
};

template <int... I>
struct Indices {};
template <int N, int... I>
struct MakeIndices : MakeIndices<N - 1, N - 1, I...> {};
template <int... I>
struct MakeIndices<0, I...> {
  using type = Indices<I...>;
};

// Lane i of the result is lane Pick::at(i) of a followed by b.
template <class T, class Pick, int... I>
PLANAR_FN typename Simd<T>::V shuffle(typename Simd<T>::V a, typename Simd<T>::V b, Indices<I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, Pick::at(I)...);
#else
  return __builtin_shuffle(a, b, typename Simd<T>::I{Pick::at(I)...});
#endif
}

// The two halves of an exchange at distance S: lanes with bit S clear come from a, lanes with bit S set from b.
template <int S, int W>
struct Low {
  static constexpr int at(int i) { return (i & S) ? W + i - S : i; }
};
template <int S, int W>
struct High {
  static constexpr int at(int i) { return (i & S) ? W + i : i + S; }
};

template <class T, int S>
struct Exchange {
  using X = Simd<T>;
  using All = typename MakeIndices<X::width>::type;

  // Transposes the width x width matrix whose rows are x[0], x[1], ...
  PLANAR_FN void transpose(typename X::V* x) {
#pragma GCC unroll 16
    for (int i = 0; i < X::width; ++i)
      if (!(i & S)) {
        const auto a = x[i], b = x[i + S];
        x[i] = shuffle<T, Low<S, X::width>>(a, b, All{});
        x[i + S] = shuffle<T, High<S, X::width>>(a, b, All{});
      }
    Exchange<T, S / 2>::transpose(x);
  }

  // Lane i of x[0] becomes the sum of the lanes of x[i].
  PLANAR_FN void sum_lanes(typename X::V* x) {
#pragma GCC unroll 16
    for (int i = 0; i < S; ++i)
      x[i] = shuffle<T, Low<S, X::width>>(x[i], x[i + S], All{}) + shuffle<T, High<S, X::width>>(x[i], x[i + S], All{});
    Exchange<T, S / 2>::sum_lanes(x);
  }
};

template <class T>
struct Exchange<T, 0> {
  PLANAR_FN void transpose(typename Simd<T>::V*) {}
  PLANAR_FN void sum_lanes(typename Simd<T>::V*) {}
};

template <class T>
PLANAR_FN void transpose(typename Simd<T>::V* x) {
  Exchange<T, Simd<T>::width / 2>::transpose(x);
}

template <class T>
PLANAR_FN typename Simd<T>::V sum_lanes(typename Simd<T>::V* x) {
  Exchange<T, Simd<T>::width / 2>::sum_lanes(x);
  return x[0];
}

}  // namespace PLANAR_NAMESPACE
}  // namespace vvae
