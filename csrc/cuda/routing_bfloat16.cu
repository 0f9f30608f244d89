#include "launch.cuh"

namespace capsule_kernels::cuda {

void forward_bfloat16(const ForwardArguments& arguments, const ForwardPlan& plan, void* stream) {
  forward_of<Tf32, BFloat16>(arguments, plan, stream);
}

void backward_bfloat16(const BackwardArguments& arguments, const BackwardPlan& plan, void* stream) {
  backward_of<Tf32, BFloat16>(arguments, plan, stream);
}

}  // namespace capsule_kernels::cuda
