"""Keys and values of one layer's FA heads for one sequence, in full precision or in few bits.

An mlx-lm cache class by interface; mlx-lm finds it by name once hydra_mlx is registered. Keys and
values may have different numbers of bits, and are quantised as they come: no full-precision copy
of the cache ever exists. Buffers grow by a quarter, or once to what reserve() announces, where
mlx-lm's are copied whole every 256 tokens.
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

BITS, GROUP_SIZES = (2, 3, 4, 5, 6, 8), (32, 64, 128)  # what mx.quantize offers
STEP = 256  # buffers are multiples of so many tokens
GROWTH = 4  # without reserve(), a buffer that is full grows by its GROWTH-th part


class HydraKVCache:
    """Keys and values of one sequence.

    cache = HydraKVCache(k_bits=8, v_bits=4)
    cache.reserve(prompt_tokens + max_tokens)  # or grow as needed
    keys, values = cache.update_and_fetch(keys, values)  # [B, Hk, T, D] each

    Attributes:
        keys, values: Buffers [B, Hk, S_alloc, D], or lists [words, scales, biases] of mx.quantize;
            None while empty. offset: Tokens held; rows behind them mean nothing.
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
        self.offset = 0
        self._reserved = 0

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
    def allocated(self) -> int:
        """Tokens the buffers have room for."""
        return 0 if self.keys is None else _parts(self.keys)[0].shape[2]

    def reserve(self, tokens: int):
        """Make room for so many tokens in all, now or with the first update."""
        self._reserved = max(self._reserved, tokens)
        if self.keys is not None and tokens > self.allocated:
            self._grow(_rounded(tokens))

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple:
        """Append T tokens; all keys and values up to them, [B, Hk, S, D] or quantised likewise."""
        before, now = self.offset, self.offset + keys.shape[2]
        if self.keys is None:
            rows = max(_rounded(now), _rounded(self._reserved))
            self.keys = self._empty(keys, rows, self.k_bits)
            self.values = self._empty(values, rows, self.v_bits)
        elif now > self.allocated:
            more = self.allocated + self.allocated // GROWTH
            self._grow(_rounded(max(now, more)))
        self.offset = now
        for whole, new, bits in (
            (self.keys, keys, self.k_bits),
            (self.values, values, self.v_bits),
        ):
            if bits is not None:
                new = mx.quantize(new, group_size=self.group_size, bits=bits)
            for x, y in zip(_parts(whole), _parts(new), strict=True):
                x[..., before:now, :] = y
        return self.keys_and_values()

    def keys_and_values(self) -> tuple:
        """What is held, without the room behind it."""
        return _rows(self.keys, self.offset), _rows(self.values, self.offset)

    def _empty(self, like: mx.array, rows: int, bits: int | None) -> Any:
        B, H, _, D = like.shape
        if bits is None:
            return mx.zeros((B, H, rows, D), like.dtype)
        words = mx.zeros((B, H, rows, D * bits // 32), mx.uint32)
        return [words, *(mx.zeros((B, H, rows, D // self.group_size), like.dtype) for _ in "sb")]

    def _grow(self, rows: int):
        def grown(x):
            y = mx.zeros((*x.shape[:2], rows, x.shape[3]), x.dtype)
            y[..., : self.offset, :] = x[..., : self.offset, :]
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
        self._reserved = 0
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

    def fork(self) -> "HydraKVCache":
        """A second cache of the same tokens; memory is shared until one of them writes.

        An update writes into a buffer through its Python object, so each needs objects of its own;
        what they stand for MLX copies at the first write.
        """
        other = HydraKVCache(self.k_bits, self.v_bits, self.group_size)
        other.offset, other._reserved = self.offset, self._reserved
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
        if self.keys is not None:
            other.keys, other.values = (
                list(mx.quantize(x, group_size=group_size, bits=n))
                for x, n in ((self.keys, k_bits), (self.values, v_bits))
            )
        return other

    def is_trimmable(self) -> bool:
        """Tokens can be taken back."""
        return True

    def trim(self, n: int) -> int:
        """Take back the last n tokens, or all; the buffers stay. Returns how many."""
        n = min(self.offset, n)
        self.offset -= n
        return n

    def size(self) -> int:
        """Tokens held."""
        return self.offset

    def empty(self) -> bool:
        """Whether there are no buffers yet."""
        return self.keys is None

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers, room for more tokens included."""
        if self.keys is None:
            return 0
        return sum(x.nbytes for whole in (self.keys, self.values) for x in _parts(whole))

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> Any:
        """mlx-lm's mask for N new tokens."""
        return create_attention_mask(N, self.offset, return_array, window_size)

    @classmethod
    def merge(cls, caches: Sequence) -> BatchKVCache:
        """One mlx-lm batch of several sequences.

        Raises:
            ValueError: mlx-lm has no batch for keys and values in few bits.
        """
        if any(c.quantised for c in caches):
            raise ValueError("Keys and values in few bits do not support batching with history")
        return BatchKVCache.merge(caches)


def _parts(whole: Any) -> Sequence:
    return whole if isinstance(whole, Sequence) else (whole,)


def _rows(whole: Any, n: int) -> Any:
    if isinstance(whole, Sequence):
        return tuple(_rows(x, n) for x in whole)
    return whole if n == whole.shape[2] else whole[..., :n, :]


def _rounded(tokens: int) -> int:
    return -(-tokens // STEP) * STEP
