// Kernels for batches too small to fill a vector with samples: lanes are consecutive input
// capsules, one sample at a time. Weights are transposed on the way through the first-level cache.
//
// The predictions of a few samples, smaller than the weights, may be held in the caches from
// sweep to sweep: the first one computes them, the others only read them (make_partition in
// driver.h).
//
// Lanes past the last capsule hold u = 0: their u_hat is 0 and they add nothing.
#pragma once

#include "routing.h"
#include "softmax.h"

namespace capsule::CAPSULE_ISA {

template <typename T>
struct CapsuleLanes {
  using V = Vec<T>;
  static constexpr int lanes = kLanes<T>;
  static constexpr int tile = 8;
  static constexpr const T* no_prior = nullptr;  // logits begin with it here

  // out[f][lanes] = W of each lane's capsule, elements [begin, begin + count) of its [N][K].
  static CAPSULE_INLINE void pack_weights(const Problem<T>& p, index i0, index begin, index count,
                                          T* out) {
    const index NK = p.N() * p.K;
    auto row = [&](index r) {
      const index i = i0 + r < p.I ? i0 + r : p.I - 1;
      return p.weight + i / p.weight_sharing * NK + begin;
    };
    gather_rows(row, count, out, lanes);
  }

  // out[b][K][lanes] for all samples of [b0, b1).
  static CAPSULE_INLINE void pack_capsules(const Problem<T>& p, index b0, index b1, index i0,
                                           index valid, T* out) {
    for (index b = b0; b < b1; ++b) {
      T* u = out + (b - b0) * p.K * lanes;
      auto row = [&](index r) { return p.u + p.at(b, r < valid ? i0 + r : i0); };
      gather_rows(row, p.K, u, lanes);
      for (index k = 0; k < p.K && valid < lanes; ++k)
        for (index r = valid; r < lanes; ++r) u[k * lanes + r] = 0;
    }
  }

  // x[j] = log priors of each lane's capsule; what logits start from.
  static CAPSULE_INLINE void start_logits(const Problem<T>& p, index i0, T* x) {
    if (!p.logits) {
      for (index o = 0; o < p.J * lanes; ++o) x[o] = 0;
      return;
    }
    auto row = [&](index r) { return p.logits + (i0 + r < p.I ? i0 + r : p.I - 1) * p.J; };
    gather_rows(row, p.J, x, lanes);
  }

  // acc[m] = sum_k W[m][k] u[k], every operand a vector of capsules.
  template <int n>
  static CAPSULE_INLINE void predict(const T* W, index K, const T* u, V (&acc)[n]) {
#pragma GCC unroll 16
    for (int m = 0; m < n; ++m) acc[m] = V{};
    for (index k = 0; k < K; ++k) {
      const V x = load(u + k * lanes);
#pragma GCC unroll 16
      for (int m = 0; m < n; ++m) acc[m] += load(W + (m * K + k) * lanes) * x;
    }
  }

  template <int n>
  static CAPSULE_INLINE void load_all(const T* x, V (&acc)[n]) {
#pragma GCC unroll 16
    for (int m = 0; m < n; ++m) acc[m] = load(x + m * lanes);
  }

  template <int n>
  static CAPSULE_INLINE void store_all(const V (&acc)[n], T* x) {
#pragma GCC unroll 16
    for (int m = 0; m < n; ++m) store(x + m * lanes, acc[m]);
  }

  // Whether vectors fit the rows of W. Where u_hat is held, only its gradient needs W then, with
  // lanes along the rows as they lie in memory: [N] a capsule is transposed instead of [N][K].
  static CAPSULE_INLINE bool rows_fit(const Problem<T>& p) {
    return lanes % p.K == 0 && p.N() * p.K % lanes == 0;
  }

  // u[k] over and over, as often as it goes into a vector.
  static CAPSULE_INLINE V repeat(const T* u, index K) {
    T x[lanes];
    for (int l = 0; l < lanes; ++l) x[l] = u[l % K];
    return load(x);
  }

  // dW = du_hat u (on top of what is there if `add`) and du = W^T du_hat of one capsule, either
  // null if it is not wanted. Reads up to a vector past du_hat.
  static CAPSULE_INLINE void gradients_by_row(const Problem<T>& p, const T* W, const T* u,
                                              const T* du_hat, bool add, T* dW, T* du) {
    const index K = p.K, rows = lanes / K, vectors = p.N() / rows;
    const V factor = repeat(u, K);
    Vec<typename SignedOf<T>::type, lanes> row_of;
    for (int l = 0; l < lanes; ++l) row_of[l] = l / K;
    V total{};
    for_tiles<4>(vectors, [&](auto size, index v) {
      constexpr int n = size;
      V sum[n];
#pragma GCC unroll 4
      for (int m = 0; m < n; ++m) {
        const V g = select_lanes<T>(load(du_hat + (v + m) * rows), row_of);
        sum[m] = du ? load(W + (v + m) * lanes) * g : V{};
        if (dW) {
          T* out = dW + (v + m) * lanes;
          store(out, add ? load(out) + g * factor : g * factor);
        }
      }
#pragma GCC unroll 4
      for (int m = 0; m < n; ++m) total += sum[m];
    });
    for (index k = 0; du && k < K; ++k) {
      du[k] = 0;
      for (index l = k; l < lanes; l += K) du[k] += total[l];
    }
  }

  static index sweep_scratch(const Problem<T>& p, const Partition& part) {
    const index samples = part.group < p.B ? part.group : p.B;
    return (samples * (p.K + 2 * p.N() + 2 * p.J) + p.D * p.K) * lanes;
  }

  // Input capsules [i0, i1), samples [b0, b1): partial[b][n] = sum over i.
  template <int fixed_K, bool is_backward>
  static void sweep(const Problem<T>& p, const Sweep<T>& sweep, index b0, index b1, index i0,
                    index i1, T* partial, T* scratch) {
    const index K = fixed_K ? fixed_K : p.K, J = p.J, D = p.D, N = p.N(), samples = b1 - b0;
    T* u = scratch;                         // [samples][K]
    T* sums = u + samples * K * lanes;      // [samples][N]
    T* u_hat = sums + samples * N * lanes;  // [samples][N]
    T* c = u_hat + samples * N * lanes;     // [samples][J]
    T* dl = c + samples * J * lanes;        // [samples][J]
    T* W = dl + samples * J * lanes;        // [D][K]
    const T* coefficient = is_backward ? dl : c;
    const bool computes = !sweep.held || sweep.fills;
    for (index x = 0; x < samples * N * lanes; ++x) sums[x] = 0;

    for (index i = i0; i < i1; i += lanes) {
      const index valid = i1 - i < lanes ? i1 - i : lanes;
      if (sweep.held) u_hat = sweep.held + (i / lanes * p.B + b0) * N * lanes;
      if (computes) pack_capsules(p, b0, b1, i, valid, u);
      for (index b = 0; b < samples; ++b) {
        start_logits(p, i, c + b * J * lanes);
        if (!sweep.V) softmax(c + b * J * lanes, J, lanes, no_prior, p.leaky);
      }
      for (index j = 0; j < J; ++j) {
        if (computes) pack_weights(p, i, j * D * K, D * K, W);
        for (index b = 0; b < samples; ++b) {
          const T* V_row = sweep.V ? sweep.V + (b0 + b) * N : nullptr;
          const T* ds_row = is_backward ? sweep.ds + (b0 + b) * N : nullptr;
          V agreement{}, dc{};  // summed apart: a large prior would round every term
          for_tiles<tile>(D, [&](auto size, index d) {
            constexpr int n = size;
            V acc[n];
            T* tile_of_u_hat = u_hat + (b * N + j * D + d) * lanes;
            if (computes) {
              predict<n>(W + d * K * lanes, K, u + b * K * lanes, acc);
              store_all<n>(acc, tile_of_u_hat);
            } else {
              load_all<n>(tile_of_u_hat, acc);
            }
#pragma GCC unroll 16
            for (int m = 0; m < n; ++m) {
              const index o = j * D + d + m;
              if (V_row) agreement += acc[m] * V_row[o];
              if constexpr (is_backward) dc += acc[m] * ds_row[o];
            }
          });
          if (V_row) {
            T* logit = c + (b * J + j) * lanes;
            store(logit, load(logit) + agreement);
          }
          if constexpr (is_backward) store(dl + (b * J + j) * lanes, dc);
        }
      }
      for (index b = 0; b < samples; ++b) {
        T* c_b = c + b * J * lanes;
        if constexpr (is_backward)
          softmax_and_gradient<false>(c_b, dl + b * J * lanes, J, lanes, no_prior, p.leaky);
        else if (sweep.V)
          softmax(c_b, J, lanes, no_prior, p.leaky);
        if (sweep.coupling)
          scatter_rows(c_b, lanes, J, valid,
                       [&](index r) { return sweep.coupling + ((b0 + b) * p.I + i + r) * J; });
        for (index j = 0; j < J; ++j) {
          const V factor = load(coefficient + (b * J + j) * lanes);
          for (index o = (b * N + j * D) * lanes; o < (b * N + (j + 1) * D) * lanes; o += lanes)
            store(sums + o, load(sums + o) + factor * load(u_hat + o));
        }
      }
    }
    for (index x = 0; x < samples * N; ++x)
      partial[b0 * N + x] = sum_lanes<T>(load(sums + x * lanes));
  }

  struct Final {
    T *u, *W, *dW, *c, *dl, *du_hat, *du, *dlogits, *end;
    Final(const Problem<T>& p, T* scratch) {
      const index N = p.N(), K = p.K, J = p.J;
      u = scratch;                    // [B][K]
      W = u + p.B * K * lanes;        // [N][K]
      dW = W + N * K * lanes;         // [N][K]
      c = dW + (N * K + 1) * lanes;   // [R][J]
      dl = c + p.R * J * lanes;       // [R][J]
      du_hat = dl + p.R * J * lanes;  // [N]
      du = du_hat + N * lanes;        // [K]
      dlogits = du + K * lanes;       // [J]
      end = dlogits + J * lanes;
    }
  };

  static index final_scratch(const Problem<T>& p) {
    return Final(p, nullptr).end - static_cast<T*>(nullptr);
  }

  // The last sweep for input capsules [i0, i1), all samples. With weight_sharing > 1 they share one
  // weight, and dW is summed over them; otherwise each has its own.
  template <int fixed_K>
  static void final(const Problem<T>& p, const FinalSweep<T>& sweep, index i0, index i1,
                    T* grad_weight, T* memory) {
    const index J = p.J, NK = p.N() * (fixed_K ? fixed_K : p.K);
    const bool shared = p.weight_sharing > 1, by_rows = sweep.held && rows_fit(p);
    const Final scratch(p, memory);
    if (shared) clear(scratch.dW, NK);
    for (index i = i0; i < i1; i += lanes) {
      const index valid = i1 - i < lanes ? i1 - i : lanes;
      T* dW = grad_weight && !shared ? grad_weight + (i - i0) * NK : nullptr;
      pack_capsules(p, 0, p.B, i, valid, scratch.u);
      if (!by_rows && (sweep.grad_u || !sweep.held)) pack_weights(p, i, 0, NK, scratch.W);
      if (!shared && !by_rows) clear(scratch.dW, NK);
      if (sweep.grad_logits) clear(scratch.dlogits, J);
      for (index b = 0; b < p.B; ++b) {
        couplings<fixed_K>(p, sweep, b, i, scratch);
        prediction_gradients(p, sweep, b, scratch);
        if (by_rows)
          gradients_by_rows(p, sweep, b, i, valid, dW, scratch);
        else
          gradients<fixed_K>(p, sweep, b, i, valid, grad_weight != nullptr, scratch);
      }
      if (sweep.grad_logits)
        scatter_rows(scratch.dlogits, lanes, J, valid,
                     [&](index r) { return sweep.grad_logits + (i + r) * J; });
      if (dW && !by_rows)
        scatter_rows(scratch.dW, lanes, NK, valid, [&](index r) { return dW + r * NK; });
    }
    if (grad_weight && shared)
      for (index x = 0; x < NK; ++x) grad_weight[x] = sum_lanes<T>(load(scratch.dW + x * lanes));
  }

  static CAPSULE_INLINE void clear(T* x, index count) {
    for (index o = 0; o < count * lanes; ++o) x[o] = 0;
  }

  static CAPSULE_INLINE T* coefficient(const Problem<T>& p, const Product<T>& of,
                                       const Final& scratch, index j) {
    return (of.is_dl ? scratch.dl : scratch.c) + ((of.t - 1) * p.J + j) * lanes;
  }

  // c^t and dl^t of every iteration for sample b and the capsules from i on, and their share of
  // dlogits.
  template <int fixed_K>
  static CAPSULE_INLINE void couplings(const Problem<T>& p, const FinalSweep<T>& sweep, index b,
                                       index i, const Final& scratch) {
    const index K = fixed_K ? fixed_K : p.K, J = p.J, D = p.D, N = p.N(), R = p.R;
    const index first_t = sweep.first_coupled(R);
    for (index t = first_t; t <= R; ++t) start_logits(p, i, scratch.c + (t - 1) * J * lanes);
    clear(scratch.dl, R * J);
    for (index j = 0; j < J; ++j)
      for_tiles<tile>(D, [&](auto size, index d) {
        constexpr int n = size;
        const index o = j * D + d;
        V acc[n];
        if (sweep.held)
          load_all<n>(sweep.held + ((i / lanes * p.B + b) * N + o) * lanes, acc);
        else
          predict<n>(scratch.W + o * K * lanes, K, scratch.u + b * K * lanes, acc);
        for (index m = 0; m < sweep.dot_count; ++m)
          dot<n>(acc, sweep.dots[m].state + b * N + o, coefficient(p, sweep.dots[m], scratch, j));
      });
    for (index t = first_t; t <= R; ++t) {
      T* c = scratch.c + (t - 1) * J * lanes;
      T* dl = scratch.dl + (t - 1) * J * lanes;
      if (!sweep.needs_dl(t)) {
        softmax(c, J, lanes, no_prior, p.leaky);
        continue;
      }
      softmax_and_gradient<true>(c, dl, J, lanes, no_prior, p.leaky);
      if (sweep.grad_logits)
        for (index o = 0; o < J * lanes; o += lanes)
          store(scratch.dlogits + o, load(scratch.dlogits + o) + load(dl + o));
    }
  }

  // sum += acc . x, x the same for every capsule
  template <int n>
  static CAPSULE_INLINE void dot(const V (&acc)[n], const T* x, T* sum) {
    V total{};  // apart from a prior in `sum`, which would round every term
#pragma GCC unroll 16
    for (int m = 0; m < n; ++m) total += acc[m] * x[m];
    store(sum, load(sum) + total);
  }

  // du_hat of sample b, all its terms.
  static CAPSULE_INLINE void prediction_gradients(const Problem<T>& p, const FinalSweep<T>& sweep,
                                                  index b, const Final& scratch) {
    const index D = p.D, N = p.N();
    for (index j = 0; j < p.J; ++j)
      for (index o = j * D; o < (j + 1) * D; ++o) {
        V sum = sweep.uniform_term ? broadcast(sweep.uniform_term[b * N + o]) : V{};
        for (index m = 0; m < sweep.term_count; ++m)
          sum += load(coefficient(p, sweep.terms[m], scratch, j)) * sweep.terms[m].state[b * N + o];
        store(scratch.du_hat + o * lanes, sum);
      }
  }

  // du = W^T du_hat of sample b to where it goes, and dW += du_hat u in scratch if it is wanted.
  template <int fixed_K>
  static CAPSULE_INLINE void gradients(const Problem<T>& p, const FinalSweep<T>& sweep, index b,
                                       index i, index valid, bool wants_dW, const Final& scratch) {
    const index K = fixed_K ? fixed_K : p.K, N = p.N();
    if (sweep.grad_u) {
      clear(scratch.du, K);
      for (index o = 0; o < N; ++o) {
        const V x = load(scratch.du_hat + o * lanes);
        for (index k = 0; k < K; ++k) {
          T* du = scratch.du + k * lanes;
          store(du, load(du) + load(scratch.W + (o * K + k) * lanes) * x);
        }
      }
      if (p.sample_at)
        for (index r = 0; r < valid; ++r)
          for (index k = 0; k < K; ++k)
            sweep.grad_u[p.at(b, i + r) + k] += scratch.du[k * lanes + r];
      else
        scatter_rows(scratch.du, lanes, K, valid,
                     [&](index r) { return sweep.grad_u + p.at(b, i + r); });
    }
    if (wants_dW)
      for (index o = 0; o < N; ++o) {
        const V x = load(scratch.du_hat + o * lanes);
        for (index k = 0; k < K; ++k) {
          T* dW = scratch.dW + (o * K + k) * lanes;
          store(dW, load(dW) + x * load(scratch.u + (b * K + k) * lanes));
        }
      }
  }

  // The same along the rows of W as they lie in memory, where they fit; dW of the first capsule, or
  // null.
  static CAPSULE_INLINE void gradients_by_rows(const Problem<T>& p, const FinalSweep<T>& sweep,
                                               index b, index i, index valid, T* dW,
                                               const Final& scratch) {
    const index N = p.N(), NK = N * p.K;
    T* rows = scratch.dW;  // of du_hat, in its place
    scatter_rows(scratch.du_hat, lanes, N, valid, [&](index r) { return rows + r * N; });
    for (index r = 0; r < valid; ++r)
      gradients_by_row(p, p.weight + (i + r) * NK, p.u + p.at(b, i + r), rows + r * N, b > 0,
                       dW ? dW + r * NK : nullptr,
                       sweep.grad_u ? sweep.grad_u + p.at(b, i + r) : nullptr);
  }
};

}  // namespace capsule::CAPSULE_ISA
