// The kernels in 16-byte vectors, which every x86-64 and aarch64 has.
#define PLANAR_NAMESPACE baseline
#define PLANAR_VECTOR_BYTES 16
#include "isa_table.h"

namespace vvae {
const Isa isa_baseline{"baseline",
                       [] { return true; },
                       {baseline::kernels<float>(), baseline::kernels<double>()},
                       {baseline::sylvester_kernels<float>(), baseline::sylvester_kernels<double>()},
                       {baseline::headed_kernels<float>(), baseline::headed_kernels<double>()}};
}
