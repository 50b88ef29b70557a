// How the K steps of a flow are cut into chunks, docs/math.md section 3, for every kernel in C++.
#pragma once

#include <stdint.h>

namespace vvae {

constexpr int kChunk = 16;  // the most steps of a chunk

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
constexpr int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }

// Steps of a chunk: many more than dim would sum more vectors than the space has dimensions, and cancel.
constexpr int64_t chunk_of(int64_t dim) { return dim >= 16 ? kChunk : dim >= 8 ? 8 : 4; }

}  // namespace vvae
