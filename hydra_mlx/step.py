"""What the layers of one forward pass share, and what a layer's input projections give."""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from .kernels.dispatch import Backend


@dataclass
class Projected:
    """What the input projections give; None for a kind or a gate the layer has not.

    Shapes: q_fa [B, T, Hf, D], k_fa and v_fa [B, T, Hk, D], gate_fa [B, T, Hf, D or 1],
    qkv_la [B, T, 3*Hl*D] (q, then k, then v), gate_la [B, T, Hl, D], a and b [B, T, Hl].
    """

    q_fa: mx.array | None = None
    k_fa: mx.array | None = None
    v_fa: mx.array | None = None
    gate_fa: mx.array | None = None
    qkv_la: mx.array | None = None
    gate_la: mx.array | None = None
    a: mx.array | None = None
    b: mx.array | None = None

    def first(self, n: int) -> "Projected":
        """The LA heads' part of the first n tokens."""
        parts = {k: getattr(self, k) for k in ("qkv_la", "gate_la", "a", "b")}
        return Projected(**{k: None if x is None else x[:, :n] for k, x in parts.items()})


@dataclass
class Step:
    """What every layer of one forward pass shares.

    Attributes:
        offset: Tokens before this step, int or [B]. fa_mask: None, "causal" or an array.
        la_mask: [B, T] bool or None. backend: What runs kernels; None for operations.
        kept: Gets (mixer, its ArraysCache, its projections) of every layer with LA heads, so that
            their states can be made for fewer tokens (Mixer.advance); None keeps nothing.
    """

    offset: Any
    fa_mask: Any
    la_mask: mx.array | None
    backend: Backend | None = None
    kept: list | None = None
