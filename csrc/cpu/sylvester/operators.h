// The operators of Sylvester flows: checks, allocates, runs. Schemas: vvae_fast/backends/sylvester.py.
#pragma once

#include <torch/csrc/stable/library.h>

#include <array>
#include <numeric>
#include <optional>
#include <tuple>

#include "../../operators/checks.h"
#include "../schedule.h"

namespace vvae {
namespace sylvester {

constexpr int64_t kRowsOfSlice = 16;  // the least rows of one set whose sums are kept apart from the others'

template <class T>
const T* data_of(const Argument& t) {
  return static_cast<const T*>(t.tensor().const_data_ptr());
}

// Contiguous but for its first dimension.
inline void make_readable(Argument& t) {
  int64_t stride = 1;
  for (int64_t i = t.rank - 1; i > 0; --i) {
    if (t.strides[i] != stride && t.sizes[i] > 1) return t.make_contiguous();
    stride *= t.sizes[i];
  }
}

// A call's tensors, checked and readable; B is a Backend of operators/operators.h.
template <class B>
struct Call {
  const Argument z;
  std::optional<Argument> columns, r_tilde;
  Argument r, d, d_tilde, b, s;
  int64_t rows, dim, sets, layers, units;

  Call(const Tensor& z_, const std::optional<Tensor>& columns_, const Tensor& r_,
       const std::optional<Tensor>& r_tilde_, const Tensor& d_, const Tensor& d_tilde_, const Tensor& b_,
       const Tensor& s_)
      : z(z_, "z"), r(r_, "r"), d(d_, "d"), d_tilde(d_tilde_, "d_tilde"), b(b_, "b"), s(s_, "s") {
    check_rank(z, 2), check_rank(r, 4);
    check_shape(z, {z.sizes[0], z.sizes[1]});
    STD_TORCH_CHECK(z.tensor().is_contiguous(), "vvae_fast: z must be contiguous");
    rows = z.sizes[0], dim = z.sizes[1], sets = r.sizes[0], layers = r.sizes[1], units = r.sizes[2];
    check_sets(z, sets);
    check_count(layers * units, std::max(dim, units));
    check_matrix(r, units);
    if (r_tilde_) check_matrix(r_tilde.emplace(*r_tilde_, "r_tilde"), units);
    for (Argument* t : {&d, &d_tilde, &b, &s}) {
      check_shape(*t, {sets, layers, units});
      make_readable(*t);
    }
    if (columns_) check_matrix(columns.emplace(*columns_, "columns"), dim);
    STD_TORCH_CHECK(columns_ || units == dim, "vvae_fast: r must have ", dim, " units without columns, got ", units);
  }

  Tensor new_empty(std::initializer_list<int64_t> wanted) const { return B::new_empty(z, wanted, z.dtype); }

  void check_shape(const Argument& t, std::initializer_list<int64_t> wanted) const {
    B::check_kind(z)(t, z.dtype);
    check_rank(t, int64_t(wanted.size()));
    for (size_t i = 0; i < wanted.size(); ++i) check_size(t, int64_t(i), wanted.begin()[i]);
  }

  void check_matrix(Argument& t, int64_t length) {
    check_shape(t, {sets, layers, units, length});
    make_readable(t);
  }

  template <class T>
  Sylvester<T> typed(int64_t activation, double slope, bool inverse) const {
    const auto of = [](const Argument& t) { return Sets<const T>{data_of<T>(t), t.strides[0]}; };
    const auto maybe = [&](const std::optional<Argument>& t) { return t ? of(*t) : Sets<const T>{nullptr, 0}; };
    return {spec_of(int64_t(Constraint::none), activation, slope, 0),
            inverse,
            rows,
            dim,
            layers,
            units,
            sets,
            data_of<T>(z),
            maybe(columns),
            of(r),
            maybe(r_tilde),
            of(d),
            of(d_tilde),
            of(b),
            of(s)};
  }
};

template <class T>
std::array<T**, 7> members(SylvesterGradients<T>& of) {
  return {&of.columns, &of.r, &of.r_tilde, &of.d, &of.d_tilde, &of.b, &of.s};
}

}  // namespace sylvester

template <class T>
void run(const SylvesterForward<T>& f, const Isa& isa) {
  const auto& of = isa.sylvester.of<T>();
  const auto pass = of.passes(f).forward;
  const int64_t size = of.forward_scratch(f);
  for_each(f.rows, f.work(), [&](int64_t row) { pass(f, row, arena<T>(kTileScratch, size)); });
}

// The rows of a set one after the other where sets are many. Where they are few, slices of its rows side by side, whose
// sums are added in order: the bits do not depend on the number of threads.
template <class T>
void run(const SylvesterBackward<T>& f, const Isa& isa) {
  const auto& of = isa.sylvester.of<T>();
  const auto pass = of.passes(f).backward;
  const int64_t size = of.backward_scratch(f), rows = f.rows / f.sets;
  // Elements of each gradient of a set, in the order of SylvesterGradients.
  const int64_t vector = f.layers * f.units, square = vector * f.units;
  const int64_t sizes[] = {f.columns.data ? vector * f.dim : 0, square, f.r_tilde.data ? square : 0, vector, vector,
                           vector, vector};
  const int64_t partial = std::accumulate(std::begin(sizes), std::end(sizes), int64_t(0));
  const int64_t affordable = kPartialBytes / (partial * int64_t(sizeof(T)));
  const int64_t wanted = std::min({ceil_div(rows, sylvester::kRowsOfSlice), kMaxSlices / f.sets, affordable});
  const int64_t slices = std::max<int64_t>(1, wanted);
  T* partials = slices > 1 ? arena<T>(kPartials, (slices - 1) * partial) : nullptr;
  for (int64_t first = 0; first < f.sets; first += slices > 1 ? 1 : f.sets) {
    const int64_t items = slices > 1 ? slices : f.sets;
    for_each(items, 3 * f.work() * rows / slices, [&](int64_t item) {
      const int64_t set = slices > 1 ? first : item, slice = slices > 1 ? item : 0;
      auto to = f.of_set(set);
      if (slice > 0) {
        T* sums = partials + (slice - 1) * partial;
        const int64_t* size = sizes;
        for (T** t : sylvester::members(to)) *t = sums, sums += *size++;
      }
      const int64_t begin = slice * rows / slices, end = (slice + 1) * rows / slices;
      for (int64_t i = begin; i < end; ++i) pass(f, i * f.sets + set, to, i > begin, arena<T>(kTileScratch, size));
    });
    auto to = f.of_set(first);
    const T* sums = partials;
    for (int64_t slice = 1; slice < slices; ++slice) {
      const int64_t* size = sizes;
      for (T** t : sylvester::members(to)) {
        for (int64_t i = 0; i < *size; ++i) (*t)[i] += sums[i];
        sums += *size++;
      }
    }
  }
}

namespace sylvester {

// As the schemas say, of the backend B.
template <class B>
struct Operators {
  using Three = std::tuple<Tensor, Tensor, Tensor>;
  using Eight = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

  template <bool inverse>
  static Three forward(const Tensor& z, const std::optional<Tensor>& columns, const Tensor& r,
                       const std::optional<Tensor>& r_tilde, const Tensor& d, const Tensor& d_tilde, const Tensor& b,
                       const Tensor& s, int64_t activation, double slope, bool save) {
    const Call<B> call(z, columns, r, r_tilde, d, d_tilde, b, s);
    Tensor z_L = call.new_empty({call.rows, call.dim}), log_det = call.new_empty({call.rows});
    Tensor saved = save ? call.new_empty({call.layers, call.rows, call.units}) : call.new_empty({0});
    if (call.rows == 0 || call.layers == 0) {
      torch::stable::copy_(z_L, z);
      torch::stable::zero_(log_det);
      return {z_L, log_det, saved};
    }
    const auto typed = [&](auto zero) {
      using T = decltype(zero);
      B::run(SylvesterForward<T>{call.template typed<T>(activation, slope, inverse),
                                 static_cast<T*>(z_L.mutable_data_ptr()), static_cast<T*>(log_det.mutable_data_ptr()),
                                 save ? static_cast<T*>(saved.mutable_data_ptr()) : nullptr},
             call.z);
    };
    call.z.dtype == kFloat64 ? typed(double{}) : typed(float{});
    return {z_L, log_det, saved};
  }

  template <bool inverse>
  static Eight backward(const Tensor& grad_z_, const Tensor& grad_log_det_, const Tensor& z,
                        const std::optional<Tensor>& columns, const Tensor& r, const std::optional<Tensor>& r_tilde,
                        const Tensor& d, const Tensor& d_tilde, const Tensor& b, const Tensor& s,
                        const Tensor& saved_, int64_t activation, double slope) {
    const Call<B> call(z, columns, r, r_tilde, d, d_tilde, b, s);
    Argument grad_z(grad_z_, "grad_z"), grad_log_det(grad_log_det_, "grad_log_det"), saved(saved_, "saved");
    const int64_t sets = call.sets, layers = call.layers, units = call.units, dim = call.dim;
    call.check_shape(grad_z, {call.rows, dim});
    call.check_shape(grad_log_det, {call.rows});
    call.check_shape(saved, {layers, call.rows, units});
    for (Argument* t : {&grad_z, &grad_log_det, &saved})
      if (!t->tensor().is_contiguous()) t->make_contiguous();
    Tensor dz = call.new_empty({call.rows, dim});
    const auto matrices = [&](bool there, int64_t length) {
      return there ? call.new_empty({sets, layers, units, length}) : call.new_empty({0});
    };
    const auto vectors = [&] { return call.new_empty({sets, layers, units}); };
    Tensor dcolumns = matrices(bool(columns), dim);
    Tensor dr = matrices(true, units), dr_tilde = matrices(bool(r_tilde), units);
    Tensor dd = vectors(), dd_tilde = vectors(), db = vectors(), ds = vectors();
    if (call.rows == 0 || layers == 0) {
      torch::stable::copy_(dz, grad_z_);
      for (Tensor* t : {&dcolumns, &dr, &dr_tilde, &dd, &dd_tilde, &db, &ds}) torch::stable::zero_(*t);
      return {dz, dcolumns, dr, dr_tilde, dd, dd_tilde, db, ds};
    }
    const auto typed = [&](auto zero) {
      using T = decltype(zero);
      const auto data = [](Tensor& t) { return static_cast<T*>(t.mutable_data_ptr()); };
      const auto to = [&](Tensor& t) { return Sets<T>{data(t), t.numel() / sets}; };
      const Sets<T> nothing{nullptr, 0};
      B::run(SylvesterBackward<T>{call.template typed<T>(activation, slope, inverse), data_of<T>(grad_z),
                                  data_of<T>(grad_log_det), data_of<T>(saved), data(dz),
                                  columns ? to(dcolumns) : nothing, to(dr), r_tilde ? to(dr_tilde) : nothing, to(dd),
                                  to(dd_tilde), to(db), to(ds)},
             call.z);
    };
    call.z.dtype == kFloat64 ? typed(double{}) : typed(float{});
    return {dz, dcolumns, dr, dr_tilde, dd, dd_tilde, db, ds};
  }
};

}  // namespace sylvester
}  // namespace vvae

// In STABLE_TORCH_LIBRARY_IMPL(vvae_fast, ..., library): what a backend registers.
#define VVAE_REGISTER_SYLVESTER(library, B)                                                            \
  library.impl("sylvester_forward", TORCH_BOX(&vvae::sylvester::Operators<B>::forward<false>));          \
  library.impl("sylvester_backward", TORCH_BOX(&vvae::sylvester::Operators<B>::backward<false>));        \
  library.impl("sylvester_inverse", TORCH_BOX(&vvae::sylvester::Operators<B>::forward<true>));           \
  library.impl("sylvester_inverse_backward", TORCH_BOX(&vvae::sylvester::Operators<B>::backward<true>))
