#include "launch.cuh"

namespace capsule_kernels::cuda {

void forward_tf32(const ForwardArguments& arguments, const ForwardPlan& plan, void* stream) {
  forward_of<Tf32, float>(arguments, plan, stream);
}

void backward_tf32(const BackwardArguments& arguments, const BackwardPlan& plan, void* stream) {
  backward_of<Tf32, float>(arguments, plan, stream);
}

}  // namespace capsule_kernels::cuda
