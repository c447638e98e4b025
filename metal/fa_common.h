// Helpers of the softmax-attention kernels: wide loads, packed numbers, the log-length scale.
//
// A cache row is D numbers of BITS bits in 32-bit words: BITS 32 and 16 are plain floats of type C,
// BITS 8 and 4 MLX's affine integers n, whose value is scale * n + bias, one scale and bias of type
// C for every GROUP neighbours. Integers are unpacked without shifts and conversions: field j of a
// 16-bit half, masked in place and put under the exponent of 2^23, is 2^23 + n * 2^(BITS * j).
// fa_field_scale undoes the 2^(BITS * j), once for a query and once for an output.

// A score no query sees, and the running maximum before the first key; finite, so that no
// difference of two of them is NaN.
#define FA_MASKED -3.0e38f
#define FA_START -1.0e30f

// N neighbouring words in loads of up to 16 bytes; p is aligned to the load.
template <int N>
HYDRA_FN void fa_load_words(const device uint* p, thread uint* out) {
  if (N % 4 == 0) {
#pragma unroll
    for (int i = 0; i < N / 4; ++i) load_uint4(p + 4 * i, out + 4 * i);
  } else if (N % 2 == 0) {
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      const uint2 x = reinterpret_cast<const device uint2*>(p)[i];
      out[2 * i] = x.x;
      out[2 * i + 1] = x.y;
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) out[i] = p[i];
  }
}

// The floats of one word: two 16-bit ones, or one of 32 bits.
template <typename C>
HYDRA_FN void fa_split_word(uint w, thread float* x) {
  x[0] = to_float(as_type<C>(static_cast<ushort>(w & 0xffffu)));
  x[1] = to_float(as_type<C>(static_cast<ushort>(w >> 16)));
}

template <>
HYDRA_FN void fa_split_word<float>(uint w, thread float* x) {
  x[0] = as_type<float>(w);
}

// E numbers of E * BITS / 32 words; integers come multiplied by 2^(BITS * j), see above.
template <typename C, int BITS, int E>
HYDRA_FN void fa_unpack(const thread uint* w, thread float* x) {
  constexpr int PER = 32 / BITS;
  if (BITS >= 16) {
#pragma unroll
    for (int i = 0; i < E / PER; ++i) fa_split_word<C>(w[i], x + i * PER);
  } else {
    constexpr int FIELDS = BITS >= 16 ? 1 : 16 / BITS;
    constexpr uint MASK = BITS >= 16 ? 0u : (1u << (BITS % 16)) - 1u;
#pragma unroll
    for (int i = 0; i < E; ++i) {
      const int at = i % PER;
      const uint half_word = at < FIELDS ? w[i / PER] : w[i / PER] >> 16;
      const uint field = half_word & (MASK << (BITS * (at % FIELDS) % 32));
      x[i] = as_type<float>(field | 0x4b000000u) - 8388608.0f;
    }
  }
}

// What number i of fa_unpack has to be multiplied by.
template <int BITS>
HYDRA_FN float fa_field_scale(int i) {
  constexpr int FIELDS = BITS >= 16 ? 1 : 16 / BITS;
  return 1.0f / static_cast<float>(1 << (BITS * (i % FIELDS) % 32));
}

// Word i of a tile of quantised rows from row `base` on, with its scale and bias, and its numbers as
// floats in the tile. Rows from S on are zeros.
template <typename C, int BITS, int GROUP, int D>
HYDRA_FN void fa_tile_load(
    const device uint* words, const device C* scales, const device C* biases, int base, int S,
    int i, thread uint& w, thread float& scale, thread float& bias) {
  constexpr int PER = 32 / BITS, ROW = D / PER;
  const int row = base + i / ROW, at = i % ROW;
  if (row < S) {
    w = words[row * ROW + at];
    scale = to_float(scales[row * (D / GROUP) + at * PER / GROUP]);
    bias = to_float(biases[row * (D / GROUP) + at * PER / GROUP]);
  }
}

template <typename C, int BITS, int D, int LD>
HYDRA_FN void fa_tile_store(
    uint w, float scale, float bias, int base, int S, int i, threadgroup float* tile) {
  constexpr int PER = 32 / BITS, ROW = D / PER;
  const int row = i / ROW;
  threadgroup float* out = tile + row * LD + i % ROW * PER;
  float x[PER];
  if (base + row < S) {
    fa_unpack<C, BITS, PER>(&w, x);
#pragma unroll
    for (int e = 0; e < PER; ++e) out[e] = metal::fma(scale * fa_field_scale<BITS>(e), x[e], bias);
  } else {
#pragma unroll
    for (int e = 0; e < PER; ++e) out[e] = 0.0f;
  }
}

// What MLX's affine quantiser makes of a vector whose channels 32 i + lane are u[i], read back: the
// cache's rounding, for new tokens that are used before they are stored. Scales and biases are C.
template <typename C, int BITS, int GROUP, int D>
HYDRA_FN void fa_quantised(thread float* u) {
  constexpr int M = D / 32, EACH = GROUP / 32;
  constexpr float most = static_cast<float>((1u << (BITS % 32)) - 1u);
#pragma unroll
  for (int first = 0; first < M; first += EACH) {
    float low = u[first], high = 0.0f;  // MLX's maximum begins at 0
#pragma unroll
    for (int i = first; i < first + EACH; ++i) {
      low = metal::min(low, u[i]);
      high = metal::max(high, u[i]);
    }
    low = simd_min(low);
    high = simd_max(high);
    const bool side = metal::fabs(low) > metal::fabs(high);
    float step = metal::max((high - low) / most, 1e-7f);
    step = side ? step : -step;
    const float edge = side ? low : high;
    const float count = metal::round(edge / step);
    if (count != 0.0f) step = edge / count;
    const float bias = count == 0.0f ? 0.0f : edge;
    const float kept_step = to_float(from_float<C>(step)), kept_bias = to_float(from_float<C>(bias));
#pragma unroll
    for (int i = first; i < first + EACH; ++i) {
      const float n = metal::min(metal::round((u[i] - bias) / step), most);
      u[i] = metal::fma(kept_step, n, kept_bias);
    }
  }
}

// s_t = ln(t + a) / ln(a), t the absolute position; a = 0 turns it off.
HYDRA_FN float fa_log_length(int t, float a) {
  if (a == 0.0f) return 1.0f;
  const float position = static_cast<float>(t < 0 ? 0 : t);
  return metal::precise::log(position + a) / metal::precise::log(a);
}

// Lanes l, l ^ 1, l ^ this and both hold one row of an 8 x 8 simdgroup matrix.
HYDRA_FN int fa_row_neighbour() { return frag_row(8) == frag_row(0) ? 8 : 2; }
