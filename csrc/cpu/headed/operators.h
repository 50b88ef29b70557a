// The operators of headed flows: checks, allocates, runs. Schemas: vvae_fast/backends/headed.py.
#pragma once

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "../../operators/checks.h"
#include "../schedule.h"

namespace vvae {

// How rows are cut into tiles of whole vectors: into an even number, for two threads, as even as can be.
struct Tiles {
  int64_t rows, lanes, vectors, number;

  Tiles(int64_t rows, int64_t lanes) : rows(rows), lanes(lanes), vectors(ceil_div(rows, lanes)) {
    number = std::min(round_up(ceil_div(rows, kTile), 2), vectors);
  }
  int64_t start(int64_t tile) const { return tile * vectors / number; }  // a vector
  // Part `part` of `parts` of a tile; it may have no rows.
  Rows part(int64_t tile, int64_t part, int64_t parts) const {
    const int64_t begin = start(tile), size = start(tile + 1) - begin;
    const int64_t first = (begin + part * size / parts) * lanes, end = (begin + (part + 1) * size / parts) * lanes;
    return {first, std::min(end, rows) - first, first - begin * lanes};
  }
  Rows operator[](int64_t tile) const { return part(tile, 0, 1); }
  int64_t most_vectors() const { return ceil_div(vectors, number); }  // of a tile
};

// Calls run(rows, tile) for the tiles from `begin` to `end`, whole, or in parts so that each thread has one; `width`:
// parameters of a row that it computes.
template <class T, class Run>
void for_each_part(const Headed<T>& p, const Tiles& tiles, int64_t begin, int64_t end, int64_t width, const Run& run) {
  const int64_t of_tile = width * (p.features + 4) * tiles.most_vectors() * tiles.lanes;  // multiply-adds
  const int64_t wanted = ceil_div(torch::stable::get_num_threads(), end - begin);
  const int64_t parts = of_tile < kGrain ? 1 : std::min(wanted, tiles.most_vectors());
  for_each((end - begin) * parts, of_tile / parts, [&](int64_t i) {
    const int64_t tile = begin + i / parts;
    const Rows rows = tiles.part(tile, i % parts, parts);
    if (rows.count > 0) run(rows, tile);
  });
}

template <class T>
void run(const HeadedForward<T>& p, const Isa& isa) {
  const auto& kernels = isa.headed.of<T>();
  const auto pass = kernels.passes(p).forward;
  const int64_t size = kernels.forward_scratch(p), width = p.all().width();
  const Tiles tiles(p.rows, kernels.lanes);
  for_each_part(p, tiles, 0, tiles.number, width,
                [&](Rows rows, int64_t) { pass(p, rows, arena<T>(kTileScratch, size)); });
}

// dweight and dbias of the steps `of` from the gradients that the tiles from `begin` to `end` left: the threads share
// the rows of dweight, to which the tiles add in order. So the bits do not depend on the number of threads.
template <class T, class Gradients>
void sum_weights(const HeadedBackward<T>& p, const HeadedKernels<T>& kernels, const Tiles& tiles, int64_t begin,
                 int64_t end, const Steps& of, const Gradients& gradients) {
  constexpr int64_t kPiece = 32;
  // Where the rows for u, w and b begin, among the gradients and in dweight.
  const int64_t begins[] = {of.of_u(of.start), of.of_w(of.start), of.of_b(of.start), of.width()};
  const int64_t rows[] = {p.all().of_u(of.start), p.all().of_w(of.start), p.all().of_b(of.start)};
  for_each(ceil_div(of.width(), kPiece), kPiece * p.features * (end - begin) * kTile, [&](int64_t piece) {
    for (int i = 0; i < 3; ++i) {
      const int64_t first = std::max(begins[i], piece * kPiece), stop = std::min(begins[i + 1], (piece + 1) * kPiece);
      for (int64_t tile = begin; tile < end && first < stop; ++tile)
        kernels.sum_weights(p, tiles[tile], gradients(tile) + first * kTile, rows[i] + first - begins[i], stop - first,
                            tile > 0);
    }
  });
}

constexpr int64_t kGradientBytes = int64_t(1) << 20, kStateBytes = int64_t(1) << 22;  // which stay in the caches

// Some spans of some tiles at a time: threads share the rows of the tiles, and then those of dweight.
template <class T>
void run(const HeadedBackward<T>& p, const Isa& isa) {
  const auto& kernels = isa.headed.of<T>();
  const auto pass = kernels.passes(p).backward;
  const Tiles tiles(p.rows, kernels.lanes);
  const int64_t size = kernels.backward_scratch(p), state = kernels.state(p), spans = p.spans();
  const int64_t of_span = p.of_spans(0, 1).width() * kTile;
  const int64_t affordable = kGradientBytes / (of_span * int64_t(sizeof(T)));
  const int64_t in_caches = std::min(affordable, kStateBytes / (state * int64_t(sizeof(T))));
  const int64_t for_threads = ceil_div(torch::stable::get_num_threads() * kernels.lanes, kTile);
  const int64_t together = std::min(tiles.number, std::max({int64_t(2), for_threads, in_caches}));
  const int64_t at_once = p.wants_params() ? std::min(spans, std::max<int64_t>(1, affordable / together)) : spans;
  const int64_t of_tile = state + (p.wants_params() ? at_once * of_span : 0);
  T* memory = arena<T>(kPartials, together * of_tile);
  for (int64_t begin = 0; begin < tiles.number; begin += together) {
    const int64_t end = std::min(begin + together, tiles.number);
    const auto state_of = [&](int64_t tile) { return memory + (tile - begin) * of_tile; };
    const auto gradients = [&](int64_t tile) { return p.wants_params() ? state_of(tile) + state : nullptr; };
    for (int64_t end_span = spans; end_span > 0; end_span -= at_once) {
      const int64_t first_span = std::max<int64_t>(0, end_span - at_once);
      const Steps of = p.of_spans(first_span, end_span);
      for_each_part(p, tiles, begin, end, of.width(), [&](Rows rows, int64_t tile) {
        pass(p, rows, first_span, end_span, {state_of(tile), gradients(tile)}, arena<T>(kTileScratch, size));
      });
      if (p.wants_params()) sum_weights(p, kernels, tiles, begin, end, of, gradients);
    }
  }
}

namespace headed {

// A call's tensors, checked and readable; B is a Backend of operators/operators.h.
template <class B>
struct Call {
  const Argument z;
  Argument context, weight, bias;
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
    check_kind(z, z.dtype);
    for (const Argument* t : {&context, &weight, &bias}) check_kind(*t, z.dtype);
    if (context.strides[1] != 1 && features != 1) context.make_contiguous();
    for (Argument* t : {&weight, &bias})
      if (!t->tensor().is_contiguous()) t->make_contiguous();
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
    check_saved(grad_z, grad_log_det, call.z, saved_rows(call.steps, call.dim), saved, B::check_kind(call.z));
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
