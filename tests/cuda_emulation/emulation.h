// What tests may set before a launch.
#pragma once

#include <string>

namespace capsule_kernels::cuda::emulation {

// `skip`: the barrier to leave out, "file:line"; empty for none.
void configure(unsigned seed, const std::string& skip);

// All barriers reached so far, a line each.
std::string barriers();

}  // namespace capsule_kernels::cuda::emulation
