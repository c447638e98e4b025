"""In how many bits a cache keeps keys and values; nothing heavy is imported."""

from typing import Any


def kv_format(cache: Any) -> tuple | None:
    """(bits of keys, bits of values, group size) of a cache of ours or mlx-lm's; None if plain."""
    k_bits, v_bits = (getattr(cache, n, None) for n in ("k_bits", "v_bits"))
    if k_bits is None:
        k_bits = v_bits = getattr(cache, "bits", None)
    return None if k_bits is None else (k_bits, v_bits, cache.group_size)


def in_words(k_bits: int, v_bits: int) -> str:
    """As a user writes it after --kv-bits: "4", or "8,4"."""
    return str(k_bits) if k_bits == v_bits else f"{k_bits},{v_bits}"
