// Kernels whose vector lanes are samples: softmax over j and dots over d need no horizontal sums.
//
// A block is `vectors` vectors of samples, [..][width] in memory. u_hat of one input capsule and
// one block ([N][width]) stays in the first-level cache between the agreement and the weighted sum.
#pragma once

#include "routing.h"
#include "rows.h"
#include "softmax.h"

namespace capsule::CAPSULE_ISA {

template <typename T, int vectors>
struct SampleLanes {
  using V = Vec<T>;
  static constexpr int lanes = kLanes<T>;
  static constexpr int width = vectors * lanes;
  static constexpr bool many_registers = sizeof(V) == 64;  // 32 of them, otherwise 16
  // Rows of a tile. Accumulators in flight hide the latency of a multiply-add; a product with
  // nothing else in registers can afford more of them, which takes fewer loads.
  static constexpr int tile = 8 / vectors;
  static constexpr int product_tile = (many_registers ? 16 : 12) / vectors;
  static constexpr int sum_tile = many_registers ? 16 : 8;

  // For dW lanes are elements k: a row of one sample's u, or of two samples interleaved where K is
  // half a vector or less. f(samples) with the number as a constant.
  template <typename F>
  static CAPSULE_INLINE auto with_samples_per_row(index K, F f) {
    if constexpr (sizeof(T) == 4)
      if (2 * K <= lanes) return f(std::integral_constant<int, 2>{});
    return f(std::integral_constant<int, 1>{});
  }
  static CAPSULE_INLINE index row_length(index K) { return (K + lanes - 1) / lanes * lanes; }

  // acc[n] = sum_k W[n][k] u[k], a tile of u_hat.
  template <int n>
  static CAPSULE_INLINE void predict(const T* W, index K, const T* u, V (&acc)[n][vectors]) {
#pragma GCC unroll 16
    for (int m = 0; m < n; ++m)
#pragma GCC unroll 16
      for (int q = 0; q < vectors; ++q) acc[m][q] = V{};
    add_prediction<n>(W, K, u, acc);
  }

  // acc[n] += sum_k W[n][k] u[k]
  template <int n>
  static CAPSULE_INLINE void add_prediction(const T* W, index K, const T* u, V (&acc)[n][vectors]) {
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

  // rows[sample / samples][capsule][row]: u with lanes along k, for dW.
  template <int fixed_K, int samples>
  static CAPSULE_INLINE void pack_rows(const Problem<T>& p, index first_sample, index valid,
                                       index i0, index count, T* rows, T* gathered) {
    const index K = fixed_K ? fixed_K : p.K, length = row_length(K);
    for (index b = 0; b < valid; b += samples) {
      const T* u = row_of(p, first_sample + b, i0, count, gathered);
      const T* next = samples == 2 && b + 1 < valid
                          ? row_of(p, first_sample + b + 1, i0, count, gathered + count * K)
                          : nullptr;
      T* row = rows + b / samples * count * length;
      if (K == length) {
        for (index x = 0; x < count * K; x += lanes) store(row + x, load(u + x));
        continue;
      }
      for (index i = 0; i < count; ++i, u += K, row += length) {
        if (samples * K < length)
          for (index x = 0; x < length; x += lanes) store(row + x, V{});
        for (index k = 0; k < K; ++k) {
          row[k * samples] = u[k];
          if constexpr (samples == 2) row[k * samples + 1] = next ? next[i * K + k] : T(0);
        }
      }
    }
  }

  // First iteration: couplings are those of the prior, the same for every sample. So s is a matrix
  // product over (i, k), with u scaled by c_ij where there is a prior.
  template <int fixed_K, int fixed_D>
  static void linear_chunk(const Problem<T>& p, index i0, index i1, const T* packed, T* out,
                           T* scratch) {
    const index K = fixed_K ? fixed_K : p.K, D = fixed_D ? fixed_D : p.D, J = p.J, N = J * D;
    const index count = p.logits ? i1 - i0 : 1;
    T* c = scratch;  // [count][J]
    for (index x = 0; x < count; ++x)
      prior_softmax(c + x * J, J, p.logits ? p.logits + (i0 + x) * J : nullptr, p.leaky,
                    c + count * J);
    T* scaled = c + count * J;  // [K][width]
    for (index j = 0; j < J; ++j)
      for_tiles<product_tile>(D, [&](auto size, index d) {
        constexpr int n = size;
        const T* W = p.weight + (j * D + d) * K;
        V acc[n][vectors]{};
        for (index i = i0; i < i1; ++i) {
          const T* u = packed + (i - i0) * K * width;
          if (p.logits) {
            for (index x = 0; x < K * width; x += lanes)
              store(scaled + x, c[(i - i0) * J + j] * load(u + x));
            u = scaled;
          }
          add_prediction<n>(W + i / p.weight_sharing * N * K, K, u, acc);
        }
        const T scale = p.logits ? T(1) : c[j];
#pragma GCC unroll 16
        for (int m = 0; m < n; ++m)
#pragma GCC unroll 16
          for (int q = 0; q < vectors; ++q) {
            T* s = out + (j * D + d + m) * width + q * lanes;
            store(s, load(s) + scale * acc[m][q]);
          }
      });
  }

  // u_hat_j of one capsule: out[D][width] = W_j u
  static CAPSULE_INLINE void predict_all(const T* W, index D, index K, const T* u, T* out) {
    for_tiles<tile>(D, [&](auto size, index d) {
      constexpr int n = size;
      V acc[n][vectors];
      predict<n>(W + d * K, K, u, acc);
#pragma GCC unroll 16
      for (int m = 0; m < n; ++m)
#pragma GCC unroll 16
        for (int q = 0; q < vectors; ++q) store(out + (d + m) * width + q * lanes, acc[m][q]);
    });
  }

  // Dots over d of `capsules` predictions with n vectors: out[m][c] = sum_d u_hat[c][d]
  // source[m][d]. Each source is read once for all capsules.
  template <int n, int capsules>
  static CAPSULE_INLINE void dots(const T* const (&sources)[n], const T* u_hat, index u_hat_stride,
                                  index D, T* const (&out)[n], index out_stride) {
    // As many sums at once as there are accumulators.
    constexpr int together = n * capsules * vectors <= 8 ? vectors : 1;
#pragma GCC unroll 2
    for (int q0 = 0; q0 < vectors; q0 += together) {
      V acc[n][capsules][together]{};
      for (index o = q0 * lanes; o < D * width; o += width) {
        V x[capsules][together];
#pragma GCC unroll 16
        for (int c = 0; c < capsules; ++c)
#pragma GCC unroll 16
          for (int q = 0; q < together; ++q)
            x[c][q] = load(u_hat + c * u_hat_stride + o + q * lanes);
#pragma GCC unroll 16
        for (int m = 0; m < n; ++m)
#pragma GCC unroll 16
          for (int q = 0; q < together; ++q) {
            const V y = load(sources[m] + o + q * lanes);
#pragma GCC unroll 16
            for (int c = 0; c < capsules; ++c) acc[m][c][q] += x[c][q] * y;
          }
      }
#pragma GCC unroll 16
      for (int m = 0; m < n; ++m)
#pragma GCC unroll 16
        for (int c = 0; c < capsules; ++c)
#pragma GCC unroll 16
          for (int q = 0; q < together; ++q)
            store(out[m] + c * out_stride + (q0 + q) * lanes, acc[m][c][q]);
    }
  }

  // Later iterations, forward (coefficient c) and backward (coefficient dl), `batch` capsules at a
  // time: V_j, ds_j and the sum of one j are read once for all of them.
  template <int fixed_K, int fixed_D, bool is_backward>
  static void routing_chunk(const Problem<T>& p, const Sweep<T>& sweep, index first_sample,
                            index i0, index i1, const T* packed, T* out, T* scratch) {
    const index K = fixed_K ? fixed_K : p.K, D = fixed_D ? fixed_D : p.D, J = p.J, N = J * D;
    const T* V_block = sweep.V + first_sample * N;
    const T* ds_block = is_backward ? sweep.ds + first_sample * N : nullptr;
    const index batch = capsules_at_once(p);
    T* u_hat = scratch;                // [J][vectors][batch][D][lanes]
    T* c = u_hat + batch * N * width;  // [batch][J][width], logits first
    T* dl = c + batch * J * width;     // [batch][J][width], dc first; backward only
    const T* coefficient = is_backward ? dl : c;

    for (index i = i0; i < i1; i += batch) {
      const index count = i1 - i < batch ? i1 - i : batch;
      for (index j = 0; j < J; ++j)
        for (index x = 0; x < count; ++x) {
          const T* W = p.weight + ((i + x) / p.weight_sharing * N + j * D) * K;
          const T* u = packed + (i + x - i0) * K * width;
          V logit[vectors]{}, dc[vectors]{};
          for_tiles<tile>(D, [&](auto size, index d) {
            constexpr int n = size;
            V acc[n][vectors];
            predict<n>(W + d * K, K, u, acc);
#pragma GCC unroll 16
            for (int m = 0; m < n; ++m)
#pragma GCC unroll 16
              for (int q = 0; q < vectors; ++q) {
                const index o = (j * D + d + m) * width + q * lanes;
                store(u_hat + (((j * vectors + q) * batch + x) * D + d + m) * lanes, acc[m][q]);
                logit[q] += acc[m][q] * load(V_block + o);
                if constexpr (is_backward) dc[q] += acc[m][q] * load(ds_block + o);
              }
          });
#pragma GCC unroll 16
          for (int q = 0; q < vectors; ++q) {
            const index o = (x * J + j) * width + q * lanes;
            store(c + o, logit[q]);
            if constexpr (is_backward) store(dl + o, dc[q]);
          }
        }
      for (index x = 0; x < count; ++x) {
        const T* prior = p.logits ? p.logits + (i + x) * J : nullptr;
#pragma GCC unroll 2
        for (int q = 0; q < vectors; ++q) {
          const index o = x * J * width + q * lanes;
          softmax(c + o, J, width, prior, p.leaky);
          if constexpr (is_backward) softmax_gradient(c + o, dl + o, J, width);
        }
        if (sweep.coupling)
          write_coupling(p, c + x * J * width, first_sample, i + x, sweep.coupling);
      }
      for (index j = 0; j < J; ++j)
        for (int q = 0; q < vectors; ++q)
          for_tiles<sum_tile>(D, [&](auto size, index d) {
            constexpr int n = size;
            T* s = out + (j * D + d) * width + q * lanes;
            V sum[n];
#pragma GCC unroll 16
            for (int m = 0; m < n; ++m) sum[m] = load(s + m * width);
            const T* x = u_hat + ((j * vectors + q) * batch * D + d) * lanes;
            const T* factor = coefficient + j * width + q * lanes;
            for (index k = 0; k < count; ++k, x += D * lanes, factor += J * width) {
              const V scale = load(factor);
#pragma GCC unroll 16
              for (int m = 0; m < n; ++m) sum[m] += scale * load(x + m * lanes);
            }
#pragma GCC unroll 16
            for (int m = 0; m < n; ++m) store(s + m * width, sum[m]);
          });
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

  // Capsules whose u_hat is held together: a share of the second-level cache. As many in a narrow
  // block as in a wide one, so that what is scratch enough for one is enough for the other.
  static CAPSULE_INLINE index capsules_at_once(const Problem<T>& p) {
    const index fit = (256 << 10) / (p.N() * 2 * lanes * index(sizeof(T)));
    return fit < 1 ? 1 : fit > 16 ? 16 : fit;
  }

  static void write_coupling(const Problem<T>& p, const T* c, index first_sample, index i,
                             T* coupling) {
    for (index b = first_sample; b < p.B && b < first_sample + width; ++b)
      for (index j = 0; j < p.J; ++j)
        coupling[(b * p.I + i) * p.J + j] = c[j * width + b - first_sample];
  }

  static index sweep_scratch(const Problem<T>& p, index chunk) {
    return (chunk * p.K + capsules_at_once(p) * (p.N() + 2 * p.J)) * width + p.K * width +
           p.J * (lanes + chunk) + gathered_size(p, chunk);
  }

  // Elements that hold the rows of a vector of samples under a window.
  static CAPSULE_INLINE index gathered_size(const Problem<T>& p, index count) {
    return p.sample_at ? lanes * count * p.K : 0;
  }

  // One block of samples, input capsules [begin, end), in chunks.
  template <bool is_backward>
  static void sweep_block(const Problem<T>& p, const Sweep<T>& sweep, index first_sample, index i0,
                          index i1, T* out, T* scratch) {
    T* packed = scratch;
    T* gathered = packed + (i1 - i0) * p.K * width;
    T* rest = gathered + gathered_size(p, i1 - i0);
    pack(p, first_sample, i0, i1 - i0, packed, gathered);
    const bool paper_sizes = p.K == 8 && p.D == 16;
    if (!sweep.V)
      paper_sizes ? linear_chunk<8, 16>(p, i0, i1, packed, out, rest)
                  : linear_chunk<0, 0>(p, i0, i1, packed, out, rest);
    else
      paper_sizes
          ? routing_chunk<8, 16, is_backward>(p, sweep, first_sample, i0, i1, packed, out, rest)
          : routing_chunk<0, 0, is_backward>(p, sweep, first_sample, i0, i1, packed, out, rest);
  }

  // Scratch of the last sweep, and how it is laid out. Sums over samples (dW, dlogits) come first:
  // they outlive a block, so wide and narrow blocks must find them at the same place.
  struct Final {
    T *dW, *dlogits, *packed, *rows, *u_hat, *c, *dl, *du, *gathered, *end;
    Final(const Problem<T>& p, index capsules, T* scratch) {
      const index N = p.N(), K = p.K, J = p.J, weights = p.weight_sharing == 1 ? capsules : 1;
      dW = scratch;                                          // [weights][N][row]
      dlogits = dW + weights * N * row_length(K);            // [capsules][J][lanes]
      packed = dlogits + capsules * J * lanes;               // [capsules][K][width]
      rows = packed + capsules * K * width;                  // [width][capsules][row]
      u_hat = rows + capsules * width * row_length(K);       // [2][D][width]
      c = u_hat + larger(2 * p.D * width, J * (lanes + 1));  // [capsules][R][J][width]
      dl = c + capsules * p.R * J * width;                   // [capsules][R][J][width]
      du = dl + capsules * p.R * J * width;                  // [capsules][K][width]
      gathered = du + capsules * K * width;                  // [lanes][capsules][K] for windows
      end = gathered + gathered_size(p, capsules);
    }
  };

  static index final_scratch(const Problem<T>& p, index capsules) {
    return Final(p, capsules, nullptr).end - static_cast<T*>(nullptr);
  }

  // One block of samples, input capsules [i0, i1): adds to dW and dlogits in scratch, writes du.
  template <int fixed_K, int fixed_D>
  static void final_block(const Problem<T>& p, const FinalSweep<T>& sweep, index first_sample,
                          index i0, index i1, const Final& scratch) {
    const index K = fixed_K ? fixed_K : p.K, D = fixed_D ? fixed_D : p.D;
    const index length = row_length(K), N = p.J * D;
    const index valid = p.B - first_sample < width ? p.B - first_sample : width;

    pack(p, first_sample, i0, i1 - i0, scratch.packed, scratch.gathered);
    if (sweep.grad_weight)
      with_samples_per_row(K, [&](auto samples) {
        pack_rows<fixed_K, samples>(p, first_sample, valid, i0, i1 - i0, scratch.rows,
                                    scratch.gathered);
      });
    couplings<fixed_K, fixed_D>(p, sweep, first_sample, i0, i1 - i0, scratch);
    for (index x = 0; x < (i1 - i0) * K * width; ++x) scratch.du[x] = 0;
    for (index j = 0; j < p.J; ++j)
      for_tiles<2>(i1 - i0, [&](auto size, index first) {
        constexpr int capsules = size;
        T* du_hat = scratch.u_hat;  // of this j: [capsules][D][width]
        for_tiles<5>(sweep.term_count, [&](auto terms, index m0) {
          constexpr int n = terms;
          const T* sources[n];
          const T* coefficients[n];
#pragma GCC unroll 5
          for (int m = 0; m < n; ++m) {
            sources[m] = source(p, sweep.terms[m0 + m], first_sample, j);
            coefficients[m] = coefficient(p, sweep.terms[m0 + m], scratch, first, j);
          }
          combine<n, capsules>(sources, coefficients, p.R * p.J * width, D, m0 > 0, du_hat,
                               D * width);
        });
#pragma GCC unroll 2
        for (int c = 0; c < capsules; ++c) {
          const index x = first + c;
          const T* du_hat_c = du_hat + c * D * width;
          if (sweep.grad_u)
            input_gradient<fixed_K>(p.weight + ((i0 + x) / p.weight_sharing * N + j * D) * K, D, K,
                                    du_hat_c, scratch.du + x * K * width);
          if (sweep.grad_weight)
            with_samples_per_row(K, [&](auto samples) {
              weight_gradient<samples>(
                  du_hat_c, p.D, scratch.rows + x * length, (i1 - i0) * length, length, valid,
                  scratch.dW + ((p.weight_sharing == 1 ? x * N : 0) + j * D) * length);
            });
        }
      });
    if (sweep.grad_u)
      for (index q = 0; q < vectors && q * lanes < valid; ++q)
        scatter_gradient(p, scratch.du + q * lanes, index(width), first_sample + q * lanes,
                         valid - q * lanes, i0, i1 - i0, sweep.grad_u, scratch.gathered);
  }

  static CAPSULE_INLINE const T* source(const Problem<T>& p, const Term<T>& term,
                                        index first_sample, index j) {
    return term.source + first_sample * p.N() + j * p.D * width;
  }

  static CAPSULE_INLINE T* coefficient(const Problem<T>& p, const Term<T>& term,
                                       const Final& scratch, index capsule, index j) {
    return (term.is_dl ? scratch.dl : scratch.c) + ((capsule * p.R + term.t - 1) * p.J + j) * width;
  }

  // c^t and dl^t of every iteration for the capsules [i0, i0 + count), and their share of dlogits.
  template <int fixed_K, int fixed_D>
  static CAPSULE_INLINE void couplings(const Problem<T>& p, const FinalSweep<T>& sweep,
                                       index first_sample, index i0, index count,
                                       const Final& scratch) {
    const index K = fixed_K ? fixed_K : p.K, D = fixed_D ? fixed_D : p.D, J = p.J, N = J * D,
                R = p.R;
    for (index j = 0; j < J; ++j)
      for_tiles<2>(count, [&](auto size, index first) {
        constexpr int capsules = size;
#pragma GCC unroll 2
        for (int x = 0; x < capsules; ++x)
          predict_all(p.weight + ((i0 + first + x) / p.weight_sharing * N + j * D) * K, D, K,
                      scratch.packed + (first + x) * K * width, scratch.u_hat + x * D * width);
        for_tiles<4>(sweep.dot_count, [&](auto size, index m0) {
          constexpr int n = size;
          const T* sources[n];
          T* out[n];
#pragma GCC unroll 4
          for (int m = 0; m < n; ++m) {
            sources[m] = source(p, sweep.dots[m0 + m], first_sample, j);
            out[m] = coefficient(p, sweep.dots[m0 + m], scratch, first, j);
          }
          dots<n, capsules>(sources, scratch.u_hat, D * width, D, out, R * J * width);
        });
      });
    for (index x = 0; x < count; ++x) {
      const T* prior = p.logits ? p.logits + (i0 + x) * J : nullptr;
      for (index t = sweep.full ? 1 : R; t <= R; ++t) {
        T* c = scratch.c + (x * R + t - 1) * J * width;
        T* dl = scratch.dl + (x * R + t - 1) * J * width;
        if (t == 1) {
          T* scalars = scratch.u_hat;  // free again; [J] and [J][lanes]
          prior_softmax(scalars, J, prior, p.leaky, scalars + J);
          for (index j = 0; j < J; ++j)
            for (index q = 0; q < width; q += lanes)
              store(c + j * width + q, broadcast(scalars[j]));
        }
#pragma GCC unroll 2
        for (int q = 0; q < width; q += lanes) {
          if (t > 1) softmax(c + q, J, width, prior, p.leaky);
          if (!sweep.needs_dl(t)) continue;
          softmax_gradient(c + q, dl + q, J, width);
          if (sweep.grad_logits)
            for (index j = 0; j < J; ++j) {
              T* sum = scratch.dlogits + (x * J + j) * lanes;
              store(sum, load(sum) + load(dl + q + j * width));
            }
        }
      }
    }
  }

  // out[c][d] = sum over m of coefficient[m][c] source[m][d], on top of what is there if `add`.
  template <int n, int capsules>
  static CAPSULE_INLINE void combine(const T* const (&sources)[n],
                                     const T* const (&coefficients)[n], index coefficient_stride,
                                     index D, bool add, T* out, index out_stride) {
#pragma GCC unroll 16
    for (int q = 0; q < vectors; ++q) {
      V factor[n][capsules];
#pragma GCC unroll 16
      for (int m = 0; m < n; ++m)
#pragma GCC unroll 16
        for (int c = 0; c < capsules; ++c)
          factor[m][c] = load(coefficients[m] + c * coefficient_stride + q * lanes);
      for (index o = q * lanes; o < D * width; o += width) {
        V acc[capsules];
#pragma GCC unroll 16
        for (int c = 0; c < capsules; ++c) acc[c] = add ? load(out + c * out_stride + o) : V{};
#pragma GCC unroll 16
        for (int m = 0; m < n; ++m) {
          const V y = load(sources[m] + o);
#pragma GCC unroll 16
          for (int c = 0; c < capsules; ++c) acc[c] += factor[m][c] * y;
        }
#pragma GCC unroll 16
        for (int c = 0; c < capsules; ++c) store(out + c * out_stride + o, acc[c]);
      }
    }
  }

  // du[k] += sum over n of W[n][k] du_hat[n]
  template <int fixed_K>
  static CAPSULE_INLINE void input_gradient(const T* W, index N, index K_, const T* du_hat, T* du) {
    const index K = fixed_K ? fixed_K : K_;
    for_tiles<tile>(K, [&](auto size, index k) {
      constexpr int n = size;
      V acc[n][vectors];
#pragma GCC unroll 16
      for (int m = 0; m < n; ++m)
#pragma GCC unroll 16
        for (int q = 0; q < vectors; ++q) acc[m][q] = load(du + (k + m) * width + q * lanes);
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

  // dW[n] += sum_b du_hat[n][b] u[b], lanes along k; `stride` from one row of u to the next. Takes
  // N as it comes, unlike its neighbours: unrolled over all of N it was a fifth slower.
  template <int samples>
  static CAPSULE_INLINE void weight_gradient(const T* du_hat, index N, const T* rows, index stride,
                                             index length, index valid, T* dW) {
    for (index x = 0; x < length; x += lanes)
      for_tiles<sum_tile>(N, [&](auto size, index o) {
        constexpr int n = size;
        V acc[n];
#pragma GCC unroll 16
        for (int m = 0; m < n; ++m) acc[m] = load(dW + (o + m) * length + x);
        // One pointer for all n: the compiler would keep, and spill, one for each.
        const T *g = du_hat + o * width, *u = rows + x;
        for (const T* end = g + valid; g < end; g += samples, u += stride) {
          const V row = load(u);
#pragma GCC unroll 16
          for (int m = 0; m < n; ++m) acc[m] += broadcast_group<samples>(g + m * width) * row;
        }
#pragma GCC unroll 16
        for (int m = 0; m < n; ++m) store(dW + (o + m) * length + x, acc[m]);
      });
  }

  // Rows of dW as they are summed become rows of K elements.
  static CAPSULE_INLINE void write_weights(const T* dW, index K, index rows, T* out) {
    const index length = row_length(K);
    with_samples_per_row(K, [&](auto samples) {
      for (index o = 0; o < rows; ++o, dW += length, out += K)
        for (index k = 0; k < K; ++k) {
          const T* sum = dW + k * samples;
          out[k] = samples == 2 ? sum[0] + sum[1] : sum[0];
        }
    });
  }
};

}  // namespace capsule::CAPSULE_ISA
