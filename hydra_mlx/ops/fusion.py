"""Scale-normalised fusion: what happens to a head's output before the output projection."""

import mlx.core as mx

from ..config import FUSION_EPS, L2_EPS


def l2_normalise(x: mx.array, scale: float = 1.0) -> mx.array:
    """scale * x / sqrt(sum(x^2) + 1e-6) over the last axis, in the dtype of x."""
    # rms_norm adds its eps to the mean, so both sum and eps are divided by D.
    D = x.shape[-1]
    y = mx.fast.rms_norm(x, None, L2_EPS / D)
    return y * (scale * D**-0.5)


def _norm(o, weight, kind):
    return o if kind is None else mx.fast.rms_norm(o, weight, FUSION_EPS)


def fa_fusion(
    o: mx.array,
    gate: mx.array | None,
    position: str,
    norm: str | None,
    weight: mx.array | None = None,
) -> mx.array:
    """Gate and norm of FA heads, without gamma.

    Args:
        o: [B, T, Hf, D]. gate: [B, T, Hf, D or 1] before the sigmoid, or None.
        position: "pre_norm" or "post_norm", where the gate multiplies.
        norm: args.fusion_norm; None does not normalise. weight: [D] or None for ones.
    """
    if gate is None:
        return _norm(o, weight, norm)
    if position == "pre_norm":
        return _norm(o * mx.sigmoid(gate), weight, norm)
    return _norm(o, weight, norm) * mx.sigmoid(gate)


def la_fusion(
    o: mx.array,
    gate: mx.array | None,
    activation: str | None,
    norm: str | None,
    weight: mx.array | None = None,
) -> mx.array:
    """Norm and output gate of LA heads, without gamma.

    Args:
        o: [B, T, Hl, D]. gate: [B, T, Hl, D] before its activation, or None.
        activation: "silu" or "sigmoid". norm, weight: as in fa_fusion.
    """
    n = _norm(o, weight, norm)
    if gate is None:
        return n
    s = mx.sigmoid(gate)
    return n * (gate * s if activation == "silu" else s)
