"""The flat cache of a HydraHead model: what it holds, in which order, and how big it is.

One flat list of mlx-lm's own cache classes, so that its --kv-bits, saving, ragged batching and
server work unchanged; our programs put a HydraKVCache in the place of each KVCache, with own_cache.
A KVCache for every layer with FA heads, then an ArraysCache(2) (conv tail,
recurrent state) for every layer with LA heads. Layers without a kind have no entry for it. A model
without any FA head gets one KVCache for a single all-zero key, because LA heads need the position
for their rotary embedding and an ArraysCache does not count tokens.
"""

from dataclasses import dataclass

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache, KVCache, QuantizedKVCache

from .config import HydraArgs
from .kv_cache import HydraKVCache, in_words, kv_format
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
    append_rows(entry, zero, zero)


def append_rows(entry, keys: mx.array, values: mx.array) -> tuple:
    """Append [B, Hk, T, D] to an entry; the keys and values up to them that it holds alone.

    In mlx-lm's classes these are all. Ours keep apart what is shared: see their shared_groups.
    """
    return (entry.append if hasattr(entry, "append") else entry.update_and_fetch)(keys, values)


def cache_bytes(cache: list) -> tuple:
    """Bytes held for keys and values, and for recurrent states and conv tails."""
    kv = sum(c.nbytes for c in cache if hasattr(c, "offset") and not c.empty())
    state = sum(c.nbytes for c in cache if isinstance(c, ArraysCache))
    return kv, state


def cached_tokens(cache: list) -> int:
    """Tokens a single-sequence cache holds."""
    return int(cache[0].offset)


def own_cache(cache: list, tokens: int = 0) -> list:
    """Put a HydraKVCache in the place of each of mlx-lm's keys and values, in place.

    Args:
        tokens: Room to make, all in all; see HydraKVCache.reserve.
    """
    for i, c in enumerate(cache):
        if type(c) in (KVCache, QuantizedKVCache):
            cache[i] = HydraKVCache.of(c)
        if isinstance(cache[i], HydraKVCache):
            cache[i].reserve(tokens)
    return cache


def quantise_cache(cache: list, bits: int | tuple, group_size: int) -> list:
    """Keep keys and values in few bits from now on, in place; what is quantised stays as it is.

    Args:
        bits: One number, or (of keys, of values).
    """
    for i, c in enumerate(own_cache(cache)):
        if isinstance(c, HydraKVCache):
            cache[i] = c.to_quantized(group_size, bits)
    return cache


def as_stock(cache: list) -> list:
    """A list of mlx-lm's own classes that shares the arrays, where mlx-lm has one; for files."""
    return [(isinstance(c, HydraKVCache) and c.as_stock()) or c for c in cache]


def bytes_per_number(bits: int | None, group_size: int = 64, itemsize: int = 2) -> float:
    """Bytes of a cached number, its share of scale and bias included; bits None: itemsize."""
    return itemsize if bits is None else bits / 8 + 2 * itemsize / group_size


def mean_itemsize(cache: list, itemsize: int = 2) -> float:
    """Bytes of a number in a cache's keys and values, for kv_bytes_per_token."""
    few = next(filter(None, map(kv_format, cache)), None)
    k_bits, v_bits, group = few or (None, None, 64)
    return sum(bytes_per_number(n, group, itemsize) for n in (k_bits, v_bits)) / 2


def describe(cache: list) -> str:
    """One line: how keys and values are kept, for --stats and --kv-bits."""
    kv = [c for c in cache if hasattr(c, "offset")]
    formats = [f for f in map(kv_format, kv) if f is not None]
    if not formats:
        return f"{len(kv)} key/value caches in full precision"
    return (
        f"kv-bits {in_words(*formats[0][:2])}: {len(formats)}/{len(kv)} key/value caches "
        "quantised, recurrent state float32"
    )
