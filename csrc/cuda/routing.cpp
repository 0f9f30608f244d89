#include "routing.h"

#include "instances.h"

namespace capsule_kernels::cuda {

void routing_forward(const ForwardArguments& arguments, const ForwardPlan& plan, Scalar scalar,
                     Products products, void* stream) {
  switch (scalar) {
    case Scalar::kFloat32:
      return forward_float32(arguments, plan, products, stream);
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
      return backward_float32(arguments, plan, products, stream);
    case Scalar::kBFloat16:
      return backward_bfloat16(arguments, plan, stream);
    case Scalar::kFloat16:
      return backward_float16(arguments, plan, stream);
  }
}

}  // namespace capsule_kernels::cuda
