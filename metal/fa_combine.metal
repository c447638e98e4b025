// Softmax attention over a long cache, second pass: joins the splits, then gate and fusion norm.
//
// threadgroup (b, t, h):
//   M = max over splits of m;  Z = sum l 2^(m - M);  o = sum 2^(m - M) part / Z      (fa_combine.h)
//   SIMD-group 0: y = norm(o * sigmoid(gate)) or norm(o) * sigmoid(gate);  lse = ln 2 (M + log2 Z)
//
// inputs   part [B, T, Hf, splits, DV] float, stats [B, T, Hf, splits, 2] float of fa_decode.metal
//          gate [B, T, Hf, DV or 1] G, before its sigmoid;  weight [DV] W
//            (any array when the template switches them off)
// scalars  splits
// outputs  y [B, T, Hf, DV] X;  lse [B, T, Hf] float, log-sum-exp of the scaled scores
// template X, G, W; DV 64 or 128; SG SIMD-groups; GATE 0 none, 1 one number a head, 2 elementwise;
//          POST 0 gate before the norm, 1 after; NORM 0 none, 1 plain, 2 with weight
// grid     (32*SG * B*T*Hf, 1, 1), threadgroup (32*SG, 1, 1)
constexpr int E = DV / 32;
threadgroup float memory[SG * DV];

const int row = static_cast<int>(threadgroup_position_in_grid.x);
const int lane = static_cast<int>(thread_index_in_simdgroup);
const int sg = static_cast<int>(simdgroup_index_in_threadgroup);

float o[E], top, total;
fa_join<DV, SG>(
    part + static_cast<long>(row) * splits * DV, stats, row * splits * 2, splits, memory, lane, sg,
    o, top, total);
if (sg == 0) {
  const float one = GATE == 1 ? sigmoid(to_float(gate[row])) : 1.0f;
  float open[E];
  for (int i = 0; i < E; ++i)
    open[i] = GATE == 2 ? sigmoid(to_float(gate[row * DV + 32 * i + lane])) : one;
  fa_fuse<DV, POST, NORM>(o, open, weight, y + row * DV, lane);
  if (lane == 0) lse[row] = 0.693147180559945309f * (top + metal::precise::log2(total));
}
