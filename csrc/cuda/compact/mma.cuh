// Matrix products of a warp on tensor cores at float32's accuracy: three products of numbers of 11 bits,
// docs/math.md (28).
//
// c [16][8] += a [16][8] b [8][8]. With n = lane / 4 and m = lane % 4, a lane holds (PTX ISA, mma.m16n8k8)
//   a: [n][m], [n + 8][m], [n][m + 4], [n + 8][m + 4]
//   b: [m][n], [m + 4][n]
//   c: [n][2m], [n][2m + 1], [n + 8][2m], [n + 8][2m + 1]
// The order of the eight that are summed is free, as long as a and b agree. With 2m for m and 2m + 1 for m + 4 a lane
// holds of c what it has to give as a: a product's result is the next one's left side, and nothing is exchanged.
#pragma once

#include "../row.cuh"

namespace vvae {
namespace cuda {

struct Tf32 {
  uint32_t high, low;  // a product reads the upper 19 bits of each
};

// high is the nearest number of 11 bits, low the rest but for its last bit. A NaN may leave high and stays in low.
__device__ __forceinline__ Tf32 split(float x) {
  const uint32_t high = (bits_of(x) + 0x1000) & 0xffffe000;
  return {high, bits_of(x - float_of(high))};
}

#if defined(__CUDACC__)
__device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  // volatile: all lanes of the warp have to come here together
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#else
inline void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  const auto all = host::warp_publish(mine);
  const int lane = int(threadIdx.x % kWarp), n = lane / 4, m = lane % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = n + 8 * (i / 2), col = 2 * m + i % 2;
    for (int k = 0; k < 8; ++k) {
      const uint32_t x = all[4 * (row % 8) + k % 4][row / 8 + 2 * (k / 4)], y = all[4 * col + k % 4][4 + k / 4];
      c[i] += float_of(x & 0xffffe000) * float_of(y & 0xffffe000);
    }
  }
  host::warp_done();
}
#endif

template <int N>
struct Fragment {  // N is 4 of a, 2 of b
  uint32_t high[N], low[N];

  __device__ __forceinline__ void set(int i, float x) {
    const Tf32 parts = split(x);
    high[i] = parts.high;
    low[i] = parts.low;
  }
};

__device__ __forceinline__ void multiply(float (&c)[4], const Fragment<4>& a, const Fragment<2>& b) {
  multiply(c, a.low, b.high);  // the small ones first
  multiply(c, a.high, b.low);
  multiply(c, a.high, b.high);
}

// sum += a b. A tensor core cuts what it adds: only products of one size are added there, sums that grow are not.
__device__ __forceinline__ void multiply_apart(float (&sum)[4], const Fragment<4>& a, const Fragment<2>& b) {
  float c[4] = {};
  multiply(c, a, b);
#pragma unroll
  for (int i = 0; i < 4; ++i) sum[i] += c[i];
}

}  // namespace cuda
}  // namespace vvae
