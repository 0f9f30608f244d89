// The CPU kernels of the operators capsule_kernels::routing_forward.cpu and routing_backward.cpu:
// checks, allocation, threads. Schemas: capsule_kernels/ops.py.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <array>
#include <deque>
#include <vector>

#include "dispatch.h"
#include "driver.h"
#include "tasks.h"
#include "threads.h"
#include "windows.h"

namespace capsule {
namespace {

using at::Tensor;
using std::optional;

// Low-precision tensors are widened once, u and W themselves, never their product.
at::ScalarType compute_type(at::ScalarType type) {
  return type == at::kDouble ? at::kDouble : at::kFloat;
}

Tensor prepare(const Tensor& x, at::ScalarType type) { return x.to(type).contiguous(); }

void check_like(const char* op, const char* name, const Tensor& x, const Tensor& u,
                at::IntArrayRef shape) {
  TORCH_CHECK_TYPE(x.scalar_type() == u.scalar_type(), op, ": ", name,
                   " must have the dtype of u, ", u.scalar_type(), ", got ", x.scalar_type());
  TORCH_CHECK_VALUE(x.device().is_cpu(), op, ": ", name, " must be a CPU tensor, got ", x.device());
  TORCH_CHECK_VALUE(x.sizes() == shape, op, ": ", name, " must have shape ", shape, ", got ",
                    x.sizes());
}

struct Sizes {
  int64_t B, I, J, K, D;
};

// Samples and input capsules of a grid [B, H, W, C, K] that a window slides over; see
// capsule_kernels/ops.py.
std::array<int64_t, 2> sizes_of_grid(const char* op, const Tensor& u, at::IntArrayRef window,
                                     int64_t weight_sharing) {
  TORCH_CHECK_VALUE(window.size() == 4, op,
                    ": window must be empty or kh, kw and a step's rows and columns, got ", window);
  TORCH_CHECK_VALUE(u.dim() == 5, op, ": u must have shape [B, H, W, C, K] under a window, got ",
                    u.sizes());
  TORCH_CHECK_VALUE(weight_sharing == 1, op, ": weight_sharing must be 1 under a window, got ",
                    weight_sharing);
  int64_t positions = 1;
  for (int side = 0; side < 2; ++side) {
    const int64_t grid = u.size(1 + side), length = window[side], step = window[2 + side];
    TORCH_CHECK_VALUE(length >= 1 && length <= grid && step >= 1, op,
                      ": window must fit into u, its steps must be >= 1, got ", window, " and u ",
                      u.sizes());
    positions *= (grid - length) / step + 1;
  }
  return {u.size(0) * positions, u.size(3) * window[0] * window[1]};
}

// The operators can be called directly, past the checks of fused_routing: what would be read out of
// bounds is refused here.
Sizes check_inputs(const char* op, const Tensor& u, const Tensor& weight,
                   const optional<Tensor>& logits, const optional<Tensor>& bias, int64_t R,
                   int64_t weight_sharing, at::IntArrayRef window) {
  const auto type = u.scalar_type();
  TORCH_CHECK_TYPE(
      type == at::kDouble || type == at::kFloat || type == at::kBFloat16 || type == at::kHalf, op,
      ": u must be float64, float32, bfloat16 or float16, got ", type);
  TORCH_CHECK_VALUE(u.device().is_cpu(), op, ": u must be a CPU tensor, got ", u.device());
  TORCH_CHECK_VALUE(u.dim() == 3 || !window.empty(), op, ": u must have shape [B, I, K], got ",
                    u.sizes());
  TORCH_CHECK_VALUE(weight.dim() == 4, op,
                    ": weight must have shape [I // weight_sharing, J, D, K], got ",
                    weight.sizes());
  TORCH_CHECK_VALUE(R >= 1, op, ": num_iterations must be >= 1, got ", R);
  const auto [B, I] = window.empty() ? std::array<int64_t, 2>{u.size(0), u.size(1)}
                                     : sizes_of_grid(op, u, window, weight_sharing);
  const int64_t J = weight.size(1), K = u.size(-1), D = weight.size(2);
  TORCH_CHECK_VALUE(I >= 1 && K >= 1 && J >= 1 && D >= 1, op,
                    ": I, J, K and D must be >= 1, got u ", u.sizes(), " and weight ",
                    weight.sizes());
  TORCH_CHECK_VALUE(weight_sharing >= 1 && I % weight_sharing == 0, op,
                    ": weight_sharing must divide I = ", I, ", got ", weight_sharing);
  check_like(op, "weight", weight, u, {I / weight_sharing, J, D, K});
  if (logits) check_like(op, "logits", *logits, u, {I, J});
  if (bias) check_like(op, "bias", *bias, u, {J, D});
  return {B, I, J, K, D};
}

// Owns what the kernels point to: inputs in the compute type, and workspaces.
template <typename T>
class Call {
 public:
  Call(const Sizes& sizes, const Tensor& u, const Tensor& weight, const optional<Tensor>& logits,
       int64_t R, bool leaky, int64_t weight_sharing, at::IntArrayRef window)
      : u_(prepare(u, type())), weight_(prepare(weight, type())) {
    if (logits) logits_ = prepare(*logits, type());
    problem_ = {sizes.B,
                sizes.I,
                sizes.J,
                sizes.K,
                sizes.D,
                R,
                weight_sharing,
                leaky,
                u_.template const_data_ptr<T>(),
                weight_.template const_data_ptr<T>(),
                logits_.defined() ? logits_.template const_data_ptr<T>() : nullptr};
    if (window.empty()) return;
    windows_
        .emplace(u.size(0), u.size(1), u.size(2), u.size(3), sizes.K, window[0], window[1],
                 window[2], window[3])
        .apply_to(problem_);
  }

  static constexpr at::ScalarType type() { return c10::CppTypeToScalarType<T>::value; }

  auto driver() {
    auto parallel = [](index tasks, index threads, auto body) {
      run_tasks(tasks, threads, body, [](index n, auto work) { on_threads(n, work); });
    };
    auto allocate = [this](index count) {
      workspaces_.push_back(at::empty({count}, u_.options()));
      return workspaces_.back().template data_ptr<T>();
    };
    return Driver<T, decltype(parallel), decltype(allocate)>(
        problem_, kernels<T>(problem_.B), at::get_num_threads(), parallel, allocate);
  }

 private:
  Tensor u_, weight_, logits_;
  optional<Windows> windows_;
  std::deque<Tensor> workspaces_;
  Problem<T> problem_;
};

template <typename T>
T* data_or_null(const Tensor& x) {
  return x.defined() ? x.data_ptr<T>() : nullptr;
}

std::tuple<Tensor, Tensor, Tensor> routing_forward(
    const Tensor& u, const Tensor& weight, const optional<Tensor>& logits,
    const optional<Tensor>& bias, int64_t num_iterations, bool leaky, int64_t weight_sharing,
    bool return_coupling, at::OptionalIntArrayRef window_, bool /*full_gradient*/) {
  const at::IntArrayRef window = window_.value_or(at::IntArrayRef());
  const Sizes sizes = check_inputs("routing_forward", u, weight, logits, bias, num_iterations,
                                   weight_sharing, window);
  const auto [B, I, J, K, D] = sizes;
  const auto type = compute_type(u.scalar_type());
  const auto options = u.options().dtype(type);
  Tensor v = at::empty({B, J, D}, options);
  Tensor s = at::empty({num_iterations, B, J, D}, options);
  Tensor coupling;
  if (return_coupling) coupling = at::empty({B, I, J}, options);
  if (B > 0)
    AT_DISPATCH_FLOATING_TYPES(type, "routing_forward", [&] {
      Call<scalar_t> call(sizes, u, weight, logits, num_iterations, leaky, weight_sharing, window);
      Tensor offset;
      if (bias) offset = prepare(*bias, type);
      call.driver().forward(data_or_null<scalar_t>(offset), s.data_ptr<scalar_t>(),
                            v.data_ptr<scalar_t>(), data_or_null<scalar_t>(coupling));
    });
  return {v.to(u.scalar_type()), s,
          return_coupling ? coupling.to(u.scalar_type()) : at::empty({0}, u.options())};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> routing_backward(
    const Tensor& grad_v, const Tensor& u, const Tensor& weight, const optional<Tensor>& logits,
    const Tensor& s, bool leaky, int64_t weight_sharing, bool full_gradient,
    std::array<bool, 4> output_mask, at::OptionalIntArrayRef window_) {
  const at::IntArrayRef window = window_.value_or(at::IntArrayRef());
  static constexpr const char* op = "routing_backward";
  TORCH_CHECK_VALUE(s.dim() == 4, op, ": s must have shape [R, B, J, D], got ", s.sizes());
  const Sizes sizes = check_inputs(op, u, weight, logits, {}, s.size(0), weight_sharing, window);
  const auto [B, I, J, K, D] = sizes;
  check_like(op, "grad_v", grad_v, u, {B, J, D});
  const auto type = compute_type(u.scalar_type());
  const auto options = u.options().dtype(type);
  TORCH_CHECK_VALUE(s.sizes() == at::IntArrayRef({s.size(0), B, J, D}) && s.device().is_cpu() &&
                        s.scalar_type() == type,
                    op, ": s must be the s [R, B, J, D] of the forward, got ", s.sizes(), " ",
                    s.scalar_type(), " on ", s.device());

  const std::array<std::vector<int64_t>, 4> shapes{
      u.sizes().vec(), weight.sizes().vec(), {I, J}, {J, D}};
  std::array<Tensor, 4> gradients;
  for (int x = 0; x < 4; ++x)
    if (output_mask[x]) {
      // Windows add to the gradient of their grid.
      const bool written = B > 0 && (x > 0 || window.empty());
      gradients[x] = written ? at::empty(shapes[x], options) : at::zeros(shapes[x], options);
    }
  if (B > 0)
    AT_DISPATCH_FLOATING_TYPES(type, "routing_backward", [&] {
      Call<scalar_t> call(sizes, u, weight, logits, s.size(0), leaky, weight_sharing, window);
      const Tensor g = prepare(grad_v, type), totals = s.contiguous();
      call.driver().backward(
          g.const_data_ptr<scalar_t>(), totals.const_data_ptr<scalar_t>(), full_gradient,
          data_or_null<scalar_t>(gradients[0]), data_or_null<scalar_t>(gradients[1]),
          data_or_null<scalar_t>(gradients[2]), data_or_null<scalar_t>(gradients[3]));
    });
  for (Tensor& x : gradients) x = x.defined() ? x.to(u.scalar_type()) : at::empty({0}, u.options());
  return {gradients[0], gradients[1], gradients[2], gradients[3]};
}

}  // namespace

TORCH_LIBRARY_IMPL(capsule_kernels, CPU, m) {
  m.impl("routing_forward.cpu", routing_forward);
  m.impl("routing_backward.cpu", routing_backward);
}

}  // namespace capsule
