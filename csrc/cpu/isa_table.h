// The table of one instruction set's kernels; each isa_*.cpp defines one.
#pragma once

#include "planar_amortized.h"
#include "planar_inverse.h"
#include "planar_shared.h"

namespace vvae {
namespace PLANAR_NAMESPACE {

template <class T>
constexpr Kernels<T> kernels() {
  return {Simd<T>::width,
          prepare_scratch<T>,
          prepare<T>,
          shared_forward_scratch<T>,
          shared_forward<T, false>,
          shared_forward<T, true>,
          shared_backward_scratch<T>,
          shared_backward<T>,
          finish<T>,
          amortized_forward_scratch<T>,
          amortized_forward<T, false>,
          amortized_forward<T, true>,
          amortized_backward_scratch<T>,
          amortized_backward<T>,
          shared_inverse_adjoint_scratch<T>,
          shared_inverse_adjoint<T>,
          amortized_inverse_adjoint_scratch<T>,
          amortized_inverse_adjoint<T>};
}

}  // namespace PLANAR_NAMESPACE
}  // namespace vvae
