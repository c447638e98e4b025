// Linear-attention heads of a layer over T <= 8 tokens in one dispatch (la_decode.h has the steps).
//
// threadgroup (b, h):
//   gates[t] = alpha, beta from a, b, A_log, dt_bias
//   la_decode_head: conv tail, SiLU, q/k norm, RoPE, L2 norm, state steps, output norm and gate
//
// inputs   x [B, T, R] X: rows of the fused projection, q|k|v of all heads from column qkv_row on,
//            the output gate from gate_row on;  ab [B, T, 2*Hl] (a, then b)
//          tail [B, TAPS-1, 3*Hl*D] X;  state [B, Hl, D, D] float;  A_log, dt_bias [Hl]
//          conv_weight [3*Hl*D, TAPS];  q_norm, k_norm, out_norm [D];  inv_freq [D/2] float
//          offset [B] or [1] int32: position of token 0;  floats [2]: eps of the q/k norm, factor
//            of RoPE's input.  What a template switches off is given any array and never read.
// scalars  T, Hl, R, qkv_row, gate_row
// outputs  y [B, T, Hl, D] X;  state_out as state;  tail_out as tail ([1] without convolution)
// template X; AB, AL, DT, CW, QN, KN, ON: dtypes of ab, A_log, dt_bias, conv_weight and the norms;
//          D 64 or 128; TAPS 0 or 4; TM most tokens (1 or 8); SG SIMD-groups of a threadgroup;
//          QK_NORM, ROPE, NEG (beta times 2), ROWS (an offset for every b) 0 or 1; NORM 0 none,
//          1 plain, 2 with weight; GATE 0 none, 1 SiLU, 2 sigmoid
// grid     (32*SG * B*Hl, 1, 1), threadgroup (32*SG, 1, 1)
threadgroup float4 qkv[TM * D];
threadgroup float gates[2 * TM];

const int head = static_cast<int>(threadgroup_position_in_grid.x);
const int b = head / Hl;
const int h = head - b * Hl;
const int N = Hl * D;

const int id = static_cast<int>(thread_index_in_threadgroup);
if (id < T) {
  const int at = (b * T + id) * 2 * Hl + h;
  gates[2 * id] = la_decay(to_float(ab[at]), to_float(A_log[h]), to_float(dt_bias[h]));
  gates[2 * id + 1] = sigmoid(to_float(ab[at + Hl])) * (NEG ? 2.0f : 1.0f);
}

la_decode_head<X, D, TAPS, TM, SG, QK_NORM, ROPE, NORM, GATE>(
    x + b * T * R + qkv_row + h * D, x + b * T * R + gate_row + h * D, R, N,
    tail + b * (TAPS - 1) * 3 * N + h * D, conv_weight + h * D * TAPS, q_norm, k_norm, out_norm,
    inv_freq, offset[ROWS ? b : 0], floats[0], floats[1], state + head * D * D,
    y + b * T * N + h * D, state_out + head * D * D, tail_out + b * (TAPS - 1) * 3 * N + h * D, T,
    reinterpret_cast<threadgroup float*>(qkv), gates, thread_index_in_simdgroup,
    simdgroup_index_in_threadgroup);

if (TAPS == 0 && head == 0 && id == 0) tail_out[0] = from_float<X>(0.0f);
