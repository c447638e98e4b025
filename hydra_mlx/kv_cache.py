"""Keys and values of one layer's FA heads for one sequence, in full precision or in few bits.

An mlx-lm cache class by interface; mlx-lm finds it by name once hydra_mlx is registered. Keys and
values may have different numbers of bits, and are quantised as they come: no full-precision copy
of the cache ever exists. Buffers grow by a quarter, or once to what reserve() announces, where
mlx-lm's are copied whole every 256 tokens. Forks can hold what they have in common once.
"""

import copy
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import (
    BatchKVCache,
    KVCache,
    QuantizedKVCache,
    create_attention_mask,
)

from .kv_format import in_words as in_words
from .kv_format import kv_format as kv_format
from .shared_rows import SharedRows, arrays_of, joined, rows_of

BITS, GROUP_SIZES = (2, 3, 4, 5, 6, 8), (32, 64, 128)  # what mx.quantize offers
STEP = 256  # buffers are multiples of so many tokens
GROWTH = 4  # without reserve(), a buffer that is full grows by its GROWTH-th part
SHARED = 1024  # tokens that are worth sharing: fewer are copied when a fork writes


class HydraKVCache:
    """Keys and values of one sequence.

    cache = HydraKVCache(k_bits=8, v_bits=4)
    cache.reserve(prompt_tokens + max_tokens)  # or grow as needed
    keys, values = cache.update_and_fetch(keys, values)  # [B, Hk, T, D] each

    Attributes:
        shared: SharedRows that come before its own rows, in order.
        keys, values: Own buffers [B, Hk, S_alloc, D], or lists [words, scales, biases] of
            mx.quantize; None while empty. The first `own` rows mean something.
        offset: Tokens held, shared ones and own.
        k_bits, v_bits: Of a number; None for both: full precision. group_size: Numbers that share
            scale and bias.

    Raises:
        ValueError: Bits or group size that mx.quantize has not, or bits for one of the two only.
    """

    def __init__(self, k_bits: int | None = None, v_bits: int | None = None, group_size: int = 64):
        if (k_bits is None) != (v_bits is None):
            raise ValueError("Keys and values: either both are quantised or neither.")
        if k_bits is not None and not {k_bits, v_bits} <= {*BITS}:
            raise ValueError(f"{k_bits} and {v_bits} bits, expected two of {BITS}.")
        if group_size not in GROUP_SIZES:
            raise ValueError(f"Groups of {group_size}, expected one of {GROUP_SIZES}.")
        self.k_bits, self.v_bits, self.group_size = k_bits, v_bits, group_size
        self.keys = self.values = None
        self.offset = self._reserved = 0
        self.shared: tuple = ()

    @property
    def quantised(self) -> bool:
        """Whether keys and values are kept in few bits."""
        return self.k_bits is not None

    @property
    def bits(self) -> int:
        """Of keys and values, where they are alike: what mlx-lm's own attention asks for.

        Raises:
            AttributeError: They are not, or in full precision.
        """
        if not self.quantised or self.k_bits != self.v_bits:
            raise AttributeError("keys and values have no one number of bits")
        return self.k_bits

    @property
    def own(self) -> int:
        """Tokens in its own buffers."""
        return self.offset - self._in_shared

    @property
    def _in_shared(self) -> int:
        return sum(p.n for p in self.shared) if self.shared else 0

    @property
    def allocated(self) -> int:
        """Tokens its own buffers have room for."""
        return 0 if self.keys is None else arrays_of(self.keys)[0].shape[2]

    def reserve(self, tokens: int):
        """Make room for so many tokens in all, now or with the first update."""
        self._reserved = max(self._reserved, tokens)
        tokens -= self._in_shared
        if self.keys is not None and tokens > self.allocated:
            self._grow(_rounded(tokens))

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple:
        """Append T tokens; all keys and values up to them, [B, Hk, S, D] or quantised likewise.

        Shared rows are copied for it; who can do without takes append and shared_groups.
        """
        own = self.append(keys, values)
        return self.keys_and_values() if self.shared else own

    def append(self, keys: mx.array, values: mx.array) -> tuple:
        """Append T tokens; keys and values of its own rows, as update_and_fetch."""
        before = self.own
        now = before + keys.shape[2]
        if self.keys is None:
            rows = max(_rounded(now), _rounded(self._reserved - self._in_shared))
            self.keys = self._empty(keys, rows, self.k_bits)
            self.values = self._empty(values, rows, self.v_bits)
        elif now > self.allocated:
            more = self.allocated + self.allocated // GROWTH
            self._grow(_rounded(max(now, more)))
        self.offset += keys.shape[2]
        for whole, new, bits in (
            (self.keys, keys, self.k_bits),
            (self.values, values, self.v_bits),
        ):
            if bits is not None:
                new = mx.quantize(new, group_size=self.group_size, bits=bits)
            for x, y in zip(arrays_of(whole), arrays_of(new), strict=True):
                x[..., before:now, :] = y
        return rows_of(self.keys, now), rows_of(self.values, now)

    def keys_and_values(self) -> tuple:
        """What is held, without the room behind it; one copy of all where rows are shared."""
        parts, n = [p.rows() for p in self.shared], self.own
        if n or not parts:
            parts.append((rows_of(self.keys, n), rows_of(self.values, n)))
        return tuple(joined(x) for x in zip(*parts, strict=True))

    def shared_groups(self) -> list:
        """[(numbers of the rows, SharedRows in order)]; for one sequence, one or none."""
        return [([0], self.shared)] if self.shared else []

    def _empty(self, like: mx.array, rows: int, bits: int | None) -> Any:
        B, H, _, D = like.shape
        if bits is None:
            return mx.zeros((B, H, rows, D), like.dtype)
        words = mx.zeros((B, H, rows, D * bits // 32), mx.uint32)
        return [words, *(mx.zeros((B, H, rows, D // self.group_size), like.dtype) for _ in "sb")]

    def _grow(self, rows: int):
        n = self.own

        def grown(x):
            y = mx.zeros((*x.shape[:2], rows, x.shape[3]), x.dtype)
            y[..., :n, :] = x[..., :n, :]
            return y

        self.keys, self.values = (
            [grown(x) for x in whole] if isinstance(whole, Sequence) else grown(whole)
            for whole in (self.keys, self.values)
        )

    @property
    def state(self) -> tuple:
        """What a file needs: rows without room behind, and the numbers that explain them."""
        rows = self.keys_and_values() if self.offset else (None, None)
        return (*rows, self.offset, self.k_bits, self.v_bits, self.group_size)

    @state.setter
    def state(self, value: Sequence):
        self.keys, self.values, self.offset, self.k_bits, self.v_bits, self.group_size = value
        self._reserved, self.shared = 0, ()
        self.keys, self.values = (
            list(x) if isinstance(x, Sequence) else x for x in (self.keys, self.values)
        )

    @classmethod
    def from_state(cls, state: Sequence) -> "HydraKVCache":
        """The cache with this state; see `state`."""
        cache = cls()
        cache.state = state
        return cache

    @classmethod
    def of(cls, stock: Any) -> "HydraKVCache":
        """What an mlx-lm KVCache or QuantizedKVCache holds; buffers are shared until written."""
        bits = getattr(stock, "bits", None)
        cache = cls(bits, bits, getattr(stock, "group_size", 64))
        cache.keys, cache.values, cache.offset = stock.keys, stock.values, stock.offset
        return cache.fork()

    def fork(self, share: bool = False) -> "HydraKVCache":
        """A second cache of the same tokens; memory is shared until one of them writes.

        An update writes into a buffer through its Python object, so each needs objects of its own;
        what they stand for MLX copies at the first write.

        Args:
            share: From SHARED tokens on, this cache and the new one hold them together for good,
                and go on in buffers of their own. Attention then adds up in another order.
        """
        if share and self.own >= SHARED and arrays_of(self.keys)[0].shape[0] == 1:
            self.shared += (SharedRows(self.keys, self.values, self.own),)
            self.keys = self.values = None
        other = HydraKVCache(self.k_bits, self.v_bits, self.group_size)
        other.offset, other._reserved, other.shared = self.offset, self._reserved, self.shared
        if self.keys is not None:
            other.keys, other.values = (
                copy.copy(x) if isinstance(x, mx.array) else [copy.copy(y) for y in x]
                for x in (self.keys, self.values)
            )
        return other

    def as_stock(self) -> Any:
        """The same as an mlx-lm class, for files that mlx-lm reads; None if it has none for it."""
        if self.k_bits != self.v_bits:
            return None
        stock = QuantizedKVCache(self.group_size, self.k_bits) if self.quantised else KVCache()
        if self.offset:
            stock.keys, stock.values = self.keys_and_values()
        stock.offset = self.offset
        return stock

    def to_quantized(self, group_size: int = 64, bits: Any = 4) -> "HydraKVCache":
        """The same in few bits; itself if it is already.

        Args:
            bits: One number, or (of keys, of values).
        """
        if self.quantised:
            return self
        k_bits, v_bits = bits if isinstance(bits, Sequence) else (bits, bits)
        other = HydraKVCache(k_bits, v_bits, group_size)
        other.offset, other._reserved = self.offset, self._reserved
        keys, values = self.keys_and_values() if self.shared else (self.keys, self.values)
        if keys is not None:
            other.keys, other.values = (
                list(mx.quantize(x, group_size=group_size, bits=n))
                for x, n in ((keys, k_bits), (values, v_bits))
            )
        return other

    def is_trimmable(self) -> bool:
        """Tokens can be taken back."""
        return True

    def trim(self, n: int) -> int:
        """Take back the last n tokens, or all; the buffers stay. Returns how many."""
        n = min(self.offset, n)
        self.offset -= n
        left, kept = self.offset, []
        for p in self.shared:
            if left > 0:
                kept.append(p.first(min(p.n, left)))
            left -= p.n
        self.shared = tuple(kept)
        return n

    def size(self) -> int:
        """Tokens held."""
        return self.offset

    def empty(self) -> bool:
        """Whether there are no buffers yet."""
        return self.keys is None and not self.shared

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers, room for more tokens and what is shared included."""
        own = 0 if self.keys is None else SharedRows(self.keys, self.values, 0).nbytes
        return own + sum(p.nbytes for p in self.shared)

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> Any:
        """mlx-lm's mask for N new tokens."""
        return create_attention_mask(N, self.offset, return_array, window_size)

    @classmethod
    def merge(cls, caches: Sequence) -> BatchKVCache:
        """One mlx-lm batch of several sequences.

        Raises:
            ValueError: mlx-lm has no batch for keys and values in few bits, or shared with forks.
        """
        if any(c.quantised or c.shared for c in caches):
            raise ValueError("Few bits or shared keys do not support batching with history")
        return BatchKVCache.merge(caches)


def _rounded(tokens: int) -> int:
    return -(-tokens // STEP) * STEP
