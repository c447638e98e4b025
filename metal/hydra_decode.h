// The FA half of hydra_decode: queries and new keys straight from the fused projection's rows.
//
// hydra_vector    one vector by one SIMD-group: norm and RoPE in registers
// hydra_queries   queries for fa_decode_scan from threadgroup memory; every cached key is before
//                 every query, so no masks
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

// q: [R, D] in threadgroup memory, scaled for base-2 scores. Results as of fa_decode_queries.
template <int BITS, int D, int L, int R>
HYDRA_FN void hydra_queries(
    const threadgroup float* q, int end, int lane, thread float* query, thread float* q_sum,
    thread int* limit) {
  constexpr int E = D / L;
  const int j = lane % L;
#pragma unroll
  for (int r = 0; r < R; ++r) {
    limit[r] = end;
    q_sum[r] = 0.0f;
#pragma unroll
    for (int i = 0; i < E; ++i) {
      const float x = q[r * D + j * E + i];
      q_sum[r] += x;
      query[r * E + i] = x * fa_field_scale<BITS>(i);
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
