// CUDA for kernels that run on the host, in the tests: what csrc/cuda/device.h includes where nvcc does not compile it.
// 1-D grids and blocks of whole warps, all of whose lanes take part in every exchange.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "lanes.h"
#include "owners.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

inline float __int_as_float(int x) { return __builtin_bit_cast(float, x); }
inline int __float_as_int(float x) { return __builtin_bit_cast(int, x); }
inline double __longlong_as_double(long long x) { return __builtin_bit_cast(double, x); }
inline long long __double_as_longlong(double x) { return __builtin_bit_cast(long long, x); }

namespace vvae {
namespace cuda {
namespace host {

struct Index {
  unsigned x, y, z;
};

enum Blocks : int64_t { kForward, kReverse };  // any other number is the seed of a random order
inline int64_t order_of_blocks = kForward;     // and of the lanes

constexpr int64_t kMostSharedBytes = 99 * 1024;  // of sm_86 and sm_89, the smallest that the kernels are made for

inline char* shared_bytes = nullptr;
inline char* shared_memory() { return shared_bytes; }

// Every kernel that ran, as the function that it is: a template's instantiations are told apart.
inline std::set<const void*> kernels_run;

// The numbers below n, in the order of blocks that is set.
inline std::vector<int> numbers_in_order(int64_t n) {
  std::vector<int> numbers(static_cast<size_t>(n));
  std::iota(numbers.begin(), numbers.end(), 0);
  if (order_of_blocks == kReverse) std::reverse(numbers.begin(), numbers.end());
  if (order_of_blocks > kReverse) std::shuffle(numbers.begin(), numbers.end(), std::mt19937_64(order_of_blocks));
  return numbers;
}

template <class F>
void launch(const char* name, const void* kernel, int64_t blocks, int threads, int64_t bytes, F&& call) {
  if (blocks < 1 || blocks > INT32_MAX || threads < 1 || threads > kMostLanes || threads % kLanesOfWarp || bytes < 0 ||
      bytes > kMostSharedBytes)
    throw std::runtime_error(std::string(name) + " cannot be launched: " + std::to_string(blocks) + " blocks of " +
                             std::to_string(threads) + " threads, " + std::to_string(bytes) + " bytes");
  kernel_name = name;
  kernels_run.insert(kernel);
  owners.begin_launch();
  const std::unique_ptr<char[]> memory(new char[size_t(bytes)]);  // exactly: AddressSanitizer sees what lies behind
  shared_bytes = memory.get();
  const auto lanes = numbers_in_order(threads);
  for (const int index : numbers_in_order(blocks)) {
    memset(shared_bytes, 0xff, size_t(bytes));  // NaN, in every type
    const auto body = [](void* f) { (*static_cast<std::remove_reference_t<F>*>(f))(); };
    block.run(index, blocks, lanes.data(), threads, body, &call);
  }
  shared_bytes = nullptr;
}

// What the lanes of a warp publish, at [lane][i]: it stays until the lane says that it is done.
template <class T, int N>
const T (*warp_publish(const T (&mine)[N]))[N] {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(mine) <= kMostPublished);
  return reinterpret_cast<const T(*)[N]>(block.publish(mine, sizeof(mine)));
}

inline void warp_done() {}  // the exchange has two halves: the next one may begin

}  // namespace host
}  // namespace cuda
}  // namespace vvae

#define threadIdx (vvae::cuda::host::Index{unsigned(vvae::cuda::host::block.lane()), 0, 0})
#define blockIdx (vvae::cuda::host::Index{unsigned(vvae::cuda::host::block.index()), 0, 0})
#define blockDim (vvae::cuda::host::Index{unsigned(vvae::cuda::host::block.lanes()), 1, 1})
#define gridDim (vvae::cuda::host::Index{unsigned(vvae::cuda::host::block.blocks()), 1, 1})

inline void __syncthreads() { vvae::cuda::host::block.wait_for_all(); }
inline void __syncwarp(unsigned = ~0u) { vvae::cuda::host::block.wait_for_warp(); }

template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  const T mine[1] = {value};
  return vvae::cuda::host::warp_publish(mine)[lane % 32][0];
}
inline bool __any_sync(unsigned, bool value) {
  const bool mine[1] = {value};
  const auto all = vvae::cuda::host::warp_publish(mine);
  for (unsigned lane = 0; lane < 32; ++lane)
    if (all[lane][0]) return true;
  return false;
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return __shfl_sync(~0u, value, int(threadIdx.x % 32) ^ mask);
}
