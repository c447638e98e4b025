"""One request at work: what it asks the model, and what is told to the thread that waits for it."""

import queue
import secrets
import threading
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from .sampling import SamplingOptions
from .sequence import CachedSequence
from .text import StopMatcher


@dataclass(frozen=True)
class Limits:
    """How much at once.

    Attributes:
        rows: Requests at work. waiting: Others. step: Tokens of a prefill call; None is the
            distance of checkpoints. max_tokens: Of a reply whose client does not say.
    """

    rows: int = 32
    waiting: int = 128
    step: int | None = None
    max_tokens: int = 512


@dataclass(frozen=True)
class Progress:
    """Prompt tokens read so far, of all."""

    done: int
    total: int


@dataclass(frozen=True)
class Piece:
    """One token of a reply.

    Attributes:
        text: What is certain by now. reason: None, or at the end "stop" or "length".
        logprob: Of the token. top: ((id, log-probability), ...), likeliest first.
    """

    text: str
    token: int
    reason: str | None = None
    logprob: float | None = None
    top: tuple = ()


@dataclass(eq=False)
class Job:
    """A request in the engine.

    Attributes:
        ids, marks: Of server_prompt.Prompt. top_logprobs: None for no log-probabilities.
        events: Progress, Pieces and at last, if all fails, an exception. cancelled: Set by whoever
            waits, when nobody does any more.
        sequence, links: Once the prompt is begun. cached: Tokens that were known then.
        nbytes: Memory it takes. admitted: Whether that is set aside.
    """

    ids: list
    marks: tuple
    options: SamplingOptions
    max_tokens: int
    stop: tuple = ()
    top_logprobs: int | None = None
    events: queue.Queue = field(default_factory=queue.Queue)
    cancelled: threading.Event = field(default_factory=threading.Event)
    sequence: CachedSequence | None = None
    links: tuple = ()
    cached: int = 0
    nbytes: int = 0
    admitted: bool = False
    pick: Any = None
    count: int = 0
    _detokenizer: Any = None
    _matcher: StopMatcher | None = None

    def begin(self, tokenizer: Any):
        """Make what the reply needs."""
        self.pick = Pick(self, tokenizer)
        self._detokenizer, self._matcher = tokenizer.detokenizer, StopMatcher(self.stop)

    def hear(self, token: int, ends: Any) -> bool:
        """The next token of the reply; tells it on. Returns whether it is the last."""
        self.count += 1
        reason = "length" if self.count == self.max_tokens else None
        if token in ends:
            reason = "stop"
        else:
            self._detokenizer.add_token(token)
        if reason:
            self._detokenizer.finalize()
        text, hit = self._matcher.push(self._detokenizer.last_segment)
        if hit:
            reason = "stop"
        elif reason:
            text += self._matcher.held
        self.events.put(Piece(text, token, reason, *self.pick.told()))
        return reason is not None


class Pick:
    """Chooses the tokens of one reply.

    A seed is that of the reply: its draws do not depend on what else the server does.

    Attributes:
        plain: It takes the likeliest and tells nothing, so a batch can choose for it.
    """

    def __init__(self, job: Job, tokenizer: Any):
        self.sampler, self.processors = job.options.make(tokenizer)
        self.top, self.seed = job.top_logprobs, job.options.seed if job.options.temp else None
        self.plain = not (job.options.temp or self.processors) and self.top is None
        self._known = mx.array(np.asarray(job.ids[:-1], np.int32)) if self.processors else None
        self._drawn = 0
        self._records: deque = deque()

    def read(self, token: mx.array, logits: mx.array) -> mx.array:
        """The token [1] after another [1], for logits [1, V]; lazy."""
        if self.processors:
            self._known = mx.concatenate([self._known, token.astype(mx.int32)])
        for process in self.processors:
            logits = process(self._known, logits)
        return self(logits - mx.logsumexp(logits, axis=-1, keepdims=True))

    def __call__(self, logprobs: mx.array) -> mx.array:
        """The token [1] for log-probabilities [1, V]; lazy."""
        if self.seed is None:
            found = self.sampler(logprobs)
        else:
            mx.random.seed((self.seed + 0x9E3779B97F4A7C15 * self._drawn) % 2**64)
            found = self.sampler(logprobs)
            mx.random.seed(secrets.randbits(64))  # for those without a seed
        self._drawn += 1
        if self.top is not None:
            self._records.append((found, logprobs[0]))
        return found

    def rewind(self, heard: int):
        """Forget what was drawn after the tokens that were heard."""
        self._drawn = heard
        self._records.clear()

    def told(self) -> tuple:
        """(log-probability, top ones) of the token that is heard next; (None, ()) if not asked."""
        if self.top is None:
            return None, ()
        token, logprobs = self._records.popleft()
        if self.top == 0:
            return logprobs[token].item(), ()
        best = mx.argsort(-logprobs)[: self.top]
        return logprobs[token].item(), tuple(
            zip(best.tolist(), logprobs[best].tolist(), strict=True)
        )
