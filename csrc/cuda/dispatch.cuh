// From what a problem says at run time to the kernels that are compiled: dtype, layout, spec, direction.
#pragma once

#include "row.cuh"

namespace vvae {
namespace cuda {

// Calls f with the layout for rows of dim columns: few lanes, so that little is done by all of them alike, and no more
// than 16 numbers a lane before a warp is full.
template <class T, class F>
void with_layout(int dim, const F& f) {
  if (dim <= 4) return f(Layout<1, 1>());
  if (dim <= 16) return f(Layout<4, 1>());
  if (dim <= 32) return f(Layout<4, 2>());
  if (dim <= 48) return f(Layout<4, 3>());
  if (dim <= 64) return f(Layout<8, 2>());
  if (dim <= 128) return f(Layout<16, 2>());
  if (dim <= 256) return f(Layout<32, 2>());
  if (dim <= 512 || sizeof(T) == 8) return f(Layout<32, 4>());
  if constexpr (sizeof(T) == 4) return f(Layout<32, 8>());
}

// A layout for what has fewer kernels: more of a row's columns are not there. Not measured on a GPU.
template <class T, class F>
void with_few_layouts(int dim, const F& f) {
  if (dim <= 4) return f(Layout<1, 1>());
  if (dim <= 16) return f(Layout<4, 1>());
  if (dim <= 64) return f(Layout<8, 2>());
  if (dim <= 256) return f(Layout<32, 2>());
  return f(Layout<32, sizeof(T) == 4 ? 8 : 4>());
}

// Calls f with a number of the type that the caller's tensors hold.
template <class F>
void with_type(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::float32: return f(float());
    case Dtype::float64: return f(double());
    case Dtype::bfloat16: return f(bfloat16());
    case Dtype::float16: return f(float16());
  }
}

// The same for kernels that compute in float32.
template <class F>
void with_half_or_float(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::bfloat16: return f(bfloat16());
    case Dtype::float16: return f(float16());
    default: return f(float());
  }
}

// The same for kernels that no half precision has.
template <class F>
void with_float_or_double(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::float64: return f(double());
    default: return f(float());
  }
}

// Calls f with a number of the tensors' type, a layout and planar/activation.h's F, of which there are three lots of kernels.
// The first ask for the formulas when they run: few, for what is seldom used.
template <class F>
void with_any_formulas(const Problem& p, const F& f) {
  with_float_or_double(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    with_few_layouts<T>(p.dim, [&](auto layout) { f(zero, layout, AnyFlow<T>()); });
  });
}

// As few for the usual spec.
template <class F>
void with_few_kernels(const Problem& p, const F& f) {
  if (!p.spec.is_usual()) return with_any_formulas(p, f);
  with_float_or_double(p.dtype, [&](auto zero) {
    with_few_layouts<decltype(zero)>(p.dim, [&](auto layout) { f(zero, layout, StandardFlow()); });
  });
}

// Many of these, for every layout and type.
template <class F>
void with_kernels(const Problem& p, const F& f) {
  if (!p.spec.is_usual()) return with_any_formulas(p, f);
  with_type(p.dtype, [&](auto zero) {
    with_layout<compute_t<decltype(zero)>>(p.dim, [&](auto layout) { f(zero, layout, StandardFlow()); });
  });
}

// f, told as well whether it is the inverse's.
template <bool inverse, class F>
auto told(const F& f) {
  return [&f](auto zero, auto layout, auto activation) {
    f(zero, layout, activation, std::integral_constant<bool, inverse>());
  };
}

// For forwards, with whether it is the inverse's, of which there are few.
template <class F>
void with_forward_kernels(const Problem& p, const F& f) {
  p.inverse ? with_few_kernels(p, told<true>(f)) : with_kernels(p, told<false>(f));
}

// The same for backwards, of whose inverses there are fewer.
template <class F>
void with_backward_kernels(const Problem& p, const F& f) {
  p.inverse ? with_any_formulas(p, told<true>(f)) : with_kernels(p, told<false>(f));
}

}  // namespace cuda
}  // namespace vvae
