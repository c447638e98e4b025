"""Going back: a cache returned to an earlier position of what it has read.

Keys and values are cut, states and conv tails come from the nearest checkpoint, and the tokens
between are read again. How exact that is:

- With float32 checkpoints and exact=True, a rollback replays the very calls of the original run
  from a checkpoint, which lies at the beginning of a call, and cuts the last one at the position.
  Every key, value, tail and state is then bit for bit that of a fresh run with the same calls, on
  the same kernels. No call is ever split inside, so the chunks of 64 tokens of ops.gated_delta
  fall where they fell. A call of which tokens were taken back (trial.py) is replayed with them.
- reuse() goes back to a checkpoint and replays nothing. append() ends its calls at multiples of
  its step, whatever position it starts from, so reuse() to a multiple and append() give bit for
  bit the cache of a fresh append() of the new tokens. Checkpoints on the grid are multiples.
- Otherwise the replayed part is cut differently, or its state was rounded to bfloat16:
  see docs/cache.md for what that was measured to be.
"""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map
from mlx_lm.models.cache import ArraysCache, KVCache, QuantizedKVCache, make_prompt_cache

from .cache import CONV, STATE
from .checkpoints import Checkpoint, Checkpoints, slots_of
from .config import is_hydra
from .errors import CacheError, UsageError
from .kv_cache import HydraKVCache, kv_format
from .trial import Trial

KINDS = (HydraKVCache, KVCache, QuantizedKVCache, ArraysCache)  # what can go back
BLOCK = 4096  # ids compared at a time


def obstacle(model: Any, cache: list) -> str:
    """Why the cache of this model can only be extended; empty where it can go back."""
    odd = sorted({type(c).__name__ for c in cache if type(c) not in KINDS})
    if odd:
        return f"a cache with {', '.join(odd)}"
    states = any(isinstance(c, ArraysCache) for c in cache)
    if states and not is_hydra(model):
        return f"the states of {type(model).__module__.rsplit('.', 1)[-1]}"
    return ""


def call_ends(start: int, stop: int, step: int | None, every: int) -> Iterator[tuple]:
    """(from, to) of the calls that read from `start` to `stop`.

    They end at multiples of `step` (None is `every`) and of `every`, whatever the start.

    Raises:
        UsageError: step is below 1.
    """
    step = every if step is None else step
    if step < 1:
        raise UsageError(f"step is {step}, expected 1 or more.")
    a = start
    while a < stop:
        b = min((a // step + 1) * step, (a // every + 1) * every, stop)
        yield a, b
        a = b


def append(
    model: Any,
    cache: list,
    checkpoints: Checkpoints,
    tokens: Sequence,
    step: int | None = None,
    mark: bool = False,
) -> mx.array | None:
    """Read more tokens, in calls that end at multiples of `step` and at the grid's lines.

    Args:
        cache: From model.make_cache(), extended in place. tokens: Ids [T].
        step: Tokens a call at most; None is the grid's distance. mark: Keep a checkpoint at the
            end, a turn boundary.

    Returns:
        Logits [1, V] after the last token; None for no tokens.

    Raises:
        CacheError, UsageError: As rollback, or step is below 1.
    """
    start = _offsets(model, cache)[1]
    if start != checkpoints.calls.end:
        raise CacheError(
            f"The cache holds {start} tokens, but its checkpoints end at {checkpoints.calls.end}.",
            "Call note after each forward call.",
        )
    ids, logits = _ids(tokens), None
    stop = start + len(ids)
    for a, b in call_ends(start, stop, step, checkpoints.grid.every):
        h = _forward(model, cache, ids[a - start : b - start])
        if b == stop:
            logits = (model.head(h[:, -1:]) if is_hydra(model) else h)[:, -1]
        checkpoints.note(cache, mark and b == stop)
    if start == stop and mark:
        checkpoints.note(cache, True)
    return logits


def rollback(
    model: Any,
    cache: list,
    checkpoints: Checkpoints,
    tokens: Sequence,
    position: int,
    exact: bool = True,
) -> int:
    """Return a cache to what it was after `position` tokens, in place.

    Calls after the last note, whole or broken off, are undone too. Going back to the last note
    itself replays nothing.

    Args:
        tokens: Ids of all that the cache has read, or at least the first `position`.
        exact: Replay the original calls, one token at a time where it was decoded that way. False
            replays in calls as long as the grid's distance: faster there, equal up to rounding.

    Returns:
        Tokens replayed; at most checkpoints.bound(position) before the call.

    Raises:
        UsageError: The position is beyond the end, or tokens are too few.
        CacheError: A batch, another model's cache, or one that the checkpoints do not belong to.
            Nothing is changed then.
    """
    least, most = _offsets(model, cache)
    end = checkpoints.calls.end
    if least < end:
        raise CacheError(
            f"The cache holds {least} tokens, but its checkpoints go to {end}.",
            "They belong to another cache, or it was trimmed without them.",
        )
    if not 0 <= position <= end:
        raise UsageError(f"Position {position} is outside the {end} tokens that were read.")
    if len(tokens) < position:
        raise UsageError(f"{len(tokens)} token ids, expected at least {position} to go back there.")
    if most == end:
        some, every = checkpoints.moved(cache) if end else (not _stateless(cache), False)
        if every:
            raise CacheError("The checkpoints belong to another cache: none of its states is here.")
        if position == end and not some:
            return 0
    return _go_back(model, cache, checkpoints, tokens, position, exact)


def undo(model: Any, cache: list, checkpoints: Checkpoints, tokens: Sequence):
    """Return a cache to the last note, for nothing unless a rollback itself was broken off.

    For a caller that knows the checkpoints are of this cache: rollback cannot tell another cache
    from one whose every state has moved, but whose offsets have not.

    Args:
        tokens: As in rollback.
    """
    _go_back(model, cache, checkpoints, tokens, checkpoints.calls.end, True)


def _go_back(
    model: Any,
    cache: list,
    checkpoints: Checkpoints,
    tokens: Sequence,
    position: int,
    exact: bool,
) -> int:
    point = checkpoints.nearest(position)
    start = 0 if point is None else point.position
    if point is not None:
        point.read()
    if exact:
        calls = checkpoints.calls
        # What the last call rejected does not matter where it is cut.
        plan = [
            (a, b, calls.rejected(a) if calls.begins(b) else ())
            for a, b in calls.between(start, position)
        ]
    else:
        N = checkpoints.grid.every
        plan = [(a, min(a + N, position), ()) for a in range(start, position, N)]
    checkpoints.cut(start)  # first: whatever breaks off what follows, a rollback can mend it
    _restore(cache, point, start)
    ids = _ids(tokens[start:position])
    for a, b, rejected in plan:
        if rejected:
            Trial(model, cache, [*tokens[a:b], *rejected]).keep(b - a)
            mx.eval([c.state for c in cache])
        else:
            _forward(model, cache, ids[a - start : b - start])
        checkpoints.note(cache, rejected=rejected)
    checkpoints.note(cache)
    return position - start


def common_prefix(tokens: Sequence, cached_tokens: Sequence) -> int:
    """How many ids two sequences begin with alike."""
    n = min(len(tokens), len(cached_tokens))
    for i in range(0, n, BLOCK):
        a, b = (np.asarray(x[i : min(i + BLOCK, n)], np.int64) for x in (tokens, cached_tokens))
        different = np.flatnonzero(a != b)
        if different.size:
            return i + int(different[0])
    return n


def common_to_all(prompts: Sequence) -> int:
    """How many ids all prompts begin with alike."""
    return min(common_prefix(prompts[0], p) for p in prompts)


def keepable(checkpoints: Checkpoints, old_tokens: Sequence, new_tokens: Sequence) -> int:
    """What reuse would keep, changing nothing. Of several sequences take the one that keeps most.

    Raises:
        UsageError: old_tokens are fewer than the checkpoints go to.
    """
    end = checkpoints.calls.end
    if len(old_tokens) < end:
        raise UsageError(f"{len(old_tokens)} token ids, but the checkpoints go to {end}.")
    wanted = min(common_prefix(new_tokens, old_tokens[:end]), max(len(new_tokens) - 1, 0))
    point = checkpoints.nearest(wanted)
    return 0 if point is None else point.position


def reuse(
    model: Any, cache: list, checkpoints: Checkpoints, old_tokens: Sequence, new_tokens: Sequence
) -> int:
    """Go back as far as a new prompt makes necessary, and no further than a checkpoint before it.

    Nothing is replayed: the tokens between go through the model with the rest of the prompt, in
    longer calls, and the count is what is really not computed again.

    Args:
        old_tokens: Ids of all that the cache has read. new_tokens: Ids of the whole new prompt.

    Returns:
        Tokens kept. The caller reads new_tokens from there on; at least one is left, for logits.

    Raises:
        UsageError, CacheError: As rollback.
    """
    wanted = keepable(checkpoints, old_tokens, new_tokens)
    rollback(model, cache, checkpoints, old_tokens, wanted)
    return wanted


def fork_cache(cache: list, share: bool = False) -> list:
    """A second cache of the same tokens; memory is shared until one of them writes.

    See HydraKVCache.fork; mlx-lm's own classes likewise.

    Args:
        share: Of HydraKVCache.fork.
    """
    forks = [c.fork(share) if isinstance(c, HydraKVCache) else copy.copy(c) for c in cache]
    for c in forks:
        if isinstance(c, ArraysCache):
            c.cache = list(c.cache)
        elif not isinstance(c, HydraKVCache):
            c.keys, c.values = tree_map(copy.copy, (c.keys, c.values))
    return forks


def _ids(tokens: Sequence) -> mx.array:
    return mx.array(np.asarray(tokens, np.int32))


def _forward(model: Any, cache: list, ids: mx.array) -> mx.array:
    h = (model.model if is_hydra(model) else model)(ids[None], cache)
    mx.eval([c.state for c in cache])  # not the logits: those of one token are wanted
    return h


def _offsets(model: Any, cache: list) -> tuple:
    """Least and most tokens that the parts of a cache hold.

    Raises:
        CacheError: A batch, or a cache of another model or kind.
    """
    why = obstacle(model, cache)
    if why:
        raise CacheError(f"{why[0].upper()}{why[1:]} cannot go back: expected one sequence.")
    fresh = make_prompt_cache(model)
    same = len(fresh) == len(cache) and all(
        isinstance(a, ArraysCache) == isinstance(b, ArraysCache)
        for a, b in zip(fresh, cache, strict=True)
    )
    if not same:
        raise CacheError(f"A cache of {len(cache)} parts is not of this model ({len(fresh)}).")
    D = getattr(getattr(model, "args", None), "head_dim", None)
    for c in cache:
        if isinstance(c, ArraysCache):
            x = c[STATE]
            fits = x is None or x.shape[-2:] == (D, D)
            whole = c.lengths is None and c.left_padding is None
        else:
            few, x = kv_format(c), c.keys
            if few is not None and x is not None:
                x = x[1]  # the scales, one for each group
            fits = x is None or D in (None, x.shape[-1] * (few[2] if few else 1))
            whole = True
        if not whole or (x is not None and x.shape[0] != 1):
            raise CacheError("A batch cannot go back: expected a cache of one sequence.")
        if not fits:
            raise CacheError("The cache is of another model: its head size differs.")
    offsets = [c.offset for c in cache if not isinstance(c, ArraysCache)]
    return min(offsets), max(offsets)


def _stateless(cache: list) -> bool:
    return all(x is None for pair in slots_of(cache) for x in pair)


def _restore(cache: list, point: Checkpoint | None, position: int):
    slots = iter(()) if point is None else iter(point.slots)
    for c in cache:
        if isinstance(c, ArraysCache):
            tail, state = (None, None) if point is None else next(slots)
            c[CONV] = tail
            c[STATE] = None if state is None else state.astype(mx.float32)
        elif isinstance(c, HydraKVCache):
            c.trim(c.offset - position)
        elif position == 0:
            c.keys = c.values = None
            c.offset = 0
        elif position < c.offset:
            _cut_rows(c, position)


def _cut_rows(c: KVCache | QuantizedKVCache, position: int):
    """Trim, and clear the rows behind: `state`, and so a saved file, has the whole buffer."""
    end = c.offset
    c.trim(end - position)
    for x in (c.keys, c.values):
        for part in x if isinstance(x, tuple | list) else (x,):
            part[..., position:end, :] = mx.zeros((), part.dtype)
