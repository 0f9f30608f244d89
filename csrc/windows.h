// Windows of a grid of capsules, copied for kernels that do not find their way in the grid itself.
// `window` as in capsule_kernels/ops.py: (kh, kw, rows of a step, columns of a step), or empty.
#pragma once

#include <ATen/ATen.h>

namespace capsule_kernels {

// All windows [B, H', W', C, kh, kw, K] of a grid [B, H, W, C, K], in its memory.
inline at::Tensor windows_of(const at::Tensor& grid, at::IntArrayRef window) {
  return grid.unfold(1, window[0], window[2])
      .unfold(2, window[1], window[3])
      .permute({0, 1, 2, 3, 5, 6, 4});
}

// Input capsules [B, I, K]: u itself, or a copy of the windows.
inline at::Tensor capsules_of(const at::Tensor& u, at::IntArrayRef window) {
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
inline at::Tensor grid_gradient(const at::Tensor& gradient, const at::Tensor& u,
                                at::IntArrayRef window) {
  if (window.empty() || gradient.dim() == 1) return gradient;
  const at::Tensor grid =
      at::zeros(u.sizes(), u.options().dtype(at::promote_types(u.scalar_type(), at::kFloat)));
  const at::Tensor windows = windows_of(grid, window), added = gradient.view(windows.sizes());
  // Place by place, each of which meets a cell once: always in the same order.
  for (int64_t dy = 0; dy < window[0]; ++dy)
    for (int64_t dx = 0; dx < window[1]; ++dx)
      windows.select(4, dy).select(4, dx).add_(added.select(4, dy).select(4, dx));
  return grid.to(u.scalar_type());
}

}  // namespace capsule_kernels
