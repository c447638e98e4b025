// Scan of split-K attention: one threadgroup reads the keys and values of ONE key/value head from
// `first` to `end` once, for up to R query rows, and writes their partial softmax.
//
// fa_decode_queries   query rows from device memory into registers (hydra_decode.h has its own way)
// fa_decode_scan      each SIMD-group has its own stream of keys, in steps of U * 32 / L: L lanes
//                     own a key, so a lane holds DK / L numbers of it and DV / L of the value
//     s[r][u] = q[r] . k[u]                   U independent loads in flight, xor-shuffles over L
//     m' = max(m, s);  l = l 2^(m - m') + sum 2^(s - m');  acc = acc 2^(m - m') + 2^(s - m') v
//   at the end: the 32 / L lane groups by shuffles, the SG SIMD-groups through `memory`
// All scores are base-2 logarithms. A step that every query sees in full skips all masks.
//
// X       dtype of q;  C dtype of the cache (of scales and biases when quantised)
// KBITS   of keys, VBITS of values. 32 or 16: both are C;  8 or 4, each for itself: MLX affine,
//         GROUP 32 or 64 (else GROUP is 1). BITS: whichever a helper works on
// L       lanes of a key: a power of two up to 16, at most GROUP numbers a lane, DK / L and DV / L
//         whole words
// R       query rows, U keys of a lane group in a step, SG SIMD-groups of the threadgroup
// q       [T, Hf, DK] of this sequence; k_words, v_words [S_alloc, D*BITS/32] of this key/value
//         head, scales and biases [S_alloc, D/GROUP] likewise (never read unless quantised)
// row     R numbers t * Hf + h, the query rows of this call; -1 for none
// query   [R, DK / L] this lane's numbers of each row: scaled for base 2 and by fa_field_scale;
//         q_sum [R] their sum before fa_field_scale;  limit [R]: the row sees keys below
// full    every row sees all keys below
// part    [T*Hf, splits, DV], stats [T*Hf, splits, 2] (maximum, sum) of this sequence, float
// T, S    query tokens and valid keys; query t sees keys below S - T + t + 1
// scale   multiplies scores;  a, offset: log-length scale at position offset + t, off when a is 0
// memory  SG * (DV + 2) floats of threadgroup memory, free on entry (barrier before a reuse)
// Every thread of the threadgroup must call it: 32 * SG threads. An empty split (first >= end) is
// allowed and writes a partial of weight 0.

template <typename X, int BITS, int DK, int L, int R>
HYDRA_FN void fa_decode_queries(
    const device X* q, const thread int* row, int T, int Hf, int S, int end, float scale, float a,
    int offset, int lane, thread float* query, thread float* q_sum, thread int* limit) {
  constexpr int EK = DK / L;
  const int j = lane % L;
#pragma unroll
  for (int r = 0; r < R; ++r) {
    const int t = row[r] < 0 ? 0 : row[r] / Hf;
    limit[r] = metal::min(end, S - T + t + 1);
    q_sum[r] = 0.0f;
    // Scores in base 2: exp2 is the cheaper exponential.
    const float s = scale * fa_log_length(offset + t, a) * 1.44269504088896341f;
#pragma unroll
    for (int i = 0; i < EK; ++i) {
      const float x = row[r] < 0 ? 0.0f : s * to_float(q[row[r] * DK + j * EK + i]);
      q_sum[r] += x;
      query[r * EK + i] = x * fa_field_scale<BITS>(i);
    }
  }
}

// Words w [U, D*BITS/32/L], scales and biases [U] of this lane's keys (or values) of a step.
template <typename C, int BITS, int GROUP, int D, int L, int U, bool TAIL>
HYDRA_FN void fa_decode_load(
    const device uint* words, const device C* scales, const device C* biases, int base, int end,
    int lane, thread uint* w, thread float* scale, thread float* bias) {
  constexpr int E = D / L, W = E * BITS / 32;
  const int group = lane / L, j = lane - group * L;
#pragma unroll
  for (int u = 0; u < U; ++u) {
    int key = base + u * (32 / L) + group;
    if (TAIL) key = metal::min(key, end - 1);
    fa_load_words<W>(words + key * (L * W) + j * W, w + u * W);
    if (BITS < 16) {
      const int at = key * (D / GROUP) + j * E / GROUP;
      scale[u] = to_float(scales[at]);
      bias[u] = to_float(biases[at]);
    }
  }
}

// p [R, U]: this lane's part of each score.
template <typename C, int BITS, int DK, int L, int R, int U>
HYDRA_FN void fa_decode_dot(
    const thread float* q, const thread float* q_sum, const thread uint* w,
    const thread float* scale, const thread float* bias, thread float* p) {
  constexpr int E = DK / L, W = E * BITS / 32;
#pragma unroll
  for (int u = 0; u < U; ++u) {
    float x[E];
    fa_unpack<C, BITS, E>(w + u * W, x);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      float s = 0.0f;
#pragma unroll
      for (int i = 0; i < E; ++i) s = metal::fma(q[r * E + i], x[i], s);
      if (BITS < 16) s = metal::fma(s, scale[u], bias[u] * q_sum[r]);
      p[r * U + u] = s;
    }
  }
}

// Scores summed over the lanes and masked (TAIL), then p: 2^(s - m), with m, l, acc brought along.
template <int BITS, int DV, int L, int R, int U, bool TAIL>
HYDRA_FN void fa_decode_softmax(
    const thread int* limit, int base, int lane, thread float* p, thread float* m, thread float* l,
    thread float* acc, thread float* acc_bias) {
  constexpr int EV = DV / L, NK = 32 / L;
#pragma unroll
  for (int d = L / 2; d > 0; d /= 2) {
#pragma unroll
    for (int i = 0; i < R * U; ++i) p[i] += simd_shuffle_xor(p[i], static_cast<ushort>(d));
  }
#pragma unroll
  for (int r = 0; r < R; ++r) {
    float top = m[r];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      if (TAIL && base + u * NK + lane / L >= limit[r]) p[r * U + u] = FA_MASKED;
      top = metal::max(top, p[r * U + u]);
    }
    const float shrink = metal::exp2(m[r] - top);
    m[r] = top;
    float sum = 0.0f;
#pragma unroll
    for (int u = 0; u < U; ++u) {
      p[r * U + u] = metal::exp2(p[r * U + u] - top);
      sum += p[r * U + u];
    }
    l[r] = metal::fma(l[r], shrink, sum);
#pragma unroll
    for (int i = 0; i < EV; ++i) acc[r * EV + i] *= shrink;
    if (BITS < 16) acc_bias[r] *= shrink;
  }
}

// acc += p v.
template <typename C, int BITS, int DV, int L, int R, int U>
HYDRA_FN void fa_decode_add(
    const thread float* p, const thread uint* w, const thread float* scale,
    const thread float* bias, thread float* acc, thread float* acc_bias) {
  constexpr int E = DV / L, W = E * BITS / 32;
#pragma unroll
  for (int u = 0; u < U; ++u) {
    float x[E];
    fa_unpack<C, BITS, E>(w + u * W, x);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      float weight = p[r * U + u];
      if (BITS < 16) {
        acc_bias[r] = metal::fma(weight, bias[u], acc_bias[r]);
        weight *= scale[u];
      }
#pragma unroll
      for (int i = 0; i < E; ++i) acc[r * E + i] = metal::fma(weight, x[i], acc[r * E + i]);
    }
  }
}

template <
    typename C, int KBITS, int VBITS, int GROUP, int DK, int DV, int L, int R, int U, bool TAIL>
HYDRA_FN void fa_decode_step(
    const device uint* k_words, const device C* k_scales, const device C* k_biases,
    const device uint* v_words, const device C* v_scales, const device C* v_biases,
    const thread float* q, const thread float* q_sum, const thread int* limit, int base, int end,
    int lane, thread float* m, thread float* l, thread float* acc, thread float* acc_bias) {
  uint kw[U * DK / L * KBITS / 32], vw[U * DV / L * VBITS / 32];
  float ks[U], kb[U], vs[U], vb[U], p[R * U];
  fa_decode_load<C, KBITS, GROUP, DK, L, U, TAIL>(
      k_words, k_scales, k_biases, base, end, lane, kw, ks, kb);
  fa_decode_load<C, VBITS, GROUP, DV, L, U, TAIL>(
      v_words, v_scales, v_biases, base, end, lane, vw, vs, vb);
  fa_decode_dot<C, KBITS, DK, L, R, U>(q, q_sum, kw, ks, kb, p);
  fa_decode_softmax<VBITS, DV, L, R, U, TAIL>(limit, base, lane, p, m, l, acc, acc_bias);
  fa_decode_add<C, VBITS, DV, L, R, U>(p, vw, vs, vb, acc, acc_bias);
}

template <
    typename C, int KBITS, int VBITS, int GROUP, int DK, int DV, int L, int R, int U, int SG>
HYDRA_FN void fa_decode_scan(
    const thread float* query, const thread float* q_sum, const thread int* limit,
    const thread int* row, const device uint* k_words, const device C* k_scales,
    const device C* k_biases, const device uint* v_words, const device C* v_scales,
    const device C* v_biases, device float* part, device float* stats, int full, int first, int end,
    int split, int splits, threadgroup float* memory, int lane, int sg) {
  constexpr int EV = DV / L;
  constexpr int KEYS = U * 32 / L;  // of a SIMD-group's step
  const int j = lane % L;

  float m[R], l[R], acc[R * EV], acc_bias[R];
#pragma unroll
  for (int r = 0; r < R; ++r) {
    m[r] = FA_START;
    l[r] = acc_bias[r] = 0.0f;
#pragma unroll
    for (int i = 0; i < EV; ++i) acc[r * EV + i] = 0.0f;
  }
  for (int base = first + sg * KEYS; base < end; base += SG * KEYS) {
    if (base + KEYS <= full) {
      fa_decode_step<C, KBITS, VBITS, GROUP, DK, DV, L, R, U, false>(
          k_words, k_scales, k_biases, v_words, v_scales, v_biases, query, q_sum, limit, base,
          end, lane, m, l, acc, acc_bias);
    } else {
      fa_decode_step<C, KBITS, VBITS, GROUP, DK, DV, L, R, U, true>(
          k_words, k_scales, k_biases, v_words, v_scales, v_biases, query, q_sum, limit, base,
          end, lane, m, l, acc, acc_bias);
    }
  }

#pragma unroll
  for (int r = 0; r < R; ++r) {
    if (row[r] >= 0) {  // the same in every thread
      if (VBITS < 16) {
#pragma unroll
        for (int i = 0; i < EV; ++i)
          acc[r * EV + i] = metal::fma(acc[r * EV + i], fa_field_scale<VBITS>(i), acc_bias[r]);
      }
#pragma unroll
      for (int d = L; d < 32; d *= 2) {
        const ushort other = static_cast<ushort>(d);
        const float m2 = simd_shuffle_xor(m[r], other), l2 = simd_shuffle_xor(l[r], other);
        const float top = metal::max(m[r], m2);
        const float c1 = metal::exp2(m[r] - top), c2 = metal::exp2(m2 - top);
        m[r] = top;
        l[r] = l[r] * c1 + l2 * c2;
#pragma unroll
        for (int i = 0; i < EV; ++i)
          acc[r * EV + i] = acc[r * EV + i] * c1 + simd_shuffle_xor(acc[r * EV + i], other) * c2;
      }
      if (lane < L) {
#pragma unroll
        for (int i = 0; i < EV; ++i) memory[sg * DV + j * EV + i] = acc[r * EV + i];
      }
      if (lane == 0) {
        memory[SG * DV + 2 * sg] = m[r];
        memory[SG * DV + 2 * sg + 1] = l[r];
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
      float top = FA_START, weight[SG];
#pragma unroll
      for (int i = 0; i < SG; ++i) top = metal::max(top, memory[SG * DV + 2 * i]);
#pragma unroll
      for (int i = 0; i < SG; ++i) weight[i] = metal::exp2(memory[SG * DV + 2 * i] - top);
      const int at = row[r] * splits + split;
      for (int d = sg * 32 + lane; d < DV; d += SG * 32) {
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < SG; ++i) sum = metal::fma(weight[i], memory[i * DV + d], sum);
        part[at * DV + d] = sum;
      }
      if (sg == 0 && lane == 0) {
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < SG; ++i) sum = metal::fma(weight[i], memory[SG * DV + 2 * i + 1], sum);
        stats[2 * at] = top;
        stats[2 * at + 1] = sum;
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
    }
  }
}
