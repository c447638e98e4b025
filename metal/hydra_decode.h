// The FA half of hydra_decode: queries and new keys straight from the fused projection's rows.
//
// hydra_vector    one vector by one SIMD-group: norm and RoPE in registers
// hydra_split     scan of cached keys by one threadgroup, the steps of fa_decode.h, with queries
//                 from threadgroup memory; every cached key is before every query, so no masks
// hydra_new_keys  the T new keys as one more split, causal, without a detour through the cache
// Partial results have the form of fa_decode.h: base-2 maximum, sum, unnormalised output.

// Channel 32 i + lane of the vector at x -> u[i].
template <typename X, typename W, int D, int NORM, int ROPE>
HYDRA_FN void hydra_vector(
    const device X* x, const device W* weight, const device float* inv_freq, float eps,
    int position, float rope_factor, int lane, thread float* u) {
  constexpr int M = D / 32;
  float square = 0.0f;
#pragma unroll
  for (int i = 0; i < M; ++i) {
    u[i] = to_float(x[32 * i + lane]);
    square += u[i] * u[i];
  }
  if (NORM) {
    const float inverse = metal::precise::rsqrt(simd_sum(square) / D + eps);
#pragma unroll
    for (int i = 0; i < M; ++i) u[i] *= inverse * to_float(weight[32 * i + lane]);
  }
  if (ROPE) la_rotate<D>(u, inv_freq, position, rope_factor, lane);
}

// q: [R, D] in threadgroup memory, scaled for base-2 scores. The rest as in fa_decode.h.
template <typename C, int BITS, int GROUP, int D, int L, int R, int U, int SG>
HYDRA_FN void hydra_split(
    const threadgroup float* q, const device uint* k_words, const device C* k_scales,
    const device C* k_biases, const device uint* v_words, const device C* v_scales,
    const device C* v_biases, const device int* rows, device float* part, device float* stats,
    int first, int end, int split, int splits, threadgroup float* memory, uint lane_index,
    uint simdgroup_index) {
  constexpr int E = D / L;
  constexpr int KEYS = U * 32 / L;  // of a SIMD-group's step
  const int lane = static_cast<int>(lane_index), sg = static_cast<int>(simdgroup_index);
  const int j = lane % L;

  float query[R * E], q_sum[R], m[R], l[R], acc[R * E], acc_bias[R];
  int limit[R];
#pragma unroll
  for (int r = 0; r < R; ++r) {
    limit[r] = end;
    m[r] = FA_START;
    l[r] = acc_bias[r] = q_sum[r] = 0.0f;
#pragma unroll
    for (int i = 0; i < E; ++i) {
      const float x = q[r * D + j * E + i];
      q_sum[r] += x;
      query[r * E + i] = x * fa_field_scale<BITS>(i);
      acc[r * E + i] = 0.0f;
    }
  }
  for (int base = first + sg * KEYS; base < end; base += SG * KEYS) {
    if (base + KEYS <= end) {
      fa_decode_step<C, BITS, GROUP, D, D, L, R, U, false>(
          k_words, k_scales, k_biases, v_words, v_scales, v_biases, query, q_sum, limit, base, end,
          lane, m, l, acc, acc_bias);
    } else {
      fa_decode_step<C, BITS, GROUP, D, D, L, R, U, true>(
          k_words, k_scales, k_biases, v_words, v_scales, v_biases, query, q_sum, limit, base, end,
          lane, m, l, acc, acc_bias);
    }
  }

#pragma unroll
  for (int r = 0; r < R; ++r) {
    const int row = rows[r];
    if (row >= 0) {  // the same in every thread
      if (BITS < 16) {
#pragma unroll
        for (int i = 0; i < E; ++i)
          acc[r * E + i] = fma(acc[r * E + i], fa_field_scale<BITS>(i), acc_bias[r]);
      }
#pragma unroll
      for (int d = L; d < 32; d *= 2) {
        const ushort other = static_cast<ushort>(d);
        const float m2 = simd_shuffle_xor(m[r], other), l2 = simd_shuffle_xor(l[r], other);
        const float top = max(m[r], m2);
        const float c1 = exp2(m[r] - top), c2 = exp2(m2 - top);
        m[r] = top;
        l[r] = l[r] * c1 + l2 * c2;
#pragma unroll
        for (int i = 0; i < E; ++i)
          acc[r * E + i] = acc[r * E + i] * c1 + simd_shuffle_xor(acc[r * E + i], other) * c2;
      }
      if (lane < L) {
#pragma unroll
        for (int i = 0; i < E; ++i) memory[sg * D + j * E + i] = acc[r * E + i];
      }
      if (lane == 0) {
        memory[SG * D + 2 * sg] = m[r];
        memory[SG * D + 2 * sg + 1] = l[r];
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
      float top = FA_START, sum_l = 0.0f;
#pragma unroll
      for (int i = 0; i < SG; ++i) top = max(top, memory[SG * D + 2 * i]);
      const int at = row * splits + split;
      for (int d = sg * 32 + lane; d < D; d += SG * 32) {
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < SG; ++i)
          sum = fma(exp2(memory[SG * D + 2 * i] - top), memory[i * D + d], sum);
        part[at * D + d] = sum;
      }
      if (sg == 0 && lane == 0) {
#pragma unroll
        for (int i = 0; i < SG; ++i)
          sum_l = fma(exp2(memory[SG * D + 2 * i] - top), memory[SG * D + 2 * i + 1], sum_l);
        stats[2 * at] = top;
        stats[2 * at + 1] = sum_l;
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
    }
  }
}

// q: as above; keys_values: [T, 2, D] in threadgroup memory. A SIMD-group per query row.
template <int D, int R, int SG>
HYDRA_FN void hydra_new_keys(
    const threadgroup float* q, const threadgroup float* keys_values, const device int* rows,
    device float* part, device float* stats, int Hf, int splits, uint lane_index,
    uint simdgroup_index) {
  constexpr int M = D / 32;
  const int lane = static_cast<int>(lane_index);
  for (int r = static_cast<int>(simdgroup_index); r < R; r += SG) {
    const int row = rows[r];
    if (row >= 0) {
      float m = FA_START, l = 0.0f, acc[M];
#pragma unroll
      for (int i = 0; i < M; ++i) acc[i] = 0.0f;
      for (int t = 0; t <= row / Hf; ++t) {
        const threadgroup float* k = keys_values + 2 * t * D + lane;
        float s = 0.0f;
#pragma unroll
        for (int i = 0; i < M; ++i) s = fma(q[r * D + 32 * i + lane], k[32 * i], s);
        s = simd_sum(s);
        const float top = max(m, s);
        const float shrink = exp2(m - top), p = exp2(s - top);
        m = top;
        l = fma(l, shrink, p);
#pragma unroll
        for (int i = 0; i < M; ++i) acc[i] = fma(acc[i], shrink, p * k[D + 32 * i]);
      }
      const int at = row * splits + splits - 1;
#pragma unroll
      for (int i = 0; i < M; ++i) part[at * D + 32 * i + lane] = acc[i];
      if (lane == 0) {
        stats[2 * at] = m;
        stats[2 * at + 1] = l;
      }
    }
  }
}
