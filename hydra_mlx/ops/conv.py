"""Causal depthwise short convolution with a tail, for the q, k and v of LA heads."""

import mlx.core as mx


def short_conv(
    x: mx.array,
    weight: mx.array,
    tail: mx.array | None = None,
    mask: mx.array | None = None,
    lengths: mx.array | None = None,
) -> tuple:
    """Convolve K inputs per channel, then SiLU (spec section 1).

    Args:
        x: [B, T, N]. weight: [N, K]; the last tap is the present token.
        tail: [B, K-1, N], the inputs before x, or None for zeros.
        mask: [B, T] bool; False tokens count as zeros.
        lengths: [B], how many of the T tokens are real when the rest is padding on the right:
            the tail then ends at the last real token.

    Returns:
        silu(conv(x)) [B, T, N] in the dtype of x, and the new tail [B, K-1, N].
    """
    B, T, N = x.shape
    K = weight.shape[1]
    if mask is not None:
        x = mx.where(mask[..., None], x, mx.zeros((), x.dtype))
    if tail is None:
        tail = mx.zeros((B, K - 1, N), x.dtype)
    padded = mx.concatenate([tail.astype(x.dtype), x], axis=1)
    w = weight.astype(x.dtype)
    y = padded[:, :T] * w[:, 0]
    for j in range(1, K):
        y = y + padded[:, j : j + T] * w[:, j]
    if lengths is None:
        # A copy: a view would keep the whole step's activations alive in the cache.
        tail = mx.contiguous(padded[:, T:])
    else:
        ends = mx.clip(lengths, 0, T)
        rows = (ends[:, None] + mx.arange(K - 1))[..., None]
        tail = mx.take_along_axis(padded, rows, axis=1)
    return y * mx.sigmoid(y), tail
