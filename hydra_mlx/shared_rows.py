"""Keys and values that several caches hold together."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx


@dataclass(frozen=True, eq=False)
class SharedRows:
    """Keys and values of the first n tokens of some sequences; nobody writes into them again.

    Attributes:
        keys, values: Buffers [1, Hk, S_alloc, D], or lists [words, scales, biases]. n: Tokens.
    """

    keys: Any
    values: Any
    n: int

    def first(self, n: int) -> "SharedRows":
        """The same buffers, of which fewer tokens count."""
        return self if n == self.n else SharedRows(self.keys, self.values, n)

    def rows(self) -> tuple:
        """Keys and values of the tokens that count."""
        return rows_of(self.keys, self.n), rows_of(self.values, self.n)

    @property
    def key(self) -> tuple:
        """Equal where the tokens are the same ones in the same buffers."""
        return id(arrays_of(self.keys)[0]), self.n

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        return sum(x.nbytes for x in (*arrays_of(self.keys), *arrays_of(self.values)))


def arrays_of(whole: Any) -> Sequence:
    """The arrays of keys or values: one, or three in few bits."""
    return whole if isinstance(whole, Sequence) else (whole,)


def rows_of(whole: Any, n: int) -> Any:
    """The first n tokens of keys or values."""
    if isinstance(whole, Sequence):
        return tuple(rows_of(x, n) for x in whole)
    return whole if n == whole.shape[2] else whole[..., :n, :]


def joined(parts: Sequence, axis: int = 2) -> Any:
    """Keys (or values) of several parts, copied: one after the other, or as rows on axis 0."""
    if len(parts) == 1:
        return parts[0]
    if isinstance(parts[0], Sequence):
        return tuple(mx.concatenate(x, axis=axis) for x in zip(*parts, strict=True))
    return mx.concatenate(parts, axis=axis)
