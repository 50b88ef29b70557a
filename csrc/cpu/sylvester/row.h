// One row through a Sylvester flow, docs/math.md (57), (58), and its adjoint, (60), (61). Vectors run along the latent
// dimensions and along the units of a layer, which do not wait for each other: what is sequential is the layers.
#pragma once

#include "../../planar/log_det.h"
#include "products.h"

namespace vvae {
namespace PLANAR_NAMESPACE {

// The parameters of one layer of a row's set.
template <class T>
struct Layer {
  const T *columns, *r, *r_tilde, *d, *d_tilde, *b, *s;
  bool turned;  // the triangular kind's odd layers take z in reverse order

  Layer(const Sylvester<T>& f, int64_t set, int64_t layer) {
    const int64_t units = layer * f.units;
    columns = f.columns.data ? f.columns.of(set) + units * f.dim : nullptr;
    r = f.r.of(set) + units * f.units;
    r_tilde = f.r_tilde.data ? f.r_tilde.of(set) + units * f.units : nullptr;
    d = f.d.of(set) + units, d_tilde = f.d_tilde.of(set) + units;
    b = f.b.of(set) + units, s = f.s.of(set) + units;
    turned = layer % 2;
  }
};

// out [units] = Q^T z.
template <class T>
PLANAR_FN void into(T* out, const T* z, const Layer<T>& of, const Sylvester<T>& f) {
  if (of.columns) return dots(out, of.columns, f.units, f.dim, z);
  if (of.turned) return reverse(out, z, f.dim);
  copy_in(out, z, f.dim);
}

// z [dim] += Q x.
template <class T>
PLANAR_FN void add_out_of(T* z, const T* x, const Layer<T>& of, const Sylvester<T>& f) {
  if (of.columns) return combine(z, of.columns, f.units, f.dim, x);
  for (int64_t d = 0; d < f.dim; ++d) z[d] += x[of.turned ? f.dim - 1 - d : d];
}

// out [units] = R~ p.
template <class T>
PLANAR_FN void times_r_tilde(T* out, const T* p, const Layer<T>& of, int64_t units) {
  if (of.r_tilde) return upper_dots(out, of.r_tilde, of.d_tilde, units, p);
  lower_combine(out, of.r, of.d_tilde, units, p);
}

// out [units] = R~^T da.
template <class T>
PLANAR_FN void times_r_tilde_transposed(T* out, const T* da, const Layer<T>& of, int64_t units) {
  if (of.r_tilde) return upper_combine(out, of.r_tilde, of.d_tilde, units, da);
  lower_dots(out, of.r, of.d_tilde, units, da);
}

// c = d d_tilde of a vector of units from the i-th on; 0 behind the last one.
template <class T>
PLANAR_FN typename Simd<T>::V c_of(const Layer<T>& of, int64_t i, int64_t units) {
  using S = Simd<T>;
  return S::load_first(of.d + i, units - i) * S::load_first(of.d_tilde + i, units - i);
}

// h, and where `slopes` is given h', of a = R~ p + b for all units; the layer's determinants go to log_det.
template <class T, class F>
PLANAR_FN void activate_layer(T* h, T* slopes, const T* p, const Layer<T>& of, const Sylvester<T>& f, const F& kind,
                              LogDet<Simd<T>>* log_det) {
  using S = Simd<T>;
  times_r_tilde(h, p, of, f.units);
  for (int64_t i = 0; i < f.units; i += S::width) {
    const int64_t rest = f.units - i;
    const auto act = activate<S>(S::load(h + i) + S::load_first(of.b + i, rest), kind);
    S::store(h + i, act.h);
    if (slopes) S::store(slopes + i, act.h_prime);
    if (!log_det) continue;
    const auto s = S::load_first(of.s + i, rest, T(1));
    add_step<S, 1>(log_det, &act, c_of(of, i, f.units), s, S::splat(0), kind);
  }
}

// The gradients of layer l's R and R~ above their diagonals: of_r h^T and of_a p^T.
template <class T>
PLANAR_FN void put_triangles(const SylvesterGradients<T>& to, int64_t l, const Layer<T>& of, int64_t units,
                             const T* of_r, const T* h, const T* of_a, const T* p, bool add) {
  const int64_t first = l * units * units;
  if (!of.r_tilde) return triangles(to.r + first, of_r, h, p, of_a, units, add);
  triangles<T>(to.r + first, of_r, h, nullptr, nullptr, units, add);
  triangles<T>(to.r_tilde + first, of_a, p, nullptr, nullptr, units, add);
}

// The sum over the units of a vector.
template <class T>
PLANAR_FN T sum_of(const LogDet<Simd<T>>& log_det) {
  const auto sums = value<Simd<T>>(log_det);
  T sum = 0;
  for (int i = 0; i < Simd<T>::width; ++i) sum += sums[i];
  return sum;
}

template <class T>
int64_t sylvester_forward_scratch(const Sylvester<T>& f) {
  return padded<T>(f.dim) + 3 * padded<T>(f.units);
}

template <class T, class F>
void sylvester_forward(const SylvesterForward<T>& f, int64_t row, T* scratch) {
  using S = Simd<T>;
  const F kind = F::of(f.spec);
  const int64_t set = row % f.sets;
  T *z = scratch, *p = z + padded<T>(f.dim), *h = p + padded<T>(f.units), *x = h + padded<T>(f.units);
  copy_in(z, f.z + row * f.dim, f.dim);
  auto log_det = no_steps<S>();
  for (int64_t l = 0; l < f.layers; ++l) {
    const Layer<T> of(f, set, l);
    into(p, z, of, f);
    if (f.saved) copy_out(f.saved + (l * f.rows + row) * f.units, p, f.units);
    activate_layer<T, F>(h, nullptr, p, of, f, kind, &log_det);
    upper_dots(x, of.r, of.d, f.units, h);
    add_out_of(z, x, of, f);
  }
  copy_out(f.z_L + row * f.dim, z, f.dim);
  f.log_det[row] = sum_of<T>(log_det);
}

template <class T>
int64_t sylvester_backward_scratch(const Sylvester<T>& f) {
  return (f.layers + 2) * padded<T>(f.dim) + (3 * f.layers + 5) * padded<T>(f.units);
}

// Forward once more from the saved p, keeping what every layer had, then the layers back.
template <class T, class F>
void sylvester_backward(const SylvesterBackward<T>& f, int64_t row, const SylvesterGradients<T>& to, bool add,
                        T* scratch) {
  using S = Simd<T>;
  const F kind = F::of(f.spec);
  const int64_t set = row % f.sets, dim = padded<T>(f.dim), units = padded<T>(f.units);
  T *g = scratch, *z = g + dim;                                           // [dim], [layers + 1][dim]
  T *h = z + (f.layers + 1) * dim, *slopes = h + f.layers * units;        // [layers][units]
  T *x = slopes + f.layers * units;                                       // [layers][units]
  T *p = x + f.layers * units, *dx = p + units, *da = dx + units, *dp = da + units;
  copy_in(z, f.z + row * f.dim, f.dim);
  for (int64_t l = 0; l < f.layers; ++l) {
    const Layer<T> of(f, set, l);
    copy_in(p, f.saved + (l * f.rows + row) * f.units, f.units);
    activate_layer<T, F>(h + l * units, slopes + l * units, p, of, f, kind, nullptr);
    upper_dots(x + l * units, of.r, of.d, f.units, h + l * units);
    copy_in(z + (l + 1) * dim, z + l * dim, dim);
    if (l + 1 < f.layers) add_out_of(z + (l + 1) * dim, x + l * units, of, f);
  }
  copy_in(g, f.grad_z + row * f.dim, f.dim);
  const auto lambda = S::splat(f.grad_log_det[row]), one = S::splat(1);
  for (int64_t l = f.layers - 1; l >= 0; --l) {
    const Layer<T> of(f, set, l);
    const int64_t first = l * f.units;  // of the layer's units among those of the set
    copy_in(p, f.saved + (l * f.rows + row) * f.units, f.units);
    into(dx, g, of, f);
    upper_combine(da, of.r, of.d, f.units, dx);
    for (int64_t i = 0; i < f.units; i += S::width) {
      const int64_t rest = f.units - i;
      const Activated<S> act{S::load(h + l * units + i), S::load(slopes + l * units + i)};
      const auto s = S::load_first(of.s + i, rest, T(1));
      const auto [delta, gamma] = step_adjoint<S>(S::load(da + i), lambda, act, c_of(of, i, f.units), s, one, kind);
      S::store(da + i, delta);
      put(to.d + first + i, S::load(dx + i) * act.h, rest, add);
      put(to.d_tilde + first + i, delta * S::load(p + i), rest, add);
      put(to.b + first + i, delta, rest, add);
      put(to.s + first + i, gamma, rest, add);
    }
    times_r_tilde_transposed(dp, da, of, f.units);
    put_triangles(to, l, of, f.units, dx, h + l * units, da, p, add);
    if (of.columns) outer_pair(to.columns + first * f.dim, x + l * units, g, dp, z + l * dim, f.units, f.dim, add);
    add_out_of(g, dp, of, f);
  }
  copy_out(f.dz + row * f.dim, g, f.dim);
}

}  // namespace PLANAR_NAMESPACE
}  // namespace vvae
