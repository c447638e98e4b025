// Attention of one layer for T <= 8 tokens, first of two dispatches: all LA heads, and the partial
// softmax of all FA heads, side by side. hydra_combine.metal is the second.
//
// threadgroups 0 .. B*Hl-1:           one LA head each, whole (la_decode.h)
// then B*Hk:                          new keys (normed) and values of one head, for the cache
// then B*(splits+1)*items:            FA: work[item] names a key/value head and up to R query rows
//   q = norm(x), RoPE, log-length scale           -> threadgroup memory
//   split <  splits: scan cached keys split * split_keys ...  (fa_decode.h)
//   split == splits: the T new keys, from x
// The cache need not hold the new tokens: storing them does not gate this kernel.
//
// inputs   x [B, T, W] X: fused projection, columns la q|k|v, la gate (if GATE), fa q|k|v, fa gate
//          ab .. offset as in la_decode.metal;  floats [4]: eps of the q/k norms, factor of RoPE's
//          input, scale of the scores, a of the log-length scale (0: off)
//          fa_q_norm, fa_k_norm [D];  keys .. v_biases: the cache as in fa_decode.metal
//          work [items * (1 + R)] int32;  sizes [7]: T, B, Hl, Hf, Hk, W, items
//          plan [4]: S cached keys, S_alloc, splits, split_keys
// outputs  y_la [B, T, Hl, D] X;  state_out, tail_out as in la_decode.metal
//          part [B, T, Hf, splits+1, D], stats [B, T, Hf, splits+1, 2] as in fa_decode.metal
//          new_k, new_v [B, Hk, T, D] X
// template as la_decode.metal; FQ, FK dtypes of fa_q_norm, fa_k_norm; FA_NORM, FA_ROPE 0 or 1;
//          C, KBITS, VBITS, GROUP, L, R, U as fa_decode.metal
// grid     (32*SG * (B*Hl + B*Hk + B*(splits+1)*items), 1, 1), threadgroup (32*SG, 1, 1)
constexpr int LA_FLOATS = 4 * TM * D;
constexpr int SCAN_FLOATS = R * D + SG * (D + 4);  // the last 2 SG are padding to whole float4
constexpr int NEW_FLOATS = R * D + 2 * TM * D;
constexpr int FA_FLOATS = SCAN_FLOATS > NEW_FLOATS ? SCAN_FLOATS : NEW_FLOATS;
threadgroup float4 memory4[(LA_FLOATS > FA_FLOATS ? LA_FLOATS : FA_FLOATS) / 4];
threadgroup float gates[2 * TM];

threadgroup float* memory = reinterpret_cast<threadgroup float*>(memory4);
const int T = sizes[0], B = sizes[1], Hl = sizes[2], Hf = sizes[3], Hk = sizes[4], W = sizes[5];
const int N = Hl * D;
const int q_row = (GATE ? 4 : 3) * N, k_row = q_row + Hf * D, v_row = k_row + Hk * D;
const int id = static_cast<int>(thread_index_in_threadgroup);
const int lane = static_cast<int>(thread_index_in_simdgroup);
const int sg = static_cast<int>(simdgroup_index_in_threadgroup);
int index = static_cast<int>(threadgroup_position_in_grid.x);

if (TAPS == 0 && index == 0 && id == 0) tail_out[0] = from_float<X>(0.0f);
if (index < B * Hl) {
  const int b = index / Hl, h = index - b * Hl;
  if (id < T) {
    const int at = (b * T + id) * 2 * Hl + h;
    gates[2 * id] = la_decay(to_float(ab[at]), to_float(A_log[h]), to_float(dt_bias[h]));
    gates[2 * id + 1] = sigmoid(to_float(ab[at + Hl])) * (NEG ? 2.0f : 1.0f);
  }
  la_decode_head<X, D, TAPS, TM, SG, QK_NORM, ROPE, NORM, GATE>(
      x + b * T * W + h * D, x + b * T * W + 3 * N + h * D, W, N,
      tail + b * (TAPS - 1) * 3 * N + h * D, conv_weight + h * D * TAPS, q_norm, k_norm, out_norm,
      inv_freq, offset[ROWS ? b : 0], floats[0], floats[1], state + index * D * D,
      y_la + b * T * N + h * D, state_out + index * D * D,
      tail_out + b * (TAPS - 1) * 3 * N + h * D, T, memory, gates, thread_index_in_simdgroup,
      simdgroup_index_in_threadgroup);
} else if (index < B * (Hl + Hk)) {
  index -= B * Hl;
  const int b = index / Hk, kv = index - b * Hk;
  for (int t = sg; t < T; t += SG) {
    const device X* row = x + (b * T + t) * W + kv * D;
    float u[D / 32];
    hydra_vector<X, FK, D, FA_NORM, FA_ROPE>(
        row + k_row, fa_k_norm, inv_freq, floats[0], offset[ROWS ? b : 0] + t, floats[1], lane, u);
    for (int i = 0; i < D / 32; ++i) {
      const int at = (index * T + t) * D + 32 * i + lane;
      new_k[at] = from_float<X>(u[i]);
      new_v[at] = row[v_row + 32 * i + lane];
    }
  }
} else {
  index -= B * (Hl + Hk);
  const int items = sizes[6], cached = plan[0], allocated = plan[1], splits = plan[2];
  const int item = index % items;
  const int split = index / items % (splits + 1);
  const int b = index / items / (splits + 1);
  const int first = split * plan[3];
  const device int* rows = work + item * (1 + R) + 1;
  const int kv = rows[-1];
  const int position = offset[ROWS ? b : 0];
  threadgroup float* rest = memory + R * D;

  for (int r = sg; r < R; r += SG) {
    const int row = rows[r];
    float u[D / 32];
    for (int i = 0; i < D / 32; ++i) u[i] = 0.0f;
    if (row >= 0) {
      const int t = row / Hf;
      hydra_vector<X, FQ, D, FA_NORM, FA_ROPE>(
          x + (b * T + t) * W + q_row + (row - t * Hf) * D, fa_q_norm, inv_freq, floats[0],
          position + t, floats[1], lane, u);
      // Scores in base 2: exp2 is the cheaper exponential.
      const float s = floats[2] * fa_log_length(position + t, floats[3]) * 1.44269504088896341f;
      for (int i = 0; i < D / 32; ++i) u[i] *= s;
    }
    for (int i = 0; i < D / 32; ++i) memory[r * D + 32 * i + lane] = u[i];
  }
  if (split == splits) {
    for (int t = sg; t < T; t += SG) {
      const device X* row = x + (b * T + t) * W + kv * D;
      float u[D / 32];
      hydra_vector<X, FK, D, FA_NORM, FA_ROPE>(
          row + k_row, fa_k_norm, inv_freq, floats[0], position + t, floats[1], lane, u);
      // As the cache will hold them, so that a token is the same to itself and to later ones.
      for (int i = 0; i < D / 32; ++i) u[i] = to_float(from_float<X>(u[i]));
      float w[D / 32];
      for (int i = 0; i < D / 32; ++i) w[i] = to_float(row[v_row + 32 * i + lane]);
      if (KBITS < 16) {
        fa_quantised<C, KBITS, KBITS < 16 ? GROUP : 32, D>(u);
        fa_quantised<C, VBITS, KBITS < 16 ? GROUP : 32, D>(w);
      }
      for (int i = 0; i < D / 32; ++i) {
        rest[2 * t * D + 32 * i + lane] = u[i];
        rest[(2 * t + 1) * D + 32 * i + lane] = w[i];
      }
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  device float* my_part = part + static_cast<long>(b) * T * Hf * (splits + 1) * D;
  device float* my_stats = stats + b * T * Hf * (splits + 1) * 2;
  if (split == splits) {
    hydra_new_keys<D, R, SG>(
        memory, rest, rows, my_part, my_stats, Hf, splits + 1, thread_index_in_simdgroup,
        simdgroup_index_in_threadgroup);
  } else {
    const long head = b * Hk + kv;
    const int end = min(first + plan[3], cached);
    int row[R], limit[R];
    float query[R * (D / L)], q_sum[R];
    for (int r = 0; r < R; ++r) row[r] = rows[r];
    hydra_queries<KBITS, D, L, R>(memory, end, lane, query, q_sum, limit);
    fa_decode_scan<C, KBITS, VBITS, GROUP, D, D, L, R, U, SG>(
        query, q_sum, limit, row,
        reinterpret_cast<const device uint*>(keys) + head * allocated * (D * KBITS / 32),
        reinterpret_cast<const device C*>(k_scales) + head * allocated * (D / GROUP),
        reinterpret_cast<const device C*>(k_biases) + head * allocated * (D / GROUP),
        reinterpret_cast<const device uint*>(values) + head * allocated * (D * VBITS / 32),
        reinterpret_cast<const device C*>(v_scales) + head * allocated * (D / GROUP),
        reinterpret_cast<const device C*>(v_biases) + head * allocated * (D / GROUP), my_part,
        my_stats, end, first, end, split, splits + 1, rest, lane, sg);
  }
}
