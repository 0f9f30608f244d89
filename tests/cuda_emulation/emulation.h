// What tests may set before a launch.
#pragma once

#include <string>

namespace capsule_kernels::cuda::emulation {

// `skip`: the barrier to leave out, "file:line:call"; empty for none.
void configure(unsigned seed, const std::string& skip);

// What the barriers that are reached from now on belong to.
void begin_call(const std::string& name);

// All barriers reached so far, a line each.
std::string barriers();

}  // namespace capsule_kernels::cuda::emulation
