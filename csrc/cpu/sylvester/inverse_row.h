// One row back through a Sylvester flow, docs/math.md (62), and its adjoint, (64). A layer is a triangular system: its
// units are solved from the last to the first, one root each.
#pragma once

#include "../../planar/root.h"
#include "row.h"

namespace vvae {
namespace PLANAR_NAMESPACE {

// R_im and R~_mi for i < m or m < i.
template <class T>
PLANAR_FN T r_at(const Layer<T>& of, int64_t i, int64_t m, int64_t units) {
  return of.r[i * units + m];
}

template <class T>
PLANAR_FN T r_tilde_at(const Layer<T>& of, int64_t m, int64_t i, int64_t units) {
  return of.r_tilde ? of.r_tilde[m * units + i] : of.r[i * units + m];
}

// The roots a of all units from rhs = R~ Q^T z', (62), and with them x = R h.
template <class T, class F>
PLANAR_FN void solve_layer(T* a, T* x, const T* rhs, const Layer<T>& of, int64_t units, const F& kind) {
  using S = Simd<T>;
  fill(x, T(0), padded<T>(units));
  fill(a, T(0), padded<T>(units));
  for (int64_t m = units - 1; m >= 0; --m) {
    T right = rhs[m] + of.b[m] - of.d_tilde[m] * x[m];  // x has the units behind m
    for (int64_t i = m + 1; i < units; ++i) right -= r_tilde_at(of, m, i, units) * x[i];
    const T s = of.s[m];
    if (!(s > 0)) right = T(__builtin_nan(""));  // no inverse
    auto root = S::splat(right);
    solve<S, 1>(&root, &root, S::splat(of.d[m] * of.d_tilde[m]), S::splat(s), kind);
    a[m] = root[0];
    const T h = activate<S>(root, kind).h[0];
    for (int64_t i = 0; i < m; ++i) x[i] += r_at(of, i, m, units) * h;
    x[m] += of.d[m] * h;
  }
}

template <class T, class F>
void sylvester_inverse(const SylvesterForward<T>& f, int64_t row, T* scratch) {
  using S = Simd<T>;
  const F kind = F::of(f.spec);
  const int64_t set = row % f.sets, units = padded<T>(f.units);
  T *z = scratch, *a = z + padded<T>(f.dim), *rhs = a + units, *x = rhs + units;
  copy_in(z, f.z + row * f.dim, f.dim);
  auto log_det = no_steps<S>();
  for (int64_t l = f.layers - 1; l >= 0; --l) {
    const Layer<T> of(f, set, l);
    into(x, z, of, f);
    times_r_tilde(rhs, x, of, f.units);
    solve_layer(a, x, rhs, of, f.units, kind);
    if (f.saved) copy_out(f.saved + (l * f.rows + row) * f.units, a, f.units);
    for (int64_t i = 0; i < f.units; i += S::width) {
      const auto act = activate<S>(S::load(a + i), kind);
      const auto s = S::load_first(of.s + i, f.units - i, T(1));
      add_step<S, 1>(&log_det, &act, c_of(of, i, f.units), s, S::splat(0), kind);
    }
    negate(x, units);
    add_out_of(z, x, of, f);
  }
  copy_out(f.z_L + row * f.dim, z, f.dim);
  f.log_det[row] = -sum_of<T>(log_det);
}

// mu = dL/d(rhs) of all units, and v = R~^T mu, from the a-bar of (64), which mu takes the place of.
template <class T>
PLANAR_FN void solve_adjoint(T* mu, T* v, const T* slopes, const T* dets, const Layer<T>& of, int64_t units) {
  fill(v, T(0), padded<T>(units));
  for (int64_t m = 0; m < units; ++m) {
    T coupled = of.d[m] * v[m];  // v has the units before m
    for (int64_t i = 0; i < m; ++i) coupled += r_at(of, i, m, units) * v[i];
    mu[m] = (mu[m] - slopes[m] * coupled) / dets[m];
    v[m] += of.d_tilde[m] * mu[m];
    for (int64_t i = m + 1; i < units; ++i) v[i] += r_tilde_at(of, m, i, units) * mu[m];
  }
}

// The layers back once more from the saved roots, keeping every z, then the adjoint from the first layer to the last.
template <class T, class F>
void sylvester_inverse_backward(const SylvesterBackward<T>& f, int64_t row, const SylvesterGradients<T>& to, bool add,
                                T* scratch) {
  using S = Simd<T>;
  const F kind = F::of(f.spec);
  const int64_t set = row % f.sets, dim = padded<T>(f.dim), units = padded<T>(f.units);
  T *g = scratch, *z = g + dim;                                          // [dim], [layers + 1][dim]
  T *h = z + (f.layers + 1) * dim, *slopes = h + f.layers * units;       // [layers][units]
  T *x = slopes + f.layers * units;                                      // [layers][units], -R h
  T *w = x + f.layers * units, *mu = w + units, *v = mu + units, *p = v + units, *dets = p + units;
  copy_in(z + f.layers * dim, f.z + row * f.dim, f.dim);
  for (int64_t l = f.layers - 1; l >= 0; --l) {
    const Layer<T> of(f, set, l);
    copy_in(p, f.saved + (l * f.rows + row) * f.units, f.units);
    for (int64_t i = 0; i < units; i += S::width) {
      const auto act = activate<S>(S::load(p + i), kind);
      S::store(h + l * units + i, act.h);
      S::store(slopes + l * units + i, act.h_prime);
    }
    upper_dots(x + l * units, of.r, of.d, f.units, h + l * units);
    negate(x + l * units, units);
    copy_in(z + l * dim, z + (l + 1) * dim, dim);
    add_out_of(z + l * dim, x + l * units, of, f);
  }
  copy_in(g, f.grad_z + row * f.dim, f.dim);
  const auto lambda = S::splat(f.grad_log_det[row]);
  for (int64_t l = 0; l < f.layers; ++l) {
    const Layer<T> of(f, set, l);
    const int64_t first = l * f.units;
    into(w, g, of, f);
    upper_combine(mu, of.r, of.d, f.units, w);
    for (int64_t i = 0; i < f.units; i += S::width) {
      const Activated<S> act{S::load(h + l * units + i), S::load(slopes + l * units + i)};
      const auto c = c_of(of, i, f.units), s = S::load_first(of.s + i, f.units - i, T(1));
      const auto det = determinant<S>(act, c, s, kind);
      S::store(dets + i, det);
      S::store(mu + i, -S::load(mu + i) * act.h_prime - lambda * (c * h_second<S>(act, kind) / det));
    }
    solve_adjoint(mu, v, slopes + l * units, dets, of, f.units);
    into(p, z + l * dim, of, f);
    for (int64_t i = 0; i < f.units; i += S::width) {
      const int64_t rest = f.units - i;
      const auto of_h = S::load(h + l * units + i), of_mu = S::load_first(mu + i, rest), mu_h = of_mu * of_h;
      const auto of_w = -(S::load(w + i) + S::load_first(v + i, rest));
      S::store(w + i, of_w);
      const auto of_s = -mu_h - lambda * S::load(slopes + l * units + i) / S::load(dets + i);
      put(to.d + first + i, of_w * of_h + S::load_first(of.d_tilde + i, rest) * mu_h, rest, add);
      put(to.d_tilde + first + i, of_mu * S::load(p + i) + S::load_first(of.d + i, rest) * mu_h, rest, add);
      put(to.b + first + i, of_mu, rest, add);
      put(to.s + first + i, of_s, rest, add);
    }
    put_triangles(to, l, of, f.units, w, h + l * units, mu, p, add);
    T* y = z + (l + 1) * dim;
    if (of.columns) outer_pair(to.columns + first * f.dim, x + l * units, g, v, y, f.units, f.dim, add);
    add_out_of(g, v, of, f);
  }
  copy_out(f.dz + row * f.dim, g, f.dim);
}

template <class T>
constexpr SylvesterKernels<T> sylvester_kernels() {
  return {sylvester_forward_scratch<T>,
          sylvester_backward_scratch<T>,
          {sylvester_forward<T, StandardFlow>, sylvester_backward<T, StandardFlow>},
          {sylvester_forward<T, AnyFlow<T>>, sylvester_backward<T, AnyFlow<T>>},
          {sylvester_inverse<T, StandardFlow>, sylvester_inverse_backward<T, StandardFlow>},
          {sylvester_inverse<T, AnyFlow<T>>, sylvester_inverse_backward<T, AnyFlow<T>>}};
}

}  // namespace PLANAR_NAMESPACE
}  // namespace vvae
