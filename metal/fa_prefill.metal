// Causal softmax attention of T new tokens over a quantised cache, tile by tile.
//
// threadgroup (b, key/value head, row tile):  rows are (token, head) pairs of the heads that share
// the key/value head, token by token, 8 in each SIMD-group
//   Q = scale * s_t * q                                    8 x D a SIMD-group, in registers
//   for tiles of BK keys up to the last that any row sees:
//     K, V tile = scale * n + bias                         by all threads, into threadgroup memory
//     S = Q K^T, masked where keys are younger than the row's token;  m' = max(m, rowmax S)
//     P = 2^(S - m');  l = l 2^(m - m') + rowsum P;  O = O 2^(m - m') + P V
//   o = O / l
// Scores never leave the registers, dequantised numbers never the threadgroup.
//
// inputs   q [B, T, Hf, D] X, after its norm, before any scale
//          keys, values [B, Hk, S_alloc, D*BITS/32] uint, BITS is KBITS or VBITS, with k_scales,
//            k_biases, v_scales, v_biases [B, Hk, S_alloc, D/GROUP] C
//          heads [kept, 2 + most] int32: for each key/value head that is read its number, how
//            many heads read it, and which
//          floats [2]: scale of the scores, a of the log-length scale (0: off)
// scalars  T, Hf, Hk, S (the last T are the new tokens), S_alloc, most, tiles, offset
// outputs  y [B, T, Hf, D] X
// template X, C; KBITS, VBITS 8 or 4; GROUP 32 or 64; D 64 or 128; BK keys of a tile, a multiple of
//          8; SG SIMD-groups: 8 * SG rows of a tile
// grid     (32*SG * tiles, kept, B), threadgroup (32*SG, 1, 1); the longest tiles come first
constexpr int LD = D + 4;  // a stride that spreads rows over the banks
constexpr int DF = D / 8, KF = BK / 8;
constexpr int KW = D * KBITS / 32, VW = D * VBITS / 32;  // words of a row
threadgroup float k_tile[BK * LD];
threadgroup float v_tile[BK * LD];

const int id = static_cast<int>(thread_index_in_threadgroup);
const uint lane = thread_index_in_simdgroup;
const int sg = static_cast<int>(simdgroup_index_in_threadgroup);
const int b = static_cast<int>(threadgroup_position_in_grid.z);
const device int* my_heads = heads + static_cast<int>(threadgroup_position_in_grid.y) * (2 + most);
const int readers = my_heads[1];
const int rows = readers * T;
const int first = (tiles - 1 - static_cast<int>(threadgroup_position_in_grid.x)) * 8 * SG;
if (first >= rows) return;  // the whole threadgroup: a head with fewer readers than another

const long head = (b * Hk + my_heads[0]) * static_cast<long>(S_alloc);
const device uint* my_keys = keys + head * KW;
const device uint* my_values = values + head * VW;
const device C* my_k_scales = k_scales + head * (D / GROUP);
const device C* my_k_biases = k_biases + head * (D / GROUP);
const device C* my_v_scales = v_scales + head * (D / GROUP);
const device C* my_v_biases = v_biases + head * (D / GROUP);

// My row of the tile, and where my pair of columns begins in every 8 x 8 matrix.
const int row = first + sg * 8 + frag_row(lane), col = frag_col(lane);
const int valid_row = metal::min(row, rows - 1);
const int token = valid_row / readers;
const long at = (static_cast<long>(b) * T + token) * Hf + my_heads[2 + valid_row % readers];
const ushort neighbour = static_cast<ushort>(fa_row_neighbour());

simdgroup_float8x8 qf[DF], of[DF];
// Scores in base 2: exp2 is the cheaper exponential.
const float base_2 = floats[0] * 1.44269504088896341f;
const float s = row < rows ? base_2 * fa_log_length(offset + token, floats[1]) : 0.0f;
#pragma unroll
for (int c = 0; c < DF; ++c) {
  qf[c].thread_elements()[0] = s * to_float(q[at * D + c * 8 + col]);
  qf[c].thread_elements()[1] = s * to_float(q[at * D + c * 8 + col + 1]);
  of[c] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
}
float m = FA_START, l = 0.0f;
const int limit = S - T + token + 1;                           // my row sees keys below
const int seen_by_all = S - T + first / readers + 1;           // every row of the tile sees these
const int last = S - T + metal::min(first + 8 * SG - 1, rows - 1) / readers + 1;

for (int base = 0; base < last; base += BK) {
  for (int i = id; i < BK * (KW > VW ? KW : VW); i += 32 * SG) {
    const bool in_k = KW >= VW || i < BK * KW, in_v = VW >= KW || i < BK * VW;
    uint kw, vw;  // both loads first, so that the second does not wait for arithmetic
    float ks, kb, vs, vb;
    if (in_k)
      fa_tile_load<C, KBITS, GROUP, D>(
          my_keys, my_k_scales, my_k_biases, base, S, i, kw, ks, kb);
    if (in_v)
      fa_tile_load<C, VBITS, GROUP, D>(
          my_values, my_v_scales, my_v_biases, base, S, i, vw, vs, vb);
    if (in_k) fa_tile_store<C, KBITS, D, LD>(kw, ks, kb, base, S, i, k_tile);
    if (in_v) fa_tile_store<C, VBITS, D, LD>(vw, vs, vb, base, S, i, v_tile);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  simdgroup_float8x8 sf[KF];
#pragma unroll
  for (int n = 0; n < KF; ++n) sf[n] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
#pragma unroll
  for (int c = 0; c < DF; ++c) {
#pragma unroll
    for (int n = 0; n < KF; ++n) {
      simdgroup_float8x8 kf;  // element (dimension, key) of K^T
      const threadgroup float* p = k_tile + (n * 8 + col) * LD + c * 8 + frag_row(lane);
      kf.thread_elements()[0] = p[0];
      kf.thread_elements()[1] = p[LD];
      simdgroup_multiply_accumulate(sf[n], qf[c], kf, sf[n]);
    }
  }
  if (base + BK > seen_by_all) {
#pragma unroll
    for (int n = 0; n < KF; ++n) {
      const int key = base + n * 8 + col;
      if (key >= limit) sf[n].thread_elements()[0] = FA_MASKED;
      if (key + 1 >= limit) sf[n].thread_elements()[1] = FA_MASKED;
    }
  }
  float top = m, sum = 0.0f;
#pragma unroll
  for (int n = 0; n < KF; ++n)
    top = metal::max(top, metal::max(sf[n].thread_elements()[0], sf[n].thread_elements()[1]));
  top = metal::max(top, simd_shuffle_xor(top, static_cast<ushort>(1)));
  top = metal::max(top, simd_shuffle_xor(top, neighbour));
  const float shrink = metal::exp2(m - top);
  m = top;
#pragma unroll
  for (int n = 0; n < KF; ++n) {
    const float p0 = metal::exp2(sf[n].thread_elements()[0] - top);
    const float p1 = metal::exp2(sf[n].thread_elements()[1] - top);
    sf[n].thread_elements()[0] = p0;
    sf[n].thread_elements()[1] = p1;
    sum += p0 + p1;
  }
  l = metal::fma(l, shrink, sum);  // of my columns; joined at the end
#pragma unroll
  for (int c = 0; c < DF; ++c) {
    of[c].thread_elements()[0] *= shrink;
    of[c].thread_elements()[1] *= shrink;
  }
#pragma unroll
  for (int c = 0; c < DF; ++c) {
#pragma unroll
    for (int n = 0; n < KF; ++n) {
      simdgroup_float8x8 vf;
      const threadgroup float* p = v_tile + (n * 8 + frag_row(lane)) * LD + c * 8 + col;
      vf.thread_elements()[0] = p[0];
      vf.thread_elements()[1] = p[1];
      simdgroup_multiply_accumulate(of[c], sf[n], vf, of[c]);
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

l += simd_shuffle_xor(l, static_cast<ushort>(1));
l += simd_shuffle_xor(l, neighbour);
if (row < rows) {
#pragma unroll
  for (int c = 0; c < DF; ++c) {
    y[at * D + c * 8 + col] = from_float<X>(of[c].thread_elements()[0] / l);
    y[at * D + c * 8 + col + 1] = from_float<X>(of[c].thread_elements()[1] / l);
  }
}
