"""Sequences that decode together, a row each.

A sequence that leaves a batch is a CachedSequence as before, to be rolled back, forked, extended,
and put into a batch again. Rows of a batch are added up in another order than single runs, so
logits differ in their last bits, as in speculative.py. What was decoded in a batch counts as calls
of many tokens: a rollback into it replays it so, equal up to rounding; see docs/speculative.md.
What rows share as forks (CachedSequence.fork(share=True)) is held and read once for all of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.generate import generation_stream
from mlx_lm.models.cache import ArraysCache

from .batch_cache import HydraBatchCache
from .cache import CONV, STATE, own_cache
from .config import is_hydra
from .errors import UsageError
from .kv_cache import HydraKVCache
from .kv_format import in_words, kv_format
from .sequence import CachedSequence


@dataclass
class _Count:
    """Stands for keys and values where only their number is asked."""

    offset: int


class Batch:
    """Sequences that decode together.

    batch = Batch(model)
    batch.put([a, b])                       # CachedSequences of any lengths
    logits = batch.step(mx.array([5, 9]))   # [2, V]: a has read 5, b 9
    batch.take([a])                         # a is itself again

    A sequence in a batch cannot be used otherwise; it says so.

    Attributes:
        rows: The sequences, in the order of the rows.
    """

    def __init__(self, model: Any):
        self.model, self.rows = model, []
        self._cache, self._before = None, None
        self._lengths = []  # tokens of each row
        self._read = []  # arrays [B] that were read since the last change of rows
        self._tokens = []  # of each row, lists since it joined
        self._under_way = False

    def __len__(self) -> int:
        return len(self.rows)

    def put(self, sequences: Sequence):
        """Let sequences join.

        Raises:
            UsageError: One of another model, twice the same, whose cache has no batch, or that
                keeps keys and values in another form than the others.
        """
        self._mend()
        new = list(sequences)
        if not new:
            return
        for s in new:
            check_row(self.model, s)
        if len({id(s) for s in [*self.rows, *new]}) < len(self.rows) + len(new):
            raise UsageError("A sequence can be in a batch once; fork it.")
        for s in new:
            s.mend()
        check_forms([*(self._cache or ()), *(c for s in new for c in s.cache)])
        with mx.stream(generation_stream):
            merged = [_merge(c) for c in zip(*(_own(s) for s in new), strict=True)]
            for c in merged:
                if isinstance(c, ArraysCache):
                    c.left_padding = None  # merge() sets it for empty ones: a mask for ever
            if self._cache is None:
                self._cache = merged
            else:
                for old, c in zip(self._cache, merged, strict=True):
                    old.extend(c)
            mx.eval([c.state for c in self._cache])
        self._flush()
        for s in new:
            self.rows.append(s)
            self._lengths.append(len(s))
            self._tokens.append([])
            s.lend()

    def step(self, tokens: mx.array) -> mx.array:
        """One token for each row.

        Args:
            tokens: [B] ids, in the order of rows; may be lazy.

        Returns:
            [B, V] logits after them, lazy.

        Raises:
            UsageError: Another number of tokens than rows.
        """
        self._mend()
        if tokens.shape != (len(self.rows),) or not self.rows:
            raise UsageError(f"Tokens of shape {tokens.shape} for {len(self.rows)} rows.")
        self._before = [
            list(c.cache) if isinstance(c, ArraysCache) else c.size() for c in self._cache
        ]
        self._under_way = True
        with mx.stream(generation_stream):
            logits = self.model(tokens[:, None], cache=self._cache)[:, -1]
        self._under_way = False
        self._read.append(tokens)
        self._lengths = [n + 1 for n in self._lengths]
        for i, (row, n) in enumerate(zip(self.rows, self._lengths, strict=True)):
            if n % row.checkpoints.grid.every == 0:
                row.checkpoints.note(self._slots(i, n))
        return logits

    def take(self, sequences: Sequence):
        """Let sequences leave: each then holds exactly what it has read."""
        self._mend()
        leaving = [self._place(s) for s in sequences]
        if not leaving:
            return
        self._flush()
        with mx.stream(generation_stream):
            for i in leaving:
                cache = [c.extract(i) for c in self._cache]
                for c in cache:
                    if isinstance(c, ArraysCache):  # not views, which hold the whole batch
                        c.cache = [None if x is None else mx.contiguous(x) for x in c.cache]
                mx.eval([c.state for c in cache if not c.empty()])
                self.rows[i].returned(cache, self._tokens[i])
            stay = [i for i in range(len(self.rows)) if i not in leaving]
            if stay:
                for c in self._cache:
                    c.filter(mx.array(stay))
            else:
                self._cache = None
        self.rows, self._lengths, self._tokens = (
            [x[i] for i in stay] for x in (self.rows, self._lengths, self._tokens)
        )

    def _place(self, sequence: CachedSequence) -> int:
        for i, row in enumerate(self.rows):
            if row is sequence:
                return i
        raise UsageError("This sequence is not in the batch.")

    def _slots(self, i: int, n: int) -> list:
        """A stand-in for a row's cache, as Checkpoints.note reads it."""
        entries = []
        for c in self._cache:
            if isinstance(c, ArraysCache):
                one = ArraysCache(2)
                one[CONV], one[STATE] = (mx.contiguous(x[i : i + 1]) for x in c.cache)
                entries.append(one)
            else:
                entries.append(_Count(n))
        return entries

    def _flush(self):
        if self._read:
            for row, tokens in zip(
                self._tokens, mx.stack(self._read, axis=1).tolist(), strict=True
            ):
                row.extend(tokens)
            self._read = []

    def _mend(self):
        """Undo a step that was broken off."""
        if not self._under_way:
            return
        for c, before in zip(self._cache, self._before, strict=True):
            if isinstance(c, ArraysCache):
                c.cache = before
            else:
                c.trim(c.size() - before)
        self._under_way = False


def check_row(model: Any, s: CachedSequence):
    """Raise UsageError for a sequence that cannot be a row of a batch of this model."""
    if s.model is not model:
        raise UsageError("A batch is of one model; this sequence is of another.")
    if s.obstacle:
        raise UsageError(f"No batch: {s.obstacle} cannot go back.")
    odd = {type(c).__name__ for c in s.cache if not hasattr(type(c), "merge")}
    if not is_hydra(model):
        odd |= {type(c).__name__ for c in s.cache if getattr(c, "quantised", False)}
    if odd:
        raise UsageError(
            f"No batch: keys and values in few bits ({', '.join(sorted(odd))}) have none.",
            "Leave --kv-bits out, or ask one by one.",
        )


def check_forms(cache: Sequence):
    """Raise UsageError where keys and values are not all kept in one form."""
    held = (c for c in cache if not isinstance(c, ArraysCache))
    forms = list(dict.fromkeys(map(kv_format, held)))
    if len(forms) > 1:
        words = ("full precision" if f is None else f"{in_words(*f[:2])} bits" for f in forms)
        raise UsageError(f"No batch of keys and values in different forms: {', '.join(words)}.")


def _own(s: CachedSequence) -> list:
    """A sequence's cache, with HydraKVCaches where its model can use them."""
    return own_cache(list(s.cache)) if is_hydra(s.model) else s.cache


def _merge(caches: Sequence) -> Any:
    """One batch of the same entry of several sequences."""
    first = caches[0]
    kind = HydraBatchCache if isinstance(first, HydraKVCache) else type(first)
    return kind.merge(caches)
