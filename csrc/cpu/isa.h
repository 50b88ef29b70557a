// What the module asks of the CPU backend: which instruction set its kernels use.
#pragma once

#include <string>
#include <vector>

namespace vvae {

std::vector<std::string> isa_levels();  // those that run here, widest first
std::string current_isa();
void set_isa(const std::string& name);  // std::invalid_argument for any that is not among isa_levels()

}  // namespace vvae
