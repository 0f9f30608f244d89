#include "routing.h"

#include "instances.h"

namespace capsule_kernels::cuda {

void routing_forward(const ForwardArguments& arguments, const ForwardPlan& plan, Scalar scalar,
                     Products products, void* stream) {
  switch (scalar) {
    case Scalar::kFloat32:
      return products == Products::kTf32 ? forward_tf32(arguments, plan, stream)
                                         : forward_float32(arguments, plan, stream);
    case Scalar::kBFloat16:
      return forward_bfloat16(arguments, plan, stream);
    case Scalar::kFloat16:
      return forward_float16(arguments, plan, stream);
  }
}

void routing_backward(const BackwardArguments& arguments, const BackwardPlan& plan, Scalar scalar,
                      Products products, void* stream) {
  switch (scalar) {
    case Scalar::kFloat32:
      return products == Products::kTf32 ? backward_tf32(arguments, plan, stream)
                                         : backward_float32(arguments, plan, stream);
    case Scalar::kBFloat16:
      return backward_bfloat16(arguments, plan, stream);
    case Scalar::kFloat16:
      return backward_float16(arguments, plan, stream);
  }
}

}  // namespace capsule_kernels::cuda
