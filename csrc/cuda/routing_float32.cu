#include "launch.cuh"

namespace capsule_kernels::cuda {

void forward_float32(const ForwardArguments& arguments, const ForwardPlan& plan, void* stream) {
  forward_of<SplitTf32, float>(arguments, plan, stream);
}

void backward_float32(const BackwardArguments& arguments, const BackwardPlan& plan, void* stream) {
  backward_of<SplitTf32, float>(arguments, plan, stream);
}

}  // namespace capsule_kernels::cuda
