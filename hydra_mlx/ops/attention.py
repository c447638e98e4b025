"""Softmax attention of the FA heads: no position in the keys, any grouping of keys."""

import math
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map

from ..kv_format import kv_format
from .partial import scan, shared_part

# Most scores, and most dequantised numbers, that exist at a time where MLX has no fused attention:
# 2 MiB of float32, on a GPU 64, whose launches have to be worth it. A few arrays of this size are
# all that attention adds to a step's memory.
SCORES, GPU_SCORES = 2**19, 2**24
FUSED_DIMS = (64, 80, 128)  # head dims of MLX's fused attention on a GPU


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
    """Softmax attention whose memory does not grow with the keys.

    Args:
        q, k, v, scale, mask, few: As scan.

    Returns:
        [B, Hq, T, D] in the dtype of q. Arithmetic besides the products is in float32.
    """
    return scan(q, k, v, scale, mask, few, most_scores()).result.astype(q.dtype)


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
        cache: The cache that k and v came from; tells how they are quantised, and what is seen
            besides them (HydraKVCache.shared_groups).
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
    groups = cache.shared_groups() if hasattr(cache, "shared_groups") else []

    def attend(q, k, v, shared):
        if shared:
            part = scan(q, k, v, scale, mask, few, most_scores())
            part = part.join(shared_part(q, shared, scale, few, most_scores()))
            return part.result.astype(q.dtype)
        if few or not (fits or block or holds_no_scores(q)):
            return streamed_attention(q, k, v, scale, mask, few)
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)

    def of_run(x, start, n):
        return tree_map(lambda y: heads(y, start, n), x)

    parts = [
        attend(
            heads(q, q_start, n_q),
            of_run(k, kv_start, n_kv),
            of_run(v, kv_start, n_kv),
            [(rows, [of_run(p.rows(), kv_start, n_kv) for p in held]) for rows, held in groups],
        )
        for q_start, n_q, kv_start, n_kv in runs
    ]
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=1)
