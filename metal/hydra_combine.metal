// Attention of one layer for T <= 8 tokens, second of two dispatches: FA splits joined, gated and
// normed, and the finished LA heads put behind them: the input of the output projection.
//
// threadgroup (b, t, h), h < Hf:  as fa_combine.metal, the gate read from the projection's rows
// threadgroup (b, t, Hf):         copy of this token's LA heads
//
// inputs   part [B, T, Hf, splits, D], stats [B, T, Hf, splits, 2] float, y_la [B, T, Hl, D] X of
//          hydra_decode.metal (splits counts the new keys' too);  x [B, T, W] X;  weight [D] WT
// scalars  splits, Hf, N (Hl*D), W, gate_row (of the FA gate in x)
// outputs  y [B, T, Hf*D + N] X
// template X, WT; D; SG SIMD-groups; GATE 0 none, 1 one number a head, 2 elementwise;
//          POST 0 gate before the norm, 1 after; NORM 0 none, 1 plain, 2 with weight
// grid     (32*SG * B*T*(Hf+1), 1, 1), threadgroup (32*SG, 1, 1)
constexpr int M = D / 32;
threadgroup float memory[SG * D];

const int index = static_cast<int>(threadgroup_position_in_grid.x);
const int token = index / (Hf + 1), h = index - token * (Hf + 1);
const int lane = static_cast<int>(thread_index_in_simdgroup);
const int sg = static_cast<int>(simdgroup_index_in_threadgroup);
device X* out = y + token * (Hf * D + N);

if (h == Hf) {
  for (int i = static_cast<int>(thread_index_in_threadgroup); i < N; i += 32 * SG)
    out[Hf * D + i] = y_la[token * N + i];
} else {
  const int row = token * Hf + h;
  const device float* my_part = part + static_cast<long>(row) * splits * D + lane;
  const int first = row * splits * 2;  // in stats, which may be too small to be a device pointer

  float m = FA_START, l = 0.0f;
  for (int s = lane; s < splits; s += 32) {
    const float m2 = stats[first + 2 * s];
    const float larger = max(m, m2);
    l = l * exp2(m - larger) + stats[first + 2 * s + 1] * exp2(m2 - larger);
    m = larger;
  }
  const float top = simd_max(m);
  const float total = simd_sum(l * exp2(m - top));

  float o[M];
  for (int i = 0; i < M; ++i) o[i] = 0.0f;
#pragma unroll 4
  for (int s = sg; s < splits; s += SG) {
    const float w = exp2(stats[first + 2 * s] - top);
    for (int i = 0; i < M; ++i) o[i] = fma(w, my_part[s * D + 32 * i], o[i]);
  }
  for (int i = 0; i < M; ++i) memory[sg * D + 32 * i + lane] = o[i];
  threadgroup_barrier(mem_flags::mem_threadgroup);

  if (sg == 0) {
    const device X* gate = x + token * W + gate_row;
    float open[M];
    float square = 0.0f;
    for (int i = 0; i < M; ++i) {
      float sum = 0.0f;
      for (int g = 0; g < SG; ++g) sum += memory[g * D + 32 * i + lane];
      o[i] = sum / total;
      open[i] = 1.0f;
      if (GATE == 1) open[i] = sigmoid(to_float(gate[h]));
      if (GATE == 2) open[i] = sigmoid(to_float(gate[h * D + 32 * i + lane]));
      if (!POST) o[i] *= open[i];
      square += o[i] * o[i];
    }
    const float inverse = NORM ? metal::precise::rsqrt(simd_sum(square) / D + 1e-6f) : 1.0f;
    for (int i = 0; i < M; ++i) {
      float z = o[i] * inverse;
      if (NORM == 2) z *= to_float(weight[32 * i + lane]);
      if (POST) z *= open[i];
      out[h * D + 32 * i + lane] = from_float<X>(z);
    }
  }
}
