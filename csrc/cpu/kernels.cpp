// The kernel table of one instruction set. Compiled once for each, see setup.py.
#include "capsule_lanes.h"
#include "sample_final.h"
#include "sample_shared.h"
#include "sample_sweep.h"
#include "squash.h"

namespace capsule::CAPSULE_ISA {
namespace {

template <typename T>
size_t scratch_size(const Problem<T>& p, const Partition& part) {
  const index squash = p.N() * kLanes<T>;
  if (part.capsule_lanes)
    return larger(
        squash, larger(CapsuleLanes<T>::sweep_scratch(p, part), CapsuleLanes<T>::final_scratch(p)));
  if (part.contracts)
    return larger(squash, larger(SampleShared<T, 2>::sweep_scratch(p, part.chunk),
                                 SampleShared<T, 2>::final_scratch(p, part.final_chunk)));
  return larger(squash, larger(SampleSweep<T, 2>::sweep_scratch(p, part.chunk),
                               SampleFinal<T, 2>::final_scratch(p, part.final_chunk)));
}

// Whether the block that begins at a sample is two vectors wide, or a last one of one.
template <typename T>
CAPSULE_INLINE bool is_wide(const Partition& part, index first_sample) {
  return part.block == 2 * kLanes<T> && part.padded - first_sample >= part.block;
}

template <typename T, bool is_backward>
void routing_sweep(const Problem<T>& p, const Partition& part, const Sweep<T>& sweep, index task,
                   T* scratch) {
  const index slot = task / part.groups, group = task % part.groups, N = p.N();
  const index i_begin = slot * part.slot_capsules;
  index i_end = i_begin + part.slot_capsules;
  if (i_end > p.I) i_end = p.I;
  T* partial = sweep.partial + slot * part.padded * N;
  const index b0 = group * part.group * part.block;
  index b1 = b0 + part.group * part.block;
  if (part.capsule_lanes) {
    if (b1 > p.B) b1 = p.B;
    p.K == 8 ? CapsuleLanes<T>::template sweep<8, is_backward>(p, sweep, b0, b1, i_begin, i_end,
                                                               partial, scratch)
             : CapsuleLanes<T>::template sweep<0, is_backward>(p, sweep, b0, b1, i_begin, i_end,
                                                               partial, scratch);
    return;
  }
  if (b1 > part.padded) b1 = part.padded;
  for (index x = b0 * N; x < b1 * N; ++x) partial[x] = 0;
  for (index i0 = i_begin; i0 < i_end; i0 += part.chunk) {
    const index i1 = i0 + part.chunk < i_end ? i0 + part.chunk : i_end;
    for (index b = b0; b < b1; b += part.block) {
      const bool last = b + part.block >= b1;
      const index next_b = last ? b0 : b + part.block, next_i0 = last ? i1 : i0;
      T* out = partial + b * N;
      if (part.contracts) {
        is_wide<T>(part, b) ? SampleShared<T, 2>::template sweep_part<is_backward>(p, sweep, b, i0,
                                                                                   i1, out, scratch)
                            : SampleShared<T, 1>::template sweep_part<is_backward>(
                                  p, sweep, b, i0, i1, out, scratch);
      } else if (is_wide<T>(part, b))
        SampleSweep<T, 2>::template sweep_part<is_backward>(p, sweep, {b, i0, i1, next_b, next_i0},
                                                            out, scratch);
      else
        SampleSweep<T, 1>::template sweep_part<is_backward>(p, sweep, {b, i0, i1, next_b, next_i0},
                                                            out, scratch);
    }
  }
}

// grad_logits of the capsules [i0, i1) from their sums [capsules][J][lanes].
template <typename T>
void write_prior_gradients(const Problem<T>& p, const FinalSweep<T>& sweep, index i0, index i1,
                           const T* dlogits) {
  if (!sweep.grad_logits) return;
  for (index x = 0; x < (i1 - i0) * p.J; ++x)
    sweep.grad_logits[i0 * p.J + x] = sum_lanes<T>(load(dlogits + x * kLanes<T>));
}

// The input capsules [begin, end) of one weight, all samples.
template <typename T>
void final_shared(const Problem<T>& p, const Partition& part, const FinalSweep<T>& sweep,
                  index begin, index end, T* grad_weight, T* scratch) {
  const typename SampleShared<T, 2>::Final wide(p, part.final_chunk, scratch);
  const typename SampleShared<T, 1>::Final narrow(p, part.final_chunk, scratch);
  for (T* x = wide.dW; x < wide.dlogits; ++x) *x = 0;
  for (index i0 = begin; i0 < end; i0 += part.final_chunk) {
    const index i1 = i0 + part.final_chunk < end ? i0 + part.final_chunk : end;
    for (T* x = wide.dlogits; x < wide.packed; ++x) *x = 0;
    for (index b = 0; b < part.padded; b += part.block) {
      auto run = [&](auto block, const auto& scratch) {
        using Shared = decltype(block);
        p.K == 8 ? Shared::template final_block<8>(p, sweep, b, i0, i1, scratch)
                 : Shared::template final_block<0>(p, sweep, b, i0, i1, scratch);
      };
      is_wide<T>(part, b) ? run(SampleShared<T, 2>{}, wide) : run(SampleShared<T, 1>{}, narrow);
    }
    write_prior_gradients(p, sweep, i0, i1, wide.dlogits);
  }
  if (grad_weight) SampleShared<T, 2>::write_weights(wide.dW, p.N() * p.K, grad_weight);
}

template <typename T>
void final_sweep(const Problem<T>& p, const Partition& part, const FinalSweep<T>& sweep, index task,
                 T* scratch) {
  const index N = p.N(), K = p.K, sharing = p.weight_sharing;
  // A task owns the capsules [begin, end) and the rows of dW from `row` on: chunks of capsules with
  // a weight each, or a share of the capsules of one weight.
  index begin = task * part.final_share, end = begin + part.final_share, row = begin;
  if (sharing > 1) {
    const index weight = task / part.splits, split = task % part.splits;
    const index share = (sharing + part.splits - 1) / part.splits;
    const index limit = (weight + 1) * sharing;
    begin = weight * sharing + split * share;
    end = begin + share < limit ? begin + share : limit;
    row = task;
  } else if (end > p.I) {
    end = p.I;
  }
  T* grad_weight = sweep.grad_weight ? sweep.grad_weight + row * N * K : nullptr;

  if (part.capsule_lanes) {
    K == 8 ? CapsuleLanes<T>::template final<8>(p, sweep, begin, end, grad_weight, scratch)
           : CapsuleLanes<T>::template final<0>(p, sweep, begin, end, grad_weight, scratch);
    return;
  }

  if (part.contracts) {
    final_shared(p, part, sweep, begin, end, grad_weight, scratch);
    return;
  }

  const bool paper_sizes = K == 8 && p.D == 16;  // loops of constant length, unrolled
  // A capsule's own dW is made in registers from block to block and leaves them finished, where its
  // rows fill a vector. What capsules share is summed in scratch.
  const bool owns = sharing == 1, directly = owns && SampleFinal<T, 2>::fills_vectors(K);
  auto run_blocks = [&](index i0, index i1, bool first, bool last) {
    const typename SampleFinal<T, 2>::Final wide(p, part.final_chunk, scratch);
    const typename SampleFinal<T, 1>::Final narrow(p, part.final_chunk, scratch);
    T* dW = grad_weight ? grad_weight + (owns ? (i0 - begin) * N * K : 0) : nullptr;
    for (T* x = first && !owns ? wide.dW : wide.dlogits; x < wide.packed; ++x) *x = 0;
    for (index b = 0; b < part.padded; b += part.block) {
      const bool finishes = directly && b + part.block >= part.padded;
      auto run = [&](auto block, const auto& scratch) {
        using Final = decltype(block);
        const typename Final::Part samples{b, i0, i1, owns && b == 0, finishes ? dW : nullptr};
        paper_sizes ? Final::template final_block<8, 16>(p, sweep, samples, scratch)
                    : Final::template final_block<0, 0>(p, sweep, samples, scratch);
      };
      is_wide<T>(part, b) ? run(SampleFinal<T, 2>{}, wide) : run(SampleFinal<T, 1>{}, narrow);
    }
    write_prior_gradients(p, sweep, i0, i1, wide.dlogits);
    if (last && dW && !directly)
      SampleFinal<T, 2>::write_weights(wide.dW, K, owns ? (i1 - i0) * N : N, dW);
  };
  for (index i0 = begin; i0 < end; i0 += part.final_chunk) {
    const index i1 = i0 + part.final_chunk < end ? i0 + part.final_chunk : end;
    run_blocks(i0, i1, sharing == 1 || i0 == begin, sharing == 1 || i1 == end);
  }
}

// A block of samples between sweeps; `Direction` is SquashForward or SquashBackward.
template <typename T, template <typename> class Direction>
void squash_block(const Problem<T>& p, const Partition& part, const Direction<T>& q, index task,
                  T* scratch) {
  if (part.capsule_lanes) {
    SquashBlock<T, T>::run(p, part, q, task * p.N(), 1, task, scratch);
    return;
  }
  const index b0 = task * part.block;
  const index width = is_wide<T>(part, b0) ? 2 * kLanes<T> : kLanes<T>;
  for (index column = 0; column < width; column += kLanes<T>)
    SquashBlock<T, Vec<T>>::run(p, part, q, b0 * p.N() + column, width, b0 + column, scratch);
}

template <typename T>
constexpr Kernels<T> table{
    kLanes<T>,
    scratch_size<T>,
    routing_sweep<T, false>,
    routing_sweep<T, true>,
    final_sweep<T>,
    squash_block<T, SquashForward>,
    squash_block<T, SquashBackward>,
};

}  // namespace

const Kernels<float>& kernels_f32() { return table<float>; }
const Kernels<double>& kernels_f64() { return table<double>; }

}  // namespace capsule::CAPSULE_ISA
