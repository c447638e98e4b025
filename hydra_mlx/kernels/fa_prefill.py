"""Causal softmax attention of many new tokens over a quantised cache: metal/fa_prefill.metal.

Keys and values are dequantised a tile at a time; neither scores nor a dequantised copy of the cache
ever exist in device memory. MLX's own fused attention serves plain caches.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import mlx.core as mx

from .cost import Cost
from .fa_decode import KeyValues, check_queries, in_bits, readers, score_floats
from .loader import Kernel, Launch, execute, table

# A tile is 8 query rows a SIMD-group: 64 rows share each dequantised tile. A lane keeps D / 4
# numbers each of q and o, 64 registers at D = 128 (ptxas for sm_90: 225 in all, no spills).
SIMDGROUPS = 8
# Keys of a tile by head dim: keys and values in float then take 17 KiB, about half of what a
# threadgroup may have.
TILE_KEYS = {64: 32, 128: 16}

KERNEL = Kernel(
    "fa_prefill",
    (
        "q", "keys", "k_scales", "k_biases", "values", "v_scales", "v_biases", "heads", "floats",
        "T", "Hf", "Hk", "S", "S_alloc", "most", "tiles", "offset",
    ),
    ("y",),
    scalars=("T", "Hf", "Hk", "S", "S_alloc", "most", "tiles", "offset"),
    headers=("fa_common.h",),
)  # fmt: skip


def eligible(q: mx.array, kv: KeyValues, kv_of_fa: tuple, mask: Any = None) -> tuple:
    """Whether the kernel can do this step: (ok, reason).

    Args:
        q: [B, T, Hf, D]. kv: The cache, new tokens included. kv_of_fa: LayerHeads.kv_of_fa.
        mask: Step.fa_mask, "causal" unless T is 1.
    """
    _, T, Hf, D = q.shape
    if not kv.quantised:
        return False, "the cache is not quantised"
    why_not = check_queries(q, kv, kv_of_fa, mask)
    if why_not:
        return False, why_not
    if kv.dims != (D, D):
        return False, f"head dims {D}, {kv.dims}: must be equal"
    if T * Hf >= 2**31 - 2**16:
        return False, f"{T} tokens"
    return True, f"cache of {in_bits(kv)}"


@lru_cache(maxsize=64)
def head_table(kv_of_fa: tuple) -> tuple:
    """Key/value heads that are read, and by whom.

    Returns:
        ((key/value head, FA heads), ...), most readers of one, and the kernel's int32 array.
    """
    heads_of = tuple(readers(kv_of_fa))
    most = max(len(heads) for _, heads in heads_of)
    flat = [n for kv, hs in heads_of for n in (kv, len(hs), *hs, *[0] * (most - len(hs)))]
    return heads_of, most, table(flat)


def launch(
    q: mx.array,
    kv: KeyValues,
    kv_of_fa: tuple,
    scale: float,
    a: float | None = None,
    offset: int | None = None,
    simdgroups: int = SIMDGROUPS,
    tile_keys: int | None = None,
) -> Launch:
    """One call.

    Args:
        q: [B, T, Hf, D], after its norm. kv: The quantised cache. kv_of_fa: As in eligible.
        scale: Of the scores, 1/sqrt(D). a: Of the log-length scale, None for off.
        offset: Position of query token 0; None for S - T.
        simdgroups, tile_keys: Instead of the tables', for sweeps.

    Returns:
        Output y [B, T, Hf, D] in the dtype of q, before gate and norm.
    """
    B, T, Hf, D = q.shape
    heads_of, most, heads = head_table(tuple(kv_of_fa))
    tiles = -(-T * most // (8 * simdgroups))
    offset = kv.S - T if offset is None else int(offset)
    return Launch(
        KERNEL,
        (
            q, *kv.parts, heads, score_floats(float(scale), float(a or 0.0)),
            T, Hf, kv.heads, kv.S, kv.allocated, most, tiles, offset,
        ),
        (
            ("X", q.dtype), ("C", kv.dtype), ("KBITS", kv.k_bits), ("VBITS", kv.v_bits),
            ("GROUP", kv.group_size), ("D", D), ("BK", tile_keys or TILE_KEYS[D]),
            ("SG", simdgroups),
        ),
        (32 * simdgroups * tiles, len(heads_of), B),
        (32 * simdgroups, 1, 1),
        (q.shape,),
        (q.dtype,),
    )  # fmt: skip


def run(
    q: mx.array,
    kv: KeyValues,
    kv_of_fa: tuple,
    scale: float,
    a: float | None = None,
    offset: int | None = None,
    route: str = "metal",
    executor: Callable | None = None,
    **options: Any,
) -> mx.array:
    """Attention of the new tokens, [B, T, Hf, D] in the dtype of q, before gate and norm.

    Args:
        q, kv, kv_of_fa, scale, a, offset: As launch. route: "metal" or "cuda". executor: Runs a
            Launch instead of the route. options: The sweepable numbers of launch.
    """
    go = executor or (lambda x: execute(x, route))
    return go(launch(q, kv, kv_of_fa, scale, a, offset, **options))[0]


def cost(call: Launch, kv_of_fa: tuple) -> Cost:
    """Work of a launch (logical bytes, as the host runtime counts).

    Every word of a tile comes with a load of its scale and bias.
    """
    t = dict(call.template)
    q = call.inputs[0]
    B, T, Hf, D = q.shape
    S = call.inputs[12]
    BK, SG, words = t["BK"], t["SG"], D * (t["KBITS"] + t["VBITS"]) // 32
    heads_of, _, _ = head_table(tuple(kv_of_fa))
    rows_of_tile, tiles = 8 * SG, call.grid[0] // (32 * SG)
    lanes = 32 * SG
    read = flops = 0
    word_bytes = 4 + 2 * t["C"].size
    for _, heads in heads_of:
        n = len(heads)
        rows = n * T
        for first in range(0, tiles * rows_of_tile, rows_of_tile):
            if first >= rows:
                read += lanes * 4  # only how many heads there are
                continue
            last = S - T + min(first + rows_of_tile - 1, rows - 1) // n + 1
            steps = -(-last // BK)
            read += min(steps * BK, S) * words * word_bytes
            read += lanes * (12 + D // 4 * q.itemsize)  # its head, and 2 * D / 8 numbers of q
            flops += 4 * steps * BK * rows_of_tile * D
    return Cost(B * read, q.nbytes, B * flops, 2 * BK * (D + 4) * 4, 1)


def composed_cost(q: mx.array, kv: KeyValues, kv_of_fa: tuple) -> Cost:
    """Work of the same step on MLX operations, each array read and written once an operation.

    mlx-lm's quantised attention: log-length scale and cast of q, then for each run of equal
    grouping quantized_matmul, a causal mask, softmax and quantized_matmul over all T x S scores.
    """
    B, T, Hf, D = q.shape
    rows, x, kept = B * T * Hf, q.itemsize, len(set(kv_of_fa))
    scores = rows * kv.S * x
    read = rows * D * (x + 4 + x) + B * kept * kv.S * kv.row_bytes + 3 * scores
    written = rows * D * (4 + x + x) + 3 * scores
    return Cost(read, written, 4 * rows * kv.S * D, 0, 2 + 5 * kept)
