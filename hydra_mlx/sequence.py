"""What a model has read, as one object: token ids, cache and checkpoints.

chat, serve and generate go through it. Whatever breaks off an operation, a flag, a closed generator
or an exception in the middle of a layer, the sequence is then what it was after its last whole
call: tokens, cache and checkpoints agree. Every operation begins and ends with mend(), which costs
nothing where there is nothing to mend.

A model whose cache cannot go back (see rollback.obstacle) works too; its sequence can be extended
or begun anew.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.generate import generation_stream
from mlx_lm.models.cache import make_prompt_cache

from . import rollback
from .cache import own_cache
from .checkpoints import MOST, Checkpoints
from .config import is_hydra
from .errors import CacheError, UsageError
from .speculative import Decoder, Judge

EVERY = 512  # tokens between checkpoints, and of a prefill call
NEVER = 1 << 62
UNKNOWN = -1  # id of a token that a cache holds, but nobody told


def make_checkpoints(
    model: Any, budget: int | None, dtype: str = "float32", every: int = EVERY
) -> Checkpoints:
    """Checkpoints of a new sequence.

    Args:
        budget: Bytes they may take; None keeps the latest state only, which is free, so that going
            back means to begin anew.

    Raises:
        UsageError: The budget holds fewer than 3.
    """
    if budget is None:
        return Checkpoints(NEVER, 2, 0, dtype)
    if not is_hydra(model):
        return Checkpoints(every, MOST, dtype=dtype)  # no states: they take nothing
    itemsize = model.model.norm.weight.dtype.size
    return Checkpoints.within(model.args, budget, step=every, dtype=dtype, itemsize=itemsize)


class CachedSequence:
    """Tokens that a model has read, with what it takes to go on from them, or back.

    sequence = CachedSequence(model, make_checkpoints(model, 2**30))
    kept = sequence.fit(prompt)                       # goes back as far as the prompt demands
    for token in sequence.generate(prompt[kept:]):    # reads the rest, replies
        ...

    Attributes:
        cache: mlx-lm's flat list, the same list for ever. checkpoints: Beside it.
        obstacle: Why it can only be extended; empty where it can go back.
    """

    def __init__(
        self,
        model: Any,
        checkpoints: Checkpoints | None = None,
        cache: list | None = None,
        tokens: Sequence = (),
        kv: Callable | None = None,
    ):
        """An empty sequence, or one that goes on from a cache.

        Args:
            checkpoints: Of the cache, or new ones; None keeps the latest state only.
            cache: Of one sequence, used in place. tokens: Ids of what it holds; () if unknown.
            kv: Changes entries of a cache list in place, to quantise them; called with a new cache
                and after each call.

        Raises:
            CacheError: Tokens, cache and checkpoints do not agree.
        """
        self.model, self.kv = model, kv or (lambda cache: None)
        self.checkpoints = make_checkpoints(model, None) if checkpoints is None else checkpoints
        self.cache = self._fresh() if cache is None else cache
        self.obstacle = rollback.obstacle(model, self.cache)
        self._ids = [int(t) for t in tokens]
        self._under_way = self._lent = False
        held = self._held()
        if not self._ids:
            self._ids = [UNKNOWN] * held
        elif held and held != len(self._ids):
            raise CacheError(f"{len(self._ids)} token ids, but the cache holds {held} tokens.")
        if cache is not None:
            self.kv(self.cache)
            if len(self) == 0:
                self.checkpoints.adopt(len(self._ids), self.cache)
            elif not self.obstacle and len(self) == held:
                self.checkpoints.note(self.cache)  # its slots are those of the end
        if len(self) != len(self._ids):
            raise CacheError(
                f"The checkpoints go to {len(self)}, but the cache holds {len(self._ids)} tokens."
            )

    @property
    def tokens(self) -> list:
        """Ids of all that was read, as a new list."""
        return self._ids[: len(self)]

    def __len__(self) -> int:
        return self.checkpoints.calls.end

    @property
    def nbytes(self) -> int:
        """Bytes of cache and checkpoints, those shared with forks included."""
        return sum(c.nbytes for c in self.cache if not c.empty()) + self.checkpoints.nbytes

    @property
    def keeps_checkpoints(self) -> bool:
        """Whether there is more to go back to than the end."""
        return not self.obstacle and self.checkpoints.grid.every != NEVER

    def keepable(self, new_tokens: Sequence) -> int:
        """What fit would keep, changing nothing; always less than the whole new prompt."""
        if not self.obstacle:
            return rollback.keepable(self.checkpoints, self._ids, new_tokens)
        n = len(self)
        return n if rollback.common_prefix(new_tokens, self._ids[:n]) == n < len(new_tokens) else 0

    def fit(self, new_tokens: Sequence) -> int:
        """Go back as far as a new prompt makes necessary; nothing is computed.

        Returns:
            Tokens kept. The caller reads new_tokens from there on.
        """
        self.mend()
        kept = self.keepable(new_tokens)
        self.back_to(kept)
        return kept

    def read(
        self,
        tokens: Sequence,
        step: int | None = None,
        progress: Callable | None = None,
        should_stop: Callable | None = None,
        mark: bool = False,
    ) -> int:
        """Read more tokens, in calls that end at multiples of `step` and on the checkpoints' grid.

        Args:
            step: Tokens a call at most; None is the grid's distance, EVERY where there is none.
            progress: Called with (tokens done, all) after each call.
            should_stop: Asked before each call; True ends the reading.
            mark: Keep a checkpoint at the end, a turn boundary.

        Returns:
            Tokens read; fewer than all only when stopped.

        Raises:
            UsageError: step is below 1.
        """
        self.mend()
        ids, start, N = [int(t) for t in tokens], len(self), self.checkpoints.grid.every
        step = EVERY if step is None and N == NEVER else step
        try:
            for a, b in rollback.call_ends(start, start + len(ids), step, N):
                if should_stop is not None and should_stop():
                    break
                self._call(ids[a - start : b - start])
                mx.clear_cache()
                if progress is not None:
                    progress(b - start, len(ids))
        finally:
            self.mend()
        done = len(self) - start
        if mark and done == len(ids):
            self.mark()
        return done

    def generate(
        self,
        tokens: Sequence,
        max_tokens: int = -1,
        sampler: Callable | None = None,
        logits_processors: Sequence | None = None,
        step: int | None = None,
        progress: Callable | None = None,
        should_stop: Callable | None = None,
        drafts: Any = None,
        law: Callable | None = None,
    ) -> Iterator[int]:
        """Read the rest of a prompt and reply; yields ids, each part of the sequence by then.

        With drafts the sequence can be behind or ahead of the reply between two ids; when the
        generator ends or is closed, it is exactly the prompt and what was yielded.

        Marks are kept before the last token of the prompt, from where another reply can be asked
        for, and where the reply ends. One step is always under way ahead of the token yielded.

        Args:
            tokens: At least one id. max_tokens: 0 only reads, -1 goes on until closed.
            sampler: log-probabilities [1, V] -> token [1]; None takes the likeliest.
            logits_processors: Each (all ids so far [T], logits [1, V]) -> logits.
            step, progress: As in read; progress also says when the first token is there.
            should_stop: Asked before each call of the prompt; True ends it without a reply, and
                the sequence holds what was read.
            drafts: From drafts.py, for speculative decoding; None decodes token by token.
            law: Of the sampler, for drafts that are sampled too: see speculative.Judge.

        Raises:
            UsageError: No tokens, or drafts for a cache that cannot go back.
        """
        ids = [int(t) for t in tokens]
        if not ids:
            raise UsageError("The prompt has no tokens.")
        if drafts is None:
            processors = list(logits_processors or ())
            sampler = sampler or (lambda logprobs: mx.argmax(logprobs, axis=-1))
            reply = partial(self._decode, ids[-1], max_tokens, sampler, processors)
        else:
            width = getattr(getattr(self.model, "args", None), "vocab_size", None)
            judge = Judge(sampler, logits_processors or (), law, width)
            reply = Decoder(self, drafts, judge, ids[-1], max_tokens, should_stop).tokens
        return self._generate(
            ids,
            reply,
            step,
            progress or (lambda done, total: None),
            should_stop or (lambda: False),
        )

    def back_to(self, position: int) -> int:
        """Return to what the sequence was after `position` tokens.

        Returns:
            Tokens that were computed again for it.

        Raises:
            UsageError: The position is beyond the end. CacheError: See obstacle.
        """
        self.mend()
        if not 0 <= position <= len(self):
            raise UsageError(f"Position {position} is outside the {len(self)} tokens read.")
        if position == len(self):
            return 0
        if position == 0:
            self._reset()
            return 0
        if self.obstacle:
            raise CacheError(f"{self.obstacle[0].upper()}{self.obstacle[1:]} cannot go back.")
        point = self.checkpoints.nearest(position)
        start = 0 if point is None else point.position
        if UNKNOWN in self._ids[start:position]:
            raise CacheError("The cache cannot go back: the ids of what it holds are not known.")
        self._under_way = True
        try:
            with mx.stream(generation_stream):
                n = rollback.rollback(self.model, self.cache, self.checkpoints, self._ids, position)
        finally:
            self.mend()
        return n

    def mark(self):
        """Keep a checkpoint here, a turn boundary."""
        self.mend()
        if not self.obstacle:
            self.checkpoints.note(self.cache, True)

    def begin(self):
        """A call is under way that someone else makes; until `extended`, mend() undoes it."""
        self._under_way = True

    def extended(self, tokens: Sequence, rejected: Sequence = ()):
        """The cache has read these tokens in one call, and some that were taken back."""
        self.kv(self.cache)
        self._ids += tokens
        self._note(len(tokens), rejected)

    def lend(self):
        """Give the cache away, to a batch; until `returned`, the sequence cannot be used."""
        self._lent = True
        self.cache[:] = make_prompt_cache(self.model)

    def returned(self, cache: list, tokens: Sequence):
        """Have a cache again that has read some more tokens; they count as one call."""
        self._lent = False
        self.cache[:] = cache
        self.extended(tokens)

    def fork(self, share: bool = False) -> "CachedSequence":
        """A second sequence of the same tokens; memory is shared until one of them writes.

        Args:
            share: Where the model is a HydraHead, keep long keys and values shared for good: see
                HydraKVCache.fork. What both then read is equal to a fresh run up to rounding.
        """
        self.mend()
        other = copy.copy(self)
        if share and not self.obstacle and is_hydra(self.model):
            own_cache(self.cache)
        fork = copy.deepcopy if self.obstacle else partial(rollback.fork_cache, share=share)
        other.cache = fork(self.cache)
        other.checkpoints, other._ids = self.checkpoints.fork(), list(self._ids)
        return other

    def mend(self):
        """Undo a call that was broken off: cache and tokens are those of the last whole one.

        Raises:
            CacheError: The sequence is in a batch.
        """
        if self._lent:
            raise CacheError("The sequence is in a batch; take it out first.")
        del self._ids[len(self) :]
        if not self._under_way:
            return
        if self.obstacle or len(self) == 0:
            self._reset()
        else:
            with mx.stream(generation_stream):
                rollback.undo(self.model, self.cache, self.checkpoints, self._ids)
        self._under_way = False

    # ------------------------------------------------------------------------------- the calls

    def _call(self, ids: list):
        """One call over known ids, evaluated and noted."""
        self._under_way = True
        self._ids += ids
        with mx.stream(generation_stream):
            self.model(mx.array([ids]), cache=self.cache)
            self.kv(self.cache)
            mx.eval([c.state for c in self.cache])
        self._note(len(ids))

    def _note(self, n: int, rejected: Sequence = ()):
        if self.obstacle:
            self.checkpoints.calls.add(n)
        else:
            self.checkpoints.note(self.cache, rejected=rejected)
        self._under_way = False

    def _generate(self, ids, reply, step, progress, should_stop):
        total, whole = len(ids), False
        try:
            progress(0, total)
            done = self.read(ids[:-1], step, lambda n, _: progress(n, total), should_stop, True)
            if done == total - 1 and not should_stop():
                with contextlib.closing(reply()) as found:
                    for token in found:
                        if token is None:
                            progress(total, total)
                        else:
                            yield token
                whole = True
        except GeneratorExit:
            whole = True
            raise
        finally:
            self.mend()
            if whole:
                self.mark()

    def _decode(self, last: int, max_tokens: int, sampler: Callable, processors: list) -> Iterator:
        """None when the first token is there, then the ids; each was read when it is yielded."""
        known = [t for t in self._ids if t != UNKNOWN] if processors else []
        history = mx.array(np.asarray(known, np.int32))

        def after(y: mx.array) -> mx.array:  # [1] -> the next one [1], lazy
            nonlocal history
            self._under_way = True
            with mx.stream(generation_stream):
                logits = self.model(y[None], cache=self.cache)[:, -1]
                if processors:
                    history = mx.concatenate([history, y.astype(mx.int32)])
                for process in processors:
                    logits = process(history, logits)
                self.kv(self.cache)
                y = sampler(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
                mx.async_eval(y)
            return y

        self._ids.append(last)
        y, n = after(mx.array([last], mx.int32)), 0
        self._note(1)
        while True:
            following = None if n == max_tokens else after(y)
            token = int(y.item())
            if n == 0:
                yield None
            if following is None:
                return
            # Only now: a call whose token nobody has seen is undone for nothing.
            self._ids.append(token)
            self._note(1)
            if n % 256 == 0:
                mx.clear_cache()
            yield token
            y, n = following, n + 1

    def _held(self) -> int:
        return max((int(getattr(c, "offset", 0)) for c in self.cache), default=0)

    def _fresh(self) -> list:
        cache = make_prompt_cache(self.model)
        self.kv(cache)
        return cache

    def _reset(self):
        """Begin anew, with entries as `kv` makes them."""
        self._under_way = True
        self.checkpoints.cut(0)
        self.cache[:] = self._fresh()
        if not self.obstacle:
            self.checkpoints.note(self.cache)
        self._ids.clear()
        self._under_way = False


def best(sequences: Sequence, new_tokens: Sequence) -> tuple:
    """The sequence that keeps most of a new prompt, of equals the shortest.

    Fork it first where its own end is still wanted.

    Returns:
        (CachedSequence, tokens kept); (None, 0) where none keeps any.
    """
    found = [(s.keepable(new_tokens), -len(s), i) for i, s in enumerate(sequences)]
    kept, _, i = max(found, default=(0, 0, 0))
    return (sequences[i], kept) if kept else (None, 0)
