// A block of samples, one a vector lane: `vectors` vectors of them, [..][width] in memory. Softmax
// over j and dots over d then need no horizontal sums. Here is what all sweeps do with a block:
// pack its input capsules, and predict.
#pragma once

#include "routing.h"
#include "rows.h"
#include "softmax.h"

namespace capsule::CAPSULE_ISA {

template <typename T, int vectors>
struct SampleBlock {
  using V = Vec<T>;
  static constexpr int lanes = kLanes<T>;
  static constexpr int width = vectors * lanes;
  static constexpr bool many_registers = sizeof(V) == 64;  // 32 of them, otherwise 16
  // Rows of a tile. Accumulators in flight hide the latency of a multiply-add; a product with
  // nothing else in registers can afford more of them, which takes fewer loads.
  static constexpr int tile = 8 / vectors;
  static constexpr int sum_tile = many_registers ? 16 : 8;
  // Capsules that share a load of a state, or of its product with W, in the last sweep.
  static constexpr int together = many_registers ? 4 : 2;

  template <int n>
  using Tile = V[n][vectors];

  template <int n>
  static CAPSULE_INLINE void load_tile(const T* x, Tile<n>& acc) {
#pragma GCC unroll 16
    for (int m = 0; m < n; ++m)
#pragma GCC unroll 16
      for (int q = 0; q < vectors; ++q) acc[m][q] = load(x + m * width + q * lanes);
  }

  template <int n>
  static CAPSULE_INLINE void store_tile(const Tile<n>& acc, T* x) {
#pragma GCC unroll 16
    for (int m = 0; m < n; ++m)
#pragma GCC unroll 16
      for (int q = 0; q < vectors; ++q) store(x + m * width + q * lanes, acc[m][q]);
  }

  // acc[n] = sum_k W[n][k] u[k], a tile of u_hat.
  template <int n>
  static CAPSULE_INLINE void predict(const T* W, index K, const T* u, Tile<n>& acc) {
#pragma GCC unroll 16
    for (int m = 0; m < n; ++m)
#pragma GCC unroll 16
      for (int q = 0; q < vectors; ++q) acc[m][q] = V{};
    add_prediction<n>(W, K, u, acc);
  }

  // acc[n] += sum_k W[n][k] u[k]
  template <int n>
  static CAPSULE_INLINE void add_prediction(const T* W, index K, const T* u, Tile<n>& acc) {
    for (index k = 0; k < K; ++k) {
      V x[vectors];
#pragma GCC unroll 16
      for (int q = 0; q < vectors; ++q) x[q] = load(u + k * width + q * lanes);
#pragma GCC unroll 16
      for (int m = 0; m < n; ++m) {
        const V weight = broadcast(W[m * K + k]);
#pragma GCC unroll 16
        for (int q = 0; q < vectors; ++q) acc[m][q] += weight * x[q];
      }
    }
  }

  // out[k] += sum over n of W[n][k] x[n]
  template <int fixed_K>
  static CAPSULE_INLINE void add_transposed(const T* W, index N, index K_, const T* x, T* out) {
    const index K = fixed_K ? fixed_K : K_;
    for_tiles<tile>(K, [&](auto size, index k) {
      constexpr int n = size;
      Tile<n> acc;
      load_tile<n>(out + k * width, acc);
      for (index o = 0; o < N; ++o) {
        V of_n[vectors];
#pragma GCC unroll 16
        for (int q = 0; q < vectors; ++q) of_n[q] = load(x + o * width + q * lanes);
#pragma GCC unroll 16
        for (int m = 0; m < n; ++m) {
          const V weight = broadcast(W[o * K + k + m]);
#pragma GCC unroll 16
          for (int q = 0; q < vectors; ++q) acc[m][q] += weight * of_n[q];
        }
      }
      store_tile<n>(acc, out + k * width);
    });
  }

  // c[J][width] of the first iteration, the prior's for every sample; `scratch` holds J (lanes + 1)
  // elements.
  static CAPSULE_INLINE void broadcast_prior(const Problem<T>& p, const T* prior, T* c,
                                             T* scratch) {
    prior_softmax(scratch, p.J, prior, p.leaky, scratch + p.J);
    for (index j = 0; j < p.J; ++j)
      for (index q = 0; q < width; q += lanes) store(c + j * width + q, broadcast(scratch[j]));
  }

  static void write_coupling(const Problem<T>& p, const T* c, index first_sample, index i,
                             T* coupling) {
    for (index b = first_sample; b < p.B && b < first_sample + width; ++b)
      for (index j = 0; j < p.J; ++j)
        coupling[(b * p.I + i) * p.J + j] = c[j * width + b - first_sample];
  }

  // packed[(i, k)][width] from the rows of `count` capsules; lanes past the batch repeat its last
  // sample, whose results are dropped. `gathered` is [lanes][count][K] for windows.
  static CAPSULE_INLINE void pack(const Problem<T>& p, index first_sample, index i0, index count,
                                  T* packed, T* gathered) {
#pragma GCC unroll 16
    for (int q = 0; q < vectors; ++q) {
      auto row = [&](index r) {
        index b = first_sample + q * lanes + r;
        if (b >= p.B) b = p.B - 1;
        return row_of(p, b, i0, count, gathered + r * count * p.K);
      };
      gather_rows(row, count * p.K, packed + q * lanes, width);
    }
  }

  // The way back: du, packed likewise, to grad_u.
  static CAPSULE_INLINE void unpack_gradient(const Problem<T>& p, index first_sample, index i0,
                                             index count, const T* du, T* grad_u, T* gathered) {
    const index valid = valid_samples(p, first_sample);
    for (index q = 0; q < width && q < valid; q += lanes)
      scatter_gradient(p, du + q, index(width), first_sample + q, valid - q, i0, count, grad_u,
                       gathered);
  }

  // Lanes that are samples of the batch.
  static CAPSULE_INLINE index valid_samples(const Problem<T>& p, index first_sample) {
    return p.B - first_sample < width ? p.B - first_sample : width;
  }

  // Elements that hold the rows of a vector of samples under a window.
  static CAPSULE_INLINE index gathered_size(const Problem<T>& p, index count) {
    return p.sample_at ? lanes * count * p.K : 0;
  }

  // Asks for `count` elements ahead of time.
  static CAPSULE_INLINE void prefetch(const T* x, index count) {
#pragma GCC unroll 8
    for (index o = 0; o < count; o += 64 / index(sizeof(T))) __builtin_prefetch(x + o);
  }

  static CAPSULE_INLINE void prefetch_to_write(const T* x, index count) {
    for (index o = 0; o < count; o += 64 / index(sizeof(T))) __builtin_prefetch(x + o, 1);
  }

  // Asks for u of the block that comes next: rows of different samples lie too far apart for the
  // processor to guess the next one. A row now and then, as all of them at once are in the way.
  struct NextBlock {
    index sample, i, count;  // the first sample, and which capsules
    index steps;             // step() is called so often
    index due = 0;

    CAPSULE_INLINE void step(const Problem<T>& p) {
      for (due += width; due >= steps; due -= steps) prefetch_row(p, sample++, i, count);
    }
  };

  static CAPSULE_INLINE void prefetch_row(const Problem<T>& p, index b, index i, index count) {
    if (b >= p.B || i + count > p.I) return;
    if (p.sample_at)
      for (index x = 0; x < count; ++x) __builtin_prefetch(p.u + p.at(b, i + x));
    else
      prefetch(p.u + p.at(b, i), count * p.K);
  }
};

}  // namespace capsule::CAPSULE_ISA
