// The backward of rows that share their parameters, in the direct form, docs/math.md (11) to (15) by chunks, and of their
// inverse, (35) and (40): g in registers, z kept where a chunk starts, (27) as in the forward. The rows' sums go to
// partials.cuh's memory and finish.cu adds them: two launches.
#include "../reduce/partials.cuh"
#include "../stage.cuh"

#include "../../planar/root.h"  // last: it belongs to the lane type that is there

namespace vvae {
namespace cuda {
namespace {

template <class S, class F>
struct SharedBackward : SharedView<BackwardView<S, F>> {
  int chunk;  // steps of one
  compute_t<S>* partials;
  KeptStarts<compute_t<S>> kept;

  SharedBackward(const Backward& f, const Split& split, int chunk, int staged)
      : SharedView<BackwardView<S, F>>(f, split, staged), chunk(chunk),
        partials(static_cast<compute_t<S>*>(f.workspace)),
        kept{partials + partial_numbers(f, split.programs), int(ceil_div(f.steps, chunk)), split.block_rows} {}
};

// Steps of a chunk to each of a row's lanes.
template <class Layout>
constexpr int kStepsOfLane = int(ceil_div(chunk_of(Layout::columns), Layout::lanes));

// A block's memory: staged steps, the rows' scalars, slope and bend of the steps' own group, and z and g of the tile.
template <class T, class Layout>
struct Tile {
  RowScalars<T> scalars;
  T *slope, *bend;  // [rows][stride]
  T *z, *g;         // [rows][columns]: z at the chunk's start, g at its end

  static int64_t bytes(int rows, int chunk) {
    const int64_t numbers = 2 * int64_t(rows) * (scalar_stride(chunk) + Layout::columns);
    return RowScalars<T>::bytes(rows, chunk) + numbers * sizeof(T);
  }
  __device__ __forceinline__ Tile(char* memory, int rows, int stride)
      : scalars(memory, rows, stride), slope(scalars.gamma + rows * stride), bend(slope + rows * stride),
        z(bend + rows * stride), g(z + rows * Layout::columns) {}
};

// v = H^T g and dw = Delta^T z over the rows of the tile, (14) without S: a thread has four steps of a column.
template <class Layout, class T>
__device__ __forceinline__ void sum_rows(const Tile<T, Layout>& tile, int rows, int count, int dim, T* partial,
                                         bool add) {
  constexpr int at_once = 4;
  const int quarters = (count + at_once - 1) / at_once;
  for (int i = int(threadIdx.x); i < 2 * quarters * dim; i += int(blockDim.x)) {
    const int d = i % dim, first = i / dim % quarters * at_once;
    const bool of_w = i / dim >= quarters;
    const T* x = (of_w ? tile.scalars.delta : tile.scalars.h) + first;
    const T* y = (of_w ? tile.z : tile.g) + d;
    T sum[at_once] = {};
    for (int row = 0; row < rows; ++row) {
      const Four<T> steps = *reinterpret_cast<const Four<T>*>(x + row * tile.scalars.stride);
#pragma unroll
      for (int j = 0; j < at_once; ++j) sum[j] += steps.get(j) * y[row * Layout::columns];
    }
#pragma unroll
    for (int j = 0; j < at_once; ++j)
      if (first + j < count)
        accumulate(partial + (first + j) * partial_width(dim) + (of_w ? dim : 0) + d, sum[j], add);
  }
}

// A row in its lanes' registers, z and g [columns]. Where the rows end everything is zero, and so is what is added to
// the sums.
template <class S, class Layout, class F>
struct State {
  using T = compute_t<S>;
  const SharedBackward<S, F>& p;
  int64_t row;
  int group;  // the row's place in the tile
  bool inside;
  Row<T, Layout> z = {}, g = {};
  T lambda = 0;

  __device__ __forceinline__ Row<T, Layout> first_z() const {
    return load_row<Layout>(p.z.from(row * p.z_row), p.params.dim);
  }

  __device__ __forceinline__ State(const SharedBackward<S, F>& p, int64_t row, int group, bool inside)
      : p(p), row(row), group(group), inside(inside) {
    if (!inside) return;
    z = first_z();
    g = load_row<Layout>(p.grad_z.from(row * p.grad_z_row), p.params.dim);
    lambda = p.grad_log_det[row * p.grad_log_det_stride];
  }
  __device__ __forceinline__ T a_of(int k) const { return inside ? p.a[k * p.a_step + row] : T(0); }
};

// The a of a chunk from `first` on, a step or a few a lane.
template <class S, class Layout, class F>
__device__ __forceinline__ void read_a(const State<S, Layout, F>& at, int first,
                                       compute_t<S> (&a)[kStepsOfLane<Layout>]) {
#pragma unroll
  for (int j = 0; j < kStepsOfLane<Layout>; ++j) {
    const int i = lane_of_row<Layout>() + j * Layout::lanes;
    a[j] = i < at.p.chunk && first + i < at.p.params.steps ? at.a_of(first + i) : compute_t<S>(0);
  }
}

// z over the chunk's steps, (10); a becomes the next chunk's.
template <bool inverse, class S, class Layout, class F, class T = compute_t<S>>
__device__ __forceinline__ void step_forward(State<S, Layout, F>& at, const Tile<T, Layout>& tile, const T* u_hat,
                                             int first, int count, T (&a)[kStepsOfLane<Layout>]) {
  T* h = tile.scalars.h + at.group * tile.scalars.stride;
#pragma unroll
  for (int j = 0; j < kStepsOfLane<Layout>; ++j) {
    const int i = lane_of_row<Layout>() + j * Layout::lanes;
    const T h_i = activate<Lane<T>>(a[j], at.p.params.activation).h;
    if (i < count) h[i] = inverse ? -h_i : h_i;
  }
  read_a(at, first + at.p.chunk, a);
  __syncwarp();
  for (int i = 0; i < count; ++i) at.z = add(at.z, h[i], read_row<Layout>(u_hat + i * Layout::columns));
  __syncwarp();
}

// g back over the chunk's steps; into the tile what is summed over its rows. a becomes that of the chunk before.
template <bool inverse, class S, class Layout, class F, class T = compute_t<S>>
__device__ __forceinline__ void step_back(State<S, Layout, F>& at, const Tile<T, Layout>& tile, const T* u_hat,
                                          const T* w, const Numbers<T>* numbers, int first, int count,
                                          T (&a)[kStepsOfLane<Layout>]) {
  constexpr int columns = Layout::columns;
  const int lane = lane_of_row<Layout>(), start = at.group * tile.scalars.stride;
  write_row(tile.g + at.group * columns, at.g);
  write_row(tile.z + at.group * columns, at.z);
  const auto& f = at.p.params.activation;
#pragma unroll
  for (int j = 0; j < kStepsOfLane<Layout>; ++j) {
    const int i = lane + j * Layout::lanes;
    if (i >= count) break;
    const auto act = activate<Lane<T>>(a[j], f);
    const T c = numbers[i].c, s = numbers[i].s;
    AdjointParts<Lane<T>> x = {};  // where the rows end the determinant may be 0
    if constexpr (inverse) {
      if (at.inside) x = inverse_adjoint_parts<Lane<T>>(at.lambda, act, c, s, f);
    } else {
      const T of_gamma = unit<Lane<T>>(s, at.p.params.constraint());
      if (at.inside) x = adjoint_parts<Lane<T>>(at.lambda, act, c, s, of_gamma, f);
    }
    tile.scalars.h[start + i] = inverse ? -act.h : act.h;
    tile.scalars.gamma[start + i] = x.gamma;
    tile.slope[start + i] = x.slope;
    tile.bend[start + i] = x.bend;
  }
  if (first > 0) read_a(at, first - at.p.chunk, a);
  __syncwarp();
  // Where the registers have room, a step's u_hat is read a turn ahead: the sum over the lanes begins with it.
  constexpr bool ahead = kReadsAhead<T, Layout>;
  const auto u_of = [&](int i) { return read_row<Layout>(u_hat + (i > 0 ? i : 0) * columns); };
  T e = dot(at.g, u_of(count - 1));
  auto u_before = u_of(count - 2);
  for (int i = count - 1; i >= 0; --i) {
    const int before = i > 0 ? i - 1 : i, own = start + i;
    const auto w_i = read_row<Layout>(w + i * columns);
    const T part = part_of_dot(at.g, u_before);
    if (ahead) u_before = u_of(i - 2);
    const T delta = e * tile.slope[own] + tile.bend[own];  // (12)
    at.g = add(at.g, delta, w_i);                          // (13)
    if (lane == 0) {
      tile.scalars.delta[own] = delta;
      if (inverse) tile.scalars.gamma[own] += gamma_of_root<Lane<T>>(delta, numbers[i].s, tile.scalars.h[own]);
    }
    e = sum_lanes<Layout>(part) + numbers[before].next * delta;  // (27)
    if (!ahead) u_before = u_of(i - 2);
  }
}

template <class Layout, class S, class F, bool inverse>
__global__ void __launch_bounds__(kThreads, 1) shared_backward_kernel(const SharedBackward<S, F> p) {
  using T = compute_t<S>;
  constexpr int columns = Layout::columns;
  const int64_t set = blockIdx.x / p.split.programs, program = blockIdx.x % p.split.programs;
  const int group = int(threadIdx.x) / Layout::lanes, block_rows = p.split.block_rows;
  const int dim = p.params.dim, steps = p.params.steps, chunks = (steps + p.chunk - 1) / p.chunk;
  const bool all_staged = p.staged == steps;
  const Staged<T, Layout> staged(shared_memory(), p.staged);
  const Tile<T, Layout> tile(shared_memory() + p.staged * Staged<T, Layout>::bytes_of_step, kGroups<Layout>,
                             scalar_stride(p.chunk));
  int staged_first = -1;  // of the steps that are staged
  const auto need = [&](int first, int count) {
    if (staged_first == (all_staged ? 0 : first)) return;
    if (staged_first >= 0) __syncthreads();  // the steps before are done with
    staged_first = all_staged ? 0 : first;
    stage<Layout>(p.params, set, staged_first, all_staged ? steps : count, staged);
    __syncthreads();
  };
  const int64_t first_block_row = program * block_rows, rows_apart = int64_t(p.split.programs) * block_rows;
  for (int64_t first_row = first_block_row; first_row < p.split.rows_per_set; first_row += rows_apart) {
    const int64_t nth = first_row + group, row = set + p.sets * nth;
    // Warps without a row go through the steps too, as in the forward.
    State<S, Layout, F> at(p, row, group, group < block_rows && nth < p.split.rows_per_set);
    // A thread reads the numbers that it wrote itself.
    const auto kept = [&](int first) {
      return p.kept.of(program * p.sets + set, first / p.chunk, dim) + int64_t(group) * dim;
    };
    T a[kStepsOfLane<Layout>];
    read_a(at, 0, a);
    for (int first = 0; first + p.chunk < steps; first += p.chunk) {  // to where the last chunk starts
      need(first, p.chunk);
      step_forward<inverse>(at, tile, staged.u_hat + (first - staged_first) * columns, first, p.chunk, a);
      if (at.inside) store_row<Layout>(kept(first + p.chunk), at.z, dim, dim % 4 == 0);
    }
    for (int first = (chunks - 1) * p.chunk; first >= 0; first -= p.chunk) {
      const int count = p.chunk < steps - first ? p.chunk : steps - first;
      need(first, count);
      const int offset = first - staged_first;
      if (at.inside)
        at.z = first > 0 ? load_row<Layout>(Rows<T>{kept(first), 1, dim % 4 == 0}, dim) : at.first_z();
      step_back<inverse>(at, tile, staged.u_hat + offset * columns, staged.w + offset * columns,
                         staged.numbers + offset, first, count, a);
      __syncthreads();
      T* partial = partial_of(p.partials, program, p.sets, set, steps, first, dim);
      const bool add = first_row != first_block_row;
      sum_rows(tile, block_rows, count, dim, partial, add);
      sum_pairs(tile.scalars, block_rows, count, dim, partial, add, inverse);
      sum_ends(tile.scalars, block_rows, count, dim, partial, add);
      __syncthreads();
    }
    if (at.inside) store_row<Layout>(p.dz + row * dim, at.g, dim, dim % 4 == 0);
  }
}

// How many rows and steps a block takes at a time, by the layout's type.
template <class L, class T>
struct Plan {
  int chunk, staged;
  Split split;

  explicit Plan(const Problem& p)
      : chunk(int(staged_chunk_of<T, L>(p.dim))), staged(Staged<T, L>::count(p.steps, chunk)),
        split(split_rows<L>(p, most_partials(p))) {}
};

}  // namespace

int64_t shared_backward_bytes(const Problem& p) {
  int64_t bytes = 0;
  with_backward_kernels(p, [&](auto zero, auto layout, auto, auto) {
    using T = compute_t<decltype(zero)>;
    const Plan<decltype(layout), T> plan(p);
    const int chunks = int(ceil_div(p.steps, plan.chunk));
    bytes = sizeof(T) * (partial_numbers(p, plan.split.programs) +
                         KeptStarts<T>::numbers(p, plan.split.programs, chunks, plan.split.block_rows, p.dim));
  });
  return bytes;
}

void launch_shared_backward(const Backward& f, void* stream) {
  with_backward_kernels(f, [&](auto zero, auto layout, auto activation, auto inverse) {
    using S = decltype(zero);
    using T = compute_t<S>;
    using L = decltype(layout);
    using F = decltype(activation);
    const Plan<L, T> plan(f);
    launch(shared_backward_kernel<L, S, F, inverse.value>, "shared_backward_kernel", plan.split.programs * f.sets,
           kThreads,
           plan.staged * Staged<T, L>::bytes_of_step + Tile<T, L>::bytes(kGroups<L>, plan.chunk), stream,
           SharedBackward<S, F>(f, plan.split, plan.chunk, plan.staged));
    launch_finish(f, plan.split.programs, plan.chunk, stream);
  });
}

}  // namespace cuda
}  // namespace vvae
