// Chunked gated delta rule, launch 2 of 2: chunk after chunk for DVS value rows of one head.
//
//   S [DVS, DK] in threadgroup memory
//   for each chunk:
//     X = [K; Q] S^T                                 [2 C, DVS]
//     E = V - since X_K                              through threadgroup memory, transposed
//     P = R' E,   O = since X_Q + M E
//     S = since[C-1] S + P^T K
//   (R', M and since come from la_prefill_local.metal.)
//
// inputs   q, k [B, T, Hl, DK] T; v [B, T, Hl, Dv] T; rm [B, Hl, N, 2 C, C] float;
//          since [B, Hl, N, C] float; state [B, Hl, Dv, DK] float (read if HAS_STATE); T_len, Hl int.
// outputs  o [B, T, Hl, Dv] T; state_out [B, Hl, Dv, DK] float.
// template T, DK (multiple of 32), DV (multiple of DVS), C (32 or 64), DVS (multiple of 16),
//          GROUPS (SIMD-groups: C / 8, C / 16 or C / 32), HAS_STATE.
// grid     (32 GROUPS, DV / DVS, B Hl) threads, threadgroup (32 GROUPS, 1, 1).
constexpr int SD = DK + 4, LD = C + 4, NT = DVS / 8, HALF = C / 16, PAIRS = 2 * HALF / GROUPS;
constexpr bool EXACT = sizeof(T) == 2;
threadgroup float st[DVS * SD];
threadgroup float et[DVS * LD], pt[DVS * LD];  // E and P, transposed

const int t = static_cast<int>(thread_index_in_threadgroup);
const int s = static_cast<int>(simdgroup_index_in_threadgroup);
const uint lane = thread_index_in_simdgroup;
const int row = frag_row(lane), col = frag_col(lane);
const int bh = static_cast<int>(threadgroup_position_in_grid.z);
const int b = bh / Hl, h = bh % Hl, dv = static_cast<int>(threadgroup_position_in_grid.y) * DVS;
const int chunks = (T_len + C - 1) / C, ld = Hl * DK, ldv = Hl * DV;
const size_t token0 = static_cast<size_t>(b) * T_len;

const size_t mine = (static_cast<size_t>(bh) * DV + dv) * DK;
for (int n = 4 * t; n < DVS * DK; n += 128 * GROUPS) {
  float x[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  if (HAS_STATE) load4(state + mine + n, x);
  for (int e = 0; e < 4; ++e) st[n / DK * SD + n % DK + e] = x[e];
}
threadgroup_barrier(mem_flags::mem_threadgroup);

for (int chunk = 0; chunk < chunks; ++chunk) {
  const int last = min(C, T_len - chunk * C) - 1;
  const size_t place = static_cast<size_t>(bh) * chunks + chunk;
  const size_t base = (token0 + chunk * C) * ld + h * DK;
  const size_t base_v = (token0 + chunk * C) * ldv + h * DV + dv;

  // X, 16 rows at a time: pairs 0 ... HALF - 1 are keys, the others queries. Later turns go the
  // other way round, so that a SIMD-group's rows of R' and M are together about as long.
  Tile x[PAIRS][2][NT];
#pragma unroll
  for (int turn = 0; turn < PAIRS; ++turn) {
    const int pair = turn % 2 == 0 ? turn * GROUPS + s : (turn + 1) * GROUPS - 1 - s;
    const int top = 16 * (pair % HALF);
    const device T* from = (pair < HALF ? k : q) + base;
    const device T* row0 = from + min(top + row, last) * ld;
    const device T* row1 = from + min(top + 8 + row, last) * ld;
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      x[turn][0][n] = zero_tile();
      x[turn][1][n] = zero_tile();
    }
#pragma unroll
    for (int d = 0; d < DK; d += 32) {
      Tile a0[4], a1[4], bs[4];
      left_tiles(row0 + d, lane, a0);
      left_tiles(row1 + d, lane, a1);
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        right_tiles_transposed(st + 8 * n * SD + d, SD, 7, lane, bs);
        multiply_pairs<EXACT, false>(x[turn][0][n], x[turn][1][n], a0, a1, bs);
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int i = top + 8 * r + row;
      const float d = since[place * C + i];
#pragma unroll
      for (int n = 0; n < NT; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float y = d * x[turn][r][n].thread_elements()[e];
          if (pair < HALF) {
            const int at = 8 * n + col + e;
            et[at * LD + i] = i <= last ? to_float(v[base_v + i * ldv + at]) - y : 0.0f;
            x[turn][r][n].thread_elements()[e] = 0.0f;
          } else {
            x[turn][r][n].thread_elements()[e] = y;
          }
        }
      }
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  // P and O
#pragma unroll
  for (int turn = 0; turn < PAIRS; ++turn) {
    const int pair = turn % 2 == 0 ? turn * GROUPS + s : (turn + 1) * GROUPS - 1 - s;
    const int top = 16 * (pair % HALF);
    const device float* left = rm + place * (2 * C * C) + (16 * pair + row) * C;
#pragma unroll
    for (int j = 0; j < C; j += 32) {
      if (j < top + 16) {
        Tile a0[4], a1[4], be[4];
        left_tiles(left + j, lane, a0);
        left_tiles(left + 8 * C + j, lane, a1);
#pragma unroll
        for (int n = 0; n < NT; ++n) {
          right_tiles_transposed(et + 8 * n * LD + j, LD, 7, lane, be);
          multiply_pairs<false, false>(x[turn][0][n], x[turn][1][n], a0, a1, be);
        }
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int i = top + 8 * r + row;
#pragma unroll
      for (int n = 0; n < NT; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float y = x[turn][r][n].thread_elements()[e];
          const int at = 8 * n + col + e;
          if (pair < HALF) {
            pt[at * LD + i] = y;
          } else if (i <= last) {
            o[base_v + i * ldv + at] = from_float<T>(y);
          }
        }
      }
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  // S, 16 x 32 at a time. The sum over the chunk is taken apart from S: see multiply_pairs.
  const float kept = since[place * C + C - 1];
  for (int unit = s; unit < DVS / 16 * (DK / 32); unit += GROUPS) {
    const int top = unit / (DK / 32) * 16, d = unit % (DK / 32) * 32;
    Tile y0[4], y1[4];
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      y0[n] = zero_tile();
      y1[n] = zero_tile();
    }
#pragma unroll
    for (int i = 0; i < C; i += 32) {
      Tile a0[4], a1[4], bk[4];
      left_tiles(pt + (top + row) * LD + i, lane, a0);
      left_tiles(pt + (top + 8 + row) * LD + i, lane, a1);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        right_tiles(k + base + d, ld, i + j, last, lane, bk);
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          multiply_pair<false, EXACT>(y0[n], y1[n], a0[j], a1[j], bk[n]);
        }
      }
    }
#pragma unroll
    for (int e = 0; e < 2; ++e) {
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const int at = (top + row) * SD + d + 4 * (col + e) + n;
        st[at] = fma(kept, st[at], y0[n].thread_elements()[e]);
        st[at + 8 * SD] = fma(kept, st[at + 8 * SD], y1[n].thread_elements()[e]);
      }
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

for (int n = 4 * t; n < DVS * DK; n += 128 * GROUPS) {
  float x[4];
  load4(st + n / DK * SD + n % DK, x);
  store4(state_out + mine + n, x);
}
