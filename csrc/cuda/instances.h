// The kernels of each scalar type, and of float32 for each way to multiply, compiled in a file of
// their own.
#pragma once

#include "routing.h"

namespace capsule_kernels::cuda {

void forward_float32(const ForwardArguments&, const ForwardPlan&, void* stream);
void backward_float32(const BackwardArguments&, const BackwardPlan&, void* stream);
void forward_tf32(const ForwardArguments&, const ForwardPlan&, void* stream);
void backward_tf32(const BackwardArguments&, const BackwardPlan&, void* stream);
void forward_bfloat16(const ForwardArguments&, const ForwardPlan&, void* stream);
void backward_bfloat16(const BackwardArguments&, const BackwardPlan&, void* stream);
void forward_float16(const ForwardArguments&, const ForwardPlan&, void* stream);
void backward_float16(const BackwardArguments&, const BackwardPlan&, void* stream);

}  // namespace capsule_kernels::cuda
