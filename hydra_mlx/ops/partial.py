"""Softmax attention in parts: over some of the keys at a time, and joined."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map

LEAST_KEYS = 256  # of a block: with fewer, rescaling what was summed so far costs as much
MASKED = -3.0e38  # a score no query sees; finite, so that no difference of two is NaN


@dataclass(frozen=True)
class Partial:
    """What attention over some of the keys adds up to, float32.

    Attributes:
        o: [B, Hq, T, D], sum of e^(s - m) v. m: [B, Hq, T, 1], largest score s, natural logarithm.
            total: [B, Hq, T, 1], sum of e^(s - m).
    """

    o: mx.array
    m: mx.array
    total: mx.array

    @property
    def result(self) -> mx.array:
        """Attention over these keys alone."""
        return self.o / self.total

    def join(self, other: "Partial") -> "Partial":
        """Over the keys of both."""
        top = mx.maximum(self.m, other.m)
        a, b = mx.exp(self.m - top), mx.exp(other.m - top)
        return Partial(self.o * a + other.o * b, top, self.total * a + other.total * b)

    def map(self, f: Callable) -> "Partial":
        """f of each array."""
        return Partial(f(self.o), f(self.m), f(self.total))


def scan(
    q: mx.array, k: Any, v: Any, scale: float, mask: Any, few: tuple | None, most: int
) -> Partial:
    """Attention that takes the keys in blocks, so that its memory does not grow with them.

    for each block: s = q k^T;  m' = max(m, s);  p = e^(s - m')
                    l = l e^(m - m') + sum p;  o = o e^(m - m') + p v

    Args:
        q: [B, Hq, T, D]. k, v: [B, Hk, S, D], Hk divides Hq, or MLX's quantised triples.
        scale: Multiplies the scores. mask: None, "causal", or a bool or additive array that
            broadcasts to [B, 1, T, S].
        few: (bits of keys, bits of values, group size) of triples.
        most: Scores, and dequantised numbers, that exist at a time; LEAST_KEYS are always taken.
    """
    B, Hq, T, D = q.shape
    Hk, S = (k[1] if few else k).shape[1:3]
    block = min(most // (B * Hq * T), most // (2 * B * Hk * D)) // 64 * 64
    block = max(block, LEAST_KEYS)
    dtype = q.dtype
    q = (q * scale).astype(dtype).reshape(B, Hk, Hq // Hk * T, D)
    at = mx.arange(S - T, S)[:, None]

    def part(x, bits, a, b, after):
        x = tree_map(lambda y: y[:, :, a:b], x)
        if after:  # MLX would begin several blocks at once, and sum up their p at the end
            x = mx.depends(list(x) if few else [x], after)
            x = x if few else x[0]
        return mx.dequantize(*x, few[2], bits).astype(dtype) if few else x

    k_bits, v_bits = few[:2] if few else (None, None)
    m = total = o = None
    for a in range(0, S, block):
        b = min(a + block, S)
        s = q @ part(k, k_bits, a, b, [o, total] if a else []).swapaxes(-1, -2)
        s = s.astype(mx.float32).reshape(B, Hk, -1, T, b - a)
        if isinstance(mask, mx.array):
            seen = mask[..., a:b]
            seen = seen[:, :, None] if seen.ndim == 4 else seen
            s = mx.where(seen, s, MASKED) if seen.dtype == mx.bool_ else s + seen
        elif mask == "causal" and b > S - T + 1:
            s = mx.where(mx.arange(a, b) <= at, s, MASKED)
        s = s.reshape(B, Hk, -1, b - a)
        top = s.max(axis=-1, keepdims=True)
        top = top if m is None else mx.maximum(m, top)
        p = mx.exp(s - top)
        y = (p.astype(dtype) @ part(v, v_bits, a, b, [s])).astype(mx.float32)
        p = p.sum(axis=-1, keepdims=True)
        if o is not None:
            shrink = mx.exp(m - top)
            p, y = total * shrink + p, o * shrink + y
        m, total, o = top, p, y
    return Partial(o, m, total).map(lambda x: x.reshape(B, Hq, T, -1))


def shared_part(
    q: mx.array, groups: Sequence, scale: float, few: tuple | None, most: int
) -> Partial:
    """Attention over keys that rows of a batch have in common, each read once for all of them.

    Args:
        q: [B, Hq, T, D]; every query sees every key. groups: (rows, parts) each: numbers of rows,
            and pairs of keys and values [1, Hk, S, D] or triples, that these rows see; a row is in
            one group at most. scale, few, most: As scan.
    """
    B, Hq, T, _ = q.shape

    def fold(rows):  # rows become tokens: [1, Hq, R * T, D]
        x = q if rows == list(range(B)) else q[mx.array(rows)]
        return x.swapaxes(0, 1).reshape(1, Hq, len(rows) * T, -1)

    def unfold(x, R):
        return x.reshape(Hq, R, T, -1).swapaxes(0, 1)

    found, order = [], []
    for rows, parts in groups:
        x, whole = fold(rows), None
        for k, v in parts:
            one = scan(x, k, v, scale, None, few, most)
            whole = one if whole is None else whole.join(one)
        found.append(tuple(unfold(y, len(rows)) for y in (whole.o, whole.m, whole.total)))
        order += rows
    return Partial(*in_order(found, order, B, (0.0, MASKED, 0.0)))


def in_order(found: list, order: list, B: int, absent: tuple) -> tuple:
    """Arrays of some rows each, as arrays of all rows.

    Args:
        found: Tuples of arrays, with a row for each number of `order`, in turn.
        absent: What each array has for rows that are not in `order`; broadcast.

    Returns:
        As many arrays, [B, ...].
    """
    rest = [b for b in range(B) if b not in order]
    if rest:
        shapes = [(len(rest), *x.shape[1:]) for x in found[0]]
        found = [*found, tuple(mx.full(s, y) for s, y in zip(shapes, absent, strict=True))]
        order = [*order, *rest]
    if len(found) == 1 and order == list(range(B)):
        return found[0]
    place = mx.array([order.index(b) for b in range(B)])
    return tuple(mx.concatenate(x, axis=0)[place] for x in zip(*found, strict=True))
