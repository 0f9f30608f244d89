// Kernels whose vector lanes are samples: softmax over j and dots over d need no horizontal sums.
//
// A block is `vectors` vectors of samples, [..][width] in memory. u_hat of one input capsule and
// one block ([N][width]) stays in the first-level cache between the agreement and the weighted sum.
#pragma once

#include "routing.h"
#include "softmax.h"

namespace capsule::CAPSULE_ISA {

template <typename T, int vectors>
struct SampleLanes {
  using V = Vec<T>;
  static constexpr int lanes = kLanes<T>;
  static constexpr int width = vectors * lanes;
  // Accumulators in flight: enough to hide the latency of a multiply-add.
  static constexpr int tile = 8 / vectors;
  // Lanes along k, for dW: at most 32 bytes, since K is small.
  static constexpr int k_lanes = sizeof(V) > 32 ? int(32 / sizeof(T)) : lanes;
  using VK = Vec<T, k_lanes>;

  static CAPSULE_INLINE index padded_K(index K) { return (K + k_lanes - 1) / k_lanes * k_lanes; }

  // acc[n] = sum_k W[n][k] u[k], a tile of u_hat.
  template <int n>
  static CAPSULE_INLINE void predict(const T* W, index K, const T* u, V (&acc)[n][vectors]) {
#pragma GCC unroll 16
    for (int m = 0; m < n; ++m)
#pragma GCC unroll 16
      for (int q = 0; q < vectors; ++q) acc[m][q] = V{};
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

  // packed[(i, k)][width] from the rows of `count` capsules; lanes past the batch repeat its last
  // sample, whose results are dropped.
  static CAPSULE_INLINE void pack(const Problem<T>& p, index first_sample, index i0, index count,
                                  T* packed) {
#pragma GCC unroll 16
    for (int q = 0; q < vectors; ++q) {
      auto row = [&](index r) {
        index b = first_sample + q * lanes + r;
        if (b >= p.B) b = p.B - 1;
        return p.u + (b * p.I + i0) * p.K;
      };
      gather_rows(row, count * p.K, packed + q * lanes, width);
    }
  }

  // First iteration: couplings are those of the prior, the same for every sample.
  template <int fixed_K>
  static void linear_chunk(const Problem<T>& p, index i0, index i1, const T* packed, T* out,
                           T* scratch) {
    const index K = fixed_K ? fixed_K : p.K, J = p.J, D = p.D, N = p.N();
    T* c = scratch;
    prior_softmax(c, J, static_cast<const T*>(nullptr), p.leaky, c + J);
    for (index i = i0; i < i1; ++i) {
      if (p.logits) prior_softmax(c, J, p.logits + i * J, p.leaky, c + J);
      const T* W = p.weight + i / p.weight_sharing * N * K;
      const T* u = packed + (i - i0) * K * width;
      for (index j = 0; j < J; ++j) {
        for_tiles<tile>(D, [&](auto size, index d) {
          constexpr int n = size;
          const index o = j * D + d;
          V acc[n][vectors];
          predict<n>(W + o * K, K, u, acc);
#pragma GCC unroll 16
          for (int m = 0; m < n; ++m)
#pragma GCC unroll 16
            for (int q = 0; q < vectors; ++q) {
              T* s = out + (o + m) * width + q * lanes;
              store(s, load(s) + c[j] * acc[m][q]);
            }
        });
      }
    }
  }

  // Later iterations, forward (coefficient c) and backward (coefficient dl). The weighted sum of
  // capsule i runs while u_hat of capsule i + 1 is computed: it fills the load and store slots
  // that the products leave free.
  template <int fixed_K, bool is_backward>
  static void routing_chunk(const Problem<T>& p, const Sweep<T>& sweep, index first_sample,
                            index i0, index i1, const T* packed, T* out, T* scratch) {
    const index K = fixed_K ? fixed_K : p.K, J = p.J, D = p.D, N = p.N();
    const T* V_block = sweep.V + first_sample * N;
    const T* ds_block = is_backward ? sweep.ds + first_sample * N : nullptr;
    T* u_hat = scratch;                  // [N][width]
    T* c = u_hat + N * width;            // [J][width], logits first
    T* dl = c + J * width;               // [J][width], dc first; backward only
    const T* coefficient = is_backward ? dl : c;
    for (index x = 0; x < (N + 2 * J) * width; ++x) scratch[x] = 0;

    for (index i = i0; i < i1; ++i) {
      const T* W = p.weight + i / p.weight_sharing * N * K;
      const T* u = packed + (i - i0) * K * width;
      for (index j = 0; j < J; ++j) {
        V previous[vectors], logit[vectors]{}, dc[vectors]{};
#pragma GCC unroll 16
        for (int q = 0; q < vectors; ++q) previous[q] = load(coefficient + j * width + q * lanes);
        for_tiles<tile>(D, [&](auto size, index d) {
          constexpr int n = size;
          V acc[n][vectors];
          predict<n>(W + (j * D + d) * K, K, u, acc);
#pragma GCC unroll 16
          for (int m = 0; m < n; ++m)
#pragma GCC unroll 16
            for (int q = 0; q < vectors; ++q) {
              const index o = (j * D + d + m) * width + q * lanes;
              store(out + o, load(out + o) + previous[q] * load(u_hat + o));
              store(u_hat + o, acc[m][q]);
              logit[q] += acc[m][q] * load(V_block + o);
              if constexpr (is_backward) dc[q] += acc[m][q] * load(ds_block + o);
            }
        });
#pragma GCC unroll 16
        for (int q = 0; q < vectors; ++q) {
          store(c + j * width + q * lanes, logit[q]);
          if constexpr (is_backward) store(dl + j * width + q * lanes, dc[q]);
        }
      }
      const T* prior = p.logits ? p.logits + i * J : nullptr;
#pragma GCC unroll 16
      for (int q = 0; q < vectors; ++q) {
        softmax(c + q * lanes, J, width, prior, p.leaky);
        if constexpr (is_backward) softmax_gradient(c + q * lanes, dl + q * lanes, J, width);
      }
      if (sweep.coupling) write_coupling(p, c, first_sample, i, sweep.coupling);
    }
    for (index j = 0; j < J; ++j)
      for (index o = j * D * width; o < (j + 1) * D * width; o += width)
#pragma GCC unroll 16
        for (int q = 0; q < vectors; ++q) {
          const index x = o + q * lanes;
          store(out + x,
                load(out + x) + load(coefficient + j * width + q * lanes) * load(u_hat + x));
        }
  }

  static void write_coupling(const Problem<T>& p, const T* c, index first_sample, index i,
                             T* coupling) {
    for (index b = first_sample; b < p.B && b < first_sample + width; ++b)
      for (index j = 0; j < p.J; ++j)
        coupling[(b * p.I + i) * p.J + j] = c[j * width + b - first_sample];
  }

  static index sweep_scratch(const Problem<T>& p, index chunk) {
    return chunk * p.K * width + (p.N() + 2 * p.J) * width + p.J * (lanes + 1);
  }

  // One block of samples, input capsules [begin, end), in chunks.
  template <bool is_backward>
  static void sweep_block(const Problem<T>& p, const Sweep<T>& sweep, index first_sample, index i0,
                          index i1, T* out, T* scratch) {
    T* packed = scratch;
    T* rest = packed + (i1 - i0) * p.K * width;
    pack(p, first_sample, i0, i1 - i0, packed);
    if (!sweep.V)
      p.K == 8 ? linear_chunk<8>(p, i0, i1, packed, out, rest)
               : linear_chunk<0>(p, i0, i1, packed, out, rest);
    else
      p.K == 8 ? routing_chunk<8, is_backward>(p, sweep, first_sample, i0, i1, packed, out, rest)
               : routing_chunk<0, is_backward>(p, sweep, first_sample, i0, i1, packed, out, rest);
  }

  // Scratch of the last sweep, and how it is laid out.
  struct Final {
    T *packed, *rows, *du_hat, *c, *dl, *du, *dW, *dlogits, *end;
    Final(const Problem<T>& p, index capsules, T* scratch) {
      const index N = p.N(), K = p.K, J = p.J, weights = p.weight_sharing == 1 ? capsules : 1;
      packed = scratch;                            // [capsules][K][width]
      rows = packed + capsules * K * width;        // [capsules][width][padded K]
      du_hat = rows + capsules * width * padded_K(K);  // [N][width]
      c = du_hat + N * width;                      // [R][J][width]
      dl = c + p.R * J * width;                    // [R][J][width]
      du = dl + p.R * J * width;                   // [capsules][K][width]
      dW = du + capsules * K * width;              // [weights][N][padded K]
      dlogits = dW + weights * N * padded_K(K);    // [capsules][J][lanes]
      end = dlogits + capsules * J * lanes;
    }
  };

  static index final_scratch(const Problem<T>& p, index capsules) {
    return Final(p, capsules, nullptr).end - static_cast<T*>(nullptr) + p.J * (lanes + 1);
  }

  // One block of samples, input capsules [i0, i1): adds to dW and dlogits in scratch, writes du.
  template <int fixed_K>
  static void final_block(const Problem<T>& p, const FinalSweep<T>& sweep, index blocked_size,
                          index first_sample, index i0, index i1, const Final& scratch) {
    const index K = fixed_K ? fixed_K : p.K, Kp = padded_K(K);
    const index J = p.J, D = p.D, N = p.N(), R = p.R;
    const index first_t = sweep.full ? 1 : R;
    const index offset = first_sample * N;
    const index valid = p.B - first_sample < width ? p.B - first_sample : width;
    const bool prior_gradient = sweep.grad_logits != nullptr;
    // V^(t-1) and ds^t of this block; t counts from 1.
    auto V_at = [&](index t) { return sweep.V + (t - 2) * blocked_size + offset; };
    auto ds_at = [&](index t) { return sweep.ds + (t - 1) * blocked_size + offset; };
    auto needs_dl = [&](index t) { return prior_gradient || (sweep.full && t > 1); };

    pack(p, first_sample, i0, i1 - i0, scratch.packed);
    if (sweep.grad_weight)
      for (index b = 0; b < valid; ++b)
        for (index i = i0; i < i1; ++i)
          for (index k = 0; k < Kp; ++k)
            scratch.rows[((i - i0) * width + b) * Kp + k] =
                k < K ? p.u[((first_sample + b) * p.I + i) * K + k] : T(0);

    for (index i = i0; i < i1; ++i) {
      const T* W = p.weight + i / p.weight_sharing * N * K;
      const T* u = scratch.packed + (i - i0) * K * width;
      const T* prior = p.logits ? p.logits + i * J : nullptr;

      // Logits and dc of every iteration, from u_hat tile by tile.
      for (index x = (first_t - 1) * J * width; x < R * J * width; ++x)
        scratch.c[x] = scratch.dl[x] = 0;
      for (index j = 0; j < J; ++j)
        for_tiles<tile>(D, [&](auto size, index d) {
          constexpr int n = size;
          V acc[n][vectors];
          predict<n>(W + (j * D + d) * K, K, u, acc);
          for (index t = first_t; t <= R; ++t) {
            const index row = ((t - 1) * J + j) * width;
            if (t > 1) dot<n>(acc, V_at(t) + (j * D + d) * width, scratch.c + row);
            if (needs_dl(t)) dot<n>(acc, ds_at(t) + (j * D + d) * width, scratch.dl + row);
          }
        });
      for (index t = first_t; t <= R; ++t)
#pragma GCC unroll 16
        for (int q = 0; q < vectors; ++q) {
          T* c = scratch.c + (t - 1) * J * width + q * lanes;
          T* dl = scratch.dl + (t - 1) * J * width + q * lanes;
          softmax(c, J, width, prior, p.leaky);
          if (!needs_dl(t)) continue;
          softmax_gradient(c, dl, J, width);
          if (prior_gradient)
            for (index j = 0; j < J; ++j) {
              T* sum = scratch.dlogits + ((i - i0) * J + j) * lanes;
              store(sum, load(sum) + load(dl + j * width));
            }
        }

      // du_hat = sum_t c^t ds^t + dl^t V^(t-1)
      for (index j = 0; j < J; ++j)
        for_tiles<tile>(D, [&](auto size, index d) {
          constexpr int n = size;
          V acc[n][vectors];
#pragma GCC unroll 16
          for (int m = 0; m < n; ++m)
#pragma GCC unroll 16
            for (int q = 0; q < vectors; ++q) acc[m][q] = V{};
          const index o = (j * D + d) * width;
          for (index t = first_t; t <= R; ++t) {
            const index row = ((t - 1) * J + j) * width;
            add_scaled<n>(acc, scratch.c + row, ds_at(t) + o);
            if (sweep.full && t > 1) add_scaled<n>(acc, scratch.dl + row, V_at(t) + o);
          }
#pragma GCC unroll 16
          for (int m = 0; m < n; ++m)
#pragma GCC unroll 16
            for (int q = 0; q < vectors; ++q)
              store(scratch.du_hat + o + m * width + q * lanes, acc[m][q]);
        });

      if (sweep.grad_u) input_gradient<fixed_K>(W, N, K, scratch.du_hat, scratch.du + (i - i0) * K * width);
      if (sweep.grad_weight)
        weight_gradient(scratch.du_hat, N, scratch.rows + (i - i0) * width * Kp, Kp, valid,
                        scratch.dW + (p.weight_sharing == 1 ? (i - i0) * N * Kp : 0));
    }
    if (sweep.grad_u)
      for (index q = 0; q < vectors && q * lanes < valid; ++q)
        scatter_rows(scratch.du + q * lanes, index(width), (i1 - i0) * K, valid - q * lanes,
                     [&](index r) {
                       return sweep.grad_u + ((first_sample + q * lanes + r) * p.I + i0) * K;
                     });
  }

  // sums += sum over the tile of acc * x
  template <int n>
  static CAPSULE_INLINE void dot(const V (&acc)[n][vectors], const T* x, T* sums) {
#pragma GCC unroll 16
    for (int q = 0; q < vectors; ++q) {
      V sum = load(sums + q * lanes);
#pragma GCC unroll 16
      for (int m = 0; m < n; ++m) sum += acc[m][q] * load(x + m * width + q * lanes);
      store(sums + q * lanes, sum);
    }
  }

  // acc += scale * x
  template <int n>
  static CAPSULE_INLINE void add_scaled(V (&acc)[n][vectors], const T* scale, const T* x) {
#pragma GCC unroll 16
    for (int q = 0; q < vectors; ++q) {
      const V factor = load(scale + q * lanes);
#pragma GCC unroll 16
      for (int m = 0; m < n; ++m) acc[m][q] += factor * load(x + m * width + q * lanes);
    }
  }

  // du[k] = sum_n W[n][k] du_hat[n]
  template <int fixed_K>
  static CAPSULE_INLINE void input_gradient(const T* W, index N, index K_, const T* du_hat, T* du) {
    const index K = fixed_K ? fixed_K : K_;
    for_tiles<tile>(K, [&](auto size, index k) {
      constexpr int n = size;
      V acc[n][vectors];
#pragma GCC unroll 16
      for (int m = 0; m < n; ++m)
#pragma GCC unroll 16
        for (int q = 0; q < vectors; ++q) acc[m][q] = V{};
      for (index o = 0; o < N; ++o) {
        V x[vectors];
#pragma GCC unroll 16
        for (int q = 0; q < vectors; ++q) x[q] = load(du_hat + o * width + q * lanes);
#pragma GCC unroll 16
        for (int m = 0; m < n; ++m) {
          const V weight = broadcast(W[o * K + k + m]);
#pragma GCC unroll 16
          for (int q = 0; q < vectors; ++q) acc[m][q] += weight * x[q];
        }
      }
#pragma GCC unroll 16
      for (int m = 0; m < n; ++m)
#pragma GCC unroll 16
        for (int q = 0; q < vectors; ++q) store(du + (k + m) * width + q * lanes, acc[m][q]);
    });
  }

  // dW[n][k] += sum_b du_hat[n][b] u[b][k], lanes along k
  static CAPSULE_INLINE void weight_gradient(const T* du_hat, index N, const T* rows, index Kp,
                                             index valid, T* dW) {
    for (index k = 0; k < Kp; k += k_lanes)
      for_tiles<12>(N, [&](auto size, index o) {
        constexpr int n = size;
        VK acc[n];
#pragma GCC unroll 16
        for (int m = 0; m < n; ++m) acc[m] = load<T, k_lanes>(dW + (o + m) * Kp + k);
        for (index b = 0; b < valid; ++b) {
          const VK x = load<T, k_lanes>(rows + b * Kp + k);
#pragma GCC unroll 16
          for (int m = 0; m < n; ++m) acc[m] += du_hat[(o + m) * width + b] * x;
        }
#pragma GCC unroll 16
        for (int m = 0; m < n; ++m) store(dW + (o + m) * Kp + k, acc[m]);
      });
  }
};

}  // namespace capsule::CAPSULE_ISA
