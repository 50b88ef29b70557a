// The backward of rows that share their parameters, in the direct form, docs/math.md (11) to (15) by chunks: z and g in
// registers, z walked back by steps, (27) as in the forward. The rows' sums go to partials.cuh's memory and finish.cu
// adds them: two launches.
#include "partials.cuh"
#include "staged.cuh"

namespace vvae {
namespace cuda {
namespace {

template <class S>
struct SharedBackward : BackwardView<S> {
  Split split;
  int chunk, staged;  // steps at a time
  compute_t<S>* partials;

  SharedBackward(const Backward& f, const Split& split, int chunk, int staged)
      : BackwardView<S>(f), split(split), chunk(chunk), staged(staged),
        partials(static_cast<compute_t<S>*>(f.workspace)) {}
};

// A block's memory: staged steps, the rows' scalars, h' and r c h'' of the steps' own group, and z and g of the tile.
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
      : scalars(memory, rows, stride), slope(scalars.r_h_prime + rows * stride), bend(slope + rows * stride),
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
      for (int j = 0; j < at_once; ++j) sum[j] += steps.at[j] * y[row * Layout::columns];
    }
#pragma unroll
    for (int j = 0; j < at_once; ++j)
      if (first + j < count)
        accumulate(partial + (first + j) * partial_width(dim) + (of_w ? dim : 0) + d, sum[j], add);
  }
}

template <class Layout, class S>
__global__ void __launch_bounds__(kThreads, 1) shared_backward_kernel(const SharedBackward<S> p) {
  using T = compute_t<S>;
  constexpr int lanes = Layout::lanes, columns = Layout::columns;
  const int64_t set = blockIdx.x / p.split.programs, program = blockIdx.x % p.split.programs;
  const int group = int(threadIdx.x) / lanes, lane = lane_of_row<Layout>(), block_rows = p.split.block_rows;
  const int dim = p.params.dim, steps = p.params.steps, stride = scalar_stride(p.chunk);
  const bool all_staged = p.staged == steps;
  const Staged<T, Layout> staged(shared_memory(), p.staged);
  const Tile<T, Layout> tile(shared_memory() + p.staged * Staged<T, Layout>::bytes_of_step, block_rows, stride);
  int staged_first = -1;  // of the steps that are staged
  const auto need = [&](int first, int count) {
    if (staged_first == (all_staged ? 0 : first)) return;
    if (staged_first >= 0) __syncthreads();  // the steps before are done with
    staged_first = all_staged ? 0 : first;
    stage<Layout>(p.params, set, staged_first, all_staged ? steps : count, staged);
    __syncthreads();
  };
  const int chunks = (steps + p.chunk - 1) / p.chunk;
  const int64_t first_block_row = program * block_rows, rows_apart = int64_t(p.split.programs) * block_rows;
  for (int64_t first_row = first_block_row; first_row < p.split.rows_per_set; first_row += rows_apart) {
    const bool working = group < block_rows;  // the same in all of a warp
    const bool inside = working && first_row + group < p.split.rows_per_set;
    const int64_t row = set + p.sets * (first_row + group);
    Row<T, Layout> z = {}, g = {};  // [columns]
    T lambda = 0;
    if (inside) {
      z = load_row<Layout>(p.z.from(row * p.z_row), dim);
      g = load_row<Layout>(p.grad_z.from(row * p.grad_z_row), dim);
      lambda = p.grad_log_det[row * p.grad_log_det_stride];
    }
    // Where the rows end, a = 0 and nothing is added to any sum.
    const auto a_of = [&](int k) { return inside ? p.a[k * p.rows + row] : T(0); };
    for (int chunk = 0; chunk < chunks; ++chunk) {  // forward once more, (10)
      const int first = chunk * p.chunk, count = p.chunk < steps - first ? p.chunk : steps - first;
      need(first, count);
      if (!working) continue;
      const int offset = first - staged_first;
      for (int i = lane; i < count; i += lanes)
        tile.scalars.h[group * stride + i] = activate<Lane<T>>(a_of(first + i)).h;
      __syncwarp();
      for (int i = 0; i < count; ++i)
        z = add(z, tile.scalars.h[group * stride + i], read_row<Layout>(staged.u_hat + (offset + i) * columns));
      __syncwarp();
    }
    for (int chunk = chunks - 1; chunk >= 0; --chunk) {
      const int first = chunk * p.chunk, count = p.chunk < steps - first ? p.chunk : steps - first;
      need(first, count);
      const int offset = first - staged_first;
      if (working) {
        write_row(tile.g + group * columns, g);
        for (int i = lane; i < count; i += lanes) {
          const auto q = staged.numbers[offset + i];
          const auto act = activate<Lane<T>>(a_of(first + i));
          const T r = lambda / determinant<Lane<T>>(act, q.c, q.s);  // (11)
          tile.scalars.h[group * stride + i] = act.h;
          tile.scalars.r_h_prime[group * stride + i] = r * act.h_prime;
          tile.slope[group * stride + i] = act.h_prime;
          tile.bend[group * stride + i] = r * q.c * h_second<Lane<T>>(act);
        }
        __syncwarp();
        T e = dot(g, read_row<Layout>(staged.u_hat + (offset + count - 1) * columns));
        for (int i = count - 1; i >= 0; --i) {
          const int k = offset + i, before = i > 0 ? k - 1 : k;
          const int at = group * stride + i;
          const T of_g = dot(g, read_row<Layout>(staged.u_hat + before * columns));
          const T delta = e * tile.slope[at] + tile.bend[at];  // (12)
          e = of_g + staged.numbers[before].next * delta;
          g = add(g, delta, read_row<Layout>(staged.w + k * columns));  // (13)
          z = add(z, -tile.scalars.h[at], read_row<Layout>(staged.u_hat + k * columns));
          if (lane == 0) tile.scalars.delta[at] = delta;
        }
        write_row(tile.z + group * columns, z);
      }
      __syncthreads();
      T* partial = partial_of(p.partials, program, p.sets, set, steps, first, dim);
      const bool add = first_row != first_block_row;
      sum_rows(tile, block_rows, count, dim, partial, add);
      sum_scalars(tile.scalars, block_rows, count, dim, partial, add);
      __syncthreads();
    }
    if (inside) store_row<Layout>(p.dz + row * dim, g, dim, dim % 4 == 0);
  }
}

}  // namespace

void launch_shared_backward(const Backward& f, void* stream) {
  with_type(f.p.dtype, [&](auto zero) {
    using S = decltype(zero);
    using T = compute_t<S>;
    with_layout<T>(f.p.dim, [&](auto layout) {
      using L = decltype(layout);
      const int64_t chunk = staged_chunk_of<T, L>(f.p.dim);
      const int staged = Staged<T, L>::count(f.p.steps, chunk);
      const Split split = split_rows<L>(f.p, most_partials(f.p));
      launch(shared_backward_kernel<L, S>, "shared_backward_kernel", split.programs * f.p.sets, kThreads,
             staged * Staged<T, L>::bytes_of_step + Tile<T, L>::bytes(split.block_rows, int(chunk)), stream,
             SharedBackward<S>(f, split, int(chunk), staged));
      launch_finish(f, split.programs, int(chunk), stream);
    });
  });
}

}  // namespace cuda
}  // namespace vvae
