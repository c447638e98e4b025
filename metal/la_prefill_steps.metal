// Gated delta rule token by token, for few tokens: a SIMD-group keeps some value rows of one head
// in registers.
//
//   for each block of TB tokens:
//     q, k, v, exp(g), beta -> threadgroup memory, in float
//     for each token:  e = beta (v - a S k),  S = a S + e k^T,  o = S q
//
// LANES lanes share a row (DK / LANES columns each, in runs of 4) and hold ROWS rows each.
//
// inputs   q, k [B, T, Hl, DK] T; v [B, T, Hl, DV] T; g, beta [B, T, Hl] float; mask [B, T] bool
//          (read if HAS_MASK); state [B, Hl, DV, DK] float (read if HAS_STATE); T_len, Hl int.
// outputs  o [B, T, Hl, DV] T; state_out [B, Hl, DV, DK] float.
// template T, DK (multiple of 4 LANES), DV, LANES (4, 8, 16), ROWS, GROUPS (SIMD-groups), TB,
//          HAS_MASK, HAS_STATE. DV is a multiple of GROUPS * ROWS * 32 / LANES.
// grid     (32 GROUPS, DV / (GROUPS ROWS 32 / LANES), B Hl) threads, threadgroup (32 GROUPS, 1, 1).
constexpr int PER = 32 / LANES * ROWS, SLICE = GROUPS * PER, EL = DK / LANES, THREADS = 32 * GROUPS;
threadgroup float qs[TB * DK], ks[TB * DK], vs[TB * SLICE];
threadgroup float as[TB], bs[TB];

const int t = static_cast<int>(thread_index_in_threadgroup);
const int s = static_cast<int>(simdgroup_index_in_threadgroup);
const int lane = static_cast<int>(thread_index_in_simdgroup);
const int part = lane % LANES, mine = s * PER + lane / LANES * ROWS;
const int bh = static_cast<int>(threadgroup_position_in_grid.z);
const int b = bh / Hl, h = bh % Hl;
const int dv = static_cast<int>(threadgroup_position_in_grid.y) * SLICE;
const size_t rows = (static_cast<size_t>(bh) * DV + dv + mine) * DK;

float st[ROWS][EL];
#pragma unroll
for (int r = 0; r < ROWS; ++r) {
#pragma unroll
  for (int i = 0; i < EL; i += 4) {
    float x[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    if (HAS_STATE) load4(state + rows + r * DK + 4 * part + i * LANES, x);
#pragma unroll
    for (int e = 0; e < 4; ++e) st[r][i + e] = x[e];
  }
}

for (int first = 0; first < T_len; first += TB) {
  const int count = min(TB, T_len - first);
  const size_t token = static_cast<size_t>(b) * T_len + first;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int n = 4 * t; n < count * DK; n += 4 * THREADS) {
    const size_t at = ((token + n / DK) * Hl + h) * DK + n % DK;
    float x[4], y[4];
    load4(q + at, x);
    load4(k + at, y);
    for (int e = 0; e < 4; ++e) {
      qs[n + e] = x[e];
      ks[n + e] = y[e];
    }
  }
  for (int n = 4 * t; n < count * SLICE; n += 4 * THREADS) {
    float x[4];
    load4(v + ((token + n / SLICE) * Hl + h) * DV + dv + n % SLICE, x);
    for (int e = 0; e < 4; ++e) vs[n + e] = x[e];
  }
  if (t < count) {
    bool here = true;
    if (HAS_MASK) here = mask[token + t];
    as[t] = here ? metal::precise::exp(g[(token + t) * Hl + h]) : 1.0f;
    bs[t] = here ? beta[(token + t) * Hl + h] : 0.0f;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  for (int n = 0; n < count; ++n) {
    const float a = as[n], write = bs[n];
    float x[EL], e[ROWS], y[ROWS];
#pragma unroll
    for (int i = 0; i < EL; i += 4) load4(ks + n * DK + 4 * part + i * LANES, x + i);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < EL; ++i) sum = fma(st[r][i], x[i], sum);
      e[r] = sum;
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
#pragma unroll
      for (int m = 1; m < LANES; m *= 2) e[r] += simd_shuffle_xor(e[r], static_cast<ushort>(m));
      e[r] = write * (vs[n * SLICE + mine + r] - a * e[r]);
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
#pragma unroll
      for (int i = 0; i < EL; ++i) st[r][i] = fma(e[r], x[i], a * st[r][i]);
    }
#pragma unroll
    for (int i = 0; i < EL; i += 4) load4(qs + n * DK + 4 * part + i * LANES, x + i);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < EL; ++i) sum = fma(st[r][i], x[i], sum);
      y[r] = sum;
    }
    const size_t at = ((token + n) * Hl + h) * DV + dv + mine;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
#pragma unroll
      for (int m = 1; m < LANES; m *= 2) y[r] += simd_shuffle_xor(y[r], static_cast<ushort>(m));
      if (part == r) o[at + r] = from_float<T>(y[r]);
    }
  }
}

#pragma unroll
for (int r = 0; r < ROWS; ++r) {
#pragma unroll
  for (int i = 0; i < EL; i += 4) {
    store4(state_out + rows + r * DK + 4 * part + i * LANES, st[r] + i);
  }
}
