"""Sequences at rest, so that a prompt is not read twice: bounded in bytes, least recently used out.

At rest a sequence is its token ids, its checkpoints, and a chain of segments: keys and values of
some rows each. A sequence that went on from another shares that one's segments; so conversations
about one document hold the document's rows once. A sequence at work has buffers of its own, which
a step can write into.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
from mlx_lm.generate import generation_stream
from mlx_lm.models.cache import ArraysCache

from .cache import CONV, STATE
from .checkpoints import Checkpoint, Checkpoints
from .kv_cache import STEP
from .rollback import keepable
from .sequence import CachedSequence

LEAST = 16  # tokens worth keeping


@dataclass
class Segment:
    """Rows of every key/value entry of a cache.

    Attributes:
        rows: For each entry its arrays, those of keys first, [1, Hk, n, ...] each; None once they
            were moved into a sequence. n: Rows of each.
    """

    rows: list
    n: int

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return sum(x.nbytes for parts in self.rows if parts for x in parts)

    def shorten(self, n: int):
        """Give up the rows after the first n."""
        if n < self.n:
            self.rows = [[_copied(x, 0, n) for x in parts] for parts in self.rows]
            mx.eval(self.rows)
            self.n = n


@dataclass(eq=False)
class Entry:
    """A sequence at rest.

    Attributes:
        links: (number of a segment, rows used of it), in order. used: When, by the pool's clock.
        arrays: Bytes of each array of its checkpoints, by id.
    """

    tokens: list
    checkpoints: Checkpoints
    links: tuple
    used: int
    arrays: dict = field(init=False)

    def __post_init__(self):
        points = [*self.checkpoints.held, self.checkpoints.nearest(len(self.tokens))]
        arrays = [x for p in points if p for pair in p.slots for x in pair if x is not None]
        self.arrays = {id(x): x.nbytes for x in arrays}


class Pool:
    """Entries within a number of bytes.

    sequence, links = pool.take(prompt)        # with what is known of it; then read the rest
    links = pool.put(sequence, links)          # a copy at rest; the sequence goes on

    Args:
        fresh: Makes an empty CachedSequence. limit: Bytes that all entries may take.

    Attributes:
        entries: In no order. nbytes: Held, each segment and each array of a checkpoint once.
        evicted: Entries that had to go so far.
    """

    def __init__(self, fresh: Callable, limit: int):
        self.fresh, self.limit = fresh, limit
        self.entries: list = []
        self.segments: dict = {}
        self.nbytes = self.evicted = 0
        self._clock = self._made = 0

    def __len__(self) -> int:
        return len(self.entries)

    def match(self, tokens: Sequence) -> tuple:
        """(the entry that keeps most of a prompt, of equals the shortest, how much); (None, 0)."""
        found = [
            (keepable(e.checkpoints, e.tokens, tokens), -len(e.tokens), i)
            for i, e in enumerate(self.entries)
        ]
        kept, _, i = max(found, default=(0, 0, 0))
        return (self.entries[i], kept) if kept else (None, 0)

    def take(self, tokens: Sequence, room: int = 0, spare: int | None = None) -> tuple:
        """A sequence with as much of a prompt as is known.

        An entry that the prompt goes on from is moved, layer by layer. Another is copied and stays,
        if there is memory for it besides the copy.

        Args:
            tokens: Of the prompt. room: Rows to allocate at least.
            spare: Bytes that entries may hold from now on; None is the limit.

        Returns:
            (CachedSequence, links to what it shares with entries).
        """
        sequence = self.fresh()
        entry, kept = self.match(tokens)
        if spare is not None:
            self.trim(spare, entry)
        if entry is None:
            return sequence, ()
        entry.used = self._tick()
        links, gone = _cut(entry.links, kept), set()
        if kept == len(entry.tokens) or (spare is not None and self.nbytes > spare):
            self.entries.remove(entry)
            gone = {key for key, _ in links} - self._longest().keys()
        points = entry.checkpoints.fork()
        point = points.nearest(kept)
        points.cut(kept)
        self._fill(sequence.cache, links, gone, max(kept, room), point)
        new = CachedSequence(sequence.model, points, sequence.cache, entry.tokens[:kept])
        new.kv = sequence.kv
        self._settle()
        return new, links

    def put(self, sequence: CachedSequence, links: tuple = (), release: bool = False) -> tuple:
        """Keep what a sequence is now.

        Args:
            links: From take or an earlier put of this sequence.
            release: It is not used again; its buffers go layer by layer.

        Returns:
            Its new links.
        """
        sequence.mend()
        tokens = sequence.tokens
        if len(tokens) < LEAST or sequence.obstacle:
            return ()
        self.entries = [e for e in self.entries if e.tokens != tokens]
        known = ()
        for key, n in _cut(links, len(tokens)):
            if key not in self.segments or self.segments[key].n < n:
                break  # let go meanwhile
            known = (*known, (key, n))
        start = sum(n for _, n in known)
        if start < len(tokens):
            self._made += 1
            self.segments[self._made] = _segment(sequence.cache, start, len(tokens), release)
            known = (*known, (self._made, len(tokens) - start))
        self.entries.append(Entry(tokens, sequence.checkpoints.fork(), known, self._tick()))
        self._settle()
        self.trim(self.limit)
        return known

    def trim(self, nbytes: int, but: Entry | None = None):
        """Let the least recently used go, but one, until no more than so many bytes are held."""
        while self.nbytes > nbytes:
            rest = [e for e in self.entries if e is not but]
            if not rest:
                return
            self.entries.remove(min(rest, key=lambda e: e.used))
            self.evicted += 1
            self._settle()

    def _tick(self) -> int:
        self._clock += 1
        return self._clock

    def _longest(self) -> dict:
        """Rows that entries use of each segment."""
        longest: dict = {}
        for e in self.entries:
            for key, n in e.links:
                longest[key] = max(longest.get(key, 0), n)
        return longest

    def _settle(self):
        """Give up what no entry uses, and count."""
        longest = self._longest()
        self.segments = {key: s for key, s in self.segments.items() if key in longest}
        arrays: dict = {}
        for e in self.entries:
            arrays |= e.arrays
        for key, s in self.segments.items():
            s.shorten(longest[key])
        self.nbytes = sum(s.nbytes for s in self.segments.values()) + sum(arrays.values())
        mx.clear_cache()

    def _fill(self, cache: list, links: tuple, gone: set, room: int, point: Checkpoint):
        """Put rows and slots into an empty cache; rows of segments in `gone` are moved."""
        kept, i, slots = sum(n for _, n in links), 0, iter(point.slots)
        rows = (max(kept, room) // STEP + 1) * STEP  # at least one more: a copy in any case
        for c in cache:
            if isinstance(c, ArraysCache):
                c[CONV], state = next(slots)
                c[STATE] = None if state is None else state.astype(mx.float32)
                continue
            parts = [[] for _ in self.segments[links[0][0]].rows[i]]
            for key, n in links:
                for to, x in zip(parts, self.segments[key].rows[i], strict=True):
                    to.append(x[:, :, :n])
            with mx.stream(generation_stream):
                for to in parts:
                    shape = list(to[0].shape)
                    shape[2] = rows - kept
                    to.append(mx.zeros(shape, to[0].dtype))
                whole = [mx.concatenate(to, axis=2) for to in parts]
            mx.eval(whole)
            half = len(whole) // 2
            c.keys, c.values = (whole[0], whole[1]) if half == 1 else (whole[:half], whole[half:])
            c.offset = kept
            for key in gone:
                self.segments[key].rows[i] = None
            i += 1


def _cut(links: Sequence, n: int) -> tuple:
    """The first n rows of a chain."""
    out = []
    for key, used in links:
        if n > 0:
            out.append((key, min(used, n)))
        n -= used
    return tuple(out)


def _copied(x: mx.array, a: int, b: int) -> mx.array:
    """Rows a to b as an array of its own; a slice could hold on to the whole buffer."""
    with mx.stream(generation_stream):
        return mx.take(x, mx.arange(a, b), axis=2)


def _segment(cache: list, a: int, b: int, release: bool) -> Segment:
    rows = []
    for c in cache:
        if isinstance(c, ArraysCache):
            continue
        whole: list[Any] = []
        for x in (c.keys, c.values):
            whole += x if isinstance(x, list | tuple) else [x]
        rows.append([_copied(x, a, b) for x in whole])
        mx.eval(rows[-1])
        if release:
            c.keys = c.values = None
        del whole
    return Segment(rows, b - a)
