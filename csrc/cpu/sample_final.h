// The last sweep of the backward over blocks of samples: u_hat's gradient from all iterations at
// once, and from it du and dW. W is taken j by j.
#pragma once

#include "sample_block.h"

namespace capsule::CAPSULE_ISA {

template <typename T, int vectors>
struct SampleFinal : SampleBlock<T, vectors> {
  using Block = SampleBlock<T, vectors>;
  using typename Block::V;
  template <int n>
  using Tile = typename Block::template Tile<n>;
  using Block::lanes, Block::width, Block::tile, Block::sum_tile, Block::together;

  // For dW lanes are elements k: a row of one sample's u, or of two samples interleaved where K is
  // half a vector or less. f(samples) with the number as a constant.
  template <typename F>
  static CAPSULE_INLINE auto with_samples_per_row(index K, F f) {
    if constexpr (sizeof(T) == 4)
      if (2 * K <= lanes) return f(std::integral_constant<int, 2>{});
    return f(std::integral_constant<int, 1>{});
  }
  static CAPSULE_INLINE index row_length(index K) { return (K + lanes - 1) / lanes * lanes; }

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

  // u_hat_j of one capsule: out[D][width] = W_j u
  static CAPSULE_INLINE void predict_all(const T* W, index D, index K, const T* u, T* out) {
    for_tiles<tile>(D, [&](auto size, index d) {
      constexpr int n = size;
      Tile<n> acc;
      Block::template predict<n>(W + d * K, K, u, acc);
      Block::template store_tile<n>(acc, out + d * width);
    });
  }

  // Dots over d of `capsules` predictions with n vectors: out[m][c] = sum_d u_hat[c][d]
  // state[m][d]. Each state is read once for all capsules.
  template <int n, int capsules>
  static CAPSULE_INLINE void dots(const T* const (&states)[n], const T* u_hat, index u_hat_stride,
                                  index D, T* const (&out)[n], index out_stride) {
    // As many sums at once as there are accumulators.
    constexpr int at_once = n * capsules * vectors <= 8 ? vectors : 1;
#pragma GCC unroll 2
    for (int q0 = 0; q0 < vectors; q0 += at_once) {
      V acc[n][capsules][at_once]{};
      for (index o = q0 * lanes; o < D * width; o += width) {
        V x[capsules][at_once];
#pragma GCC unroll 16
        for (int c = 0; c < capsules; ++c)
#pragma GCC unroll 16
          for (int q = 0; q < at_once; ++q)
            x[c][q] = load(u_hat + c * u_hat_stride + o + q * lanes);
#pragma GCC unroll 16
        for (int m = 0; m < n; ++m)
#pragma GCC unroll 16
          for (int q = 0; q < at_once; ++q) {
            const V y = load(states[m] + o + q * lanes);
#pragma GCC unroll 16
            for (int c = 0; c < capsules; ++c) acc[m][c][q] += x[c][q] * y;
          }
      }
#pragma GCC unroll 16
      for (int m = 0; m < n; ++m)
#pragma GCC unroll 16
        for (int c = 0; c < capsules; ++c)
#pragma GCC unroll 16
          for (int q = 0; q < at_once; ++q)
            store(out[m] + c * out_stride + (q0 + q) * lanes, acc[m][c][q]);
    }
  }

  // Scratch of the last sweep, and how it is laid out. Sums over samples (dW, dlogits) come first:
  // they outlive a block, so wide and narrow blocks must find them at the same place.
  struct Final {
    T *dW, *dlogits, *packed, *rows, *u_hat, *c, *dl, *du, *gathered, *end;
    Final(const Problem<T>& p, index capsules, T* scratch) {
      const index N = p.N(), K = p.K, J = p.J, weights = p.weight_sharing == 1 ? capsules : 1;
      dW = scratch;                                                 // [weights][N][row]
      dlogits = dW + weights * N * row_length(K);                   // [capsules][J][lanes]
      packed = dlogits + capsules * J * lanes;                      // [capsules][K][width]
      rows = packed + capsules * K * width;                         // [width][capsules][row]
      u_hat = rows + capsules * width * row_length(K);              // [together][D][width]
      c = u_hat + larger(together * p.D * width, J * (lanes + 1));  // [capsules][R][J][width]
      dl = c + capsules * p.R * J * width;                          // [capsules][R][J][width]
      du = dl + capsules * p.R * J * width;                         // [capsules][K][width]
      gathered = du + capsules * K * width;  // [lanes][capsules][K] for windows
      end = gathered + Block::gathered_size(p, capsules);
    }
  };

  static index final_scratch(const Problem<T>& p, index capsules) {
    return Final(p, capsules, nullptr).end - static_cast<T*>(nullptr);
  }

  // Samples from `first_sample` on and input capsules [i0, i1) of the last sweep.
  struct Part {
    index first_sample, i0, i1;
    bool begins_dW;  // nothing was added to dW before
    T* finished_dW;  // where dW goes with this part, or null: it stays in scratch
  };

  // One block of samples: adds to dW and dlogits in scratch, writes du.
  template <int fixed_K, int fixed_D>
  static void final_block(const Problem<T>& p, const FinalSweep<T>& sweep, const Part& part,
                          const Final& scratch) {
    const index first_sample = part.first_sample, i0 = part.i0, i1 = part.i1;
    const index K = fixed_K ? fixed_K : p.K, D = fixed_D ? fixed_D : p.D;
    const index length = row_length(K), N = p.J * D;
    const index valid = Block::valid_samples(p, first_sample);

    Block::pack(p, first_sample, i0, i1 - i0, scratch.packed, scratch.gathered);
    if (sweep.grad_weight)
      with_samples_per_row(K, [&](auto samples) {
        pack_rows<fixed_K, samples>(p, first_sample, valid, i0, i1 - i0, scratch.rows,
                                    scratch.gathered);
      });
    // W of the chunk, from far away, is wanted a row of each capsule at a time; asked for at once
    // where the second-level cache takes it.
    const index weights = (i1 - i0) * N * K;
    if (first_sample == 0 && p.weight_sharing == 1 && weights * index(sizeof(T)) <= 128 << 10)
      Block::prefetch(p.weight + i0 * N * K, weights);
    couplings<fixed_K, fixed_D>(p, sweep, first_sample, i0, i1 - i0, scratch);
    for (index x = 0; x < (i1 - i0) * K * width; ++x) scratch.du[x] = 0;
    for (index j = 0; j < p.J; ++j)
      for_tiles<together>(i1 - i0, [&](auto size, index first) {
        constexpr int capsules = size;
        T* du_hat = scratch.u_hat;  // of this j: [capsules][D][width]
        const T* first_term =
            sweep.uniform_term ? at_j(p, sweep.uniform_term, first_sample, j) : nullptr;
        for_tiles<4>(sweep.term_count, [&](auto terms, index m0) {
          constexpr int n = terms;
          const T* states[n];
          const T* coefficients[n];
#pragma GCC unroll 4
          for (int m = 0; m < n; ++m) {
            states[m] = at_j(p, sweep.terms[m0 + m].state, first_sample, j);
            coefficients[m] = coefficient(p, sweep.terms[m0 + m], scratch, first, j);
          }
          combine<n, capsules>(states, coefficients, p.R * p.J * width, D,
                               m0 > 0 ? du_hat : first_term, m0 > 0 ? D * width : 0, du_hat,
                               D * width);
        });
#pragma GCC unroll 4
        for (int c = 0; c < capsules; ++c) {
          const index x = first + c;
          const T* du_hat_c = du_hat + c * D * width;
          if (sweep.grad_u)
            Block::template add_transposed<fixed_K>(p.weight + (p.row(i0 + x) * N + j * D) * K, D,
                                                    K, du_hat_c, scratch.du + x * K * width);
          if (sweep.grad_weight) {
            const index row = (p.weight_sharing == 1 ? x * N : 0) + j * D;
            T* out = part.finished_dW ? part.finished_dW + row * K : nullptr;
            if (out) Block::prefetch_to_write(out, D * K);
            with_samples_per_row(K, [&](auto samples) {
              weight_gradient<samples>(du_hat_c, p.D, scratch.rows + x * length, (i1 - i0) * length,
                                       length, valid, part.begins_dW, scratch.dW + row * length,
                                       out);
            });
          }
        }
      });
    if (sweep.grad_u)
      Block::unpack_gradient(p, first_sample, i0, i1 - i0, scratch.du, sweep.grad_u,
                             scratch.gathered);
  }

  static CAPSULE_INLINE const T* at_j(const Problem<T>& p, const T* blocked, index first_sample,
                                      index j) {
    return blocked + first_sample * p.N() + j * p.D * width;
  }

  static CAPSULE_INLINE T* coefficient(const Problem<T>& p, const Product<T>& of,
                                       const Final& scratch, index capsule, index j) {
    return (of.is_dl ? scratch.dl : scratch.c) + ((capsule * p.R + of.t - 1) * p.J + j) * width;
  }

  // c^t and dl^t of every iteration for the capsules [i0, i0 + count), and their share of dlogits.
  template <int fixed_K, int fixed_D>
  static CAPSULE_INLINE void couplings(const Problem<T>& p, const FinalSweep<T>& sweep,
                                       index first_sample, index i0, index count,
                                       const Final& scratch) {
    const index K = fixed_K ? fixed_K : p.K, D = fixed_D ? fixed_D : p.D, J = p.J, N = J * D,
                R = p.R;
    for (index j = 0; j < J; ++j)
      for_tiles<together>(count, [&](auto size, index first) {
        constexpr int capsules = size;
#pragma GCC unroll 4
        for (int x = 0; x < capsules; ++x)
          predict_all(p.weight + (p.row(i0 + first + x) * N + j * D) * K, D, K,
                      scratch.packed + (first + x) * K * width, scratch.u_hat + x * D * width);
        for_tiles<4>(sweep.dot_count, [&](auto size, index m0) {
          constexpr int n = size;
          const T* states[n];
          T* out[n];
#pragma GCC unroll 4
          for (int m = 0; m < n; ++m) {
            states[m] = at_j(p, sweep.dots[m0 + m].state, first_sample, j);
            out[m] = coefficient(p, sweep.dots[m0 + m], scratch, first, j);
          }
          dots<n, capsules>(states, scratch.u_hat, D * width, D, out, R * J * width);
        });
      });
    for (index x = 0; x < count; ++x)
      couple(p, sweep, i0 + x, scratch.c + x * R * J * width, scratch.dl + x * R * J * width,
             scratch.dlogits + x * J * lanes, scratch.u_hat);  // free again
  }

  // Logits and dc of one capsule, c and dl [R][J][width], become couplings and their gradients;
  // `scratch` holds J (lanes + 1) elements.
  static CAPSULE_INLINE void couple(const Problem<T>& p, const FinalSweep<T>& sweep, index i,
                                    T* all_c, T* all_dl, T* dlogits, T* scratch) {
    const index J = p.J;
    const T* prior = p.logits ? p.logits + i * J : nullptr;
    for (index t = sweep.first_coupled(p.R); t <= p.R; ++t) {
      T* c = all_c + (t - 1) * J * width;
      T* dl = all_dl + (t - 1) * J * width;
      if (t == 1) Block::broadcast_prior(p, prior, c, scratch);
#pragma GCC unroll 2
      for (int q = 0; q < width; q += lanes) {
        if (!sweep.needs_dl(t)) {
          if (t > 1) softmax(c + q, J, width, prior, p.leaky);
          continue;
        }
        if (t > 1)
          softmax_and_gradient<true>(c + q, dl + q, J, width, prior, p.leaky);
        else
          softmax_gradient(c + q, dl + q, J, width);
        if (sweep.grad_logits)
          for (index j = 0; j < J; ++j) {
            T* sum = dlogits + j * lanes;
            store(sum, load(sum) + load(dl + q + j * width));
          }
      }
    }
  }

  // out[c][d] = from[c][d] + sum over m of coefficient[m][c] state[m][d]; null: from 0.
  template <int n, int capsules>
  static CAPSULE_INLINE void combine(const T* const (&states)[n], const T* const (&coefficients)[n],
                                     index coefficient_stride, index D, const T* from,
                                     index from_stride, T* out, index out_stride) {
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
        for (int c = 0; c < capsules; ++c) acc[c] = from ? load(from + c * from_stride + o) : V{};
#pragma GCC unroll 16
        for (int m = 0; m < n; ++m) {
          const V y = load(states[m] + o);
#pragma GCC unroll 16
          for (int c = 0; c < capsules; ++c) acc[c] += factor[m][c] * y;
        }
#pragma GCC unroll 16
        for (int c = 0; c < capsules; ++c) store(out + c * out_stride + o, acc[c]);
      }
    }
  }

  // dW[n] += sum_b du_hat[n][b] u[b], from 0 if it `begins`, and to `out` if that is not null;
  // lanes along k, `stride` from one row of u to the next. Takes N as it comes, unlike its
  // neighbours: unrolled over all of N it was a fifth slower. Not inlined: what stands around it
  // cost it registers.
  template <int samples>
  static __attribute__((noinline)) void weight_gradient(const T* du_hat, index N, const T* rows,
                                                        index stride, index length, index valid,
                                                        bool begins, T* dW, T* out) {
    for (index x = 0; x < length; x += lanes)
      for_tiles<sum_tile>(N, [&](auto size, index o) {
        constexpr int n = size;
        V acc[n];
        if (begins) {
#pragma GCC unroll 16
          for (int m = 0; m < n; ++m) acc[m] = V{};
        } else {
#pragma GCC unroll 16
          for (int m = 0; m < n; ++m) acc[m] = load(dW + (o + m) * length + x);
        }
        // One pointer for all n: the compiler would keep, and spill, one for each.
        const T *g = du_hat + o * width, *u = rows + x;
        for (const T* end = g + valid; g < end; g += samples, u += stride) {
          const V row = load(u);
#pragma GCC unroll 16
          for (int m = 0; m < n; ++m) acc[m] += broadcast_group<samples>(g + m * width) * row;
        }
        if (out) {
          store_weights<samples, n>(acc, out + o * Block::lanes / samples);
          return;
        }
#pragma GCC unroll 16
        for (int m = 0; m < n; ++m) store(dW + (o + m) * length + x, acc[m]);
      });
  }

  // Rows of dW that fill a vector to rows of K = lanes / samples elements.
  template <int samples, int n>
  static CAPSULE_INLINE void store_weights(const V (&sums)[n], T* out) {
    if constexpr (samples == 1) {
#pragma GCC unroll 16
      for (int m = 0; m < n; ++m) store(out + m * lanes, sums[m]);
    } else {
      // Sums of neighbours; those of two rows fill a vector.
      auto even = [](int l) constexpr { return 2 * l; };
      auto odd = [](int l) constexpr { return 2 * l + 1; };
#pragma GCC unroll 16
      for (int m = 0; m < n; m += 2) {
        const V next = sums[m + (n > 1)];
        const V rows = shuffle<T>(sums[m], next, even) + shuffle<T>(sums[m], next, odd);
        __builtin_memcpy(out + m * lanes / 2, &rows, n > 1 ? sizeof(V) : sizeof(V) / 2);
      }
    }
  }

  // Whether rows of dW fill a vector as they are summed.
  static bool fills_vectors(index K) {
    return with_samples_per_row(K, [&](auto samples) { return samples * K == lanes; });
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
