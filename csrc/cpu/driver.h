// The order of sweeps, for any instruction set and any scheduler. Knows nothing of torch:
// `parallel(tasks, threads, body)` runs body(task, thread) for each task on at most so many
// threads; `allocate(n)` returns n elements that live as long as the call.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "routing.h"

namespace capsule {

inline index ceil_div(index a, index b) { return (a + b - 1) / b; }

template <typename T>
Partition make_partition(const Problem<T>& p, index lanes) {
  // First-level and second-level cache sizes that every processor of the last ten years has.
  constexpr index weight_bytes = 128 << 10, final_weight_bytes = 64 << 10;
  // A share of the last-level cache: what is held of u_hat must fit, and pay.
  constexpr index held_bytes = 4 << 20;
  constexpr index most_slots = 16, blocks_per_task = 4, sweep_tasks = 128, final_tasks = 32;
  const index bytes = p.N() * p.K * index(sizeof(T));

  Partition part{};
  part.capsule_lanes = too_few_for_lanes(p.B, lanes);
  part.block = part.capsule_lanes ? 1 : 2 * lanes;
  part.padded = part.capsule_lanes ? p.B : ceil_div(p.B, lanes) * lanes;
  part.blocks = ceil_div(part.padded, part.block);
  part.group = part.capsule_lanes ? part.blocks : std::min(part.blocks, blocks_per_task);
  part.groups = ceil_div(part.blocks, part.group);

  // Multiply-adds of forward and backward for a pair (i, j), R = 3: W contracted with the states,
  // once for all capsules that share it, against u_hat of each. What is contracted takes more
  // loads, so it has to save a quarter of them.
  const index contracted = 21 * p.D * p.K / p.weight_sharing + 22 * p.K;
  part.contracts = !part.capsule_lanes && 4 * contracted < 3 * (7 * p.D * p.K + 19 * p.D);

  const index unit = part.capsule_lanes ? lanes : 1;
  // Samples by the thousand are tasks enough: fewer partial sums then.
  const index slots = std::min(
      {most_slots, ceil_div(sweep_tasks, part.groups), ceil_div(p.I, std::max(unit, index(8)))});
  part.slot_capsules = ceil_div(ceil_div(p.I, slots), unit) * unit;
  part.slots = ceil_div(p.I, part.slot_capsules);
  // Where W is contracted it is used once a chunk: as many capsules as it has, while their u is
  // small.
  const index shared_chunk = std::min(p.weight_sharing, index(64));
  part.chunk = std::clamp(part.contracts ? std::max(shared_chunk, index(16)) : weight_bytes / bytes,
                          index(1), part.slot_capsules);
  if (!part.contracts)  // in equal parts
    part.chunk = ceil_div(part.slot_capsules, ceil_div(part.slot_capsules, part.chunk));

  // At least so many capsules that they share what the last sweep reads of V and ds.
  part.final_chunk = part.capsule_lanes
                         ? lanes
                         : std::clamp(final_weight_bytes / bytes, std::min(index(4), p.I), p.I);
  if (p.weight_sharing > 1) {
    part.final_chunk = part.contracts ? shared_chunk : std::min(part.final_chunk, p.weight_sharing);
    part.splits = std::clamp(ceil_div(final_tasks, p.I / p.weight_sharing), index(1),
                             ceil_div(p.weight_sharing, unit));
    // No split may be empty: its rows of dW would stay unwritten.
    part.splits = ceil_div(p.weight_sharing, ceil_div(p.weight_sharing, part.splits));
  } else {
    part.splits = 1;
    part.final_share = part.final_chunk;
    if (p.overlap > 1) {
      // Whole types of capsules, in equal chunks.
      const index types = ceil_div(p.I / p.overlap, final_tasks);
      part.final_share = std::clamp(part.final_chunk / p.overlap, index(1), types) * p.overlap;
      part.final_chunk = ceil_div(part.final_share, ceil_div(part.final_share, part.final_chunk));
    }
  }

  // The predictions of a few samples are smaller than the weights they come from. Where they fit
  // into the caches they stay there from sweep to sweep, and the weights are read once.
  const index predictions = ceil_div(p.I, lanes) * lanes * p.B * p.N();
  const bool pays =
      part.capsule_lanes && p.R > 1 && p.weight_sharing == 1 && p.overlap == 1 && p.B < p.K;
  part.held = pays && predictions * index(sizeof(T)) <= held_bytes ? predictions : 0;
  return part;
}

template <typename T>
index final_tasks(const Problem<T>& p, const Partition& part) {
  return p.weight_sharing > 1 ? p.I / p.weight_sharing * part.splits
                              : ceil_div(p.I, part.final_share);
}

// Where the elements n of sample b lie in a blocked array.
struct BlockedRow {
  index first, stride;
  BlockedRow(const Partition& part, index N, index b) {
    const index block = b / part.block * part.block;
    first = block * N + b - block;
    stride = std::min(part.block, part.padded - block);
  }
  index operator()(index n) const { return first + n * stride; }
};

template <typename T, typename Parallel, typename Allocate>
class Driver {
 public:
  Driver(const Problem<T>& p, const Kernels<T>& kernels, index threads, Parallel parallel,
         Allocate allocate)
      : p_(p),
        kernels_(kernels),
        part_(make_partition(p, kernels.lanes)),
        // Whole pages apart, so that threads never share a cache line.
        scratch_size_(ceil_div(index(kernels.scratch(p, part_)), 1024) * 1024),
        blocked_(part_.padded * p.N()),
        threads_(threads),
        parallel_(parallel),
        allocate_(allocate),
        scratch_(allocate(threads * scratch_size_)) {}

  // s [R, B, J, D], v [B, J, D], coupling [B, I, J] or null.
  void forward(const T* bias, T* s, T* v, T* coupling) {
    T* V = allocate_(p_.R > 1 ? blocked_ : 0);
    T* partial = allocate_(part_.slots * blocked_);
    T* held = part_.held ? allocate_(part_.held) : nullptr;
    for (index t = 1; t <= p_.R; ++t) {
      Sweep<T> sweep{};
      sweep.held = held;
      sweep.fills = t == 1;
      sweep.V = t > 1 ? V : nullptr;
      sweep.partial = partial;
      sweep.coupling = t == p_.R && t > 1 ? coupling : nullptr;
      run(part_.tasks(),
          [&](index task, T* scratch) { kernels_.forward(p_, part_, sweep, task, scratch); });
      SquashForward<T> squash{};
      squash.partial = partial;
      squash.bias = bias;
      squash.s = s + (t - 1) * p_.B * p_.N();
      squash.V_previous = sweep.V;
      squash.V = t < p_.R ? V : nullptr;
      squash.v = t == p_.R ? v : nullptr;
      run(part_.blocks, squash_threads(), [&](index block, T* scratch) {
        kernels_.squash_forward(p_, part_, squash, block, scratch);
      });
    }
    if (coupling && p_.R == 1) prior_coupling(coupling);
  }

  // grad_v [B, J, D]; s as the forward left it; gradients as in FinalSweep, grad_bias [J, D] or
  // null.
  void backward(const T* grad_v, const T* s, bool full, T* grad_u, T* grad_weight, T* grad_logits,
                T* grad_bias) {
    const index R = p_.R, N = p_.N();
    T* V = allocate_((R - 1) * blocked_);
    T* ds = allocate_(R * blocked_);
    T* G = allocate_(blocked_);
    T* partial = allocate_(full && R > 1 ? part_.slots * blocked_ : 0);
    std::fill(G, G + blocked_, T(0));
    for (index b = 0; b < p_.B; ++b) {
      const BlockedRow row(part_, N, b);
      for (index n = 0; n < N; ++n) G[row(n)] = grad_v[b * N + n];
    }

    for (index t = 1; t <= R; ++t) {
      SquashBackward<T> squash{};
      squash.s = s + (t - 1) * p_.B * N;
      squash.V_previous = t > 1 ? V + (t - 2) * blocked_ : nullptr;
      squash.V = t < R ? V + (t - 1) * blocked_ : nullptr;
      squash.G = G;
      squash.ds = t == R ? ds + (R - 1) * blocked_ : nullptr;
      run(part_.blocks, squash_threads(), [&](index block, T* scratch) {
        kernels_.squash_backward(p_, part_, squash, block, scratch);
      });
    }
    // From here on G is the gradient with respect to v^t through later agreements.
    std::fill(G, G + blocked_, T(0));
    T* held = full && part_.held ? allocate_(part_.held) : nullptr;
    for (index t = R; full && t > 1; --t) {
      Sweep<T> sweep{};
      sweep.held = held;
      sweep.fills = t == R;
      sweep.V = V + (t - 2) * blocked_;
      sweep.ds = ds + (t - 1) * blocked_;
      sweep.partial = partial;
      run(part_.tasks(),
          [&](index task, T* scratch) { kernels_.backward(p_, part_, sweep, task, scratch); });
      SquashBackward<T> squash{};
      squash.partial = partial;
      squash.s = s + (t - 2) * p_.B * N;
      squash.G = G;
      squash.ds = ds + (t - 2) * blocked_;
      run(part_.blocks, squash_threads(), [&](index block, T* scratch) {
        kernels_.squash_backward(p_, part_, squash, block, scratch);
      });
    }

    if (grad_bias) {
      std::vector<double> sums(N);
      for (index t = full ? 1 : R; t <= R; ++t)
        for (index b = 0; b < p_.B; ++b) {
          const BlockedRow row(part_, N, b);
          for (index n = 0; n < N; ++n) sums[n] += ds[(t - 1) * blocked_ + row(n)];
        }
      std::copy(sums.begin(), sums.end(), grad_bias);
    }
    if (grad_u || grad_weight || grad_logits) {
      const index tasks = final_tasks(p_, part_), row = N * p_.K;
      T* rows = part_.splits > 1 && grad_weight ? allocate_(tasks * row) : grad_weight;
      FinalSweep<T> final{};
      final.full = full;
      final.V = V;
      final.ds = ds;
      final.blocked = blocked_;
      final.held = held;
      final.grad_u = grad_u;
      final.grad_weight = rows;
      final.grad_logits = grad_logits;
      if (full && R > 1 && !p_.logits && !grad_logits) {
        for (index x = 0; x < blocked_; ++x) ds[x] *= T(1) / T(p_.J + p_.leaky);
        final.uniform_term = ds;
      }
      std::vector<Product<T>> dots, terms;
      for (index t = full ? 1 : R; t <= R; ++t) {
        if (t > 1) dots.push_back({final.V_before(t), t, false});
        if (final.needs_dl(t)) dots.push_back({final.ds_of(t), t, true});
        if (t > 1 || !final.uniform_term) terms.push_back({final.ds_of(t), t, false});
        if (full && t > 1) terms.push_back({final.V_before(t), t, true});
      }
      final.dots = dots.data();
      final.dot_count = index(dots.size());
      final.terms = terms.data();
      final.term_count = index(terms.size());
      run(tasks, [&](index task, T* scratch) { kernels_.final(p_, part_, final, task, scratch); });
      if (rows != grad_weight)
        for (index w = 0; w < p_.I / p_.weight_sharing; ++w)
          for (index x = 0; x < row; ++x) {
            T sum = rows[w * part_.splits * row + x];
            for (index split = 1; split < part_.splits; ++split)
              sum += rows[(w * part_.splits + split) * row + x];
            grad_weight[w * row + x] = sum;
          }
    }
  }

 private:
  template <typename Body>
  void run(index tasks, Body body) {
    run(tasks, threads_, body);
  }

  template <typename Body>
  void run(index tasks, index threads, Body body) {
    parallel_(tasks, threads,
              [&](index task, index thread) { body(task, scratch_ + thread * scratch_size_); });
  }

  // Waking a thread costs about as much as this many additions: below, one runs them all.
  index squash_threads() const {
    return std::clamp(part_.slots * p_.N() * part_.padded / 32768, index(1), threads_);
  }

  void prior_coupling(T* coupling) {
    // One iteration: every sample has the couplings of the prior.
    const index J = p_.J;
    for (index i = 0; i < p_.I; ++i) {
      T* c = coupling + i * J;
      T highest = p_.leaky ? T(0) : -std::numeric_limits<T>::infinity(), total = 0;
      auto logit = [&](index j) { return p_.logits ? p_.logits[i * J + j] : T(0); };
      for (index j = 0; j < J; ++j) highest = logit(j) > highest ? logit(j) : highest;
      for (index j = 0; j < J; ++j) total += c[j] = std::exp(logit(j) - highest);
      if (p_.leaky) total += std::exp(-highest);
      for (index j = 0; j < J; ++j) c[j] /= total;
    }
    for (index b = 1; b < p_.B; ++b)
      std::copy(coupling, coupling + p_.I * J, coupling + b * p_.I * J);
  }

  const Problem<T> p_;
  const Kernels<T>& kernels_;
  const Partition part_;
  const index scratch_size_, blocked_, threads_;
  Parallel parallel_;
  Allocate allocate_;
  T* const scratch_;  // [threads][scratch_size_]
};

}  // namespace capsule
