// What is no operator: facts about this build and this processor, for Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <sstream>

#include "cpu/dispatch.h"
#include "cpu/driver.h"

#define CAPSULE_TEXT_OF(...) #__VA_ARGS__
#define CAPSULE_TEXT(...) CAPSULE_TEXT_OF(__VA_ARGS__)

namespace py = pybind11;

namespace {

py::dict kernel_plan(int64_t B, int64_t I, int64_t J, int64_t K, int64_t D, int64_t R,
                     int64_t weight_sharing) {
  if (std::min({B, I, J, K, D, R, weight_sharing}) < 1 || I % weight_sharing != 0) {
    std::ostringstream message;
    message << "kernel_plan: sizes must be >= 1 and weight_sharing must divide I, got B = " << B
            << ", I = " << I << ", J = " << J << ", K = " << K << ", D = " << D << ", R = " << R
            << ", weight_sharing = " << weight_sharing;
    throw py::value_error(message.str());
  }
  const capsule::Problem<float> problem{B,     I,       J,       K,      D, R, weight_sharing,
                                        false, nullptr, nullptr, nullptr};
  const auto& kernels = capsule::kernels<float>(B);
  const auto part = capsule::make_partition(problem, kernels.lanes);
  py::dict plan;
  plan["lanes"] = part.capsule_lanes ? "capsules" : "samples";
  plan["contracts_weight"] = part.contracts;
  plan["samples_per_block"] = part.block;
  plan["sweep_tasks"] = part.tasks();
  plan["capsules_per_chunk"] = part.chunk;
  plan["final_tasks"] = capsule::final_tasks(problem, part);
  plan["scratch_bytes_per_thread"] = kernels.scratch(problem, part) * sizeof(float);
  plan["partial_sum_bytes"] = part.slots * part.padded * problem.N() * int64_t(sizeof(float));
  plan["held_prediction_bytes"] = part.held * int64_t(sizeof(float));
  return plan;
}

}  // namespace

// Without Python's lock: what is shared by threads here is constant, atomic, or behind a mutex.
PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  m.doc() = "Compiled kernels of capsule_kernels; importing registers them with torch.";
  // What the CUDA kernels are compiled for, as nvcc names it ("sm_80,compute_90"), if they are
  // here.
  m.attr("cuda_targets") =
#ifdef CAPSULE_CUDA_TARGETS
      CAPSULE_TEXT(CAPSULE_CUDA_TARGETS);
#else
      "";
#endif
  m.def("instruction_set", capsule::instruction_set, "The instruction set the CPU kernels use.");
  m.def("usable_instruction_sets", capsule::usable_instruction_sets,
        "Instruction sets of this build that this processor has, widest first.");
  m.def("set_instruction_set", capsule::set_instruction_set, py::arg("name"),
        "Use another of usable_instruction_sets(), for tests and comparisons.");
  m.def("kernel_plan", kernel_plan, py::arg("B"), py::arg("I"), py::arg("J"), py::arg("K"),
        py::arg("D"), py::arg("R") = 3, py::arg("weight_sharing") = 1,
        "How the CPU kernels cut a float32 problem into tasks.");
}
