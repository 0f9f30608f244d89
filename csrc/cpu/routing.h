// What the driver (driver.h) and the kernels of each instruction set share. Letters as in the
// paper: B samples, I input capsules, J output capsules, K and D their dimensions, R iterations,
// N = J * D.
#pragma once

#include <cstddef>
#include <cstdint>

namespace capsule {

using index = int64_t;

// Shared by code that is compiled for different instruction sets: never a function that the linker
// could take from the wrong one.
#define CAPSULE_SHARED inline __attribute__((always_inline))

template <typename T>
struct Problem {
  index B, I, J, K, D, R;
  index weight_sharing;  // consecutive input capsules that share one weight
  bool leaky;
  const T* u;       // [B, I, K], or a grid under a window
  const T* weight;  // [I / weight_sharing, J, D, K]
  const T* logits;  // [I, J] log priors, or null

  // Under a window: where samples begin in the grid, and what their capsules add (windows.h). Null
  // for u [B, I, K].
  const index* sample_at = nullptr;   // [B]
  const index* capsule_at = nullptr;  // [I]
  // So many consecutive input capsules may share cells of the grid, one sample's with another's:
  // one task adds up their gradients.
  index overlap = 1;

  // Where capsule i of sample b begins in u.
  CAPSULE_SHARED index at(index b, index i) const {
    return sample_at ? sample_at[b] + capsule_at[i] : (b * I + i) * K;
  }
  // The row of weight that capsule i uses; a division costs as much as a few predictions.
  CAPSULE_SHARED index row(index i) const { return weight_sharing == 1 ? i : i / weight_sharing; }
  CAPSULE_SHARED index N() const { return J * D; }
};

// Whether vectors of samples would be half empty at best.
CAPSULE_SHARED bool too_few_for_lanes(index B, index lanes) { return B <= lanes / 2; }

// How a sweep over all (b, i) is cut into tasks: by the shape alone, never by the number of
// threads, so that sums are added in the same order on any machine.
//
// Samples are cut into blocks: vector lanes are the samples of a block ("sample lanes"), or, when
// they are too few for that, a block is one sample and lanes are consecutive input capsules
// ("capsule lanes").
struct Partition {
  bool capsule_lanes;
  bool contracts;       // W with the states, once for all capsules that share it (sample_shared.h)
  index block;          // samples in a full block: two vectors, or 1 with capsule lanes
  index blocks;         // in the batch; the last may be one vector only
  index group;          // blocks that one task of a routing sweep takes
  index groups;         // ceil(blocks / group)
  index slots;          // partial sums over i, added in order of the slot
  index slot_capsules;  // input capsules of a slot (the last may have fewer)
  index chunk;          // input capsules whose weights stay in cache over a task's blocks
  index final_chunk;    // the same for the last sweep of the backward
  index final_share;    // input capsules of one of its tasks, where each has a weight of its own
  index splits;  // tasks of the last sweep for each shared weight; their dW are added in order
  index padded;  // samples, rounded up to whole vectors
  index held;    // elements of u_hat that a call keeps in the caches, or 0 (see make_partition)

  CAPSULE_SHARED index tasks() const { return slots * groups; }
};

// One routing sweep: partial[slot] += sum over the slot's i of coefficient_ij u_hat_ij, where the
// coefficient is c_ij (forward) or dl_ij (backward).
//
// "Blocked" arrays hold a batch of [N] vectors block by block, lanes innermost: the block that
// begins at sample b0 and is w wide starts at b0 * N and is [N][w]. With capsule lanes: [B][N].
template <typename T>
struct Sweep {
  const T* V;   // blocked: V^(t-1) = v^1 + ... + v^(t-1); null in the first iteration
  const T* ds;  // blocked: ds^t; null in the forward
  T* partial;   // [slots] of blocked
  T* held;      // [I / lanes][B][N][lanes]: u_hat in the caches, or null
  bool fills;   // this sweep computes what is held; later ones only read it
  T* coupling;  // [B, I, J]: where to write c, or null
};

// A product with a state of iteration t, blocked, in the last sweep: a dot u_hat_ij . state_j, from
// which a coefficient is made, or a term of u_hat's gradient, coefficient_ij state_j.
template <typename T>
struct Product {
  const T* state;
  index t;     // from 1
  bool is_dl;  // the coefficient is dl^t, or else c^t
};

// The last sweep of the backward: everything of u_hat's gradient at once.
template <typename T>
struct FinalSweep {
  bool full;      // all iterations, or only iteration R
  const T* V;     // V^1, ..., V^(R-1), blocked
  const T* ds;    // ds^1, ..., ds^R, blocked; ds^1 with its coefficient where it is uniform_term
  index blocked;  // elements of each
  const Product<T>* dots;  // V^(t-1) for t > 1: logits of c^t; ds^t where dl^t is needed: its dc
  index dot_count;
  const Product<T>* terms;  // c^t ds^t, and for full gradients dl^t V^(t-1)
  index term_count;
  // A term that comes first and has no coefficient: c^1 ds^1, blocked, where c^1 is one number for
  // all (no prior); or null.
  const T* uniform_term;
  const T* held;   // as in Sweep, or null
  T* grad_u;       // as u, or null; under a window it is added to
  T* grad_weight;  // [I / weight_sharing * splits, J, D, K] or null
  T* grad_logits;  // [I, J] or null

  CAPSULE_SHARED const T* V_before(index t) const { return V + (t - 2) * blocked; }
  CAPSULE_SHARED const T* ds_of(index t) const { return ds + (t - 1) * blocked; }
  // The first iteration of which c^t is wanted.
  CAPSULE_SHARED index first_coupled(index R) const { return !full ? R : uniform_term ? 2 : 1; }
  CAPSULE_SHARED bool needs_dl(index t) const { return grad_logits || (full && t > 1); }
};

// Between sweeps of the forward: s^t = sum of partials + bias, V^t = V^(t-1) + squash(s^t).
template <typename T>
struct SquashForward {
  const T* partial;     // [slots] of blocked
  const T* bias;        // [J, D] or null
  const T* V_previous;  // blocked V^(t-1), or null for zero
  T* s;                 // [B, J, D]
  T* V;                 // blocked V^t, or null where it is not needed
  T* v;                 // [B, J, D]: v^t of the last iteration, or null
};

// Between sweeps of the backward: G^(t-1) = G^t + sum of partials,
// ds^(t-1) = J_squash(s^(t-1))^T G^(t-1). Before them, V^t = V^(t-1) + squash(s^t) once more.
template <typename T>
struct SquashBackward {
  const T* partial;     // [slots] of blocked, or null: nothing to add yet
  const T* s;           // [B, J, D], of the forward
  const T* V_previous;  // blocked V^(t-1), or null for zero
  T* V;                 // blocked V^t, or null where it is not needed
  T* G;                 // blocked, updated in place
  T* ds;                // blocked, or null where it is not needed
};

template <typename T>
struct Kernels {
  int lanes;
  size_t (*scratch)(const Problem<T>&, const Partition&);  // elements of T one task needs
  void (*forward)(const Problem<T>&, const Partition&, const Sweep<T>&, index task, T* scratch);
  void (*backward)(const Problem<T>&, const Partition&, const Sweep<T>&, index task, T* scratch);
  void (*final)(const Problem<T>&, const Partition&, const FinalSweep<T>&, index task, T* scratch);
  void (*squash_forward)(const Problem<T>&, const Partition&, const SquashForward<T>&, index block,
                         T* scratch);
  void (*squash_backward)(const Problem<T>&, const Partition&, const SquashBackward<T>&,
                          index block, T* scratch);
};

}  // namespace capsule
