"""Which kernels a layer would use and why not, worked out from the config: nothing is loaded.

The kernels' own predicates decide, asked with arrays that are never computed; tests compare the
answers with what layers do. Only the first-use check is left out, it needs a GPU.
"""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from .config import HydraArgs, layer_heads
from .fused import fused_rows
from .kernels import fa_decode, fa_prefill, hydra_decode, la_decode, la_prefill
from .kernels.dispatch import PLAIN_FROM
from .kernels.fa_decode import KeyValues
from .kernels.hydra_decode import HydraLayer
from .kernels.la_decode import LaLayer

DTYPES = {"F32": mx.float32, "F64": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}
NAMES = {
    "both": "hydra_decode + hydra_combine",
    "LA": "la_decode",
    "FA": "fa_decode + fa_combine",
    "delta": "la_prefill",
    "prefill FA": "fa_prefill",
}
CONTEXT = 32768  # cached keys that are asked about
PROMPT = 2048  # tokens of a prefill step


@dataclass(frozen=True)
class Path:
    """What one kind of step runs for the heads of one layer.

    Attributes:
        step: "decode" or "prefill". heads: "FA", "LA" or "FA and LA". runs: Names of kernels, or
            "operations". reason: Why.
    """

    step: str
    heads: str
    runs: str
    reason: str


@dataclass
class _Cache:
    """Stands for a KVCache or QuantizedKVCache that holds CONTEXT tokens."""

    keys: Any
    values: Any
    offset: int
    bits: int | None
    group_size: int | None


def _cache(heads: int, D: int, dtype: mx.Dtype, bits: int | None, group: int | None) -> _Cache:
    def one():
        if bits is None:
            return mx.zeros((1, heads, CONTEXT, D), dtype)
        scales = mx.zeros((1, heads, CONTEXT, D // group), dtype)
        return mx.zeros((1, heads, CONTEXT, D * bits // 32), mx.uint32), scales, scales

    return _Cache(one(), one(), CONTEXT, bits, group)


def _layers(args: HydraArgs, layer: int) -> tuple:
    """HydraLayer and LaLayer in the shapes of a layer."""
    heads, D = layer_heads(args, layer), args.head_dim
    Hl, small = len(heads.la), mx.zeros(D)
    rope = args.rope_scaling or {}
    dynamic = "dynamic" in (rope.get("type"), rope.get("rope_type"))
    why_not = "DynamicNTKScalingRoPE has no fixed frequencies" if dynamic else ""
    rows = fused_rows(args, layer)
    taps = args.la_conv_kernel
    la = LaLayer(
        Hl, D, rows.total, 0, 0, small, small, mx.zeros((3 * Hl * D, taps)) if taps else None,
        None, None, None, None, small, None, None, False, why_not if args.la_rope else "",
    )  # fmt: skip
    both = why_not if args.fa_rope or args.la_rope else ""
    hydra = HydraLayer(
        la, len(heads.kv), tuple(heads.kv_of_fa), None, None, None, args.fa_rope, small, None,
        args.fa_gate, args.fa_gate_position, both,
    )  # fmt: skip
    return hydra, la


def layer_paths(
    args: HydraArgs,
    layer: int,
    route: str,
    dtype: str = "BF16",
    kv_bits: int | None = None,
    kv_group: int | None = None,
) -> tuple:
    """Paths of one layer at B=1, over a cache of CONTEXT tokens.

    Args:
        route: "metal" or "cuda". dtype: Of the activations, safetensors name. kv_bits, kv_group: Of
            a quantised cache.
    """
    heads, D, T = layer_heads(args, layer), args.head_dim, PROMPT
    fused, kind = args.weights_form == "fused", DTYPES[dtype]
    hydra, la = _layers(args, layer)
    cache = _cache(max(len(heads.kv), 1), D, kind, kv_bits, kv_group)
    held = KeyValues.of(cache)
    x, ab = (mx.zeros((1, 1, n), kind) for n in (la.R, 2 * max(len(heads.la), 1)))
    out = []

    def note(step: str, which: str, kernels: str, verdict: tuple) -> bool:
        ok, reason = verdict
        out.append(Path(step, which, NAMES[kernels] if ok else "operations", reason))
        return ok

    def delta(step: str, tokens: int, instead: str = ""):
        q = mx.zeros((1, tokens, len(heads.la), D), kind)
        ok, reason = la_prefill.eligible(q, q, q)
        note(step, "LA", "delta", (ok, f"{reason}{instead}"))

    alone = True
    if fused and heads.fa and heads.la:
        verdict = hydra_decode.eligible(hydra, x, ab, cache)
        alone = not verdict[0]
        if not alone:
            note("decode", "FA and LA", "both", verdict)
    if alone and heads.fa:
        q = mx.zeros((1, 1, len(heads.fa), D), kind)
        verdict = fa_decode.eligible(q, held, heads.kv_of_fa)
        least = PLAIN_FROM[route]
        if verdict[0] and kv_bits is None and (least is None or held.S < least):
            verdict = False, "a plain cache: MLX's own attention"
        note("decode", "FA", "FA", verdict)
    if alone and heads.la:
        verdict = la_decode.eligible(la, x, ab) if fused else (False, "not a converted folder")
        if verdict[0]:
            note("decode", "LA", "LA", verdict)
        else:
            delta("decode", 1, f"; not la_decode: {verdict[1]}")
    if heads.fa:
        q = mx.zeros((1, T, len(heads.fa), D), kind)
        note("prefill", "FA", "prefill FA", fa_prefill.eligible(q, held, heads.kv_of_fa, "causal"))
    if heads.la:
        delta("prefill", T)
    return tuple(out)
