// One linear-attention head over T <= TM tokens, from the fused projection's rows to the input of
// the output projection. la_decode.metal and hydra_decode.metal call it; its caller has filled
// `gates` and nothing else. All SG SIMD-groups of the threadgroup take part.
//
//   load the state rows of this lane into registers           (first, so that it hides behind:)
//   q, k, v of every token: conv + SiLU, q/k norm, RoPE, L2    a SIMD-group per vector -> qkv
//   shift the convolution tail
//   for t in 0 .. T-1:
//     S *= alpha;  delta = beta * (v - S k);  S += delta k^T;  o = S q   8 lanes per value row
//   store the state
//   y = norm(o) * gate                                         a SIMD-group per token
//
// Why one threadgroup for a whole head: the output norm needs all D values of o, and MSL 3.1 has no
// ordering between threadgroups, so slices of a head would cost a second dispatch. A head is 64 KiB
// of state at D = 128, all of it in flight at once as 16-byte loads; the work beside it is small.

// alpha = exp(g) of one token and head.
HYDRA_FN float la_decay(float a, float A_log, float dt_bias) {
  return metal::precise::exp(-metal::precise::exp(A_log) * softplus(a + dt_bias));
}

// Sum over the 8 lanes that share a value row.
HYDRA_FN float la_row_sum(float x) {
  x += simd_shuffle_xor(x, 1);
  x += simd_shuffle_xor(x, 2);
  return x + simd_shuffle_xor(x, 4);
}

// RoPE of a vector whose channels 32 i + lane are u[i], in the half-split form; the input is
// multiplied by `factor` first.
template <int D>
HYDRA_FN void la_rotate(
    thread float* u, const device float* inv_freq, int position, float factor, int lane) {
  constexpr int HALF = D / 64;
  const float p = static_cast<float>(position);
#pragma unroll
  for (int i = 0; i < HALF; ++i) {
    // The rounding of p * f, up to 0.03 rad at a million tokens, is put back.
    const float f = inv_freq[32 * i + lane];
    const float angle = p * f;
    const float rest = metal::fma(p, f, -angle);
    const float c0 = metal::precise::cos(angle);
    const float s0 = metal::precise::sin(angle);
    const float c1 = 1.0f - 0.5f * rest * rest;
    const float s1 = rest - rest * rest * rest * (1.0f / 6.0f);
    const float c = (c0 * c1 - s0 * s1) * factor;
    const float s = (s0 * c1 + c0 * s1) * factor;
    const float a = u[i];
    const float b = u[i + HALF];
    u[i] = a * c - b * s;
    u[i + HALF] = b * c + a * s;
  }
}

// X activations; C, Q, K, O element types of the filters and the three norm weights.
// D head dim; TAPS filter width, 4 or 0; QK_NORM, ROPE 0 or 1; NORM 0 none, 1 plain, 2 with weight;
// GATE 0 none, 1 SiLU, 2 sigmoid. Pointers stand at this head (and batch row):
//   x     q of token 0; tokens are R elements apart, k is N = Hl*D further on, v 2 N
//   gate  output gate of token 0, tokens R apart
//   tail, tail_out  [TAPS-1, 3N] at this head's q channels;  conv  [3N, TAPS] likewise
//   state, state_out  [D, D];  y  token 0, tokens N apart
//   qkv   threadgroup, 4*TM*D floats: q, k, v, o, each [TM, D];  gates  alpha, beta by token
template <
    typename X, int D, int TAPS, int TM, int SG, int QK_NORM, int ROPE, int NORM, int GATE,
    typename C, typename Q, typename K, typename O>
HYDRA_FN void la_decode_head(
    const device X* x, const device X* gate, int R, int N, const device X* tail,
    const device C* conv, const device Q* q_norm, const device K* k_norm, const device O* out_norm,
    const device float* inv_freq, int position, float rms_eps, float rope_scale,
    const device float* state, device X* y, device float* state_out, device X* tail_out, int T,
    threadgroup float* qkv, const threadgroup float* gates, uint lane_, uint group_) {
  constexpr int M = D / 32;                             // channels of a lane in a vector
  constexpr int ROUNDS = (D + 4 * SG - 1) / (4 * SG);  // value rows of a lane
  const int lane = static_cast<int>(lane_);
  const int group = static_cast<int>(group_);
  const int part = lane & 7;
  const int n_tokens = TM == 1 ? 1 : T;
  threadgroup float* out = qkv + 3 * TM * D;

  // Row (r*SG + group)*4 + lane/8, columns 32 i + 4 part .. + 3.
  float S[ROUNDS][D / 8];
#pragma unroll
  for (int r = 0; r < ROUNDS; ++r) {
    const int row = (r * SG + group) * 4 + (lane >> 3);
    if (row < D) {
#pragma unroll
      for (int i = 0; i < M; ++i) load4(state + row * D + 32 * i + 4 * part, S[r] + 4 * i);
    }
  }

  for (int task = group; task < 3 * n_tokens; task += SG) {
    const int t = task / 3;
    const int kind = task - 3 * t;  // q, k, v
    float u[M];
#pragma unroll
    for (int i = 0; i < M; ++i) {
      const int channel = kind * N + 32 * i + lane;
      if (TAPS == 0) {
        u[i] = to_float(x[t * R + channel]);
      } else {
        float w[4];
        load4(conv + channel * 4, w);
        float sum = 0.0f;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int at = t + j - 3;
          const float before = at < 0 ? to_float(tail[(t + j) * 3 * N + channel])
                                      : to_float(x[at * R + channel]);
          sum += before * w[j];
        }
        u[i] = silu(sum);
      }
    }
    if (kind < 2) {
      if (QK_NORM) {
        float square = 0.0f;
#pragma unroll
        for (int i = 0; i < M; ++i) square += u[i] * u[i];
        const float inverse = metal::precise::rsqrt(simd_sum(square) / D + rms_eps);
#pragma unroll
        for (int i = 0; i < M; ++i) {
          const int c = 32 * i + lane;
          u[i] *= inverse * (kind == 0 ? to_float(q_norm[c]) : to_float(k_norm[c]));
        }
      }
      if (ROPE) la_rotate<D>(u, inv_freq, position + t, rope_scale, lane);
      float square = 0.0f;
#pragma unroll
      for (int i = 0; i < M; ++i) square += u[i] * u[i];
      float inverse = metal::precise::rsqrt(simd_sum(square) + 1e-6f);
      if (kind == 0) inverse *= metal::precise::rsqrt(static_cast<float>(D));
#pragma unroll
      for (int i = 0; i < M; ++i) u[i] *= inverse;
    }
#pragma unroll
    for (int i = 0; i < M; ++i) qkv[(kind * TM + t) * D + 32 * i + lane] = u[i];
  }

  // Row j of the new tail is row T + j of [tail, x].
  if (TAPS > 1) {
    for (int task = group; task < 3 * (TAPS - 1); task += SG) {
      const int j = task / 3;
      const int at = n_tokens + j - (TAPS - 1);
      const int first = (task - 3 * j) * N + lane;
#pragma unroll
      for (int i = 0; i < M; ++i) {
        const int channel = first + 32 * i;
        tail_out[j * 3 * N + channel] =
            at < 0 ? tail[(n_tokens + j) * 3 * N + channel] : x[at * R + channel];
      }
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  for (int t = 0; t < n_tokens; ++t) {
    const float alpha = gates[2 * t];
    const float beta = gates[2 * t + 1];
    float q[D / 8];
    float k[D / 8];
#pragma unroll
    for (int i = 0; i < M; ++i) {
      load4(qkv + t * D + 32 * i + 4 * part, q + 4 * i);
      load4(qkv + (TM + t) * D + 32 * i + 4 * part, k + 4 * i);
    }
#pragma unroll
    for (int r = 0; r < ROUNDS; ++r) {
      const int row = (r * SG + group) * 4 + (lane >> 3);
      if (row < D) {  // the same for a whole SIMD-group: D is a multiple of 4
        float dot = 0.0f;
#pragma unroll
        for (int i = 0; i < D / 8; ++i) {
          S[r][i] *= alpha;
          dot += S[r][i] * k[i];
        }
        const float delta = beta * (qkv[(2 * TM + t) * D + row] - la_row_sum(dot));
        float o = 0.0f;
#pragma unroll
        for (int i = 0; i < D / 8; ++i) {
          S[r][i] += delta * k[i];
          o += S[r][i] * q[i];
        }
        o = la_row_sum(o);
        if (part == 0) out[t * D + row] = o;
      }
    }
  }

#pragma unroll
  for (int r = 0; r < ROUNDS; ++r) {
    const int row = (r * SG + group) * 4 + (lane >> 3);
    if (row < D) {
#pragma unroll
      for (int i = 0; i < M; ++i) store4(state_out + row * D + 32 * i + 4 * part, S[r] + 4 * i);
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  for (int t = group; t < n_tokens; t += SG) {
    float n[M];
    float square = 0.0f;
#pragma unroll
    for (int i = 0; i < M; ++i) {
      n[i] = out[t * D + 32 * i + lane];
      square += n[i] * n[i];
    }
    const float inverse = NORM ? metal::precise::rsqrt(simd_sum(square) / D + 1e-6f) : 1.0f;
#pragma unroll
    for (int i = 0; i < M; ++i) {
      const int c = 32 * i + lane;
      float z = n[i] * inverse;
      if (NORM == 2) z *= to_float(out_norm[c]);
      if (GATE == 1) z *= silu(to_float(gate[t * R + c]));
      if (GATE == 2) z *= sigmoid(to_float(gate[t * R + c]));
      y[t * N + c] = from_float<X>(z);
    }
  }
}
