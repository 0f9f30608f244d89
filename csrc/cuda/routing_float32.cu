#include "launch.cuh"

namespace capsule_kernels::cuda {

void forward_float32(const ForwardArguments& arguments, const ForwardPlan& plan, Products products,
                     void* stream) {
  const auto run =
      products == Products::kTf32 ? forward_of<Tf32, float> : forward_of<SplitTf32, float>;
  run(arguments, plan, stream);
}

void backward_float32(const BackwardArguments& arguments, const BackwardPlan& plan,
                      Products products, void* stream) {
  const auto run =
      products == Products::kTf32 ? backward_of<Tf32, float> : backward_of<SplitTf32, float>;
  run(arguments, plan, stream);
}

}  // namespace capsule_kernels::cuda
