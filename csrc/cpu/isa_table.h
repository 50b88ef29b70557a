// The table of one instruction set's kernels; each isa_*.cpp defines one.
#pragma once

#include "amortized.h"
#include "headed/rows.h"
#include "shared.h"
#include "sylvester/inverse_row.h"

namespace vvae {
namespace PLANAR_NAMESPACE {

template <class T, class F, bool inverse>
constexpr Passes<T> passes() {
  return {shared_forward<T, F, inverse>, shared_backward<T, F, inverse>, amortized_forward<T, F, inverse>,
          amortized_backward<T, F, inverse>};
}

template <class T>
constexpr Kernels<T> kernels() {
  return {Simd<T>::width,
          prepare_scratch<T>,
          prepare<T>,
          finish<T>,
          shared_forward_scratch<T>,
          shared_backward_scratch<T>,
          amortized_forward_scratch<T>,
          amortized_backward_scratch<T>,
          passes<T, StandardFlow, false>(),
          passes<T, AnyFlow<T>, false>(),
          passes<T, StandardFlow, true>(),
          passes<T, AnyFlow<T>, true>()};
}

}  // namespace PLANAR_NAMESPACE
}  // namespace vvae
