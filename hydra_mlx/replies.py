"""Replies to several prompts at once.

A prompt is read by its own sequence, so nothing is padded and every row's checkpoints are those of
a single run; what prompts begin with alike is read once, and held once: forks share it. Then the
sequences decode in a batch: they finish and leave, and others join.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.generate import generation_stream

from .batch import Batch, check_row
from .errors import UsageError
from .generation import Part
from .rollback import common_to_all
from .sequence import CachedSequence
from .text import StopMatcher

SHARED = 16  # tokens that prompts begin with alike, from which on they are read once


@dataclass
class _Row:
    """One reply under way."""

    index: int
    prompt: list
    sequence: CachedSequence
    detokenizer: Any
    matcher: StopMatcher
    limit: int
    known: mx.array | None = None
    started: bool = False
    tokens: list = field(default_factory=list)

    def hear(self, token: int, ends: Any) -> Part:
        """The next token of the reply."""
        self.tokens.append(token)
        reason = "length" if len(self.tokens) == self.limit else None
        if token in ends:
            reason = "stop"
        else:
            self.detokenizer.add_token(token)
        return self.part(token, reason)

    def part(self, token: int | None, reason: str | None) -> Part:
        if reason:
            self.detokenizer.finalize()
        text, hit = self.matcher.push(self.detokenizer.last_segment)
        if hit:
            reason = "stop"
        elif reason:
            text += self.matcher.held
        return Part(text, token, reason)


def read_shared(base: CachedSequence, prompts: Sequence, **options: Any) -> int:
    """Have a sequence read what all prompts begin with, if that is worth it.

    Args:
        base: Goes back as far as the prompts demand. prompts: Lists of ids. options: As of read().

    Returns:
        Tokens that the prompts share, and base then holds at least in part.
    """
    first = prompts[0]
    n = min(common_to_all(prompts), min(map(len, prompts)) - 1)
    kept = base.fit(first[: n + 1])
    if len(prompts) > 1 and n - kept >= SHARED:
        base.read(first[kept:n], **options)
    return n


def stream_replies(
    model: Any,
    tokenizer: Any,
    prompts: Sequence,
    max_tokens: int | Sequence = 256,
    sampler: Callable | None = None,
    logits_processors: Sequence | None = None,
    base: CachedSequence | None = None,
    rows: int = 8,
    prefill_step_size: int | None = None,
    stop: Sequence = (),
    progress: Callable | None = None,
    should_stop: Callable | None = None,
    sequences: list | None = None,
) -> Iterator[list]:
    """Reply to several prompts at once; yields lists of (number of the prompt, Part).

    Each list is what one pass gave; a Part is as of generation.stream_generate, without timings.

    Args:
        prompts: Lists of ids, whole ones. max_tokens: Of each reply, or a list; -1 is no limit.
        sampler: log-probabilities [B, V] -> tokens [B]; None takes the likeliest.
        logits_processors: Each (tokens [T], logits [1, V]) -> logits, row by row.
        base: What prompts may begin with, read already; extended to what they share. None begins
            with an empty one.
        rows: Replies under way at once; the others wait.
        progress: Called with (prompts read, all). should_stop: Asked between calls; True ends all.
        sequences: A list that gets each prompt's CachedSequence as it leaves: prompt and reply, or
            what had been read; in the order of the prompts, None where nothing was.

    Raises:
        UsageError: At once, for arguments that cannot be honoured.
    """
    todo = [[int(t) for t in p] for p in prompts]
    limits = [max_tokens] * len(todo) if isinstance(max_tokens, int) else list(max_tokens)
    if rows < 1 or len(limits) != len(todo) or min(limits, default=0) < -1:
        raise UsageError(f"{rows} rows and {max_tokens} tokens, expected 1 and -1 or more.")
    if not todo or not all(todo):
        raise UsageError("A prompt has no tokens." if todo else "There are no prompts.")
    if base is None:
        base = CachedSequence(model)
    check_row(model, base)
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if "" in stops:
        raise UsageError("A stop string is empty, which would end every reply at once.")
    replies = _Replies(
        model, tokenizer, todo, limits, sampler, list(logits_processors or ()), base, rows,
        prefill_step_size, stops, progress or (lambda done, total: None),
        should_stop or (lambda: False), [] if sequences is None else sequences,
    )  # fmt: skip
    return replies.lists()


@dataclass
class _Replies:
    """The loop of stream_replies; attributes as its arguments."""

    model: Any
    tokenizer: Any
    prompts: list
    limits: list
    sampler: Callable | None
    processors: list
    base: CachedSequence
    rows: int
    step_size: int | None
    stops: tuple
    progress: Callable
    should_stop: Callable
    sequences: list

    def lists(self) -> Iterator[list]:
        """See stream_replies."""
        waiting = deque(enumerate(self.prompts))
        self.sequences[:] = [None] * len(waiting)
        batch, live = Batch(self.model), []
        y = mx.zeros((0,), mx.int32)
        how = {"step": self.step_size, "should_stop": self.should_stop}
        try:
            read_shared(self.base, self.prompts, **how)
            while waiting or live:
                new = self._join(waiting, self.rows - len(live), how)
                if self.should_stop():
                    yield self._broken([*live, *new], waiting)
                    return
                batch.put([row.sequence for row in new])
                live += new
                y = mx.concatenate([y, mx.array([row.prompt[-1] for row in new], mx.int32)])
                following = self._next(batch.step(y), live, y)
                parts, over = [], []
                # Only now: every row has read its token, so one that ends holds it.
                for i, (row, token) in enumerate(zip(live, y.tolist(), strict=True)):
                    part = self._heard(row, token)
                    if part is not None:
                        parts.append((row.index, part))
                        if part.finish_reason:
                            over.append(i)
                batch.take([live[i].sequence for i in over])
                stay = [i for i in range(len(live)) if i not in over]
                live = [live[i] for i in stay]
                y = following[mx.array(stay, mx.int32)] if stay else following[:0]
                yield parts
        finally:
            batch.take(list(batch.rows))

    def _join(self, waiting: deque, room: int, how: dict) -> list:
        """Rows for the next prompts, read but for their last token."""
        new = []
        while waiting and len(new) < room and not self.should_stop():
            index, prompt = waiting.popleft()
            sequence = self.base.fork(share=True)
            self.sequences[index] = sequence
            sequence.read(prompt[len(sequence) : -1], **how)
            known = mx.array(np.asarray(prompt[:-1], np.int32)) if self.processors else None
            matcher, text = StopMatcher(self.stops), self.tokenizer.detokenizer
            new.append(_Row(index, prompt, sequence, text, matcher, self.limits[index], known))
            self.progress(index + 1, len(self.prompts))
        return new

    def _next(self, logits: mx.array, live: list, y: mx.array) -> mx.array:
        """[B] tokens, lazy."""
        with mx.stream(generation_stream):
            if self.processors:
                out = []
                for i, row in enumerate(live):
                    row.known, one = mx.concatenate([row.known, y[i : i + 1]]), logits[i : i + 1]
                    for process in self.processors:
                        one = process(row.known, one)
                    out.append(one)
                logits = mx.concatenate(out)
            logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
            found = mx.argmax(logprobs, axis=-1) if self.sampler is None else self.sampler(logprobs)
            found = found.astype(mx.int32)
            mx.async_eval(found)
        return found

    def _heard(self, row: _Row, token: int) -> Part | None:
        if row.started:
            return row.hear(token, self.tokenizer.eos_token_ids)
        row.started = True  # this was the last token of its prompt
        return None if row.limit else row.part(None, "length")

    def _broken(self, rows: list, waiting: deque) -> list:
        parts = [(row.index, row.part(None, "interrupt")) for row in rows]
        return parts + [(index, Part("", None, "interrupt")) for index, _ in waiting]
