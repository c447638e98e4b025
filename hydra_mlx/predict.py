"""Floor of a decode step on Apple's chips: bytes that must move over the bandwidth there is.

A token cannot be faster than reading every weight once, the keys and values of the whole context
once, and the recurrent state once and writing it back. Nothing here was measured on those chips.
"""

from dataclasses import dataclass

from .config import HydraArgs
from .layouts import model_shapes
from .quantise import QuantPlan
from .sizes import kv_bytes_per_token, state_bytes

# Memory bandwidth in GB/s as Apple states it (largest configuration of each chip), and float32
# GPU TFLOP/s where Apple or its GPU core count and clock give one; None where no figure was found.
CHIPS = {
    "M1": (68, 2.6),
    "M1 Pro": (200, 5.2),
    "M1 Max": (400, 10.4),
    "M1 Ultra": (800, 20.8),
    "M2": (100, 3.6),
    "M2 Pro": (200, 6.8),
    "M2 Max": (400, 13.6),
    "M2 Ultra": (800, 27.2),
    "M3": (100, 4.1),
    "M3 Pro": (150, 7.4),
    "M3 Max": (400, 16.4),
    "M3 Ultra": (819, 32.8),
    "M4": (120, 4.6),
    "M4 Pro": (273, 9.2),
    "M4 Max": (546, 18.4),
    "M5": (153, None),
    "M5 Pro": (307, None),
    "M5 Max": (614, None),
}
CONTEXTS = {"4K": 4096, "32K": 32768, "128K": 131072, "512K": 524288, "1M": 1048576}
# Bytes of a cached value: bfloat16; 4 bits with a bfloat16 scale and bias for 64 values.
CACHES = {"bf16": 2.0, "4-bit": 0.5625}

# Qwen3-1.7B's sizes.
BASE_17B = {
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
    "rope_theta": 1e6,
    "weights_form": "fused",
}
# Each FA head on a key/value head of its own: the most that a ratio can keep.
RATIOS = {
    "3:1": [0, 4, 8, 12],
    "7:1": [0, 8],
    "full": list(range(16)),
}


def geometry(ratio: str) -> HydraArgs:
    """HydraHead-1.7B with the head map of a ratio; "full" is the base model itself."""
    heads = [RATIOS[ratio]] * BASE_17B["num_hidden_layers"]
    plain = {"fa_rope": True, "fa_logit_scale": None, "fa_gate": None, "fusion_norm": None}
    extra = {**plain, "fusion_scale": False} if ratio == "full" else {}
    return HydraArgs(**BASE_17B, full_attention_heads=heads, **extra)


@dataclass(frozen=True)
class Floor:
    """Bytes a decode step must move, and the operations it must do.

    Attributes:
        weights, kv, state: Bytes; state counts reading and writing. flops: Multiply-adds as two.
    """

    weights: int
    kv: int
    state: int
    flops: int

    @property
    def nbytes(self) -> int:
        """All of them."""
        return self.weights + self.kv + self.state

    def milliseconds(self, bandwidth: float, tflops: float | None) -> float:
        """The larger of moving the bytes (GB/s) and doing the arithmetic (TFLOP/s)."""
        move = self.nbytes / bandwidth / 1e6
        return max(move, self.flops / tflops / 1e9) if tflops else move


def weight_bytes(args: HydraArgs, bits: int = 4, group: int = 64) -> int:
    """Bytes of all weights a token reads: affine quantised matrices, 16-bit scales and the rest.

    The embedding counts when it is the output head too.
    """
    plan = QuantPlan(bits, group, "affine", None, (), args.num_hidden_layers)
    total = 0
    for name, shape in model_shapes(args).items():
        size = 1
        for n in shape:
            size *= n
        stem = name.removesuffix(".weight")
        packed = len(shape) == 2 and plan.params(stem, shape[1]) is not None
        if stem.endswith("embed_tokens") and not args.tie_word_embeddings:
            continue
        total += size * bits // 8 + size // group * 4 if packed else 2 * size
    return total


def floor(args: HydraArgs, context: int, cache_bytes: float) -> Floor:
    """Floor of one decode step at B=1.

    Args:
        context: Tokens in the cache. cache_bytes: Bytes of a cached value, see CACHES.
    """
    D, H = args.head_dim, args.num_attention_heads
    shapes = model_shapes(args).values()
    products = sum(2 * s[0] * s[1] for s in shapes if len(s) == 2)
    fa = sum(len(h) for h in args.full_attention_heads)
    la = args.num_hidden_layers * H - fa
    return Floor(
        weight_bytes(args),
        int(context * kv_bytes_per_token(args, cache_bytes)),
        2 * state_bytes(args),
        products + 4 * fa * context * D + 7 * la * D * D,
    )
