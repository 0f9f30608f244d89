// The operators of the cuda backend: checks, contiguous inputs, torch's allocations, one launch.

#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>
#include <torch/library.h>
#include <torch/version.h>

#include <algorithm>
#include <array>
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

// float32 as torch.backends.cuda.matmul.fp32_precision says, which older settings set as well.
Products products_of(Scalar scalar) {
  if (scalar != Scalar::kFloat32) return Products::kTf32;  // exactly
  const auto& settings = at::globalContext();
#if TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR < 10
  const bool tf32 = settings.float32Precision("cuda", "matmul") == "tf32";
#else
  const bool tf32 = settings.float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL) ==
                    at::Float32Precision::TF32;
#endif
  return tf32 ? Products::kTf32 : Products::kFloat32;
}

// The figures of the current device, asked for once.
Device figures_of(int index) {
  static std::mutex mutex;
  static std::map<int, Device> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(index);
  if (found != known.end()) return found->second;
  Device device{};
  const auto ask = [&](int& figure, cudaDeviceAttr attribute) {
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&figure, attribute, index));
  };
  ask(device.sm_count, cudaDevAttrMultiProcessorCount);
  ask(device.shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin);
#ifdef CAPSULE_SM_90A
  int major = 0, minor = 0;
  ask(major, cudaDevAttrComputeCapabilityMajor);
  ask(minor, cudaDevAttrComputeCapabilityMinor);
  if (major == 9 && minor == 0) device.warpgroups = 256;  // measured on an H200
#endif
  return known[index] = device;
}

// All windows [B, H', W', C, kh, kw, K] of a grid [B, H, W, C, K], in its memory; `window` as in
// capsule_kernels/ops.py. The kernels take capsules [B, I, K], so that windows have to be copied.
Tensor windows_of(const Tensor& grid, at::IntArrayRef window) {
  // A step past the end is one over all of it, whose stride can be counted.
  return grid.unfold(1, window[0], std::min(window[2], grid.size(1)))
      .unfold(2, window[1], std::min(window[3], grid.size(2)))
      .permute({0, 1, 2, 3, 5, 6, 4});
}

// Input capsules [B, I, K]: u itself, or a copy of its windows.
Tensor capsules_of(const Tensor& u, at::IntArrayRef window) {
  return window.empty() ? u : windows_of(u, window).flatten(0, 2).flatten(1, 3);
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

void check_fits(bool fits) {
  TORCH_CHECK_VALUE(fits,
                    "capsule_kernels: weight, or in the backward the states of all iterations "
                    "beside one, does not "
                    "fit in the shared memory of this device; use the triton backend");
}

// A size that the kernels can index with 32 bits.
int64_t bounded(int64_t size) {
  TORCH_CHECK_VALUE(size < std::numeric_limits<int>::max() / 16, "capsule_kernels: a size of ",
                    size, " is too large for the cuda backend");
  return size;
}

void check_like(const char* name, const Tensor& x, const Tensor& u, at::IntArrayRef shape) {
  TORCH_CHECK_TYPE(x.scalar_type() == u.scalar_type(), "capsule_kernels: ", name,
                   " must have the dtype of u, ", u.scalar_type(), ", got ", x.scalar_type());
  TORCH_CHECK_VALUE(x.device() == u.device(), "capsule_kernels: ", name, " must be on ", u.device(),
                    " as u is, got ", x.device());
  TORCH_CHECK_VALUE(x.sizes() == shape, "capsule_kernels: ", name, " must have shape ", shape,
                    ", got ", x.sizes());
}

// Samples and input capsules of the windows of u.
std::array<int64_t, 2> sizes_of_grid(const Tensor& u, at::IntArrayRef window,
                                     int64_t weight_sharing) {
  TORCH_CHECK_VALUE(window.size() == 4 && u.dim() == 5 && weight_sharing == 1,
                    "capsule_kernels: a window needs 4 numbers, u [B, H, W, C, K] and "
                    "weight_sharing 1, got ",
                    window, ", ", u.sizes(), " and ", weight_sharing);
  int64_t B = bounded(u.size(0)), I = bounded(u.size(3));
  for (int side = 0; side < 2; ++side) {
    const int64_t grid = bounded(u.size(1 + side)), length = window[side], step = window[2 + side];
    TORCH_CHECK_VALUE(length >= 1 && length <= grid && step >= 1,
                      "capsule_kernels: the window must fit into the grid and move by 1 or more, "
                      "got ",
                      window, " and ", u.sizes());
    B = bounded(B * ((grid - length) / step + 1));
    I = bounded(I * length);
  }
  return {B, I};
}

// The sizes of a call. The operators can be called directly, past the checks of fused_routing: what
// would be read out of bounds, or is too large to be counted, is refused here, before any copy.
Shape checked_shape(const Tensor& u, const Tensor& weight, const optional<Tensor>& logits,
                    int64_t R, int64_t weight_sharing, at::IntArrayRef window) {
  scalar_of(u);  // or its error
  TORCH_CHECK_VALUE(u.is_cuda(), "capsule_kernels: u must be a CUDA tensor, got ", u.device());
  TORCH_CHECK_VALUE(u.dim() == 3 || !window.empty(),
                    "capsule_kernels: u must have shape [B, I, K], got ", u.sizes());
  TORCH_CHECK_VALUE(weight.dim() == 4,
                    "capsule_kernels: weight must have shape [I // weight_sharing, J, D, K], got ",
                    weight.sizes());
  TORCH_CHECK_VALUE(R >= 1, "capsule_kernels: num_iterations must be >= 1, got ", R);
  const auto [B, I] = window.empty()
                          ? std::array<int64_t, 2>{bounded(u.size(0)), bounded(u.size(1))}
                          : sizes_of_grid(u, window, weight_sharing);
  const int64_t J = weight.size(1), D = weight.size(2), K = u.size(-1);
  TORCH_CHECK_VALUE(I >= 1 && J >= 1 && D >= 1 && K >= 1,
                    "capsule_kernels: I, J, K and D must be >= 1, got u ", u.sizes(),
                    " and weight ", weight.sizes());
  TORCH_CHECK_VALUE(weight_sharing >= 1 && I % weight_sharing == 0,
                    "capsule_kernels: weight_sharing must divide I = ", I, ", got ",
                    weight_sharing);
  TORCH_CHECK_VALUE(D <= 32 && J <= 2 * kMaxFragments && tile_fits_registers(int(J), int(D)),
                    "capsule_kernels: the cuda backend does not hold J = ", J, ", D = ", D,
                    " in registers; use the triton backend");
  check_fits(K <= 1 << 20);  // nowhere near: so the plan can count the elements of W_i in an int
  TORCH_CHECK_VALUE(sample_is_counted(I, K),
                    "capsule_kernels: the cuda backend counts the elements of a sample in 32 bits, "
                    "got I = ",
                    I, ", K = ", K, "; use the triton backend");
  check_like("weight", weight, u, {I / weight_sharing, J, D, K});
  if (logits) check_like("logits", *logits, u, {I, J});
  const Shape shape{int(B), int(I), int(J), int(K), int(D), int(bounded(R)), int(weight_sharing)};
  TORCH_CHECK_VALUE(batch_is_counted(shape),
                    "capsule_kernels: the cuda backend counts what it sums for a batch in 32 bits, "
                    "got B = ",
                    B, ", J = ", J, ", D = ", D, "; use smaller batches or the triton backend");
  return shape;
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& grid, const Tensor& weight_,
                                           const optional<Tensor>& logits_,
                                           const optional<Tensor>& bias_, int64_t num_iterations,
                                           bool leaky, int64_t weight_sharing, bool return_coupling,
                                           at::OptionalIntArrayRef window_,
                                           bool /*full_gradient*/) {
  const at::IntArrayRef window = window_.value_or(at::IntArrayRef());
  const Shape shape = checked_shape(grid, weight_, logits_, num_iterations, weight_sharing, window);
  if (bias_) check_like("bias", *bias_, grid, {shape.J, shape.D});
  const c10::cuda::CUDAGuard guard(grid.device());
  const Scalar scalar = scalar_of(grid);
  const Tensor u = prepared(capsules_of(grid, window)), weight = prepared(weight_);
  const Tensor logits = prepared(logits_), bias = prepared(bias_);

  const Tensor v = at::empty({shape.B, shape.J, shape.D}, u.options());
  const Tensor s = at::empty({shape.R, shape.B, shape.J, shape.D}, u.options().dtype(at::kFloat));
  const Tensor coupling = return_coupling ? at::empty({shape.B, shape.I, shape.J}, u.options())
                                          : at::empty({0}, u.options());
  if (shape.B == 0) return {v, s, coupling};

  const Products products = products_of(scalar);
  const ForwardPlan plan =
      plan_forward(shape, int(u.element_size()), figures_of(u.get_device()),
                   products == Products::kTf32 && !logits.defined() && !return_coupling);
  check_fits(plan.sweep.blocks > 0);
  const Tensor workspace = at::empty({int64_t(plan.workspace_floats)}, s.options());
  routing_forward({shape, leaky, 1.0f / float(shape.J + leaky), data(u), data(weight), data(logits),
                   data(bias), v.mutable_data_ptr(), s.mutable_data_ptr<float>(),
                   output_data(coupling, return_coupling), workspace.mutable_data_ptr<float>()},
                  plan, scalar, products, c10::cuda::getCurrentCUDAStream().stream());
  return {v, s, coupling};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad_v_, const Tensor& grid, const Tensor& weight_,
    const optional<Tensor>& logits_, const Tensor& s_, bool leaky, int64_t weight_sharing,
    bool full_gradient, std::array<bool, 4> output_mask, at::OptionalIntArrayRef window_) {
  const at::IntArrayRef window = window_.value_or(at::IntArrayRef());
  TORCH_CHECK_VALUE(s_.dim() == 4, "capsule_kernels: s must have shape [R, B, J, D], got ",
                    s_.sizes());
  const Shape shape = checked_shape(grid, weight_, logits_, s_.size(0), weight_sharing, window);
  check_like("grad_v", grad_v_, grid, {shape.B, shape.J, shape.D});
  TORCH_CHECK_VALUE(s_.sizes() == at::IntArrayRef({shape.R, shape.B, shape.J, shape.D}) &&
                        s_.scalar_type() == at::kFloat && s_.device() == grid.device(),
                    "capsule_kernels: s must be the s [R, B, J, D] of the forward, got ",
                    s_.sizes(), " ", s_.scalar_type(), " on ", s_.device());
  const c10::cuda::CUDAGuard guard(grid.device());
  const Scalar scalar = scalar_of(grid);
  const Tensor u = prepared(capsules_of(grid, window)), weight = prepared(weight_);
  const Tensor logits = prepared(logits_), grad_v = prepared(grad_v_), s = prepared(s_);

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

  const Products products = products_of(scalar);
  const BackwardPlan plan = plan_backward(
      shape, int(u.element_size()), figures_of(u.get_device()),
      products == Products::kTf32 && full_gradient && !logits.defined() && !output_mask[2]);
  check_fits(plan.sweep.blocks > 0 && plan.gradients.warps > 0);
  const Tensor workspace = at::empty({int64_t(plan.workspace_floats)}, s.options());
  routing_backward(
      {shape, leaky, full_gradient, 1.0f / float(shape.J + leaky), data(grad_v), data(u),
       data(weight), data(logits), s.const_data_ptr<float>(), output_data(grad_u, output_mask[0]),
       output_data(grad_weight, output_mask[1]), output_data(grad_logits, output_mask[2]),
       output_data(grad_bias, output_mask[3]), workspace.mutable_data_ptr<float>()},
      plan, scalar, products, c10::cuda::getCurrentCUDAStream().stream());
  return {grid_gradient(grad_u, grid, window), grad_weight, grad_logits, grad_bias};
}

}  // namespace
}  // namespace capsule_kernels::cuda

TORCH_LIBRARY_IMPL(capsule_kernels, CUDA, m) {
  m.impl("routing_forward.cuda", TORCH_FN(capsule_kernels::cuda::forward));
  m.impl("routing_backward.cuda", TORCH_FN(capsule_kernels::cuda::backward));
}
