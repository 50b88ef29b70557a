// The kernels for x86-64-v3 (AVX2 and FMA), empty elsewhere.
#include "kernels.h"

#if defined(__x86_64__)
namespace vvae {
static bool runs_here() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
}
}  // namespace vvae

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,bmi,bmi2"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,bmi,bmi2")
#endif
#define PLANAR_NAMESPACE avx2
#define PLANAR_VECTOR_BYTES 32
#include "isa_table.h"

namespace vvae {
const Isa isa_avx2{"avx2",
                   runs_here,
                   {avx2::kernels<float>(), avx2::kernels<double>()},
                   {avx2::sylvester_kernels<float>(), avx2::sylvester_kernels<double>()},
                   {avx2::headed_kernels<float>(), avx2::headed_kernels<double>()}};
}  // namespace vvae
#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
namespace vvae {
const Isa isa_avx2{"avx2", [] { return false; }, {}, {}, {}};
}
#endif
