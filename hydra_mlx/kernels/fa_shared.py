"""Attention of few tokens over keys that rows of a batch have in common, and over their own.

First passes of fa_decode.metal over each buffer; the second pass joins all of their splits as if
they were of one. Rows that share keys are heads of one call, so each key is read for up to four of
them at once.
"""

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from ..ops.partial import in_order
from . import fa_decode
from .fa_decode import CORES, KeyValues
from .loader import execute

HEADS = 32  # of one call
START = -1e30  # maximum of no scores: FA_START of fa_common.h


def parts_of(cache: Any) -> tuple:
    """(own, starts, groups) of run, of a HydraBatchCache or a HydraKVCache."""
    own = KeyValues.of(cache)
    groups = [
        (rows, [KeyValues.of_shared(p, own) for p in parts])
        for rows, parts in cache.shared_groups()
    ]
    return own, getattr(cache, "padding", None), groups


def eligible(
    q: mx.array, own: KeyValues, groups: Sequence, kv_of_fa: tuple, gate: mx.array | None
) -> tuple:
    """Whether the kernels can do this step: (ok, reason).

    Args:
        q: [B, T, Hf, D]. own: Own rows, the new tokens included. groups: As run.
        kv_of_fa: LayerHeads.kv_of_fa. gate: [B, T, Hf, Dv or 1] or None.
    """
    ok, reason = fa_decode.eligible(q, own, kv_of_fa, "causal", gate)
    for _, parts in groups:
        for part in parts:
            why_not = fa_decode.check_cache(part, len(kv_of_fa))
            if ok and (why_not or part.dims != own.dims or part.widths != own.widths):
                ok, reason = False, why_not or "shared keys are kept in another form"
    return ok, reason


def run(
    q: mx.array,
    own: KeyValues,
    starts: Sequence | None,
    groups: Sequence,
    kv_of_fa: tuple,
    scale: float,
    s: mx.array | None = None,
    gate: mx.array | None = None,
    position: str = "pre_norm",
    norm: str | None = None,
    weight: mx.array | None = None,
    route: str = "metal",
    executor: Callable | None = None,
    cores: int | None = None,
) -> mx.array:
    """Attention, gate and norm of the FA heads for at most 8 tokens of each row.

    Args:
        q: [B, T, Hf, D], after its norm. own: B rows, which end at the same key. starts: Their
            first keys. groups: [(numbers of rows, [KeyValues of one row that all of them see])].
        scale: Of the scores, 1/sqrt(D). s: [B, T] or [T] float32, the log-length scale.
        kv_of_fa, gate, position, norm, weight, route, executor: As fa_decode.run.

    Returns:
        [B, T, Hf, Dv] in the dtype of q.
    """
    go = executor or (lambda x: execute(x, route))
    how = {"cores": cores or CORES[route]}
    x = q if s is None else q.astype(mx.float32) * s[..., None, None]
    found = [go(fa_decode.launch(x, own, kv_of_fa, scale, starts=starts, **how))]
    if groups:
        found.append(_shared(x, groups, kv_of_fa, scale, go, how))
    part, stats = (mx.concatenate(y, axis=3) for y in zip(*found, strict=True))
    second = fa_decode.combine_launch(part, stats, q.dtype, gate, position, norm, weight)
    return go(second)[0]


def _shared(
    q: mx.array, groups: Sequence, kv_of_fa: tuple, scale: float, go: Callable, how: dict
) -> tuple:
    """part [B, T, Hf, splits, Dv] and stats of all groups; rows without any have weight 0."""
    B, T, Hf, D = q.shape
    found, order = [], []
    for rows, parts in groups:
        x = q if rows == list(range(B)) else q[mx.array(rows)]
        x = x.reshape(1, 1, len(rows) * T * Hf, D)
        each = [_one(x, p, kv_of_fa, scale, go, how) for p in parts]
        both = (mx.concatenate(y, axis=3) for y in zip(*each, strict=True))
        found.append([y.reshape(len(rows), T, Hf, *y.shape[3:]) for y in both])
        order += rows
    most = max(x.shape[3] for x, _ in found)
    nothing = (0.0, mx.array([START, 0.0]))
    found = [
        tuple(_filled(x, most, y) for x, y in zip(pair, nothing, strict=True)) for pair in found
    ]
    return in_order(found, order, B, nothing)


def _one(q: mx.array, kv: KeyValues, kv_of_fa: tuple, scale: float, go: Callable, how: dict) -> Any:
    """part [1, 1, rows, splits, Dv] and stats of one buffer, for rows [1, 1, n * Hf, D]."""
    Hf, n, out, splits = len(kv_of_fa), q.shape[2], [], None
    most = max(1, HEADS // Hf) * Hf
    for a in range(0, n, most):
        x = q[:, :, a : a + most]
        first = fa_decode.launch(x, kv, kv_of_fa * (x.shape[2] // Hf), scale, splits=splits, **how)
        given = dict(zip(first.kernel.inputs, first.inputs, strict=True))
        splits = given["splits"], given["split_keys"]
        out.append(go(first))
    return [mx.concatenate(y, axis=2) for y in zip(*out, strict=True)]


def _filled(x: mx.array, splits: int, nothing: Any) -> mx.array:
    """With more splits on axis 3, of what has no weight."""
    more = splits - x.shape[3]
    shape = (*x.shape[:3], more, x.shape[-1])
    return mx.concatenate([x, mx.full(shape, nothing, x.dtype)], axis=3) if more else x
