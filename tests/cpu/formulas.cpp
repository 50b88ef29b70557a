// The formulas of csrc/planar on pairs (x, alpha) from stdin, for test_formula_errors.py: a row of results for each pair.
#include <cstdio>
#include <cstring>

#include "cpu/simd/vector.h"
#include "planar/log_det.h"

using namespace vvae;
using namespace vvae::PLANAR_NAMESPACE;

template <class T>
static void write_all() {
  using L = Simd<T>;
  T in[2];
  while (fread(in, sizeof(T), 2, stdin) == 2) {
    const auto x = L::splat(in[0]), alpha = L::splat(in[1]);
    const StandardFlow tanh;
    const AnyFlow<T> sigmoid{Activation::sigmoid, 0, 0}, elu{Activation::elu, 0, 0}, leaky{Activation::leaky_relu, T(0.2), 0};
    const AnyFlow<T> with_eps{Activation::tanh, 0, T(1e-3)};
    const auto e = L::exp_both(-2 * L::abs(x));
    const auto act = activate<L>(x, tanh), logistic = activate<L>(x, sigmoid);
    const auto exponential = activate<L>(x, elu);
    const auto p = constrain<L>(alpha, L::splat(1), Constraint::softplus);
    const auto q = constrain<L>(alpha, L::splat(1), Constraint::log_softplus);
    const auto sum = no_steps<L>();
    auto one_step = sum;
    add_step<L, 1>(&one_step, &act, p.c, p.s, p.sunk, tanh);
    const typename L::V found[] = {e.value, e.minus_one, L::log(L::abs(x)), act.h, act.h_prime,
                                   one_minus_slope<L>(act, tanh), h_second<L>(act, tanh), logistic.h, logistic.h_prime,
                                   p.c, p.s, p.rho, determinant<L>(act, p.c, p.s, tanh),
                                   inverse_determinant<L>(p.s, act, p.c, p.s, tanh),
                                   log_abs_determinant<L>(act, p.c, p.s, p.sunk, tanh), value<L>(one_step),
                                   one_minus_slope<L>(logistic, sigmoid), h_second<L>(logistic, sigmoid),
                                   exponential.h, exponential.h_prime, one_minus_slope<L>(exponential, elu),
                                   h_second<L>(exponential, elu), activate<L>(x, leaky).h,
                                   p.rising, p.falling, q.c, q.s, q.rho, q.rising, q.falling,
                                   log_abs_determinant<L>(act, p.c, p.s, p.sunk, with_eps)};
    for (const auto& v : found) {
      const T lane = v[0];
      fwrite(&lane, sizeof(T), 1, stdout);
    }
  }
}

int main(int, char** argv) { strcmp(argv[1], "float32") ? write_all<double>() : write_all<float>(); }
