"""The flat cache of a HydraHead model: what it holds, in which order, and how big it is.

One flat list of mlx-lm's own cache classes, so that --kv-bits, saving, ragged batching and the
server work unchanged: a KVCache for every layer with FA heads, then an ArraysCache(2) (conv tail,
recurrent state) for every layer with LA heads. Layers without a kind have no entry for it. A model
without any FA head gets one KVCache for a single all-zero key, because LA heads need the position
for their rotary embedding and an ArraysCache does not count tokens.
"""

from dataclasses import dataclass

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache, KVCache, QuantizedKVCache

from .config import HydraArgs
from .sizes import kv_bytes_per_token as kv_bytes_per_token
from .sizes import state_bytes as state_bytes

CONV, STATE = 0, 1  # slots of an ArraysCache


@dataclass(frozen=True)
class CacheLayout:
    """Where each layer's entries are in the flat list; None where the layer has none.

    Attributes:
        kv: Index of each layer's KVCache. arrays: Index of each layer's ArraysCache.
        position: Index of the entry that counts tokens. length: Entries in all.
    """

    kv: tuple
    arrays: tuple
    position: int
    length: int


def cache_layout(args: HydraArgs) -> CacheLayout:
    """The flat layout for these head lists."""
    H = args.num_attention_heads
    n = 0
    kv, arrays = [], []
    for fa in args.full_attention_heads:
        kv.append(n if fa else None)
        n += bool(fa)
    position = 0
    if n == 0:
        n = 1
    for fa in args.full_attention_heads:
        arrays.append(n if len(fa) < H else None)
        n += len(fa) < H
    return CacheLayout(tuple(kv), tuple(arrays), position, n)


def make_cache(args: HydraArgs) -> list:
    """An empty cache for one sequence."""
    layout = cache_layout(args)
    first_arrays = layout.length - sum(i is not None for i in layout.arrays)
    return [KVCache() if i < first_arrays else ArraysCache(2) for i in range(layout.length)]


def tick(entry, B: int, T: int, D: int, dtype: mx.Dtype):
    """Count T tokens in the position entry of a model without FA heads."""
    zero = mx.zeros((B, 1, T, D), dtype)
    entry.update_and_fetch(zero, zero)


def cache_bytes(cache: list) -> tuple:
    """Bytes held for keys and values, and for recurrent states and conv tails."""
    kv = sum(c.nbytes for c in cache if hasattr(c, "offset") and not c.empty())
    state = sum(c.nbytes for c in cache if isinstance(c, ArraysCache))
    return kv, state


def cached_tokens(cache: list) -> int:
    """Tokens a single-sequence cache holds."""
    return int(cache[0].offset)


def quantise_cache(cache: list, bits: int, group_size: int) -> list:
    """Replace every KVCache by a QuantizedKVCache from the first token on, in place."""
    for i, c in enumerate(cache):
        if isinstance(c, KVCache):
            if c.empty():
                cache[i] = QuantizedKVCache(group_size=group_size, bits=bits)
            else:
                cache[i] = c.to_quantized(group_size=group_size, bits=bits)
    return cache


def describe(cache: list) -> str:
    """One line: how keys and values are kept, for --stats and --kv-bits."""
    kv = [c for c in cache if hasattr(c, "offset")]
    bits: int | None = next((c.bits for c in kv if hasattr(c, "bits")), None)
    n = sum(hasattr(c, "bits") for c in kv)
    if bits is None:
        return f"{len(kv)} key/value caches in full precision"
    return f"kv-bits {bits}: {n}/{len(kv)} key/value caches quantised, recurrent state float32"
