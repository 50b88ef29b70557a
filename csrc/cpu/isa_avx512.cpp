// The kernels for x86-64-v4 (AVX-512), empty elsewhere.
#include "kernels.h"

#if defined(__x86_64__)
namespace vvae {
static bool runs_here() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
}
}  // namespace vvae

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx2,fma,bmi,bmi2"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx2,fma,bmi,bmi2")
#endif
#define PLANAR_NAMESPACE avx512
#define PLANAR_VECTOR_BYTES 64
#include "isa_table.h"

namespace vvae {
const Isa isa_avx512{"avx512",
                     runs_here,
                     {avx512::kernels<float>(), avx512::kernels<double>()},
                     {avx512::sylvester_kernels<float>(), avx512::sylvester_kernels<double>()},
                     {avx512::headed_kernels<float>(), avx512::headed_kernels<double>()}};
}  // namespace vvae
#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
namespace vvae {
const Isa isa_avx512{"avx512", [] { return false; }, {}, {}, {}};
}
#endif
