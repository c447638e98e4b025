// Chunked gated delta rule, launch 1 of 2: what a chunk of C tokens needs and no state enters.
//
//   D[i, j] = exp(g_{j+1} + ... + g_i), j <= i       sums of the segment itself, never differences
//   A[i, j] = beta_i D[i, j] (k_i . k_j), j < i
//   R = (I + A)^-1                                   8-row blocks: forward substitution inside
//   R' = D[C-1, :] R beta,   M = ((Q K^T) * D) R beta                       and among the blocks
//   since[i] = exp(g_0 + ... + g_i)
//   With E = V - since (K S^T) the second launch gets the outputs since (Q S^T) + M E and the new
//   state since[C-1] S + (R' E)^T K.
//
// inputs   q, k [B, T, Hl, DK] T; g, beta [B, T, Hl] float; mask [B, T] bool (read if HAS_MASK);
//          T_len, Hl int.
// outputs  rm [B, Hl, N, 2 C, C] float: R' then M; since [B, Hl, N, C] float; N = ceil(T_len / C).
// template T, DK (multiple of 32), C (32 or 64), HAS_MASK.
// grid     (2 C, N, B Hl) threads, threadgroup (2 C, 1, 1): C / 16 SIMD-groups, each with 16 rows
//          of A and, so that all have the same work, the mirrored 16 rows of Q K^T.
constexpr int LD = C + 4, TILES = C / 8, GROUPS = C / 16;
// Tile (I, J), I > J: A. Tile (J, I): R(I, J), not transposed. Diagonal: A, then R.
threadgroup float ar[C * LD];
threadgroup float gate[C], write[C];      // g and beta, 0 past the last token
threadgroup float inside[C * 8];          // [i, j % 8]: g_{j+1} + ... + g_i, j in the tile of i
threadgroup float head[C], tail[C];       // from the start of the tile to i; after j to its end
threadgroup float between[TILES * TILES]; // [I, J]: whole tiles J + 1 ... I - 1
threadgroup float before[TILES], after[TILES];

const int t = static_cast<int>(thread_index_in_threadgroup);
const int s = static_cast<int>(simdgroup_index_in_threadgroup);
const uint lane = thread_index_in_simdgroup;
const int row = frag_row(lane), col = frag_col(lane);
const int chunk = static_cast<int>(threadgroup_position_in_grid.y);
const int bh = static_cast<int>(threadgroup_position_in_grid.z);
const int b = bh / Hl, h = bh % Hl, first = chunk * C, last = min(C, T_len - first) - 1;
const int ld = Hl * DK;

// Gates, and the sums of their segments.
if (t < C) {
  bool here = t <= last;
  const int token = b * T_len + first + min(t, last);
  if (HAS_MASK) here = here && mask[token];
  gate[t] = here ? g[token * Hl + h] : 0.0f;
  write[t] = here ? beta[token * Hl + h] : 0.0f;
}
threadgroup_barrier(mem_flags::mem_threadgroup);
if (t < C) {
  const int start = t & ~7;
  float sum = 0.0f;
  for (int j = t; j >= start; --j) {
    inside[t * 8 + (j & 7)] = sum;
    sum += gate[j];
  }
  head[t] = sum;
  sum = 0.0f;
  for (int i = t + 1; i < start + 8; ++i) sum += gate[i];
  tail[t] = sum;
}
threadgroup_barrier(mem_flags::mem_threadgroup);
if (t < TILES * TILES) {
  const int I = t / TILES, J = t % TILES;
  float sum = 0.0f;
  for (int m = J + 1; m < I; ++m) sum += head[8 * m + 7];
  between[t] = sum;
}
if (t < TILES) {
  float sum = 0.0f;
  for (int m = 0; m < t; ++m) sum += head[8 * m + 7];
  before[t] = sum;
  sum = 0.0f;
  for (int m = t + 1; m < TILES; ++m) sum += head[8 * m + 7];
  after[t] = sum;
}
threadgroup_barrier(mem_flags::mem_threadgroup);
const size_t place = static_cast<size_t>(bh) * threadgroups_per_grid.y + chunk;
if (t < C) since[place * C + t] = metal::precise::exp(before[t / 8] + head[t]);

// Rows 16 s ... of A, and rows 16 (GROUPS - 1 - s) ... of (Q K^T) * D, which stay in registers.
const size_t base = (static_cast<size_t>(b) * T_len + first) * ld + h * DK;
const device T* keys = k + base;
const int pair = GROUPS - 1 - s;
Tile m0[TILES], m1[TILES];
#pragma unroll
for (int which = 0; which < 2; ++which) {
  const int top = 16 * (which == 0 ? s : pair);
  const device T* rows = (which == 0 ? k : q) + base;
  rows_by_keys<T, TILES, DK>(
      rows + min(top + row, last) * ld, rows + min(top + 8 + row, last) * ld, keys, ld, last,
      top / 8 + 2, lane, m0, m1);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int i = top + 8 * r + row, I = top / 8 + r;
#pragma unroll
    for (int n = 0; n < TILES; ++n) {
      if (n < top / 8 + 2) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int j = 8 * n + col + e;
          float y = 0.0f;
          if (j < i || (j == i && which == 1)) {
            const float segment =
                n == I ? inside[i * 8 + (j & 7)] : tail[j] + between[I * TILES + n] + head[i];
            y = r == 0 ? m0[n].thread_elements()[e] : m1[n].thread_elements()[e];
            y *= metal::precise::exp(segment);
          }
          if (which == 0) {
            ar[i * LD + j] = write[i] * y;
          } else if (r == 0) {
            m0[n].thread_elements()[e] = y;
          } else {
            m1[n].thread_elements()[e] = y;
          }
        }
      }
    }
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);

// Inverses of the diagonal tiles, a column a thread.
float x[8];
if (t < C) {
  const int corner = (t & ~7) * LD + (t & ~7), c = t & 7;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < i; ++j) sum -= ar[corner + i * LD + j] * x[j];
    x[i] = i == c ? 1.0f : (i < c ? 0.0f : sum);
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);
if (t < C) {
#pragma unroll
  for (int i = 0; i < 8; ++i) ar[((t & ~7) + i) * LD + t] = x[i];
}
threadgroup_barrier(mem_flags::mem_threadgroup);

// R(I, J) = -R(I, I) (A(I, J) R(J, J) + ... + A(I, I-1) R(I-1, J)); columns s and TILES - 1 - s.
for (int side = 0; side < 2; ++side) {
  const int J = side == 0 ? s : TILES - 1 - s;
  for (int I = J + 1; I < TILES; ++I) {
    Tile sum = zero_tile(), result = zero_tile();
    for (int K = J; K < I; ++K) {
      multiply_tile(
          sum, left_tile(ar + 8 * I * LD + 8 * K, LD, lane),
          right_tile(ar + 8 * J * LD + 8 * K, LD, lane));
    }
    threadgroup float* slot = ar + 8 * J * LD + 8 * I;
    put_tile(sum, slot, LD, lane);
    simdgroup_barrier(mem_flags::mem_threadgroup);
    multiply_tile(
        result, left_tile(ar + 8 * I * LD + 8 * I, LD, lane), right_tile(slot, LD, lane));
    simdgroup_barrier(mem_flags::mem_threadgroup);
    result.thread_elements()[0] = -result.thread_elements()[0];
    result.thread_elements()[1] = -result.thread_elements()[1];
    put_tile(result, slot, LD, lane);
    simdgroup_barrier(mem_flags::mem_threadgroup);
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);

// R': four columns a thread and turn.
device float* out = rm + place * (2 * C * C);
for (int n = 4 * t; n < C * C; n += 8 * C) {
  const int i = n / C, j = n % C, I = i / 8, J = j / 8;
  float y[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  if (J <= I) {
    const float end = metal::precise::exp(tail[i] + after[I]);
    const int at = (8 * J + i % 8) * LD + 8 * I + j % 8;
    for (int e = 0; e < 4; ++e) y[e] = ar[at + e] * end * write[j + e];
  }
  store4(out + n, y);
}

// M = ((Q K^T) * D) R beta, rows 16 pair ...
out += C * C + 16 * pair * C;
#pragma unroll
for (int n = 0; n < TILES; ++n) {
  Tile y0 = zero_tile(), y1 = zero_tile();
#pragma unroll
  for (int kt = n; kt < TILES; ++kt) {
    if (kt <= 2 * pair + 1) {
      multiply_pair<false, false>(
          y0, y1, m0[kt], m1[kt], right_tile(ar + 8 * n * LD + 8 * kt, LD, lane));
    }
  }
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const int j = 8 * n + col + e;
    out[row * C + j] = y0.thread_elements()[e] * write[j];
    out[(8 + row) * C + j] = y1.thread_elements()[e] * write[j];
  }
}
