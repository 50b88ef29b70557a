// The kernels' launchers, and what they agree on. A problem with many rows to a set runs the shared kernels, set by set,
// any other the amortized ones.
#pragma once

#include "../planar/chunks.h"
#include "launch.h"

namespace vvae {
namespace cuda {

// How the rows of a set are shared out: programs take blocks of rows in turn. By the shape alone, whatever GPU there is,
// so that sums over rows have the same bits everywhere.
struct Split {
  int64_t rows_per_set;
  int block_rows;
  int programs;  // of a set
};

// Bytes of a block's memory that the compact form needs at least; more than any GPU has where its registers do not hold
// a row.
int64_t compact_bytes(int dim);

void launch_shared_forward(const Forward& p, void* stream);
void launch_shared_inverse(const Forward& p, void* stream);
void launch_shared_backward(const Backward& p, void* stream);
void launch_amortized_forward(const Forward& p, void* stream);
void launch_amortized_backward(const Backward& p, void* stream);
void launch_compact_forward(const Forward& p, void* stream);
void launch_compact_backward(const Backward& p, void* stream);

// Bytes of workspace that each backward takes.
int64_t shared_backward_bytes(const Problem& p);
int64_t amortized_backward_bytes(const Problem& p);
int64_t compact_backward_bytes(const Problem& p);

// The last launch of a backward with shared parameters: adds the programs' sums, then (6).
void launch_finish(const Backward& p, int programs, int chunk, void* stream);

}  // namespace cuda
}  // namespace vvae
