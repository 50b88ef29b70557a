// The instruction set that the CPU's kernels use, for every operator.
#pragma once

#include <atomic>

#include "kernels.h"

namespace vvae {

std::atomic<const Isa*>& chosen_isa();

}  // namespace vvae
