// Which instruction set the CPU kernels use: the widest that this processor has and this build
// holds.
#pragma once

#include <string>
#include <vector>

#include "routing.h"

namespace capsule {

#define CAPSULE_DECLARE(isa)            \
  namespace isa {                       \
  const Kernels<float>& kernels_f32();  \
  const Kernels<double>& kernels_f64(); \
  }
CAPSULE_DECLARE(baseline)
#ifdef CAPSULE_X86
CAPSULE_DECLARE(avx2)
CAPSULE_DECLARE(avx512)
#endif
#undef CAPSULE_DECLARE

// Names, widest first, of the instruction sets that can run here.
std::vector<std::string> usable_instruction_sets();

// The one in use; settable (to one of the usable ones) so that tests can run each.
std::string instruction_set();
void set_instruction_set(const std::string& name);

// The kernels for a batch of B samples: of the instruction set in use, or of half its width where
// that many samples fill those vectors only.
template <typename T>
const Kernels<T>& kernels(index B);

}  // namespace capsule
