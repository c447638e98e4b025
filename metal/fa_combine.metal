// Softmax attention over a long cache, second pass: joins the splits, then gate and fusion norm.
//
// threadgroup (b, t, h):
//   M = max over splits of m;  Z = sum l 2^(m - M)         every SIMD-group for itself
//   o = sum 2^(m - M) part / Z                             SIMD-group i takes splits i, i + SG, ...
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
const device float* my_part = part + static_cast<long>(row) * splits * DV + lane * E;
const int first = row * splits * 2;  // in stats, which may be too small to be a device pointer

float m = FA_START, l = 0.0f;
for (int s = lane; s < splits; s += 32) {
  const float m2 = stats[first + 2 * s], l2 = stats[first + 2 * s + 1];
  const float larger = metal::max(m, m2);
  l = l * metal::exp2(m - larger) + l2 * metal::exp2(m2 - larger);
  m = larger;
}
const float top = simd_max(m);
const float total = simd_sum(l * metal::exp2(m - top));

float o[E];
for (int i = 0; i < E; ++i) o[i] = 0.0f;
#pragma unroll 4
for (int s = sg; s < splits; s += SG) {
  const float w = metal::exp2(stats[first + 2 * s] - top);
  for (int i = 0; i < E; ++i) o[i] = metal::fma(w, my_part[s * DV + i], o[i]);
}
for (int i = 0; i < E; ++i) memory[sg * DV + lane * E + i] = o[i];
threadgroup_barrier(mem_flags::mem_threadgroup);

if (sg == 0) {
  for (int i = 0; i < E; ++i) {
    float sum = 0.0f;
    for (int g = 0; g < SG; ++g) sum += memory[g * DV + lane * E + i];
    o[i] = sum / total;
  }
  float open[E];
  float one = GATE == 1 ? sigmoid(to_float(gate[row])) : 1.0f;
  for (int i = 0; i < E; ++i)
    open[i] = GATE == 2 ? sigmoid(to_float(gate[row * DV + lane * E + i])) : one;
  float squares = 0.0f;
  for (int i = 0; i < E; ++i) {
    if (GATE != 0 && !POST) o[i] *= open[i];
    squares += o[i] * o[i];
  }
  float n = 1.0f;
  if (NORM != 0) n = metal::precise::rsqrt(simd_sum(squares) / static_cast<float>(DV) + 1e-6f);
  for (int i = 0; i < E; ++i) {
    float x = o[i] * n;
    if (NORM == 2) x *= to_float(weight[lane * E + i]);
    if (GATE != 0 && POST) x *= open[i];
    y[row * DV + lane * E + i] = from_float<X>(x);
  }
  if (lane == 0) lse[row] = 0.693147180559945309f * (top + metal::precise::log2(total));
}
