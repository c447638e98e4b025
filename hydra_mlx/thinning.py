"""Which checkpoints of a growing sequence are kept, and where its forward calls began.

Numbers only; the checkpoints themselves are in checkpoints.py.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Grid:
    """Which of the checkpoints at 1N, 2N, 3N, ... are kept when the sequence has `end` lines.

    Half of M is spread evenly over the whole length: multiples of 2^u lines, u the smallest with
    end // 2^u <= M/2. The other half grows denser towards the end: of each level l < u, the odd
    multiples of 2^l, the last w = (M/2) // u; where that is 0, of the M/2 highest levels the last.
    So at most M are kept. As `end` grows, u never falls and w never rises, so what is kept was
    kept before: thinning is dropping, and what is left depends on the length alone.

    Attributes:
        every: N in tokens. most: M, even, 2 or more.
    """

    every: int
    most: int

    def levels(self, end: int) -> tuple:
        """(u, w, lowest level of which any is kept)."""
        half = self.most // 2
        u = max(end, 1).bit_length()
        while u and end >> (u - 1) <= half:
            u -= 1
        return u, max(1, half // max(u, 1)), max(0, u - half)

    def keeps(self, line: int, end: int) -> bool:
        """Whether line 1..end is kept at this length."""
        u, w, lowest = self.levels(end)
        level = level_of(line)
        if level >= u:
            return True
        last = ((end >> level) - 1) // 2  # the k of the last odd multiple (2k+1) 2^l
        return level >= lowest and last - (line >> level) // 2 < w

    def bound(self, position: int, end: int, call: int = 0) -> int:
        """No more tokens than this lie between a position and the checkpoint before it.

        Proof. Write e = end // N, P = position // N and d = e - P. The last w odd multiples of 2^l
        up to e are those above e - w 2^(l+1); for the levels above the same holds further back, and
        multiples of 2^u are kept everywhere. So for lowest <= l < u every multiple of s = 2^l
        in (e - 2ws, e] is kept. Checkpoint k lies in [kN, kN + call]. Of the multiples of s whose
        checkpoint is not after the position take the last, k: then position < (k+s) N + call, and
        k > P - s if call is 0, else k > P - 2s. It is kept if d + s <= 2ws, else d + 2s <= 2ws.
        Hence at most sN + call tokens lie between for the least such s, or for s = 2^u.

        For call = 0 that is at most N max(2^lowest, min(2^u, 2d / (2w-1))), with
        2^u <= max(1, 4e / M): a part of the tail that an edit makes new anyway, or of the whole,
        whichever is less.

        Args:
            position, end: Tokens; `end` the furthest the sequence has ever reached.
            call: 0 if no call crosses a line (append makes them so), else the longest call,
                at most N.
        """
        N = self.every
        e = end // N
        u, w, level = self.levels(e)
        reach = 2 * w - (2 if call else 1)
        while level < u and e - position // N > reach << level:
            level += 1
        return (N << level) + call


def level_of(line: int) -> int:
    """How often 2 divides a line's number."""
    return (line & -line).bit_length() - 1


class Calls:
    """Where each forward call began: runs of calls of the same length, so decoding takes no room.

    Attributes:
        end: Tokens in all.
    """

    def __init__(self):
        self.end = 0
        # (start, tokens a call, ids it had beyond those that stayed...), each run up to the next;
        # the last call may be shorter, and one that took ids back is a run of its own.
        self._runs = []

    @classmethod
    def of(cls, end: int, runs: Sequence) -> "Calls":
        """The calls with these `runs`.

        Raises:
            ValueError: They are none.
        """
        calls, starts = cls(), [0, *(r[0] for r in runs[1:]), end]
        rising = all(a < b for a, b in zip(starts, starts[1:]))  # noqa: B905
        if (runs or end) and not (rising and runs[0][0] == 0 and all(r[1] > 0 for r in runs)):
            raise ValueError("runs of calls that do not follow each other")
        calls.end, calls._runs = end, [tuple(r) for r in runs]
        return calls

    @property
    def runs(self) -> list:
        """[(start, tokens a call, ids taken back...), ...]: what `of` makes the same calls from."""
        return list(self._runs)

    def add(self, n: int, rejected: Sequence = ()):
        """One more call, of n tokens that stay and some that were taken back."""
        last = self._runs[-1] if self._runs else (0, 0)
        if rejected or last[1:] != (n,) or (self.end - last[0]) % n:
            self._runs.append((self.end, n, *rejected))
        self.end += n

    def cut(self, position: int):
        """Forget what came after a position."""
        runs = [r for r in self._runs if r[0] < position]
        if runs and runs[-1][0] + runs[-1][1] > position:
            runs[-1] = runs[-1][:2]  # of a call that is cut, what it took back does not matter
        self._runs, self.end = runs, position

    def _run(self, position: int) -> tuple:
        """The last run that begins at or before a position."""
        return self._runs[bisect_right(self._runs, position, key=lambda r: r[0]) - 1]

    def begins(self, position: int) -> bool:
        """Whether one call ends and another may begin there."""
        if position in (0, self.end) or not self._runs:
            return position in (0, self.end)
        run = self._run(position)
        return (position - run[0]) % run[1] == 0

    def rejected(self, start: int) -> tuple:
        """What was taken back of the call that begins there."""
        run = self._run(start) if self._runs else (0, 0)
        return run[2:] if run[0] == start else ()

    def between(self, start: int, stop: int) -> Iterator[tuple]:
        """(from, to) of the calls from `start`, itself a beginning, the last cut at `stop`."""
        ends = [r[0] for r in self._runs[1:]] + [self.end]
        for (first, n, *_), end in zip(self._runs, ends, strict=False):
            for a in range(first + max(0, start - first) // n * n, min(end, stop), n):
                if a >= start:
                    yield a, min(a + n, end, stop)

    def copy(self) -> "Calls":
        """An independent copy."""
        other = Calls()
        other.end, other._runs = self.end, list(self._runs)
        return other
