// How a call is laid over the device: pure functions of the sizes and of the device's figures.
//
// A forward is one cooperative launch of G_i x G_b blocks. Block (g_i, g_b) owns a slice of the
// input capsules, whose W stays in its shared memory through all iterations, and a share of the
// samples, in tiles of 8. Between iterations the blocks exchange only s and V.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>

#ifdef __CUDACC__
#define CAPSULE_KERNELS_BOTH __host__ __device__  // what kernels call too
#else
#define CAPSULE_KERNELS_BOTH
#endif

namespace capsule_kernels::cuda {

struct Shape {
  int B, I, J, K, D, R;
  int weight_sharing;
};

// The figures of a device that decide a plan.
struct Device {
  int sm_count;
  int shared_per_block;  // bytes, what a block may opt in to
  int warpgroups;  // samples from which on products of warpgroups are worth it; 0 without them
};

constexpr int kTileSamples = 8;    // samples of a tile: the columns of one mma
constexpr int kTileRows = 16;      // pairs (j, d) of one mma: its rows
constexpr int kStepDims = 8;       // of K, the contraction of one mma
constexpr int kMaxFragments = 10;  // mma results of a tile [J * D, 8] that fit in registers
constexpr int kFragmentBytes = kTileSamples * kTileRows * 4;
constexpr int kWarpSize = 32;
constexpr int kCounterStride = 32;  // from counter to counter: each has a cache line of its own
// Warps of a block, as the registers of a thread allow: they hold V, ds and the sum, or V, ds,
// du_hat and dW, beside u_hat.
constexpr int kSweepWarps = 8;
constexpr int kPartialSumsAhead = 16;  // that a warp asks for at once
constexpr int kGradientWarps = 8;      // at most
constexpr int kArrivalsBytes = 8;
constexpr int kSumBlocks = 8;  // that add partial sums, for each of a sweep: they wait for memory

CAPSULE_KERNELS_BOTH constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
CAPSULE_KERNELS_BOTH constexpr int round_up(int a, int b) { return ceil_div(a, b) * b; }

// Division of 0 <= x < 2^31 by a number that is known before a launch, without dividing: exact,
// with factor = ceil(2^shift / divisor) and 2^(shift - 31) >= divisor.
struct Divisor {
  unsigned factor = 1u << 31;
  int shift = 31;

  Divisor() = default;
  explicit Divisor(int divisor) {
    while ((1ll << (shift - 31)) < divisor) ++shift;
    factor = unsigned(((1ull << shift) + divisor - 1) / divisor);
  }
  CAPSULE_KERNELS_BOTH int divide(int x) const {
    // Of no negative x: nothing to extend the sign of.
    return int((unsigned long long)(unsigned(x)) * factor >> shift);
  }
};

// D as the kernels pad it: 8, 16 or 32; 0 where it is too large.
CAPSULE_KERNELS_BOTH constexpr int padded_dims(int D) {
  return D <= 8 ? 8 : D <= 16 ? 16 : D <= 32 ? 32 : 0;
}

constexpr bool tile_fits_registers(int J, int D) {
  return D <= 32 && J <= kMaxFragments * kTileRows / padded_dims(D);
}

// Whether an int counts the elements [I, K] of a sample of u, as the kernels do; what they load
// ahead of time does not go past the last capsule. W on chip bounds I only where capsules do not
// share it.
constexpr bool sample_is_counted(std::int64_t I, std::int64_t K) {
  return I * K <= std::numeric_limits<int>::max();
}

// The instance of the kernels for a call: padded D, and J where it is a constant and K even and at
// most 8, as in the paper's networks (0: any J that fits, and any K).
struct TileChoice {
  int D, J;
};

CAPSULE_KERNELS_BOTH constexpr TileChoice choose_tile(const Shape& shape) {
  const int D = padded_dims(shape.D);
  const bool known = shape.K <= kStepDims && shape.K % 2 == 0 &&
                     ((D == 16 && (shape.J == 10 || shape.J == 5)) || (D == 8 && shape.J == 10));
  return {D, known ? shape.J : 0};
}

// Output capsules that two fragments hold where J is not a constant.
CAPSULE_KERNELS_BOTH constexpr int capsules_of_two_fragments(int D) { return 2 * kTileRows / D; }

// The padded sizes of a call.
struct Padded {
  int D, K;             // D: 8, 16 or 32; K: a multiple of 8
  int J;                // with the output capsules that fill up the last fragments
  int fragments;        // of a tile [J * D, 8]
  int tiles;            // of 8 samples
  int weight_elements;  // of one W_i on chip

  CAPSULE_KERNELS_BOTH explicit Padded(const Shape& shape)
      : D(padded_dims(shape.D)),
        K(round_up(shape.K, kStepDims)),
        J(choose_tile(shape).J > 0 ? shape.J : round_up(shape.J, capsules_of_two_fragments(D))),
        fragments(J * D / kTileRows),
        tiles(ceil_div(shape.B, kTileSamples)),
        weight_elements(fragments * kTileRows * K) {}

  CAPSULE_KERNELS_BOTH std::size_t tile_floats() const {
    return std::size_t(fragments) * kTileRows * kTileSamples;
  }
};

// Whether an int counts the float4s of a state [tiles][tile], as the kernels do.
inline bool batch_is_counted(const Shape& shape) {
  const Padded padded(shape);
  return padded.tiles * (padded.tile_floats() / 4) <= std::size_t(std::numeric_limits<int>::max());
}

// The sweeps of large batches (warpgroup_sweep.cuh): a warpgroup takes 64 samples, and four input
// capsules at a time.
constexpr int kWarpgroupSamples = 64;
constexpr int kWarpgroups = 2;  // of a block
constexpr int kQuad = 4;

// The persistent grid of the sweeps; `blocks == 0` where W does not fit on chip, or the batch or a
// sample has too many elements.
struct SweepPlan {
  int blocks = 0;
  int slots = 0;           // by warpgroups, for images of W on chip; 0 otherwise
  int wide_states = 0;     // on chip, of 64 samples each
  int capsule_groups = 0;  // G_i
  int sample_groups = 0;   // G_b
  int tiles_per_pass =
      0;                 // tiles a block works on side by side; its other warps split the capsules
  int capsules = 0;      // of a group, at most
  int weight_bytes = 0;  // of the slice of W on chip
  int shared_bytes = 0;
  std::size_t counter_floats = 0;  // room for the counter of each group of samples
  // What kernels would otherwise compute, and keep in registers.
  int tiles = 0;
  int lanes = 0;               // warps of a block that share a tile
  int adders = 0;              // warps of a block that share a sum over the capsule groups
  std::size_t state_size = 0;  // of a state [tiles][tile] in float4s
  Divisor by_capsule_groups, by_tiles_per_pass, by_weight_sharing;
};

// Of a plan: as few as can ask for all partial sums at once, where others have sums to add
// meanwhile.
inline int adders_of(const SweepPlan& plan, int fragments) {
  const int sums = ceil_div(plan.tiles_per_pass * fragments, plan.capsule_groups);  // of a block
  int adders = kSweepWarps;
  while (adders > 1 && sums > kSweepWarps / adders &&
         ceil_div(plan.capsule_groups, adders / 2) <= kPartialSumsAhead) {
    adders /= 2;
  }
  return adders;
}

// A plan for some groups of samples; `blocks == 0` where it does not fit.
inline SweepPlan try_sweep(const Shape& shape, int scalar_bytes, const Device& device,
                           int tiles_per_pass, int sample_groups) {
  const Padded padded(shape);
  const int most_groups = device.sm_count / sample_groups;
  SweepPlan plan;
  if (most_groups == 0) return plan;
  plan.tiles = padded.tiles;
  plan.state_size = padded.tiles * padded.tile_floats() / 4;
  plan.by_weight_sharing = Divisor(shape.weight_sharing);
  plan.sample_groups = sample_groups;
  plan.tiles_per_pass = tiles_per_pass;
  plan.lanes = kSweepWarps / tiles_per_pass;
  plan.capsules = ceil_div(shape.I, std::min(shape.I, most_groups));
  plan.capsule_groups = ceil_div(shape.I, plan.capsules);
  plan.counter_floats = std::size_t(sample_groups) * kCounterStride;
  plan.by_capsule_groups = Divisor(plan.capsule_groups);
  plan.by_tiles_per_pass = Divisor(tiles_per_pass);
  plan.adders = adders_of(plan, padded.fragments);
  // The sum of each warp.
  const int exchange_bytes = kSweepWarps * padded.fragments * kFragmentBytes;
  // The rows of W that this many consecutive capsules touch, at most.
  const int rows = (plan.capsules + shape.weight_sharing - 2) / shape.weight_sharing + 1;
  const double weight_bytes = double(rows) * padded.weight_elements * scalar_bytes;
  if (weight_bytes + exchange_bytes > device.shared_per_block) return plan;
  plan.weight_bytes = round_up(int(weight_bytes), 16);
  plan.shared_bytes = plan.weight_bytes + exchange_bytes;
  plan.blocks = plan.capsule_groups * sample_groups;
  return plan;
}

inline SweepPlan plan_sweep(const Shape& shape, int scalar_bytes, const Device& device) {
  const Padded padded(shape);
  SweepPlan best;
  if (!sample_is_counted(shape.I, shape.K) || !batch_is_counted(shape)) return best;
  double best_cost = 0;
  for (const int tiles_per_pass : {1, 2, 4}) {
    if (tiles_per_pass > padded.tiles) break;
    const int passes = ceil_div(padded.tiles, tiles_per_pass);
    const int lanes = kSweepWarps / tiles_per_pass;
    for (int sample_groups = 1; sample_groups <= std::min(passes, device.sm_count);
         ++sample_groups) {
      const SweepPlan plan = try_sweep(shape, scalar_bytes, device, tiles_per_pass, sample_groups);
      if (plan.blocks == 0) continue;
      // In cycles, roughly: a capsule of a tile takes a warp 90 a fragment when 8 warps share the
      // SM, and a pass as much as two of them; partial sums are written once and read once at
      // 3000 bytes a cycle.
      const double sweep = 90.0 * padded.fragments * ceil_div(passes, sample_groups) *
                           (ceil_div(plan.capsules, lanes) + 2);
      const double exchange =
          2.0 * plan.capsule_groups * padded.tiles * padded.fragments * kFragmentBytes / 3000;
      const double cost = sweep + exchange;
      if (best.blocks == 0 || cost < best_cost) {
        best = plan;
        best_cost = cost;
      }
    }
  }
  return best;
}

// Floats of one of the two images of four W_i, and of a state of 64 samples.
CAPSULE_KERNELS_BOTH constexpr int image_floats(int J) { return kQuad * J * kTileRows * kStepDims; }
CAPSULE_KERNELS_BOTH constexpr int wide_state_floats(int J) {
  return kWarpgroupSamples * J * kTileRows;
}

// A plan for some groups of samples, which the warpgroups of a block share or not; `states` that a
// sweep reads: V, or V and ds.
inline SweepPlan try_warpgroups(const Shape& shape, const Device& device, int states,
                                bool share_samples, int sample_groups) {
  SweepPlan plan;
  const int quads = ceil_div(shape.I, kQuad);
  const int tiles = kWarpgroupSamples / kTileSamples;
  plan.sample_groups = sample_groups;
  plan.tiles_per_pass = share_samples ? tiles : kWarpgroups * tiles;
  plan.capsules = kQuad * ceil_div(quads, std::min(quads, device.sm_count / sample_groups));
  plan.capsule_groups = ceil_div(shape.I, plan.capsules);
  plan.tiles = ceil_div(shape.B, kWarpgroupSamples) * tiles;
  plan.state_size = std::size_t(plan.tiles / tiles) * (wide_state_floats(shape.J) / 4);
  plan.counter_floats = std::size_t(sample_groups) * kCounterStride;
  plan.by_capsule_groups = Divisor(plan.capsule_groups);
  plan.adders = adders_of(plan, shape.J);
  plan.wide_states = share_samples ? states : kWarpgroups * states;
  plan.slots = share_samples ? 10 - 2 * states : 6 / states;
  plan.shared_bytes =
      4 * (plan.wide_states * wide_state_floats(shape.J) + plan.slots * image_floats(shape.J)) +
      kSweepWarps * kWarpSize * 16 + kArrivalsBytes * (2 * plan.slots + kWarpgroups);
  if (plan.shared_bytes <= device.shared_per_block) {
    plan.blocks = plan.capsule_groups * sample_groups;
  }
  return plan;
}

// The same by warpgroups; `blocks == 0` where the sizes are others than those of the paper's
// networks, or the batch is small.
inline SweepPlan plan_warpgroups(const Shape& shape, const Device& device, int states) {
  SweepPlan best;
  const bool fits = device.warpgroups > 0 && shape.B >= device.warpgroups && shape.R > 1 &&
                    (shape.J == 10 || shape.J == 5) && shape.K == kStepDims &&
                    shape.D == kTileRows && shape.weight_sharing == 1 &&
                    sample_is_counted(shape.I, shape.K) && batch_is_counted(shape);
  if (!fits) return best;
  double best_cost = 0;
  for (const bool share_samples : {false, true}) {
    const int samples = share_samples ? kWarpgroupSamples : kWarpgroups * kWarpgroupSamples;
    const int passes = ceil_div(shape.B, samples);
    for (int groups = 1; groups <= std::min(passes, device.sm_count); ++groups) {
      const SweepPlan plan = try_warpgroups(shape, device, states, share_samples, groups);
      if (plan.blocks == 0) continue;
      // In cycles, roughly, and all of them counted, none measured: both warpgroups take 220 for
      // an output capsule and four input capsules each; images come at 3000 bytes a cycle; partial
      // sums are written and read once as fast.
      const int quads = plan.capsules / kQuad;
      const int turns = share_samples ? ceil_div(quads, kWarpgroups) : quads;
      const double work = 220.0 * shape.J * turns * ceil_div(passes, groups);
      const double images =
          8.0 * image_floats(shape.J) * quads * plan.capsule_groups * passes / 3000;
      const double exchange = 2.0 * 16 * plan.state_size * plan.capsule_groups / 3000;
      const double cost = std::max(work, images) + exchange;
      if (best.blocks == 0 || cost < best_cost) {
        best = plan;
        best_cost = cost;
      }
    }
  }
  return best;
}

// Floats of both images of all W, where the sweeps are by warpgroups.
inline std::size_t images_of_weight(const Shape& shape, const SweepPlan& plan) {
  return plan.slots > 0 ? std::size_t(2) * ceil_div(shape.I, kQuad) * image_floats(shape.J) : 0;
}

struct ForwardPlan {
  SweepPlan sweep;
  std::size_t first_state = 0;  // V, in float4s from the beginning of the workspace
  std::size_t workspace_floats = 0;
};

// Workspace: counters, partial sums [G_i][tiles][tile], then V [tiles][tile]; by warpgroups, the
// images of W. `plain`: in one TF32 product, without a prior, and without couplings to write.
inline ForwardPlan plan_forward(const Shape& shape, int scalar_bytes, const Device& device,
                                bool plain) {
  ForwardPlan plan;
  if (plain) plan.sweep = plan_warpgroups(shape, device, 1);
  if (plan.sweep.blocks == 0) plan.sweep = plan_sweep(shape, scalar_bytes, device);
  plan.first_state =
      plan.sweep.capsule_groups * plan.sweep.state_size + plan.sweep.counter_floats / 4;
  plan.workspace_floats =
      4 * (plan.first_state + plan.sweep.state_size) + images_of_weight(shape, plan.sweep);
  return plan;
}

// The last sweep of the backward: a block owns `capsules` input capsules and one of `splits` shares
// of the samples, and goes through their tiles. A warp owns a capsule; those that are left over are
// dealt to the warps anew for each tile.
struct GradientPlan {
  int warps = 0;     // of a block; 0 where shared memory does not hold even one capsule
  int capsules = 0;  // of a block
  int splits = 0;
  // Tiles of states on chip: with two of them one is loaded ahead of time, with four two are, and a
  // warp may be a tile behind the others.
  int buffers = 0;
  int shared_bytes = 0;
  Divisor by_buffers;
};

// Where J is a constant K is at most 8, and the dW of a warp's own capsule stays in registers.
CAPSULE_KERNELS_BOTH inline int stored_capsules(const Shape& shape, int capsules, int warps) {
  return choose_tile(shape).J > 0 ? capsules - warps : capsules;
}

// The states of a tile that the gradients need: V^1..V^(R-1) and ds^1..ds^R.
CAPSULE_KERNELS_BOTH inline int gradient_states(const Shape& shape) { return 2 * shape.R - 1; }

// On chip: two counts of arrivals for each buffer, states of the tiles, dW of the capsules whose dW
// is stored, sums of dprior for each lane of every capsule, du_hat of a tile for each warp, W_i.
inline std::size_t gradient_bytes(const Shape& shape, const Padded& padded, int scalar_bytes,
                                  const GradientPlan& plan) {
  const std::size_t tile_bytes = std::size_t(padded.fragments) * kFragmentBytes;
  return std::size_t(2 * kArrivalsBytes) * plan.buffers +
         tile_bytes * (plan.buffers * gradient_states(shape) + plan.warps) +
         std::size_t(padded.weight_elements) *
             (4 * stored_capsules(shape, plan.capsules, plan.warps) +
              scalar_bytes * plan.capsules) +
         std::size_t(plan.capsules) * padded.J * kWarpSize * 4;
}

inline GradientPlan plan_gradients(const Shape& shape, int scalar_bytes, const Device& device) {
  const Padded padded(shape);
  GradientPlan best;
  double best_cost = 0;
  for (int capsules = 1; capsules <= std::min(shape.I, 2 * kGradientWarps); ++capsules) {
    GradientPlan plan;
    plan.capsules = capsules;
    plan.warps = std::min(capsules, kGradientWarps);
    const auto fits = [&](int buffers) {
      plan.buffers = buffers;
      return gradient_bytes(shape, padded, scalar_bytes, plan) <=
             std::size_t(device.shared_per_block);
    };
    if (!fits(4) && !fits(2) && !fits(1)) break;
    plan.by_buffers = Divisor(plan.buffers);
    plan.shared_bytes = int(gradient_bytes(shape, padded, scalar_bytes, plan));
    const int groups = ceil_div(shape.I, capsules);
    // Splitting the samples costs sums through memory: only as far as it fills the device.
    plan.splits = std::max(1, std::min(padded.tiles, device.sm_count / groups));
    const int waves = ceil_div(groups * plan.splits, device.sm_count);
    // Few warps leave the SM idle: a tile takes at least half as long as with all of them.
    const double cost = double(waves) * ceil_div(padded.tiles, plan.splits) *
                        (std::max(capsules, kGradientWarps) + capsules);
    if (best.warps == 0 || cost < best_cost) {
      best = plan;
      best_cost = cost;
    }
  }
  return best;
}

// The same sweep by output capsules (routing_backward_outputs.cuh): a warp owns one of them for 16
// input capsules. A unit is a tile of a group of input capsules; units are counted group by group
// and cut into as many runs of nearly equal length as there are blocks.
constexpr int kMostOutputs = 10;  // warps of a block, as the registers of a thread allow
constexpr int kOutputInputs = 16;
constexpr int kOutputWeight = kOutputInputs * kTileRows * kStepDims;  // elements of a warp's W
constexpr int kStateBuffers = 2, kInputBuffers = 3;
// Units of a block from which on this sweep is the faster one (measured, docs/kernels-cuda.md): it
// begins later, and leaves partial sums.
constexpr int kLeastUnits = 16;
constexpr int kInputQuads = kOutputInputs * kTileSamples * kStepDims / 4;

struct OutputPlan {
  int blocks = 0;  // 0: not for this call
  int tiles = 0;
  int units = 0, longer = 0;  // of each block, and how many have one more
  int shared_bytes = 0;
  Divisor by_tiles;

  CAPSULE_KERNELS_BOTH int first_unit(int block) const {
    return block * units + (block < longer ? block : longer);
  }
  CAPSULE_KERNELS_BOTH int block_of(int unit) const {
    const int in_longer = longer * (units + 1);
    return unit < in_longer ? unit / (units + 1) : longer + (unit - in_longer) / units;
  }
  // Blocks that have tiles of the group of input capsule i, and at most of any.
  CAPSULE_KERNELS_BOTH int parts_of(int i) const {
    const int first = i / kOutputInputs * tiles;
    return block_of(first + tiles - 1) - block_of(first) + 1;
  }
  int most_parts() const {
    return longer == 0 && units % tiles == 0 ? 1 : ceil_div(tiles - 1, units) + 1;
  }
};

inline bool fits_outputs(const Shape& shape) {
  return shape.R >= 2 && shape.R <= 3 && shape.J <= kMostOutputs && shape.K == kStepDims &&
         shape.D == kTileRows;
}

inline OutputPlan plan_outputs(const Shape& shape, int scalar_bytes, const Device& device) {
  OutputPlan plan;
  if (!fits_outputs(shape)) return plan;
  const int quads =
      kStateBuffers * (gradient_states(shape) + 2 * (shape.R - 1)) * kWarpSize + kInputQuads;
  plan.shared_bytes = 16 * shape.J * quads +
                      scalar_bytes * (4 * kInputBuffers * kInputQuads + shape.J * kOutputWeight);
  if (plan.shared_bytes > device.shared_per_block) return plan;
  plan.tiles = Padded(shape).tiles;
  plan.by_tiles = Divisor(plan.tiles);
  const std::int64_t units = std::int64_t(ceil_div(shape.I, kOutputInputs)) * plan.tiles;
  if (units > std::numeric_limits<int>::max()) return plan;
  // A multiprocessor has registers for that many blocks.
  const int resident =
      std::min(kMostOutputs / shape.J, device.shared_per_block / plan.shared_bytes);
  const std::int64_t blocks = std::int64_t(device.sm_count) * resident;
  if (units < kLeastUnits * blocks) return plan;
  plan.blocks = int(blocks);
  plan.units = int(units) / plan.blocks;
  plan.longer = int(units) % plan.blocks;
  return plan;
}

struct BackwardPlan {
  SweepPlan sweep;
  GradientPlan gradients;
  OutputPlan outputs;         // takes the place of `gradients` where it has blocks
  int parts = 0;              // in which the samples of an input capsule are summed, at most
  bool partial_sums = false;  // dW and dprior go through the workspace
  // In float4s from the beginning of the workspace.
  std::size_t first_state = 0;  // V^1
  std::size_t wide_states = 0, weight_images = 0, partial_gradients = 0;
  std::size_t workspace_floats = 0;
};

// Workspace: counters; partial sums of G [G_i][tiles][tile]; G, V^1..V^(R-1) and ds^1..ds^R
// [tiles][tile] each; by warpgroups, V^1..V^(R-1), ds of an iteration and W as its sweeps read
// them; then partial sums of dW [parts, I, J, D, K] and of dprior [parts, I, J]. `plain`: in one
// TF32 product, without a prior, and through all iterations.
inline BackwardPlan plan_backward(const Shape& shape, int scalar_bytes, const Device& device,
                                  bool plain) {
  BackwardPlan plan;
  if (plain) plan.sweep = plan_warpgroups(shape, device, 2);
  if (plan.sweep.blocks == 0) plan.sweep = plan_sweep(shape, scalar_bytes, device);
  plan.gradients = plan_gradients(shape, scalar_bytes, device);
  if (plain) plan.outputs = plan_outputs(shape, scalar_bytes, device);
  plan.parts = plan.outputs.blocks > 0 ? plan.outputs.most_parts() : plan.gradients.splits;
  plan.partial_sums = plan.parts > 1 || shape.weight_sharing > 1;
  plan.first_state =
      (plan.sweep.capsule_groups + 1) * plan.sweep.state_size + plan.sweep.counter_floats / 4;
  plan.wide_states = plan.first_state + (2 * shape.R - 1) * plan.sweep.state_size;
  plan.weight_images =
      plan.wide_states + (plan.sweep.slots > 0 ? shape.R * plan.sweep.state_size : 0);
  plan.partial_gradients = plan.weight_images + images_of_weight(shape, plan.sweep) / 4;
  plan.workspace_floats = 4 * plan.partial_gradients;
  if (plan.partial_sums) {
    plan.workspace_floats +=
        std::size_t(plan.parts) * shape.I * shape.J * (std::size_t(shape.D) * shape.K + 1);
  }
  return plan;
}

}  // namespace capsule_kernels::cuda
