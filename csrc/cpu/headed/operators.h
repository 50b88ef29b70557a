// The operators of headed flows: checks, allocates, runs. Schemas: vvae_fast/backends/headed.py.
#pragma once

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>
#include <type_traits>

#include "../../operators/checks.h"
#include "../schedule.h"

namespace vvae {

template <class T>
const HeadedKernels<T>& headed_kernels(const Isa& isa) {
  if constexpr (std::is_same_v<T, float>)
    return isa.headed_f32;
  else
    return isa.headed_f64;
}

// How rows are cut into tiles of whole vectors: into an even number, for two threads, as even as can be.
struct Tiles {
  int64_t rows, lanes, vectors, number;

  Tiles(int64_t rows, int64_t lanes) : rows(rows), lanes(lanes), vectors(ceil_div(rows, lanes)) {
    number = std::min(round_up(ceil_div(rows, kTile), 2), vectors);
  }
  Rows operator[](int64_t i) const {
    const int64_t first = i * vectors / number * lanes, end = (i + 1) * vectors / number * lanes;
    return {first, std::min(end, rows) - first};
  }
};

template <class T>
int64_t work_of_tile(const Headed<T>& p, const Tiles& tiles) {
  return p.width() * (p.features + 4) * ceil_div(p.rows, tiles.number);
}

template <class T>
void run(const HeadedForward<T>& p, const Isa& isa) {
  const auto& kernels = headed_kernels<T>(isa);
  const auto pass = kernels.passes(p).forward;
  const int64_t size = kernels.forward_scratch(p);
  const Tiles tiles(p.rows, kernels.lanes);
  for_each(tiles.number, work_of_tile(p, tiles),
           [&](int64_t i) { pass(p, tiles[i], arena<T>(kTileScratch, size)); });
}

// Into how many slices the tiles are cut, whose sums are kept apart: as many as there are tiles, or of two to kMaxSlices
// the most that kHeadedPartialBytes hold, a power of two like most numbers of threads.
constexpr int64_t kHeadedPartialBytes = int64_t(1) << 25;
inline int64_t slices_of(const Tiles& tiles, int64_t bytes) {
  int64_t most = 2;
  while (2 * most <= kMaxSlices && 2 * most * bytes <= kHeadedPartialBytes) most *= 2;
  return std::min(tiles.number, most);
}

// The slices side by side, whose sums are added in order: the bits do not depend on the number of threads.
template <class T>
void run(const HeadedBackward<T>& p, const Isa& isa) {
  const auto& kernels = headed_kernels<T>(isa);
  const auto pass = kernels.passes(p).backward;
  const Tiles tiles(p.rows, kernels.lanes);
  const int64_t size = kernels.backward_scratch(p), work = 3 * work_of_tile(p, tiles);
  if (!p.wants_params())
    return for_each(tiles.number, work, [&](int64_t i) { pass(p, tiles[i], false, arena<T>(kTileScratch, size)); });
  const int64_t weights = p.width() * p.features, partial = weights + p.width();
  const int64_t slices = slices_of(tiles, partial * int64_t(sizeof(T)));
  T* partials = slices > 1 ? arena<T>(kPartials, (slices - 1) * partial) : nullptr;
  for_each(slices, work * tiles.number / slices, [&](int64_t slice) {
    HeadedBackward<T> of_slice = p;
    if (slice > 0) of_slice.dweight = partials + (slice - 1) * partial, of_slice.dbias = of_slice.dweight + weights;
    const int64_t begin = slice * tiles.number / slices, end = (slice + 1) * tiles.number / slices;
    for (int64_t i = begin; i < end; ++i) pass(of_slice, tiles[i], i > begin, arena<T>(kTileScratch, size));
  });
  if (slices == 1) return;
  constexpr int64_t kPiece = int64_t(1) << 14;
  const auto add = [&](T* to, const T* from, int64_t count) {
    for_each(ceil_div(count, kPiece), kPiece * slices, [&](int64_t piece) {
      const int64_t end = std::min(count, (piece + 1) * kPiece);
      for (int64_t slice = 1; slice < slices; ++slice)
        for (int64_t i = piece * kPiece; i < end; ++i) to[i] += from[(slice - 1) * partial + i];
    });
  };
  add(p.dweight, partials, weights);
  add(p.dbias, partials + weights, p.width());
}

namespace headed {

// A call's tensors, checked and readable; B is a Backend of operators/operators.h.
template <class B>
struct Call {
  const Argument z, context;
  Argument weight, bias;
  int64_t rows, dim, steps, features;

  Call(const Tensor& z_, const Tensor& context_, const Tensor& weight_, const Tensor& bias_)
      : z(z_, "z"), context(context_, "context"), weight(weight_, "weight"), bias(bias_, "bias") {
    check_rank(z, 2), check_rank(context, 2), check_rank(weight, 2), check_rank(bias, 1);
    rows = z.sizes[0], dim = z.sizes[1], features = context.sizes[1];
    const int64_t width = weight.sizes[0];
    STD_TORCH_CHECK(dim > 0 && width % (2 * dim + 1) == 0,
                    "vvae_fast: weight must have K (2 D + 1) rows for z [R, D] with D > 0, got ", width, " and D = ",
                    dim);
    steps = width / (2 * dim + 1);
    check_size(context, 0, rows), check_size(weight, 1, features), check_size(bias, 0, width);
    check_count(steps, std::max(dim, features));
    const auto check_kind = B::check_kind(z);
    for (const Argument* t : {&z, &context}) check_kind(*t, z.dtype);
    for (Argument* t : {&weight, &bias}) {
      check_kind(*t, z.dtype);
      if (!t->tensor().is_contiguous()) t->make_contiguous();
    }
  }

  Tensor new_empty(std::initializer_list<int64_t> sizes) const { return B::new_empty(z, sizes, z.dtype); }
  bool is_empty() const { return rows == 0 || steps == 0; }

  template <class T>
  static const T* data_of(const Argument& t) {
    return static_cast<const T*>(t.tensor().const_data_ptr());
  }
  template <class T>
  static Matrix<const T> matrix(const Argument& t) {
    return {data_of<T>(t), t.strides[0], t.strides[1]};
  }
  template <class T>
  Headed<T> typed(const FlowSpec& spec) const {
    return {spec, rows, dim, steps, features, matrix<T>(z), matrix<T>(context), data_of<T>(weight), data_of<T>(bias)};
  }
};

// As the schemas say, of the backend B.
template <class B>
struct Operators {
  using Three = std::tuple<Tensor, Tensor, Tensor>;
  using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;

  static Three forward(const Tensor& z, const Tensor& context, const Tensor& weight, const Tensor& bias,
                       int64_t constraint, int64_t activation, double slope, double log_det_eps, bool save) {
    const FlowSpec spec = spec_of(constraint, activation, slope, log_det_eps);
    const Call<B> call(z, context, weight, bias);
    Tensor z_K = call.new_empty({call.rows, call.dim}), log_det = call.new_empty({call.rows});
    Tensor saved = save ? call.new_empty({saved_rows(call.steps, call.dim), call.rows}) : call.new_empty({0});
    if (call.is_empty()) {
      torch::stable::copy_(z_K, z);
      torch::stable::zero_(log_det);
      return {z_K, log_det, saved};
    }
    const auto typed = [&](auto zero) {
      using T = decltype(zero);
      const auto data = [](Tensor& t) { return static_cast<T*>(t.mutable_data_ptr()); };
      B::run(HeadedForward<T>{call.template typed<T>(spec), data(z_K), data(log_det), save ? data(saved) : nullptr},
             call.z);
    };
    call.z.dtype == kFloat64 ? typed(double{}) : typed(float{});
    return {z_K, log_det, saved};
  }

  static Four backward(const Tensor& grad_z_, const Tensor& grad_log_det_, const Tensor& z, const Tensor& context,
                       const Tensor& weight, const Tensor& bias, const Tensor& saved_, int64_t constraint,
                       int64_t activation, double slope, double log_det_eps, bool params) {
    const FlowSpec spec = spec_of(constraint, activation, slope, log_det_eps);
    const Call<B> call(z, context, weight, bias);
    const Argument grad_z(grad_z_, "grad_z"), grad_log_det(grad_log_det_, "grad_log_det"), saved(saved_, "saved");
    check_rank(grad_z, 2), check_rank(grad_log_det, 1), check_rank(saved, 2);
    check_size(grad_z, 0, call.rows), check_size(grad_z, 1, call.dim), check_size(grad_log_det, 0, call.rows);
    check_size(saved, 0, saved_rows(call.steps, call.dim)), check_size(saved, 1, call.rows);
    STD_TORCH_CHECK(saved.tensor().is_contiguous(), "vvae_fast: saved must be contiguous, as the forward returned it");
    for (const Argument* t : {&grad_z, &grad_log_det, &saved}) B::check_kind(call.z)(*t, call.z.dtype);
    const auto maybe = [&](std::initializer_list<int64_t> sizes) {
      return params ? call.new_empty(sizes) : call.new_empty({0});
    };
    Tensor dz = call.new_empty({call.rows, call.dim});
    Tensor dcontext = maybe({call.rows, call.features}), dbias = maybe({call.bias.sizes[0]});
    Tensor dweight = maybe({call.bias.sizes[0], call.features});
    if (call.is_empty()) {
      torch::stable::copy_(dz, grad_z_);
      for (Tensor* t : {&dcontext, &dweight, &dbias}) torch::stable::zero_(*t);
      return {dz, dcontext, dweight, dbias};
    }
    const auto typed = [&](auto zero) {
      using T = decltype(zero);
      const auto data = [&](Tensor& t) { return static_cast<T*>(t.mutable_data_ptr()); };
      const auto of_params = [&](Tensor& t) { return params ? data(t) : nullptr; };
      B::run(HeadedBackward<T>{call.template typed<T>(spec), call.template matrix<T>(grad_z),
                                {call.template data_of<T>(grad_log_det), grad_log_det.strides[0]},
                                call.template data_of<T>(saved), data(dz), of_params(dcontext), of_params(dweight),
                                of_params(dbias)},
             call.z);
    };
    call.z.dtype == kFloat64 ? typed(double{}) : typed(float{});
    return {dz, dcontext, dweight, dbias};
  }
};

}  // namespace headed
}  // namespace vvae

// In STABLE_TORCH_LIBRARY_IMPL(vvae_fast, ..., library): what a backend registers.
#define VVAE_REGISTER_HEADED(library, B)                                                   \
  library.impl("headed_forward", TORCH_BOX(&vvae::headed::Operators<B>::forward));         \
  library.impl("headed_backward", TORCH_BOX(&vvae::headed::Operators<B>::backward))
