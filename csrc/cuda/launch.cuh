// From the sizes of a call to an instance of the kernels; one translation unit a scalar type.
#pragma once

#include <type_traits>

#include "instances.h"
#include "routing_backward_gradients.cuh"
#include "routing_backward_states.cuh"
#include "routing_forward.cuh"

namespace capsule_kernels::cuda {

template <class P, class T, int DT>
void launch_backward(const BackwardArguments& arguments, const BackwardPlan& plan, void* stream) {
  launch(routing_backward_states_kernel<P, T, DT>, plan.sweep.blocks, kSweepWarps * kWarpSize,
         plan.sweep.shared_bytes, /*cooperative=*/true, stream, arguments, plan);
  const Shape& shape = arguments.shape;
  const GradientPlan& gradients = plan.gradients;
  launch(routing_backward_gradients_kernel<P, T, DT>,
         ceil_div(shape.I, gradients.warps) * gradients.splits, gradients.warps * kWarpSize,
         gradients.shared_bytes, /*cooperative=*/false, stream, arguments, plan);
  if (gradients.partial_sums &&
      (arguments.grad_weight != nullptr || arguments.grad_logits != nullptr)) {
    launch(routing_backward_sums_kernel<T>, plan.sweep.blocks, kSweepWarps * kWarpSize, 0,
           /*cooperative=*/false, stream, arguments, plan);
  }
}

// Calls run(DT) with the number of fragments of an output capsule as a constant.
template <class Run>
void with_fragments(int D, Run run) {
  switch (fragments_per_capsule(D)) {
    case 1:
      return run(std::integral_constant<int, 1>());
    case 2:
      return run(std::integral_constant<int, 2>());
    default:
      return run(std::integral_constant<int, 4>());
  }
}

template <class P, class T>
void forward_of(const ForwardArguments& arguments, const ForwardPlan& plan, void* stream) {
  with_fragments(arguments.shape.D, [&](auto DT) {
    launch_forward<P, T, decltype(DT)::value>(arguments, plan, stream);
  });
}

template <class P, class T>
void backward_of(const BackwardArguments& arguments, const BackwardPlan& plan, void* stream) {
  with_fragments(arguments.shape.D, [&](auto DT) {
    launch_backward<P, T, decltype(DT)::value>(arguments, plan, stream);
  });
}

}  // namespace capsule_kernels::cuda
