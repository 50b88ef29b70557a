// What a kernel asks of the machine that is not arithmetic: the one place where nvcc's device and the host, which runs
// the same kernels in the tests, differ. Twins stand side by side.
#pragma once

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#else
#include "cuda_on_host.h"
#endif

#include <stdint.h>

#include <stdexcept>
#include <string>

namespace vvae {
namespace cuda {

constexpr unsigned kWarp = 32, kAllLanes = 0xffffffffu;

// Memory of the block, as much as the launch asked for.
#if defined(__CUDACC__)
__device__ __forceinline__ char* shared_memory() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}
#else
inline char* shared_memory() { return host::shared_memory(); }
#endif

// The only way in which a kernel writes to its outputs: the host records which block wrote an element.
template <class T>
__device__ __forceinline__ void store(T* to, T value) {
#if !defined(__CUDACC__)
  host::record_store(to, sizeof(T));
#endif
  *to = value;
}

#if defined(__CUDACC__)
inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("vvae_fast: ") + what + ": " + cudaGetErrorString(error));
}

inline void check_launch(cudaError_t error, const char* name) {
  if (error != cudaSuccess) check(error, (std::string("the kernel ") + name + " could not be launched").c_str());
}

// What a block of the current device can have of shared memory.
inline int64_t most_shared_bytes() {
  int device = 0, bytes = 0;
  check(cudaGetDevice(&device), "the current device is not known");
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        "the shared memory of the current device is not known");
  return bytes;
}

// Runs `blocks` blocks of `threads` threads with `bytes` of shared memory each.
template <class P>
void launch(void (*kernel)(P), const char* name, int64_t blocks, int threads, int64_t bytes, void* stream, const P& p) {
  if (blocks > INT32_MAX)
    throw std::runtime_error(std::string("vvae_fast: the kernel ") + name +
                             " needs 2^31 blocks or more: call it with fewer rows, or parameter sets and steps");
  if (bytes > 48 * 1024)
    check_launch(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)), name);
  kernel<<<unsigned(blocks), unsigned(threads), size_t(bytes), cudaStream_t(stream)>>>(p);
  check_launch(cudaGetLastError(), name);
}
#else
inline int64_t most_shared_bytes() { return host::kMostSharedBytes; }

template <class P>
void launch(void (*kernel)(P), const char* name, int64_t blocks, int threads, int64_t bytes, void*, const P& p) {
  host::launch(name, reinterpret_cast<const void*>(kernel), blocks, threads, bytes, [&p, kernel] { kernel(p); });
}
#endif

}  // namespace cuda
}  // namespace vvae
