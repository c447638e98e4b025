"""Keys and values of one layer's FA heads for several sequences, in full precision or in few bits.

Own rows are padded on the left to the longest. What sequences share with forks (shared_rows.py)
stays where it is, is held once, and read once a step for all that share it.
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map
from mlx_lm.models.base import create_causal_mask

from .kv_cache import STEP, HydraKVCache
from .shared_rows import joined


class HydraBatchCache:
    """Rows of a batch, each of which was a HydraKVCache.

    cache = HydraBatchCache.merge(caches)
    keys, values = cache.append(keys, values)  # [B, Hk, T, D] each
    one = cache.extract(0)                     # a HydraKVCache as before

    Attributes:
        store: Own rows, a HydraKVCache of B sequences that all end at its offset. padding: Rows
            before each sequence's own. shared: SharedRows of each.
    """

    def __init__(self, store: HydraKVCache, padding: Sequence, shared: Sequence):
        self.store, self.padding, self.shared = store, list(padding), list(shared)

    @classmethod
    def merge(cls, caches: Sequence) -> "HydraBatchCache":
        """One batch of several sequences; nothing of theirs is changed.

        Raises:
            ValueError: They keep keys and values in different forms.
        """
        formats = {(c.k_bits, c.v_bits, c.quantised and c.group_size) for c in caches}
        if len(formats) > 1:
            raise ValueError("Keys and values of a batch are kept in one form.")
        blocks = [_Block((c.keys, c.values), 0, c.own) for c in caches]
        return cls(*_stacked(blocks, caches[0]), [c.shared for c in caches])

    def extend(self, other: "HydraBatchCache"):
        """Add the rows of another batch behind these."""
        blocks = [*self._blocks(), *other._blocks()]
        self.store, self.padding = _stacked(blocks, self.store)
        self.shared += other.shared

    def filter(self, keep: Any):
        """Keep some rows, in this order; numbers as a list or an array."""
        rows = [int(i) for i in (keep.tolist() if isinstance(keep, mx.array) else keep)]
        blocks = self._blocks()
        self.store, self.padding = _stacked([blocks[i] for i in rows], self.store)
        self.shared = [self.shared[i] for i in rows]

    def extract(self, i: int) -> HydraKVCache:
        """A row as a cache of its own."""
        block, old = self._blocks()[i], self.store
        one = HydraKVCache(old.k_bits, old.v_bits, old.group_size)
        one.shared = self.shared[i]
        one.offset = sum(p.n for p in one.shared) + block.n
        if block.n:
            one.keys, one.values = block.taken(mx.contiguous)
        return one

    def _blocks(self) -> list:
        whole = (self.store.keys, self.store.values)
        return [_Block(whole, i, self.store.offset, p) for i, p in enumerate(self.padding)]

    # ------------------------------------------------------------------ as the layers use it

    @property
    def offset(self) -> mx.array:
        """[B] int32: tokens that each sequence holds, shared ones and own."""
        n = self.store.offset
        held = [sum(p.n for p in s) for s in self.shared]
        return mx.array([n - p + h for p, h in zip(self.padding, held, strict=True)], mx.int32)

    @property
    def own(self) -> int:
        """Own rows, padding included."""
        return self.store.offset

    @property
    def k_bits(self) -> int | None:
        """Of a key's number; None: full precision."""
        return self.store.k_bits

    @property
    def v_bits(self) -> int | None:
        """Of a value's number."""
        return self.store.v_bits

    @property
    def group_size(self) -> int:
        """Numbers that share scale and bias."""
        return self.store.group_size

    @property
    def quantised(self) -> bool:
        """Whether keys and values are kept in few bits."""
        return self.store.quantised

    @property
    def keys(self) -> Any:
        """Own buffer or buffers, [B, Hk, S_alloc, ...]."""
        return self.store.keys

    @property
    def values(self) -> Any:
        """As keys."""
        return self.store.values

    def append(self, keys: mx.array, values: mx.array) -> tuple:
        """T tokens for each sequence; own keys and values up to them, [B, Hk, S, D]."""
        return self.store.append(keys, values)

    def shared_groups(self) -> list:
        """[(numbers of the rows, the SharedRows that they all see)]."""
        groups: dict = {}
        for i, parts in enumerate(self.shared):
            if parts:
                groups.setdefault(tuple(p.key for p in parts), ([], parts))[0].append(i)
        return list(groups.values())

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> Any:
        """Mask of own rows for N new tokens: None for one where nothing is padded."""
        if not any(self.padding) and N == 1 and not return_array:
            return None
        padding = mx.array(self.padding)
        return create_causal_mask(N, self.store.offset, window_size, left_padding=padding)

    def trim(self, n: int) -> int:
        """Take back the last n tokens of every sequence, own ones. Returns how many."""
        return self.store.trim(min(n, self.store.offset - max(self.padding)))

    def size(self) -> int:
        """As own."""
        return self.store.offset

    def empty(self) -> bool:
        """Whether there are no buffers yet."""
        return self.store.empty()

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers; what rows share counts once."""
        shared = {p.key[0]: p.nbytes for s in self.shared for p in s}
        return self.store.nbytes + sum(shared.values())

    @property
    def state(self) -> list:
        """Arrays to evaluate."""
        return [] if self.store.keys is None else [*self.store.state[:2]]


class _Block:
    """Own rows of one sequence: n of them, in row `i` of buffers, from `begin` on."""

    def __init__(self, whole: tuple, i: int, end: int, begin: int = 0):
        self.whole, self.i, self.begin, self.n = whole, i, begin, end - begin

    def taken(self, f: Any) -> list:
        """f of each array [1, Hk, n, ...], keys and values as they are kept."""
        return [tree_map(lambda x: f(self._cut(x)), y) for y in self.whole]

    def _cut(self, x: mx.array) -> mx.array:
        return x[self.i : self.i + 1, :, self.begin : self.begin + self.n]


def _stacked(blocks: list, like: HydraKVCache) -> tuple:
    """(one HydraKVCache of all blocks, padding of each)."""
    store = HydraKVCache(like.k_bits, like.v_bits, like.group_size)
    longest = max(b.n for b in blocks)
    store.offset = longest
    if longest:
        room = (longest // STEP + 1) * STEP - longest
        both = [b.taken(lambda x, p=longest - b.n: _padded(x, p, room)) for b in blocks if b.n]
        some = iter(both)
        rows = [next(some) if b.n else tree_map(mx.zeros_like, both[0]) for b in blocks]
        store.keys, store.values = (joined(x, axis=0) for x in zip(*rows, strict=True))
    return store, [longest - b.n for b in blocks]


def _padded(x: mx.array, left: int, right: int) -> mx.array:
    return mx.pad(x, [(0, 0), (0, 0), (left, right), (0, 0)])
