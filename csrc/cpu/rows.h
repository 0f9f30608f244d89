// Capsules of one sample as a row, one after another: as they lie in u [B, I, K], gathered from a
// grid that windows slide over.
#pragma once

#include "routing.h"
#include "vec.h"

namespace capsule::CAPSULE_ISA {

// f(start in u, start in the row, K) for each capsule of [i0, i0 + count) of a sample under a
// window. K is a constant where it is the paper's.
template <typename T, typename F>
CAPSULE_INLINE void for_capsules(const Problem<T>& p, index b, index i0, index count, F f) {
  auto visit = [&](auto K) {
    for (index x = 0; x < count; ++x) f(p.sample_at[b] + p.capsule_at[i0 + x], x * K, K);
  };
  p.K == 8 ? visit(std::integral_constant<index, 8>{}) : visit(p.K);
}

// u of the capsules [i0, i0 + count) of a sample as a row, which is made in `buffer` if need be.
template <typename T>
CAPSULE_INLINE const T* row_of(const Problem<T>& p, index b, index i0, index count, T* buffer) {
  if (!p.sample_at) return p.u + p.at(b, i0);
  for_capsules(p, b, i0, count, [&](index from, index to, auto K) {
    for (index k = 0; k < K; ++k) buffer[to + k] = p.u[from + k];
  });
  return buffer;
}

// The way back to grad_u, of the first `valid` samples of a vector: in[(i, k)][stride].
// `buffer` holds a row of each if windows have to be added to what is there.
template <typename T>
CAPSULE_INLINE void scatter_gradient(const Problem<T>& p, const T* in, index stride,
                                     index first_sample, index valid, index i0, index count,
                                     T* grad_u, T* buffer) {
  if (!p.sample_at) {
    scatter_rows(in, stride, count * p.K, valid,
                 [&](index r) { return grad_u + p.at(first_sample + r, i0); });
    return;
  }
  const index length = count * p.K;
  scatter_rows(in, stride, length, valid, [&](index r) { return buffer + r * length; });
  for (index r = 0; r < valid && r < kLanes<T>; ++r)
    for_capsules(p, first_sample + r, i0, count, [&](index to, index from, auto K) {
      for (index k = 0; k < K; ++k) grad_u[to + k] += buffer[r * length + from + k];
    });
}

}  // namespace capsule::CAPSULE_ISA
