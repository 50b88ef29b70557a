// The table of one instruction set's kernels; each isa_*.cpp defines one.
#pragma once

#include "planar_amortized.h"
#include "planar_inverse.h"
#include "planar_shared.h"

namespace vvae {
namespace PLANAR_NAMESPACE {

template <class T, class F>
constexpr Passes<T> passes() {
  return {shared_forward<T, F, false>,    shared_forward<T, F, true>,    shared_backward<T, F>,
          shared_inverse_adjoint<T, F>,   amortized_forward<T, F, false>, amortized_forward<T, F, true>,
          amortized_backward<T, F>,       amortized_inverse_adjoint<T, F>};
}

template <class T>
constexpr Kernels<T> kernels() {
  return {Simd<T>::width,
          prepare_scratch<T>,
          prepare<T>,
          finish<T>,
          shared_forward_scratch<T>,
          shared_backward_scratch<T>,
          shared_inverse_adjoint_scratch<T>,
          amortized_forward_scratch<T>,
          amortized_backward_scratch<T>,
          amortized_inverse_adjoint_scratch<T>,
          passes<T, Tanh>(),
          passes<T, AnyActivation<T>>()};
}

}  // namespace PLANAR_NAMESPACE
}  // namespace vvae
