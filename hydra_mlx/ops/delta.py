"""The gated delta rule on MLX operations: chunked (WY / UT form) and step by step.

    S_t = alpha_t S_{t-1} + beta_t (v_t - alpha_t S_{t-1} k_t) k_t^T,  o_t = S_t q_t

Inside a chunk of C tokens, with D[i, j] = alpha_{j+1} ... alpha_i for j <= i (and D[i, -1] the
decay since the chunk began) and A[i, j] = beta_i D[i, j] (k_i . k_j) for j < i:

    R = (I + A)^-1,   U = R (beta V),   W = R (beta D[:, -1] K)
    P = U - W S^T                                  the values really written, [C, Dv]
    O = D[:, -1] Q S^T + (D * Q K^T) P             outputs,  S the state before the chunk
    S <- D[C-1, -1] S + (D[C-1, :] P)^T K          the state after it

(Gated DeltaNet, arXiv 2412.06464, section 3; UT transform, arXiv 2406.06484.)

Two things keep it right where others lose digits. The inverse is built by merging blocks of
1, 2, 4, ... rows, which stays at rounding error on repeated keys with beta near 1, where Neumann
doubling explodes. And each decay is the sum of its own segment of g, never a difference of two
long sums, so a token that wipes the state (g = -inf is allowed) costs later tokens nothing.
"""

from functools import cache

import mlx.core as mx
import numpy as np

CHUNK = 64
GROUP = 32  # chunks whose products are made at once: memory grows with it, launches shrink
STEPS_AT_MOST = 4  # up to here token-by-token is the smaller graph


@cache
def _merge_masks(C: int) -> list:
    """Masks [C, C] of the lower-left blocks that the merges of b-row blocks fill, b = 1, 2, 4."""
    i, j = np.arange(C)[:, None], np.arange(C)[None]
    masks, b = [], 1
    while b < C:
        masks.append((i // (2 * b) == j // (2 * b)) & (i // b % 2 == 1) & (j // b % 2 == 0))
        b *= 2
    return [mx.array(m, mx.float32) for m in masks]


@mx.custom_function
def unit_lower_inverse(A: mx.array) -> mx.array:
    """(I + A)^-1 for a strictly lower triangular A [..., C, C], C a power of two, float32.

    Block merging: with R the inverse of the diagonal blocks so far and M the part of A that
    joins neighbours, R <- R - R M R. The gradient uses -R^T G R^T, so training keeps one matrix.
    """
    C = A.shape[-1]
    R = mx.broadcast_to(mx.eye(C, dtype=A.dtype), A.shape)
    for level, mask in enumerate(_merge_masks(C)):
        M = A * mask
        R = R - M if level == 0 else R - R @ M @ R
    return R


@unit_lower_inverse.vjp
def _unit_lower_inverse_vjp(primals, cotangent, output):
    Rt = mx.swapaxes(output, -1, -2)
    return -(Rt @ cotangent @ Rt)


def gated_delta(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    g: mx.array,
    beta: mx.array,
    state: mx.array | None = None,
    mask: mx.array | None = None,
    chunk: int = CHUNK,
) -> tuple:
    """The gated delta rule over T tokens for all LA heads of a layer.

    Args:
        q, k: [B, T, Hl, Dk], normalised and scaled by the caller. v: [B, T, Hl, Dv]. Any float.
        g: [B, T, Hl], LOG of the decay (<= 0, -inf allowed), float32.
        beta: [B, T, Hl], after the sigmoid, float32.
        state: [B, Hl, Dv, Dk] float32, or None for zeros.
        mask: [B, T] bool; a False token reads the state but does not move it.
        chunk: C, a power of two.

    Returns:
        o [B, T, Hl, Dv] in the dtype of v, and the last state [B, Hl, Dv, Dk] in float32.

    Raises:
        ValueError: Shapes disagree or chunk is not a power of two.
    """
    _check_shapes(q, k, v, g, beta, state, mask, chunk)
    B, T, Hl, Dk = q.shape
    g, beta = g.astype(mx.float32), beta.astype(mx.float32)
    if mask is not None:
        g = mx.where(mask[..., None], g, 0.0)
        beta = mx.where(mask[..., None], beta, 0.0)
    if state is None:
        state = mx.zeros((B, Hl, v.shape[-1], Dk), mx.float32)
    state = state.astype(mx.float32)
    if T <= STEPS_AT_MOST:
        return _steps(q, k, v, g, beta, state)
    return _chunked(q, k, v, g, beta, state, chunk)


def _steps(q, k, v, g, beta, S):
    """Token by token; S is [B, Hl, Dv, Dk] float32."""
    out = []
    for t in range(q.shape[1]):
        q_t, k_t = (x[:, t, :, None].astype(mx.float32) for x in (q, k))  # [B, Hl, 1, Dk]
        v_t = v[:, t, ..., None].astype(mx.float32)  # [B, Hl, Dv, 1]
        S = S * mx.exp(g[:, t])[..., None, None]
        error = v_t - (S * k_t).sum(-1, keepdims=True)
        S = S + (beta[:, t, :, None, None] * error) * k_t
        out.append((S * q_t).sum(-1))  # [B, Hl, Dv]
    return mx.stack(out, axis=1).astype(v.dtype), S


def _chunked(q, k, v, g, beta, S, C):
    T = q.shape[1]
    C = min(C, 1 << (T - 1).bit_length())
    ends = list(range(GROUP * C, T, GROUP * C))
    # Splits, not slices: the gradient of a slice is as large as what it was cut from.
    groups = zip(*(mx.split(x, ends, axis=1) for x in (q, k, v, g, beta)), strict=True)
    out = []
    for group in groups:
        o, S = _one_group(*(_in_chunks(x, C) for x in group), S)
        out.append(o[:, : group[0].shape[1]])
    o = mx.concatenate(out, axis=1) if len(out) > 1 else out[0]
    return o.astype(v.dtype), S


def _in_chunks(x, C):
    """[B, t, Hl, ...] -> [n, B, Hl, C, ...] in float32; missing tokens become zeros, which leave
    the state alone (g = 0 keeps it, beta = 0 writes nothing)."""
    x = x.astype(mx.float32)
    short = -x.shape[1] % C
    if short:
        x = mx.pad(x, [(0, 0), (0, short)] + [(0, 0)] * (x.ndim - 2))
    x = x.reshape(x.shape[0], -1, C, *x.shape[2:])
    return mx.swapaxes(mx.moveaxis(x, 1, 0), 2, 3)


def _one_group(q, k, v, g, beta, S):
    """n chunks of C tokens. q, k [n, B, Hl, C, Dk]; v [n, B, Hl, C, Dv]; g, beta [n, B, Hl, C].

    Only what needs the state goes chunk by chunk; the rest is one operation for all of them.
    Returns o [B, n*C, Hl, Dv] and the state after them.
    """
    n, B, Hl, C, _ = q.shape
    tri = mx.tri(C, C, 0, dtype=mx.float32)
    below = mx.tri(C, C, -1, dtype=mx.bool_)
    kt = mx.swapaxes(k, -1, -2)
    # Row i, column j of the cumulative sum over i holds g_{j+1} + ... + g_i.
    segments = mx.cumsum(mx.where(below, g[..., None], 0.0), axis=-2)
    D = mx.exp(segments) * tri
    since_start = mx.exp(mx.cumsum(g, axis=-1))[..., None]  # D[:, -1]
    to_end = D[..., -1, :, None]
    beta = beta[..., None]
    A = mx.where(below, (k * beta) @ kt * D, 0.0)
    R = unit_lower_inverse(A)
    # W S^T first would need U and W apart; R (beta V - beta D K S^T) is one product fewer.
    keys, decay = beta * since_start * k, since_start[..., -1:, :]
    chunks = zip(*(mx.split(x, n) for x in (R, beta * v, keys, to_end * k, decay)), strict=True)
    S, states, written = S[None], [], []
    for R_c, v_c, keys_c, k_c, decay_c in chunks:
        P = R_c @ (v_c - keys_c @ mx.swapaxes(S, -1, -2))
        states.append(S)
        written.append(P)
        S = decay_c * S + mx.swapaxes(P, -1, -2) @ k_c
    states, P = mx.concatenate(states), mx.concatenate(written)
    o = since_start * (q @ mx.swapaxes(states, -1, -2)) + (q @ kt * D) @ P
    return mx.moveaxis(mx.swapaxes(o, 2, 3), 0, 1).reshape(B, n * C, Hl, -1), S[0]


def _check_shapes(q, k, v, g, beta, state, mask, chunk):
    if q.ndim != 4 or k.shape != q.shape:
        raise ValueError(f"q and k must both be [B, T, Hl, Dk]; got {q.shape} and {k.shape}")
    B, T, Hl, Dk = q.shape
    if v.ndim != 4 or v.shape[:3] != (B, T, Hl):
        raise ValueError(f"v must be [{B}, {T}, {Hl}, Dv]; got {v.shape}")
    for name, x in (("g", g), ("beta", beta)):
        if x.shape != (B, T, Hl):
            raise ValueError(f"{name} must be {(B, T, Hl)}; got {x.shape}")
    if state is not None and state.shape != (B, Hl, v.shape[-1], Dk):
        raise ValueError(f"state must be {(B, Hl, v.shape[-1], Dk)}; got {state.shape}")
    if mask is not None and mask.shape != (B, T):
        raise ValueError(f"mask must be {(B, T)}; got {mask.shape}")
    if chunk < 1 or chunk & (chunk - 1):
        raise ValueError(f"chunk must be a power of two; got {chunk}")
    if T < 1:
        raise ValueError("q has no tokens")
