"""Softmax attention of the FA heads: no position in the keys, any grouping of keys."""

import math
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map

from ..kv_format import kv_format

# Most scores, and most dequantised numbers, that exist at a time where MLX has no fused attention:
# 2 MiB of float32, on a GPU 64, whose launches have to be worth it. A few arrays of this size are
# all that attention adds to a step's memory.
SCORES, GPU_SCORES = 2**19, 2**24
LEAST_KEYS = 256  # of a block: with fewer, rescaling what was summed so far costs as much
FUSED_DIMS = (64, 80, 128)  # head dims of MLX's fused attention on a GPU
MASKED = -3.0e38  # a score no query sees; finite, so that no difference of two is NaN


def log_length_scale(offset: Any, T: int, a: float) -> mx.array:
    """s_t = ln(t + a) / ln(a) for the T positions after `offset` (spec section 1), float32.

    Args:
        offset: Tokens before these: an int, or [B] for ragged batches (rows still inside their
            left padding have negative offsets; those positions count as 0).

    Returns:
        [T] or [B, T].
    """
    t = mx.arange(T, dtype=mx.float32)
    if isinstance(offset, mx.array):
        t = offset.astype(mx.float32).reshape(-1, 1) + t
    else:
        t = t + float(offset)
    # Computed as 1 + ln(1 + t/a)/ln(a): exact at t = 0 and no cancellation at a million.
    return 1.0 + mx.log1p(mx.maximum(t, 0.0) / a) / math.log(a)


def blocked_attention(q: mx.array, k: mx.array, v: mx.array, scale: float, block: int) -> mx.array:
    """Causal attention whose gradient never holds all scores: `block` queries at a time.

    MLX's own gradient makes [T, T] scores of every head, 1 GB each at 16384 tokens.

    Args:
        q: [B, Hq, T, D]. k, v: [B, Hk, T, D], Hk divides Hq. scale: Multiplies the scores.

    Returns:
        [B, Hq, T, D].
    """
    T = q.shape[2]
    cuts = [(i, min(i + block, T)) for i in range(0, T, block)]

    def one(q, k, v):
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask="causal")

    @mx.custom_function
    def run(q, k, v):
        out = []
        for i, end in cuts:
            # MLX would start several blocks at once; each waits for the one before.
            part = mx.depends([q[:, :, i:end]], out[-1:])[0] if out else q[:, :, i:end]
            out.append(one(part, k[:, :, :end], v[:, :, :end]))
        return mx.concatenate(out, axis=2)

    @run.vjp
    def run_vjp(primals, cotangent, output):
        q, k, v = primals
        dq, dk, dv = [], mx.zeros_like(k), mx.zeros_like(v)
        for i, end in cuts:
            part = mx.depends([q[:, :, i:end]], [dk, dv, *dq[-1:]])[0]
            inputs = [part, k[:, :, :end], v[:, :, :end]]
            _, grads = mx.vjp(one, inputs, [cotangent[:, :, i:end]])
            rest = [(0, 0), (0, 0), (0, T - end), (0, 0)]
            dq.append(grads[0])
            dk, dv = dk + mx.pad(grads[1], rest), dv + mx.pad(grads[2], rest)
        return mx.concatenate(dq, axis=2), dk, dv

    return run(q, k, v)


def most_scores() -> int:
    """SCORES of the device that MLX uses."""
    return GPU_SCORES if mx.default_device().type == mx.gpu else SCORES


def holds_no_scores(q: mx.array) -> bool:
    """Whether MLX's own attention of q [B, Hq, T, D] is fused, without an array of scores."""
    on_gpu = mx.default_device().type == mx.gpu
    fits = mx.metal.is_available() or q.dtype != mx.float32  # on CUDA: cuDNN, 16-bit types
    return on_gpu and fits and q.shape[-1] in FUSED_DIMS


def streamed_attention(
    q: mx.array, k: Any, v: Any, scale: float, mask: Any = None, few: tuple | None = None
) -> mx.array:
    """Softmax attention that takes the keys in blocks, so that its memory does not grow with them.

    for each block: s = q k^T;  m' = max(m, s);  p = e^(s - m')
                    l = l e^(m - m') + sum p;  o = o e^(m - m') + p v

    Args:
        q: [B, Hq, T, D]. k, v: [B, Hk, S, D], Hk divides Hq, or MLX's quantised triples.
        scale: Multiplies the scores. mask: None, "causal", or a bool or additive array that
            broadcasts to [B, 1, T, S].
        few: (bits of keys, bits of values, group size) of triples.

    Returns:
        [B, Hq, T, D] in the dtype of q. Arithmetic besides the products is in float32.
    """
    B, Hq, T, D = q.shape
    Hk, S = (k[1] if few else k).shape[1:3]
    most = most_scores()
    block = min(most // (B * Hq * T), most // (2 * B * Hk * D)) // 64 * 64
    block = max(block, LEAST_KEYS)
    q = (q * scale).astype(q.dtype).reshape(B, Hk, Hq // Hk * T, D)
    at = mx.arange(S - T, S)[:, None]

    def part(x, bits, a, b, after):
        x = tree_map(lambda y: y[:, :, a:b], x)
        if after:  # MLX would begin several blocks at once, and sum up their p at the end
            x = mx.depends(list(x) if few else [x], after)
            x = x if few else x[0]
        return mx.dequantize(*x, few[2], bits).astype(q.dtype) if few else x

    k_bits, v_bits = few[:2] if few else (None, None)
    m = total = o = None
    for a in range(0, S, block):
        b = min(a + block, S)
        s = q @ part(k, k_bits, a, b, [o, total] if a else []).swapaxes(-1, -2)
        s = s.astype(mx.float32).reshape(B, Hk, -1, T, b - a)
        if isinstance(mask, mx.array):
            seen = mask[..., a:b]
            seen = seen[:, :, None] if seen.ndim == 4 else seen
            s = mx.where(seen, s, MASKED) if seen.dtype == mx.bool_ else s + seen
        elif mask == "causal" and b > S - T + 1:
            s = mx.where(mx.arange(a, b) <= at, s, MASKED)
        s = s.reshape(B, Hk, -1, b - a)
        top = s.max(axis=-1, keepdims=True)
        top = top if m is None else mx.maximum(m, top)
        p = mx.exp(s - top)
        y = (p.astype(q.dtype) @ part(v, v_bits, a, b, [s])).astype(mx.float32)
        p = p.sum(axis=-1, keepdims=True)
        if o is not None:
            shrink = mx.exp(m - top)
            p, y = total * shrink + p, o * shrink + y
        m, total, o = top, p, y
    return (o / total).astype(q.dtype).reshape(B, Hq, T, -1)


def ragged_attention(
    q: mx.array,
    k: Any,
    v: Any,
    runs: tuple,
    scale: float,
    mask: Any = None,
    cache: Any | None = None,
    block: int | None = None,
) -> mx.array:
    """Causal softmax attention where key/value heads may serve different numbers of FA heads.

    Args:
        q: [B, Hf, T, D]. k, v: [B, Hk, S, D], or MLX's quantised triples.
        runs: LayerHeads.runs, (q_start, n_q, kv_start, n_kv); one attention call each.
        scale: Multiplies the scores. mask: None, "causal", or a bool or additive array.
        cache: The cache that k and v came from; tells how they are quantised.
        block: For training: most queries whose scores exist at a time; causal, without a cache.

    Returns:
        [B, Hf, T, D].
    """

    def heads(x, start, n):
        whole = start == 0 and n == x.shape[1]
        return x if whole else x[:, start : start + n]

    if block is not None and cache is None and mask == "causal" and q.shape[2] > block:
        parts = [
            blocked_attention(heads(q, i, n), heads(k, j, m), heads(v, j, m), scale, block)
            for i, n, j, m in runs
        ]
        return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=1)
    few, S = kv_format(cache), (k if isinstance(k, mx.array) else k[1]).shape[2]
    fits = q.shape[0] * q.shape[1] * q.shape[2] * S <= most_scores()

    def attend(q, k, v):
        if few or not (fits or block or holds_no_scores(q)):
            return streamed_attention(q, k, v, scale, mask, few)
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)

    parts = [
        attend(
            heads(q, q_start, n_q),
            tree_map(lambda x, s=kv_start, n=n_kv: heads(x, s, n), k),
            tree_map(lambda x, s=kv_start, n=n_kv: heads(x, s, n), v),
        )
        for q_start, n_q, kv_start, n_kv in runs
    ]
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=1)
