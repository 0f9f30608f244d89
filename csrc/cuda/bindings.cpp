// The operators of the cuda backend: checks, contiguous inputs, torch's allocations, one launch.

#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>
#include <torch/library.h>

#include <limits>
#include <map>
#include <mutex>
#include <optional>
#include <tuple>

#include "routing.h"

namespace capsule_kernels::cuda {
namespace {

using at::Tensor;
using std::optional;

// Contiguous and aligned for vector loads; usually the tensor itself.
Tensor prepared(const Tensor& x) {
  const Tensor y = x.contiguous();
  return reinterpret_cast<std::uintptr_t>(y.const_data_ptr()) % 16 == 0 ? y : y.clone();
}

Tensor prepared(const optional<Tensor>& x) {
  return x.has_value() && x->defined() ? prepared(*x) : Tensor();
}

const void* data(const Tensor& x) { return x.defined() ? x.const_data_ptr() : nullptr; }

void* output_data(const Tensor& x, bool wanted) { return wanted ? x.mutable_data_ptr() : nullptr; }

Scalar scalar_of(const Tensor& u) {
  switch (u.scalar_type()) {
    case at::kFloat:
      return Scalar::kFloat32;
    case at::kBFloat16:
      return Scalar::kBFloat16;
    case at::kHalf:
      return Scalar::kFloat16;
    default:
      TORCH_CHECK_TYPE(false,
                       "capsule_kernels: the cuda backend takes float32, bfloat16 and "
                       "float16, got u of dtype ",
                       u.scalar_type());
  }
}

Products products_of_float32() {
  return at::globalContext().float32MatmulPrecision() == at::Float32MatmulPrecision::HIGHEST
             ? Products::kFloat32
             : Products::kTf32;
}

// The figures of the current device, asked for once.
Device figures_of(int index) {
  static std::mutex mutex;
  static std::map<int, Device> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(index);
  if (found != known.end()) return found->second;
  Device device{};
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&device.sm_count, cudaDevAttrMultiProcessorCount, index));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&device.shared_per_block,
                                        cudaDevAttrMaxSharedMemoryPerBlockOptin, index));
  device.clusters = resident_clusters_of_sweeps(device.shared_per_block);
  return known[index] = device;
}

// All windows [B, H', W', C, kh, kw, K] of a grid [B, H, W, C, K], in its memory; `window` as in
// capsule_kernels/ops.py. The kernels take capsules [B, I, K], so that windows have to be copied.
Tensor windows_of(const Tensor& grid, at::IntArrayRef window) {
  return grid.unfold(1, window[0], window[2])
      .unfold(2, window[1], window[3])
      .permute({0, 1, 2, 3, 5, 6, 4});
}

// Input capsules [B, I, K]: u itself, or a copy of its windows.
Tensor capsules_of(const Tensor& u, at::IntArrayRef window) {
  if (window.empty()) return u;
  TORCH_CHECK_VALUE(window.size() == 4 && u.dim() == 5,
                    "capsule_kernels: a window needs 4 numbers and u [B, H, W, C, K], got ", window,
                    " and ", u.sizes());
  for (int side = 0; side < 2; ++side)
    TORCH_CHECK_VALUE(
        window[side] >= 1 && window[side] <= u.size(1 + side) && window[2 + side] >= 1,
        "capsule_kernels: the window must fit into the grid, got ", window, " and ", u.sizes());
  return windows_of(u, window).flatten(0, 2).flatten(1, 3);
}

// The gradient of u [B, H, W, C, K] from that of capsules_of(u, window).
Tensor grid_gradient(const Tensor& gradient, const Tensor& u, at::IntArrayRef window) {
  if (window.empty() || gradient.dim() == 1) return gradient;
  const Tensor grid =
      at::zeros(u.sizes(), u.options().dtype(at::promote_types(u.scalar_type(), at::kFloat)));
  const Tensor windows = windows_of(grid, window), added = gradient.view(windows.sizes());
  // Place by place, each of which meets a cell once: always in the same order.
  for (int64_t dy = 0; dy < window[0]; ++dy)
    for (int64_t dx = 0; dx < window[1]; ++dx)
      windows.select(4, dy).select(4, dx).add_(added.select(4, dy).select(4, dx));
  return grid.to(u.scalar_type());
}

// The sizes of a call, checked to be within what the kernels index with 32 bits.
Shape shape_of(const Tensor& u, const Tensor& weight, int64_t R, int64_t weight_sharing) {
  TORCH_CHECK_VALUE(
      u.dim() == 3 && weight.dim() == 4 && weight_sharing >= 1 && R >= 1 &&
          weight.size(0) * weight_sharing == u.size(1) && weight.size(3) == u.size(2) &&
          weight.scalar_type() == u.scalar_type() && weight.device() == u.device(),
      "capsule_kernels: weight must be [I // weight_sharing, J, D, K] for u [B, I, K] "
      "of the same dtype and device, got ",
      weight.sizes(), " and ", u.sizes());
  for (const int64_t size : {u.size(0), u.size(1), u.size(2), weight.size(1), weight.size(2), R}) {
    TORCH_CHECK_VALUE(size < std::numeric_limits<int>::max() / 16, "capsule_kernels: a size of ",
                      size, " is too large for the cuda backend");
  }
  const int64_t J = weight.size(1), D = weight.size(2);
  TORCH_CHECK_VALUE(D <= 32 && J <= 2 * kMaxFragments && tile_fits_registers(int(J), int(D)),
                    "capsule_kernels: the cuda backend does not hold J = ", J, ", D = ", D,
                    " in registers; use the triton backend");
  return {int(u.size(0)), int(u.size(1)),     int(J), int(u.size(2)), int(D),
          int(R),         int(weight_sharing)};
}

void check_fits(bool fits) {
  TORCH_CHECK_VALUE(fits,
                    "capsule_kernels: weight, or in the backward the states of all iterations "
                    "beside one, does not "
                    "fit in the shared memory of this device; use the triton backend");
}

// An optional input of the sizes and dtype the kernels read.
void check_optional(const char* name, const Tensor& x, at::IntArrayRef sizes, const Tensor& u) {
  TORCH_CHECK_VALUE(!x.defined() || (x.sizes() == sizes && x.scalar_type() == u.scalar_type() &&
                                     x.device() == u.device()),
                    "capsule_kernels: ", name, " must be ", sizes,
                    " of the dtype and device of u, "
                    "got ",
                    x.sizes());
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& grid, const Tensor& weight_,
                                           const optional<Tensor>& logits_,
                                           const optional<Tensor>& bias_, int64_t num_iterations,
                                           bool leaky, int64_t weight_sharing, bool return_coupling,
                                           at::OptionalIntArrayRef window_) {
  const c10::cuda::CUDAGuard guard(grid.device());
  const at::IntArrayRef window = window_.value_or(at::IntArrayRef());
  const Tensor u_ = capsules_of(grid, window);
  const Shape shape = shape_of(u_, weight_, num_iterations, weight_sharing);
  const Scalar scalar = scalar_of(u_);
  const Tensor u = prepared(u_), weight = prepared(weight_);
  const Tensor logits = prepared(logits_), bias = prepared(bias_);
  check_optional("logits", logits, {shape.I, shape.J}, u);
  check_optional("bias", bias, {shape.J, shape.D}, u);

  const Tensor v = at::empty({shape.B, shape.J, shape.D}, u.options());
  const Tensor s = at::empty({shape.R, shape.B, shape.J, shape.D}, u.options().dtype(at::kFloat));
  const Tensor coupling = return_coupling ? at::empty({shape.B, shape.I, shape.J}, u.options())
                                          : at::empty({0}, u.options());
  if (shape.B == 0) return {v, s, coupling};

  const ForwardPlan plan = plan_forward(shape, int(u.element_size()), figures_of(u.get_device()));
  check_fits(plan.sweep.blocks > 0);
  const Tensor workspace = at::empty({int64_t(plan.workspace_floats)}, s.options());
  routing_forward({shape, leaky, 1.0f / float(shape.J + leaky), data(u), data(weight), data(logits),
                   data(bias), v.mutable_data_ptr(), s.mutable_data_ptr<float>(),
                   output_data(coupling, return_coupling), workspace.mutable_data_ptr<float>()},
                  plan, scalar, products_of_float32(), c10::cuda::getCurrentCUDAStream().stream());
  return {v, s, coupling};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad_v_, const Tensor& grid, const Tensor& weight_,
    const optional<Tensor>& logits_, const Tensor& s_, bool leaky, int64_t weight_sharing,
    bool full_gradient, std::array<bool, 4> output_mask, at::OptionalIntArrayRef window_) {
  const c10::cuda::CUDAGuard guard(grid.device());
  const at::IntArrayRef window = window_.value_or(at::IntArrayRef());
  const Tensor u_ = capsules_of(grid, window);
  const Shape shape = shape_of(u_, weight_, s_.size(0), weight_sharing);
  const Scalar scalar = scalar_of(u_);
  const Tensor u = prepared(u_), weight = prepared(weight_), logits = prepared(logits_);
  const Tensor grad_v = prepared(grad_v_), s = prepared(s_);
  check_optional("logits", logits, {shape.I, shape.J}, u);
  check_optional("grad_v", grad_v, {shape.B, shape.J, shape.D}, u);
  TORCH_CHECK_VALUE(s.sizes() == at::IntArrayRef({shape.R, shape.B, shape.J, shape.D}) &&
                        s.scalar_type() == at::kFloat && s.device() == u.device(),
                    "capsule_kernels: s must be float32 [R, B, J, D], got ", s.sizes());

  // An empty batch has no samples to sum over: every gradient is 0.
  const auto gradient = [&](bool wanted, at::IntArrayRef sizes) {
    if (!wanted) return at::empty({0}, u.options());
    return shape.B == 0 ? at::zeros(sizes, u.options()) : at::empty(sizes, u.options());
  };
  const Tensor grad_u = gradient(output_mask[0], u.sizes());
  const Tensor grad_weight = gradient(output_mask[1], weight.sizes());
  const Tensor grad_logits = gradient(output_mask[2], {shape.I, shape.J});
  const Tensor grad_bias = gradient(output_mask[3], {shape.J, shape.D});
  if (shape.B == 0)
    return {grid_gradient(grad_u, grid, window), grad_weight, grad_logits, grad_bias};

  const BackwardPlan plan = plan_backward(shape, int(u.element_size()), figures_of(u.get_device()));
  check_fits(plan.sweep.blocks > 0 && plan.gradients.warps > 0);
  const Tensor workspace = at::empty({int64_t(plan.workspace_floats)}, s.options());
  routing_backward(
      {shape, leaky, full_gradient, 1.0f / float(shape.J + leaky), data(grad_v), data(u),
       data(weight), data(logits), s.const_data_ptr<float>(), output_data(grad_u, output_mask[0]),
       output_data(grad_weight, output_mask[1]), output_data(grad_logits, output_mask[2]),
       output_data(grad_bias, output_mask[3]), workspace.mutable_data_ptr<float>()},
      plan, scalar, products_of_float32(), c10::cuda::getCurrentCUDAStream().stream());
  return {grid_gradient(grad_u, grid, window), grad_weight, grad_logits, grad_bias};
}

}  // namespace
}  // namespace capsule_kernels::cuda

TORCH_LIBRARY_IMPL(capsule_kernels, CUDA, m) {
  m.impl("routing_forward.cuda", TORCH_FN(capsule_kernels::cuda::forward));
  m.impl("routing_backward.cuda", TORCH_FN(capsule_kernels::cuda::backward));
}
