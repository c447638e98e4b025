// Second pass of split-K attention, up to the gate: one threadgroup joins the splits of ONE row.
//
// fa_join<D, SG>(...)
//   top = max over splits of m;  total = sum l 2^(m - top)      every SIMD-group for itself
//   sum 2^(m - top) part                                        SIMD-group i: splits i, i + SG, ...
//   SIMD-group 0: o = sum / total, channel 32 i + lane in o[i]
// fa_fuse<D, POST, NORM>(...): gate and norm of o by SIMD-group 0
//
// part    [splits, D] of this row;  stats, first: its [splits, 2] begin at stats + first
// P       pointer type of stats or weight: MLX passes small arrays as constant memory
// memory  SG * D floats of threadgroup memory
// Every thread of the threadgroup must call fa_join: 32 * SG threads.

template <int D, int SG, typename P>
HYDRA_FN void fa_join(
    const device float* part, P stats, int first, int splits, threadgroup float* memory, int lane,
    int sg, thread float* o, thread float& top, thread float& total) {
  constexpr int M = D / 32;
  float m = FA_START, l = 0.0f;
  for (int s = lane; s < splits; s += 32) {
    const float m2 = stats[first + 2 * s], l2 = stats[first + 2 * s + 1];
    const float larger = metal::max(m, m2);
    l = l * metal::exp2(m - larger) + l2 * metal::exp2(m2 - larger);
    m = larger;
  }
  top = simd_max(m);
  total = simd_sum(l * metal::exp2(m - top));

  for (int i = 0; i < M; ++i) o[i] = 0.0f;
#pragma unroll 4
  for (int s = sg; s < splits; s += SG) {
    const float w = metal::exp2(stats[first + 2 * s] - top);
    for (int i = 0; i < M; ++i) o[i] = metal::fma(w, part[s * D + 32 * i + lane], o[i]);
  }
  for (int i = 0; i < M; ++i) memory[sg * D + 32 * i + lane] = o[i];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (sg == 0) {
    for (int i = 0; i < M; ++i) {
      float sum = 0.0f;
      for (int g = 0; g < SG; ++g) sum += memory[g * D + 32 * i + lane];
      o[i] = sum / total;
    }
  }
}

// open: factors of the output gate, 1 without; NORM 0 none, 1 plain, 2 with weight; out: [D].
template <int D, int POST, int NORM, typename X, typename P>
HYDRA_FN void fa_fuse(
    thread float* o, const thread float* open, P weight, device X* out, int lane) {
  constexpr int M = D / 32;
  float squares = 0.0f;
  for (int i = 0; i < M; ++i) {
    if (!POST) o[i] *= open[i];
    squares += o[i] * o[i];
  }
  float inverse = 1.0f;
  if (NORM) inverse = metal::precise::rsqrt(simd_sum(squares) / static_cast<float>(D) + 1e-6f);
  for (int i = 0; i < M; ++i) {
    float x = o[i] * inverse;
    if (NORM == 2) x *= to_float(weight[32 * i + lane]);
    if (POST) x *= open[i];
    out[32 * i + lane] = from_float<X>(x);
  }
}
