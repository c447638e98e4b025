// 8 x 8 tiles for the chunked gated delta rule: operands from row-major memory, and products.
//
// A block of 8 x 32 numbers is four tiles whose columns are interleaved: tile j, column n is column
// 4 n + j of the block. A lane's share of the four tiles is then 8 neighbours of one row, one or
// two wide loads; sums over the 32 columns do not care for their order as long as both operands
// have the same. A left operand and a result have the layout of frag_row and frag_col; a right
// operand (k down, n across) has it on Metal, and its transpose on CUDA, as the tensor cores want.
//
// Products come in pairs of row tiles (16 rows), one instruction of a tensor core. There, float32
// is the sum of two TF32 parts, and 16-bit numbers are one exactly: EXACT_A and EXACT_B say so.

typedef simdgroup_float8x8 Tile;

// Eight neighbours as floats, from device or threadgroup memory.
template <typename P>
HYDRA_FN void read8(P p, thread float* x) {
#ifdef HYDRA_CUDA
  load8(p, x);
#else
  load4(p, x);
  load4(p + 4, x + 4);
#endif
}

HYDRA_FN Tile zero_tile() { return make_filled_simdgroup_matrix<float, 8, 8>(0.0f); }

// Four left tiles, [8 rows, 32]: p is at column 0 of the block, in THIS LANE'S row.
template <typename P>
HYDRA_FN void left_tiles(P p, uint lane, thread Tile* f) {
  float x[8];
  read8(p + 4 * frag_col(lane), x);
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    f[j].thread_elements()[0] = x[j];
    f[j].thread_elements()[1] = x[4 + j];
  }
}

// Four right tiles, [32 = k, 8 = n], of a matrix stored as [n, k]: n-th row at p + min(n, last) * ld.
template <typename P>
HYDRA_FN void right_tiles_transposed(P p, int ld, int last, uint lane, thread Tile* f) {
#ifdef HYDRA_CUDA
  left_tiles(p + min(frag_row(lane), last) * ld, lane, f);
#else
  float x[4];
  for (int e = 0; e < 2; ++e) {
    load4(p + min(frag_col(lane) + e, last) * ld + 4 * frag_row(lane), x);
    for (int j = 0; j < 4; ++j) f[j].thread_elements()[e] = x[j];
  }
#endif
}

// Four right tiles, [8 = k, 32 = n], of a matrix stored as [k, n] of which every 4th row is taken:
// k-th row at p + min(first + 4 k, last) * ld.
template <typename P>
HYDRA_FN void right_tiles(P p, int ld, int first, int last, uint lane, thread Tile* f) {
#ifdef HYDRA_CUDA
  float x[4];
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    load4(p + min(first + 4 * (frag_col(lane) + e), last) * ld + 4 * frag_row(lane), x);
#pragma unroll
    for (int j = 0; j < 4; ++j) f[j].thread_elements()[e] = x[j];
  }
#else
  left_tiles(p + min(first + 4 * frag_row(lane), last) * ld, lane, f);
#endif
}

// One 8 x 8 left tile or result in memory, columns in their natural order.
HYDRA_FN Tile left_tile(const threadgroup float* p, int ld, uint lane) {
  Tile f;
  const int at = frag_row(lane) * ld + frag_col(lane);
  f.thread_elements()[0] = p[at];
  f.thread_elements()[1] = p[at + 1];
  return f;
}

HYDRA_FN void put_tile(Tile f, threadgroup float* p, int ld, uint lane) {
  const int at = frag_row(lane) * ld + frag_col(lane);
  p[at] = f.thread_elements()[0];
  p[at + 1] = f.thread_elements()[1];
}

// One 8 x 8 right tile, stored as [k, n].
HYDRA_FN Tile right_tile(const threadgroup float* p, int ld, uint lane) {
#ifdef HYDRA_CUDA
  Tile f;
  f.thread_elements()[0] = p[frag_col(lane) * ld + frag_row(lane)];
  f.thread_elements()[1] = p[(frag_col(lane) + 1) * ld + frag_row(lane)];
  return f;
#else
  return left_tile(p, ld, lane);
#endif
}

#ifdef HYDRA_CUDA

template <bool EXACT>
HYDRA_FN uint tf32_high(float x) {
  return EXACT ? as_type<uint>(x) : tf32_(x);
}

// s[0..1] are the lane's part of rows 0 to 7 of the result, s[2..3] of rows 8 to 15.
HYDRA_FN void tensor_product(thread float* s, uint a0, uint a1, uint a2, uint a3, uint b0, uint b1) {
#ifdef HYDRA_MMA16
  mma16_(s, a0, a1, a2, a3, b0, b1);
#else
  mma_(s, a0, a2, b0, b1);
  mma_(s + 2, a1, a3, b0, b1);
#endif
}

template <bool EXACT_A, bool EXACT_B>
HYDRA_FN void accumulate_pair(thread float* s, Tile a0, Tile a1, Tile b) {
  const float x[4] = {a0.thread_elements()[0], a1.thread_elements()[0], a0.thread_elements()[1],
                      a1.thread_elements()[1]};
  const float y[2] = {b.thread_elements()[0], b.thread_elements()[1]};
  uint ah[4], bh[2];
#pragma unroll
  for (int i = 0; i < 4; ++i) ah[i] = tf32_high<EXACT_A>(x[i]);
#pragma unroll
  for (int i = 0; i < 2; ++i) bh[i] = tf32_high<EXACT_B>(y[i]);
  if (!EXACT_A) {
    uint al[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) al[i] = tf32_(x[i] - as_type<float>(ah[i]));
    tensor_product(s, al[0], al[1], al[2], al[3], bh[0], bh[1]);
  }
  if (!EXACT_B) {
    uint bl[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) bl[i] = tf32_(y[i] - as_type<float>(bh[i]));
    tensor_product(s, ah[0], ah[1], ah[2], ah[3], bl[0], bl[1]);
  }
  tensor_product(s, ah[0], ah[1], ah[2], ah[3], bh[0], bh[1]);
}

#endif

// d0 += a0 b, d1 += a1 b.
template <bool EXACT_A, bool EXACT_B>
HYDRA_FN void multiply_pair(thread Tile& d0, thread Tile& d1, Tile a0, Tile a1, Tile b) {
#ifdef HYDRA_CUDA
  float s[4] = {d0.thread_elements()[0], d0.thread_elements()[1], d1.thread_elements()[0],
                d1.thread_elements()[1]};
  accumulate_pair<EXACT_A, EXACT_B>(s, a0, a1, b);
  d0.thread_elements()[0] = s[0];
  d0.thread_elements()[1] = s[1];
  d1.thread_elements()[0] = s[2];
  d1.thread_elements()[1] = s[3];
#else
  simdgroup_multiply_accumulate(d0, a0, b, d0);
  simdgroup_multiply_accumulate(d1, a1, b, d1);
#endif
}

// The same over four tiles of k. A tensor core cuts the digits that do not fit its sum, always
// towards zero; four products at a time are summed apart, and added with rounding.
template <bool EXACT_A, bool EXACT_B>
HYDRA_FN void multiply_pairs(
    thread Tile& d0, thread Tile& d1, const thread Tile* a0, const thread Tile* a1,
    const thread Tile* b) {
#ifdef HYDRA_CUDA
  float s[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
  for (int j = 0; j < 4; ++j) accumulate_pair<EXACT_A, EXACT_B>(s, a0[j], a1[j], b[j]);
  d0.thread_elements()[0] += s[0];
  d0.thread_elements()[1] += s[1];
  d1.thread_elements()[0] += s[2];
  d1.thread_elements()[1] += s[3];
#else
#pragma unroll
  for (int j = 0; j < 4; ++j) multiply_pair<EXACT_A, EXACT_B>(d0, d1, a0[j], a1[j], b[j]);
#endif
}

// d += a b for one tile, neither operand exact.
HYDRA_FN void multiply_tile(thread Tile& d, Tile a, Tile b) {
#ifdef HYDRA_CUDA
  float s[4] = {d.thread_elements()[0], d.thread_elements()[1], 0.0f, 0.0f};
  accumulate_pair<false, false>(s, a, zero_tile(), b);
  d.thread_elements()[0] = s[0];
  d.thread_elements()[1] = s[1];
#else
  simdgroup_multiply_accumulate(d, a, b, d);
#endif
}

// acc[n] = rows of `left` times keys 8 n .. 8 n + 7, for n < tiles; [16, 8 N] in natural columns.
// row0, row1: this lane's rows of the two left tiles, at column 0. keys: row 0 of the chunk.
template <typename T, int N, int DK>
HYDRA_FN void rows_by_keys(
    const device T* row0, const device T* row1, const device T* keys, int ld, int last, int tiles,
    uint lane, thread Tile* acc0, thread Tile* acc1) {
  constexpr bool EXACT = sizeof(T) == 2;
#pragma unroll
  for (int n = 0; n < N; ++n) {
    acc0[n] = zero_tile();
    acc1[n] = zero_tile();
  }
  for (int d = 0; d < DK; d += 32) {
    Tile a0[4], a1[4], b[4];
    left_tiles(row0 + d, lane, a0);
    left_tiles(row1 + d, lane, a1);
#pragma unroll
    for (int n = 0; n < N; ++n) {
      if (n < tiles) {
        // Rows past the end of the tokens repeat the last one; their gates make them vanish.
        right_tiles_transposed(keys + min(8 * n, last) * ld + d, ld, max(last - 8 * n, 0), lane, b);
        multiply_pairs<EXACT, EXACT>(acc0[n], acc1[n], a0, a1, b);
      }
    }
  }
}
