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
  float o[M], top, total;
  fa_join<D, SG>(
      part + static_cast<long>(row) * splits * D, stats, row * splits * 2, splits, memory, lane, sg,
      o, top, total);
  if (sg == 0) {
    const device X* gate = x + token * W + gate_row;
    const float one = GATE == 1 ? sigmoid(to_float(gate[h])) : 1.0f;
    float open[M];
    for (int i = 0; i < M; ++i)
      open[i] = GATE == 2 ? sigmoid(to_float(gate[h * D + 32 * i + lane])) : one;
    fa_fuse<D, POST, NORM>(o, open, weight, out + h * D, lane);
  }
}
