// Coupling coefficients of one input capsule, one sample (or capsule) a lane.
#pragma once

#include "vec.h"

namespace capsule::CAPSULE_ISA {

// c = softmax over j of x_j + prior_j, in place. `x` is [J][stride]; leaky adds a logit fixed at 0
// whose share is dropped. NaN anywhere makes the whole row NaN, as in torch.softmax.
template <typename T>
CAPSULE_INLINE void softmax(T* x, index J, index stride, const T* prior, bool leaky) {
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
  }
  const Vec<T> scale = T(1) / total;
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
