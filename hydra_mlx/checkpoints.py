"""Checkpoints: recurrent states and conv tails as they were at earlier positions of a sequence.

A recurrent state cannot be cut back as keys and values can; it can be kept. `Checkpoints` is held
beside the flat cache list and keeps, every N tokens and at marked positions such as turns, the
slots of each ArraysCache. Keeping float32 is keeping a reference: a step replaces the slots of a
cache and never writes into their arrays.

It also keeps where each forward call began. Sums in another order differ in their last bits, so
replaying the same calls is what makes a return to an earlier position exact; see rollback.py.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache

from .cache import CONV, STATE, cached_tokens, state_bytes
from .config import HydraArgs
from .errors import CacheError, UsageError
from .text import size
from .thinning import Calls, Grid, level_of

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16}
FINEST = 256  # tokens; shorter calls would slow prefill more than a shorter replay saves
MOST = 4096  # where a model has no states, and a checkpoint takes nothing
MARKS = 8  # marked positions kept at most


@dataclass(frozen=True)
class Checkpoint:
    """The slots of every ArraysCache at a position.

    Attributes:
        position: Tokens read. line: Its place on the grid, None between lines. marked: Asked for.
        slots: ((conv tail, state), ...) in the order of the cache list.
        check: Of slots that come from a file: raises if it has changed under them.
    """

    position: int
    line: int | None
    marked: bool
    slots: tuple
    check: Callable | None = None

    def read(self):
        """Have the slots in memory, as they were kept.

        Raises:
            CacheError: The file they come from has changed.
        """
        mx.eval(self.slots)
        if self.check is not None:
            self.check()

    @property
    def nbytes(self) -> int:
        """Bytes of its arrays."""
        return sum(x.nbytes for pair in self.slots for x in pair if x is not None)


class Checkpoints:
    """Checkpoints of one sequence, beside its cache.

    points = Checkpoints(every=512, most=24)
    points.note(cache)              # after each forward call; mark=True at a turn boundary

    Attributes:
        grid: N and M. dtype: "float32" or "bfloat16" of the kept states; tails stay as they are.
        marks: Marked positions kept at most, the last ones. furthest: Tokens ever reached.
        calls: Where each call began.
    """

    def __init__(self, every: int = 512, most: int = 24, marks: int = MARKS, dtype="float32"):
        if every < 1 or most < 2 or most % 2 or marks < 0:
            raise UsageError(
                f"Checkpoints every {every} tokens, {most} at most and {marks} marked: expected "
                "1 or more, an even number from 2, and 0 or more."
            )
        if dtype not in DTYPES:
            raise UsageError(f"Checkpoints as {dtype!r}, expected {' or '.join(DTYPES)}.")
        self.grid, self.marks, self.dtype = Grid(every, most), marks, dtype
        self.calls = Calls()
        self.furthest = 0
        self._held = []  # by position
        # Slots after the last note, to undo a step for free; None while a rollback is under way.
        self._latest: tuple | None = ()

    @classmethod
    def within(
        cls, args: HydraArgs, budget: int, context: int | None = None, step: int = 512,
        dtype="float32", itemsize: int = 2,
    ) -> "Checkpoints":  # fmt: skip
        """Checkpoints that take at most `budget` bytes at any length.

        One is the latest state, float32. Of the others a quarter, at most MARKS, is for marks, the
        rest is M. N is `step`; where a context is given, halved down to FINEST as long as an even
        grid over so many tokens needs no thinning.

        Args:
            step: Tokens of a prefill call. itemsize: Bytes of a conv tail's number.

        Raises:
            UsageError: The budget holds fewer than 3.
        """
        one = checkpoint_bytes(args, dtype, itemsize)
        latest = checkpoint_bytes(args, "float32", itemsize)
        fit = max(0, budget - latest) // one if one else MOST
        marks = min(MARKS, fit // 4)
        most = (fit - marks) // 2 * 2
        if most < 2:
            raise UsageError(
                f"{size(budget)} for checkpoints, but one takes {size(one)}.",
                f"Give {size(latest + 2 * one)} or more, or keep them as bfloat16.",
            )
        every, even = step, most // 2
        while context and every % 2 == 0 and every // 2 >= FINEST and context <= every // 2 * even:
            every //= 2
        return cls(every, most, marks, dtype)

    @property
    def held(self) -> tuple:
        """The Checkpoints kept, by position; not the latest state."""
        return tuple(self._held)

    @property
    def settled(self) -> bool:
        """Whether the latest state is known; not while a rollback is under way."""
        return self._latest is not None

    @property
    def positions(self) -> list:
        """Where there are checkpoints, ascending; position 0 needs none."""
        return [c.position for c in self._held]

    @property
    def nbytes(self) -> int:
        """Bytes of all kept arrays, those shared with a fork or the live cache included."""
        latest = sum(x.nbytes for pair in self._latest or () for x in pair if x is not None)
        return latest + sum(c.nbytes for c in self._held)

    def most_bytes(self, model: Any, tokens: int) -> int:
        """What they may take at a length."""
        itemsize = model.model.norm.weight.dtype.size
        n = min(tokens // self.grid.every, self.grid.most) + self.marks
        one, latest = (checkpoint_bytes(model.args, d, itemsize) for d in (self.dtype, "float32"))
        return n * one + latest

    def note(self, cache: list, mark: bool = False, rejected: Sequence = ()):
        """Say that a forward call is done; keeps a checkpoint where one is due.

        Args:
            cache: The sequence's cache, noted since it was empty. mark: Keep this position,
                whether or not on the grid. rejected: Ids that the call had beyond those that the
                cache holds now (trial.py).

        Raises:
            CacheError: The cache is shorter than at the last note.
        """
        before, now, N = self.calls.end, cached_tokens(cache), self.grid.every
        if now < before:
            raise CacheError(
                f"The cache holds {now} tokens, but its checkpoints go to {before}.",
                "Use rollback to go back.",
            )
        slots = slots_of(cache)
        if now > before:
            self._latest = None  # broken off in the next lines, nothing but a replay is right
            self.calls.add(now - before, rejected)
            self.furthest = max(self.furthest, now)
        self._latest = slots
        # A call over several lines stands for the one that thinning keeps longest.
        line = max(range(before // N + 1, now // N + 1), key=level_of, default=None)
        if now == 0 or not (mark or line is not None):
            return
        if self._held and self._held[-1].position == now:
            self._held[-1] = replace(self._held[-1], marked=True)
        else:
            self._held.append(Checkpoint(now, line, mark, self._stored()))
        self._thin()

    def adopt(self, tokens: int, cache: list):
        """Begin with a cache whose calls are unknown: they count as calls of N tokens.

        Raises:
            CacheError: Something was noted before.
        """
        if self.calls.end:
            raise CacheError(f"The checkpoints go to {self.calls.end}, expected new ones.")
        for _ in range(tokens // self.grid.every):
            self.calls.add(self.grid.every)
        if tokens % self.grid.every:
            self.calls.add(tokens % self.grid.every)
        self.furthest = tokens
        self._latest = slots_of(cache)

    def _stored(self) -> tuple:
        dtype = DTYPES[self.dtype]
        kept = tuple((pair[CONV], pair[STATE].astype(dtype)) for pair in self._latest)
        mx.eval(kept)  # unevaluated, it would hold the whole graph of the call
        return kept

    def _thin(self):
        end = self.calls.end // self.grid.every
        last = [c.position for c in self._held if c.marked][-self.marks :] if self.marks else []
        kept = []
        for c in self._held:
            marked = c.position in last
            if marked or (c.line is not None and self.grid.keeps(c.line, end)):
                kept.append(replace(c, marked=marked))
        self._held = kept

    def nearest(self, position: int) -> Checkpoint | None:
        """The last one at or before a position; None for the empty cache at 0."""
        if 0 < position == self.calls.end and self._latest is not None:
            return Checkpoint(position, None, False, self._latest)
        i = bisect_right(self.positions, position)
        return self._held[i - 1] if i else None

    def cut(self, position: int):
        """Forget what came after a position."""
        self._held = self._held[: bisect_right(self.positions, position)]
        if position < self.calls.end:
            self._latest = None
            self.calls.cut(position)

    def moved(self, cache: list) -> tuple:
        """Whether any slot of a cache, and whether every one, is not that of the last note."""
        if self._latest is None:
            return True, False
        pairs = zip(slots_of(cache), self._latest, strict=True)
        moved = [a is not b for now, then in pairs for a, b in zip(now, then, strict=True)]
        return any(moved), bool(moved) and all(moved)

    def resume(self, calls: Calls, furthest: int, held: Sequence, cache: list):
        """Take up what was kept, of other checkpoints with the same grid, beside this cache.

        Raises:
            CacheError: The parts contradict each other.
        """
        at, end = [c.position for c in held], cached_tokens(cache)
        slots = slots_of(cache)
        shapes = {tuple(None if x is None else x.shape for x in p) for p in slots}
        kept = {tuple(None if x is None else x.shape for x in p) for c in held for p in c.slots}
        fits = all(len(c.slots) == len(slots) for c in held) and kept <= shapes
        if not (fits and at == sorted({*at}) and all(0 < n <= end for n in at)):
            raise CacheError("The checkpoints do not fit the cache.")
        if calls.end != end or furthest < end:
            raise CacheError(f"The checkpoints go to {calls.end}, but the cache to {end}.")
        self.calls, self.furthest, self._held = calls, furthest, list(held)
        self._latest = slots

    def bound(self, position: int, call: int = 0) -> int:
        """Grid.bound for this sequence."""
        return self.grid.bound(position, self.furthest, call)

    def fork(self) -> "Checkpoints":
        """An independent copy that shares the arrays."""
        other = Checkpoints(self.grid.every, self.grid.most, self.marks, self.dtype)
        other.calls, other.furthest = self.calls.copy(), self.furthest
        other._held, other._latest = list(self._held), self._latest
        return other


def slots_of(cache: list) -> tuple:
    """((conv tail, state), ...) of every ArraysCache, in the order of the list."""
    return tuple(tuple(c.cache) for c in cache if isinstance(c, ArraysCache))


def checkpoint_bytes(args: HydraArgs, dtype: str = "float32", itemsize: int = 2) -> int:
    """Bytes of one checkpoint; itemsize is that of a conv tail's number."""
    tails = state_bytes(args, itemsize) - state_bytes(args, 0)
    return state_bytes(args, 0) * DTYPES[dtype].size // 4 + tails
