// Which instruction set the CPU's kernels use: for the operators, and for the module to tell and to set.
#pragma once

#include <atomic>
#include <string>
#include <vector>

namespace vvae {

struct Isa;  // kernels.h
std::atomic<const Isa*>& chosen_isa();

std::vector<std::string> isa_levels();  // those that run here, widest first
std::string current_isa();
void set_isa(const std::string& name);  // std::invalid_argument for any that is not among isa_levels()

}  // namespace vvae
