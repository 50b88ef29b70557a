// Which formulas a flow has, in the order of vvae_fast/shapes.py, for every kernel in C++. No torch.
#pragma once

namespace vvae {

enum class Constraint { softplus, none, log_softplus };
enum class Activation { tanh, leaky_relu, elu, sigmoid, linear };

struct Formulas {
  Constraint constraint;
  Activation activation;
  double slope;        // leaky_relu's below 0
  double log_det_eps;  // inside the logarithm, docs/math.md (31)

  // What the kernels know when they are compiled: tanh and an exact logarithm.
  bool is_tanh() const { return activation == Activation::tanh && log_det_eps == 0; }
};

}  // namespace vvae
