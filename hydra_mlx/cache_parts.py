"""A cache list and its checkpoints as named arrays and plain values, and back, for cache files."""

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models import cache as stock

from .cache import as_stock
from .checkpoints import Checkpoint, Checkpoints
from .errors import CacheError
from .kv_cache import HydraKVCache
from .thinning import Calls


def kinds() -> dict:
    """{name: class} of all that a file may name: mlx-lm's cache classes, and ours."""
    found = {n: c for n, c in vars(stock).items() if isinstance(c, type)}
    found[HydraKVCache.__name__] = HydraKVCache
    return {n: c for n, c in found.items() if hasattr(c, "from_state") and n[0] != "_"}


def pack(cache: list) -> tuple:
    """A cache list as stock.save_prompt_cache would write it, without unused rows.

    Returns:
        ([(name, array), ...], class names, [[name, "scalar", "string" or "none"], ...], indices of
        entries that are a HydraKVCache under the name of the mlx-lm class that holds the same).

    Raises:
        CacheError: A class that cannot be read again.
    """
    shown = as_stock(cache)
    ours = [i for i, (a, b) in enumerate(zip(cache, shown, strict=True)) if a is not b]
    cache = shown
    odd = sorted({type(c).__name__ for c in cache if kinds().get(type(c).__name__) is not type(c)})
    if odd:
        raise CacheError(f"A cache with {', '.join(odd)} cannot be kept in a file.")
    arrays, scalars = [], []
    for name, x in tree_flatten([_state(c) for c in cache]):
        if isinstance(x, mx.array):
            arrays.append((name, x))
        elif isinstance(x, str):
            scalars.append([name, "string"])
            arrays.append((name, mx.array([ord(c) for c in x], mx.int32)))
        elif x is None:
            scalars.append([name, "none"])
            arrays.append((name, mx.zeros((0,))))
        elif isinstance(x, bool | int | float):
            scalars.append([name, "scalar"])
            arrays.append((name, mx.array(x)))
        else:
            raise CacheError(f"A cache with {type(x).__name__} in it cannot be kept in a file.")
    return arrays, [type(c).__name__ for c in cache], scalars, ours


def _state(c: Any) -> Sequence:
    if type(c) in (stock.KVCache, stock.QuantizedKVCache) and not c.empty():
        return (*c.keys_and_values(), *c.state[2:])
    return c.state


def unpack(arrays: dict, classes: Sequence, scalars: Sequence, ours: Sequence) -> list:
    """The cache list that pack was given; arrays stay lazy.

    Raises:
        CacheError, ValueError, KeyError, TypeError: Not what pack wrote.
    """
    arrays, known = dict(arrays), kinds()
    for name, kind in scalars:
        x = arrays[name]
        if kind == "string":
            arrays[name] = "".join(map(chr, x.tolist()))
        else:
            arrays[name] = None if kind == "none" else x.item()
    states = tree_unflatten(list(arrays.items()))
    odd = sorted(set(classes) - set(known))
    if odd:
        raise CacheError(f"It holds a cache of class {odd[0]}, which this version does not know.")
    cache = [known[c].from_state(s) for c, s in zip(classes, states, strict=True)]
    for i in ours:
        cache[i] = HydraKVCache.of(cache[i])
    return cache


def pack_checkpoints(points: Checkpoints) -> tuple:
    """([(name, array), ...], plain values for JSON) of checkpoints.

    Raises:
        CacheError: A rollback is under way.
    """
    if not points.settled:
        raise CacheError("The checkpoints cannot be kept in a file: a rollback was broken off.")
    arrays, held = [], []
    for i, c in enumerate(points.held):
        held.append([c.position, c.line, c.marked, [[x is not None for x in p] for p in c.slots]])
        flat = [(f"{i}.{j}.{k}", x) for j, p in enumerate(c.slots) for k, x in enumerate(p)]
        arrays += [(name, x) for name, x in flat if x is not None]
    return arrays, {
        "every": points.grid.every,
        "most": points.grid.most,
        "marks": points.marks,
        "dtype": points.dtype,
        "furthest": points.furthest,
        "end": points.calls.end,
        "runs": points.calls.runs,
        "held": held,
    }


def unpack_checkpoints(arrays: dict, values: dict, cache: list, check: Callable) -> Checkpoints:
    """The checkpoints that pack_checkpoints was given; arrays stay lazy.

    Args:
        cache: The list they lie beside. check: Called when the arrays of one have been read.

    Raises:
        UsageError, ValueError, KeyError, TypeError: Not what pack_checkpoints wrote.
    """
    points = Checkpoints(values["every"], values["most"], values["marks"], values["dtype"])
    held = []
    for i, (position, line, marked, there) in enumerate(values["held"]):
        slots = tuple(
            tuple(arrays[f"{i}.{j}.{k}"] if x else None for k, x in enumerate(pair))
            for j, pair in enumerate(there)
        )
        held.append(Checkpoint(position, line, marked, slots, check))
    points.resume(Calls.of(values["end"], values["runs"]), values["furthest"], held, cache)
    return points
