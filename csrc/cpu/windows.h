// Where the windows of a grid [B, H, W, C, K] find their capsules. Every position (b, y, x) of the
// window is a sample, every (c, dy, dx) one of its input capsules, in these orders. Where a capsule
// lies is then a sum of two numbers, one of the sample's and one of the capsule's.
#pragma once

#include <vector>

#include "routing.h"

namespace capsule {

struct Windows {
  std::vector<index> sample_at, capsule_at;
  index overlap;

  // A window of kh x kw capsules, moved by `down` rows or `right` columns in a step.
  Windows(index B, index H, index W, index C, index K, index kh, index kw, index down,
          index right) {
    const index rows = (H - kh) / down + 1, columns = (W - kw) / right + 1;
    sample_at.reserve(B * rows * columns);
    for (index b = 0; b < B; ++b)
      for (index y = 0; y < rows; ++y)
        for (index x = 0; x < columns; ++x)
          sample_at.push_back(((b * H + y * down) * W + x * right) * C * K);
    capsule_at.reserve(C * kh * kw);
    for (index c = 0; c < C; ++c)
      for (index dy = 0; dy < kh; ++dy)
        for (index dx = 0; dx < kw; ++dx) capsule_at.push_back(((dy * W + dx) * C + c) * K);
    const bool apart = (rows == 1 || down >= kh) && (columns == 1 || right >= kw);
    overlap = apart ? 1 : kh * kw;
  }

  template <typename T>
  void apply_to(Problem<T>& p) const {
    p.sample_at = sample_at.data();
    p.capsule_at = capsule_at.data();
    p.overlap = overlap;
  }
};

}  // namespace capsule
