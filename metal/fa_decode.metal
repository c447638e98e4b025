// Softmax attention of T <= 8 tokens over a long cache, first pass: partial results by split.
//
// threadgroup (b, split, item):
//   kv, rows = work[item]              one key/value head, up to R of the query rows that read it
//   fa_decode_scan over keys split * split_keys ..., see fa_decode.h
// Query rows (head, token) of one key/value head share every load; more than R of them make several
// items, which are neighbours in the grid so that caches serve the later ones.
//
// inputs   q [B, T, Hf, DK] X, after its norm, before any scale
//          keys [B, Hk, S_alloc, DK] C, values [B, Hk, S_alloc, DV] C; or, quantised, uint words
//            [B, Hk, S_alloc, D*BITS/32] of KBITS or VBITS, with k_scales, k_biases, v_scales,
//            v_biases [B, Hk, S_alloc, D/GROUP] C (any array of 8 or more numbers when not quantised)
//          work [items * (1 + R)] int32: key/value head, then R rows t * Hf + h or -1
//          floats [2]: scale of the scores, a of the log-length scale (0: off)
//          starts [B] int32: the first key that each sequence sees, those before are padding
// scalars  T, Hf, Hk, S, S_alloc, items, splits, split_keys, offset (position of query token 0)
// outputs  part [B, T, Hf, splits, DV] float;  stats [B, T, Hf, splits, 2] float: maximum of the
//          base-2 scores, sum of 2^(score - maximum)
// template X, C; KBITS, VBITS 32, 16, 8 or 4; GROUP, 1 when not quantised; DK, DV; L, R, U, SG as
//          in fa_decode.h
// grid     (32*SG * items*splits*B, 1, 1), threadgroup (32*SG, 1, 1)
threadgroup float memory[SG * (DV + 2)];

const int index = static_cast<int>(threadgroup_position_in_grid.x);
const int item = index % items;
const int split = index / items % splits;
const int b = index / items / splits;
const device int* my_work = work + item * (1 + R);
const long head = b * Hk + my_work[0];
const int begin = split * split_keys, end = metal::min(begin + split_keys, S);
const int first = metal::max(begin, starts[b]);
const int lane = static_cast<int>(thread_index_in_simdgroup);

int row[R], limit[R];
float query[R * (DK / L)], q_sum[R];
for (int r = 0; r < R; ++r) row[r] = my_work[1 + r];
fa_decode_queries<X, KBITS, DK, L, R>(
    q + b * T * Hf * DK, row, T, Hf, S, end, floats[0], floats[1], offset, lane, query, q_sum,
    limit);

fa_decode_scan<C, KBITS, VBITS, GROUP, DK, DV, L, R, U, SG>(
    query, q_sum, limit, row,
    reinterpret_cast<const device uint*>(keys) + head * S_alloc * (DK * KBITS / 32),
    reinterpret_cast<const device C*>(k_scales) + head * S_alloc * (DK / GROUP),
    reinterpret_cast<const device C*>(k_biases) + head * S_alloc * (DK / GROUP),
    reinterpret_cast<const device uint*>(values) + head * S_alloc * (DV * VBITS / 32),
    reinterpret_cast<const device C*>(v_scales) + head * S_alloc * (DV / GROUP),
    reinterpret_cast<const device C*>(v_biases) + head * S_alloc * (DV / GROUP),
    part + b * T * Hf * splits * DV, stats + b * T * Hf * splits * 2,
    metal::min(end, S - T + 1),  // every query sees the keys below
    first, end, split, splits, memory, lane, static_cast<int>(simdgroup_index_in_threadgroup));
