// What the CUDA backend's operators ask of its kernels. No torch and no CUDA headers: a stream is a pointer here.
#pragma once

#include "../planar/args.h"

namespace vvae {
namespace cuda {

using Problem = vvae::Problem<void>;
using Forward = vvae::Forward<void>;
using Backward = vvae::Backward<void>;  // its workspace: workspace_bytes(p), aligned to 16 bytes

// How z is kept and multiplied. The shape chooses, or a form is asked for to compare the two: problems that have it
// then run it.
enum class Form { automatic, direct, compact };
void set_form(Form form);

// The most columns that the kernels take.
int64_t most_dim(Dtype dtype);

// Whether the kernels compute the problem's formulas for numbers of its dtype. The inverse has none for half precisions.
bool computes(const Problem& p);

// Bytes that launch_backward needs beside its tensors.
int64_t workspace_bytes(const Problem& p);

// Launch on `stream` of the current device; rows, sets, K and D are at least 1. std::runtime_error, naming the kernel,
// where a launch fails.
void launch_forward(const Forward& p, void* stream);
void launch_backward(const Backward& p, void* stream);

}  // namespace cuda
}  // namespace vvae
