// What a flow computes, its names in the order of vvae_fast's, for every kernel in C++. No torch.
#pragma once

namespace vvae {

enum class Constraint { softplus, none, log_softplus };
enum class Activation { tanh, leaky_relu, elu, sigmoid, linear };

struct FlowSpec {
  Constraint constraint;
  Activation activation;
  double slope;        // leaky_relu's below 0
  double log_det_eps;  // inside the logarithm, docs/math.md (31)

  // What StandardFlow has compiled in: tanh and an exact logarithm.
  bool is_standard() const { return activation == Activation::tanh && log_det_eps == 0; }
  // What nearly every flow has: no third constraint either.
  bool is_usual() const { return is_standard() && constraint != Constraint::log_softplus; }
};

}  // namespace vvae
