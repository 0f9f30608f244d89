// Coupling coefficients of one input capsule, one sample (or capsule) a lane.
#pragma once

#include "vec.h"

namespace capsule::CAPSULE_ISA {

// exp(x_j + prior_j - the largest of them) in place, and 1 / their sum. `x` is [J][stride]; leaky
// adds a logit fixed at 0. visit(j, exponential) is called for each.
template <typename T, typename Visit>
CAPSULE_INLINE Vec<T> exponentials(T* x, index J, index stride, const T* prior, bool leaky,
                                   Visit visit) {
  Vec<T> highest = leaky ? Vec<T>{} : broadcast(-T(__builtin_inf()));
  for (index j = 0; j < J; ++j) {
    Vec<T> logit = load(x + j * stride);
    if (prior) {
      logit += prior[j];
      store(x + j * stride, logit);
    }
    highest = max(logit, highest);
  }
  Vec<T> total = leaky ? exp_nonpositive<T>(-highest) : Vec<T>{};
  for (index j = 0; j < J; ++j) {
    const Vec<T> e = exp_nonpositive<T>(load(x + j * stride) - highest);
    store(x + j * stride, e);
    total += e;
    visit(j, e);
  }
  return T(1) / total;
}

// c = softmax over j of x_j + prior_j, in place; the share of a leaky logit is dropped. NaN
// anywhere makes the whole row NaN, as in torch.softmax.
template <typename T>
CAPSULE_INLINE void softmax(T* x, index J, index stride, const T* prior, bool leaky) {
  const Vec<T> scale = exponentials(x, J, stride, prior, leaky, [](index, const Vec<T>&) {});
  for (index j = 0; j < J; ++j) store(x + j * stride, load(x + j * stride) * scale);
}

// dl_j = c_j (dc_j - sum_k c_k dc_k), written over dc.
template <typename T>
CAPSULE_INLINE void softmax_gradient(const T* c, T* dc, index J, index stride) {
  Vec<T> mean{};
  for (index j = 0; j < J; ++j) mean += load(c + j * stride) * load(dc + j * stride);
  for (index j = 0; j < J; ++j)
    store(dc + j * stride, load(c + j * stride) * (load(dc + j * stride) - mean));
}

// Both at once; c is written over x if it `keeps_c`.
template <bool keeps_c, typename T>
CAPSULE_INLINE void softmax_and_gradient(T* x, T* dc, index J, index stride, const T* prior,
                                         bool leaky) {
  Vec<T> mean{};
  const Vec<T> scale = exponentials(x, J, stride, prior, leaky, [&](index j, const Vec<T>& e) {
    mean += e * load(dc + j * stride);
  });
  mean *= scale;
  for (index j = 0; j < J; ++j) {
    const Vec<T> c = load(x + j * stride) * scale;
    if constexpr (keeps_c) store(x + j * stride, c);
    store(dc + j * stride, c * (load(dc + j * stride) - mean));
  }
}

// Couplings before any agreement, the same for every sample: one scalar a j, softmax of the priors
// of one capsule, or uniform where `prior` is null. `scratch` holds [J][lanes].
template <typename T>
CAPSULE_INLINE void prior_softmax(T* c, index J, const T* prior, bool leaky, T* scratch) {
  constexpr int lanes = kLanes<T>;
  if (!prior) {
    for (index j = 0; j < J; ++j) c[j] = T(1) / T(J + leaky);
    return;
  }
  for (index x = 0; x < J * lanes; ++x) scratch[x] = 0;
  softmax(scratch, J, lanes, prior, leaky);
  for (index j = 0; j < J; ++j) c[j] = scratch[j * lanes];
}

}  // namespace capsule::CAPSULE_ISA
