#include "dispatch.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>

namespace capsule {
namespace {

struct InstructionSet {
  const char* name;
  bool (*usable)();
  const Kernels<float>& (*f32)();
  const Kernels<double>& (*f64)();
  // Whether the next one has vectors of half the width and is else as good, if not so wide.
  bool next_is_half;

  const Kernels<float>& kernels(float) const { return f32(); }
  const Kernels<double>& kernels(double) const { return f64(); }
};

const InstructionSet kInstructionSets[] = {
#ifdef CAPSULE_X86
    {"avx512",
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw");
     },
     avx512::kernels_f32, avx512::kernels_f64, true},
    {"avx2", [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); },
     avx2::kernels_f32, avx2::kernels_f64, false},
#endif
    {"baseline", [] { return true; }, baseline::kernels_f32, baseline::kernels_f64, false},
};

std::atomic<const InstructionSet*>& current() {
  static std::atomic<const InstructionSet*> chosen{
      std::find_if(std::begin(kInstructionSets), std::end(kInstructionSets),
                   [](auto& s) { return s.usable(); })};
  return chosen;
}

}  // namespace

std::vector<std::string> usable_instruction_sets() {
  std::vector<std::string> names;
  for (const InstructionSet& set : kInstructionSets)
    if (set.usable()) names.push_back(set.name);
  return names;
}

std::string instruction_set() { return current().load()->name; }

void set_instruction_set(const std::string& name) {
  for (const InstructionSet& set : kInstructionSets)
    if (set.name == name && set.usable()) {
      current() = &set;
      return;
    }
  throw std::invalid_argument("instruction set must be one of usable_instruction_sets(), got " +
                              name);
}

template <typename T>
const Kernels<T>& kernels(index B) {
  const InstructionSet* set = current();
  const Kernels<T>& widest = set->kernels(T());
  if (!set->next_is_half || !too_few_for_lanes(B, widest.lanes)) return widest;
  const Kernels<T>& half = set[1].kernels(T());
  return too_few_for_lanes(B, half.lanes) ? widest : half;
}
template const Kernels<float>& kernels<float>(index B);
template const Kernels<double>& kernels<double>(index B);

}  // namespace capsule
