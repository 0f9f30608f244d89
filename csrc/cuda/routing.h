// Dynamic routing on CUDA devices: what the kernels are told, free of torch and of CUDA headers.
//
// All pointers are device pointers to contiguous arrays, 16-byte aligned. `u`, `weight`, `logits`,
// `bias`, `v`, `coupling` and the gradients have the scalar type of the call; everything else is
// float. Letters are those of the paper: see docs/kernels.md.
#pragma once

#include <cstddef>
#include <cstdint>

#include "plan.h"

namespace capsule_kernels::cuda {

enum class Scalar { kFloat32, kBFloat16, kFloat16 };

// How float32 operands enter the tensor cores. bfloat16 and float16 values are TF32 values as they
// are, so kTf32 multiplies them exactly.
enum class Products {
  kTf32,     // one product of operands rounded to TF32
  kFloat32,  // three products of operands split in two TF32 values each: float32 accuracy
};

struct ForwardArguments {
  Shape shape;
  bool leaky;
  // What softmax gives where all logits are 0. Told, not computed: a kernel would hold it in a
  // register from the first iteration on.
  float uniform_coupling;
  const void* u;       // [B, I, K]
  const void* weight;  // [I / weight_sharing, J, D, K]
  const void* logits;  // [I, J] or null
  const void* bias;    // [J, D] or null
  void* v;             // [B, J, D]
  float* s;            // [R, B, J, D]
  void* coupling;      // [B, I, J] or null
  float* workspace;    // ForwardPlan::workspace_floats
};

struct BackwardArguments {
  Shape shape;
  bool leaky;
  bool full_gradient;
  float uniform_coupling;  // as above
  const void* grad_v;      // [B, J, D]
  const void* u;           // [B, I, K]
  const void* weight;      // [I / weight_sharing, J, D, K]
  const void* logits;      // [I, J] or null
  const float* s;          // [R, B, J, D], as the forward wrote it
  void* grad_u;            // each null where it is not wanted
  void* grad_weight;
  void* grad_logits;
  void* grad_bias;
  float* workspace;  // BackwardPlan::workspace_floats
};

// Both enqueue on `stream` (a cudaStream_t) of the current device and return without waiting.
// They throw std::runtime_error naming the CUDA call that failed.
void routing_forward(const ForwardArguments& arguments, const ForwardPlan& plan, Scalar scalar,
                     Products products, void* stream);
void routing_backward(const BackwardArguments& arguments, const BackwardPlan& plan, Scalar scalar,
                      Products products, void* stream);

}  // namespace capsule_kernels::cuda
