"""Speculative decoding: drafts checked in one pass over up to 8 tokens, also on hybrid models.

    pending token and draft t d1 d2 d3  ->  one pass  ->  what the model says after each of them
    d1, d2 right, d3 wrong              ->  the reply grows by d1 d2 and the model's own next token,
                                            the cache is cut to t d1 d2 (trial.py)

The reply is what plain decoding gives. Greedy: a drafted token stays if it is the likeliest one.
Sampling: the model draws its own token at each place with the very sampler of plain decoding, and
a drafted token stays if it is the one drawn, so whatever is drafted cannot matter. That is the rule
of Leviathan et al. (arXiv 2211.17192) for a draft that leaves nothing to chance. Where the draft
was itself drawn from a known distribution q, their rule for that keeps more of it: accept with
probability min(1, p/q), else draw from max(0, p - q), normalised; p is what the sampler draws from.

Passes over several tokens add in another order than passes over one, so logits differ in their last
bits, and where two tokens are equally likely up to these, either may come; see docs/speculative.md.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.generate import generation_stream

from .drafts import Draft
from .errors import UsageError
from .trial import Trial

UNLIMITED = 1 << 30


@dataclass
class Tally:
    """What drafting brought.

    Attributes:
        passes: Of the model, each over the newest token and maybe a draft. tokens: They gave.
        drafted, accepted: Guessed tokens, and those that stayed.
    """

    passes: int = 0
    tokens: int = 0
    drafted: int = 0
    accepted: int = 0

    def count(self, drafted: int, accepted: int):
        """One more pass."""
        self.passes += 1
        self.tokens += accepted + 1
        self.drafted += drafted
        self.accepted += accepted


class Judge:
    """What the model says of a draft.

    Args:
        sampler: log-probabilities [1, V] -> token [1]; None takes the likeliest.
        processors: Each (tokens [T], logits [1, V]) -> logits, a function of these alone.
        law: log-probabilities [1, V] -> those [1, V] of what the sampler draws, up to a constant;
            None where it is not known, or the sampler takes the likeliest.
        width: V, where it is known: a draft model's table can have more or fewer rows.
    """

    def __init__(
        self,
        sampler: Callable | None,
        processors: Sequence,
        law: Callable | None,
        width: int | None = None,
    ):
        self.width = width
        self.sampler, self.processors, self.law = sampler, list(processors or ()), law
        self._known = None  # the text so far, for processors

    def know(self, tokens: Any):
        """The text has grown; an array stays where it is."""
        if self.processors:
            if not isinstance(tokens, mx.array):
                tokens = mx.array(np.asarray(tokens, np.int32))
            tokens = tokens.astype(mx.int32)
            old = self._known
            self._known = tokens if old is None else mx.concatenate([old, tokens])

    def _logprobs(self, logits: mx.array, drafted: list) -> mx.array:
        """[1, V] after the text and some drafted tokens, arrays [1]."""
        if self.processors:
            tokens = mx.concatenate([self._known, *drafted]) if drafted else self._known
            for process in self.processors:
                logits = process(tokens, logits)
        return logits - mx.logsumexp(logits, axis=-1, keepdims=True)

    def choose(self, drafted: list, logits: mx.array) -> tuple:
        """For the drafter, as its `choose`: its logits [1, V] under the same rules."""
        if self.width not in (None, logits.shape[-1]):
            logits = _width(logits[0], self.width)[None]
        logprobs = self._logprobs(logits, drafted)
        if self.law is None:  # the likeliest token: any other stays less often
            return mx.argmax(logprobs, axis=-1), None
        law = self._normal(logprobs)
        return mx.random.categorical(law), law[0]

    def _normal(self, logprobs: mx.array) -> mx.array:
        x = self.law(logprobs).astype(mx.float32)
        return x - mx.logsumexp(x, axis=-1, keepdims=True)

    def next(self, logits: mx.array) -> mx.array:
        """The token [1] after the text; logits [1, V]."""
        logprobs = self._logprobs(logits, [])
        return mx.argmax(logprobs, axis=-1) if self.sampler is None else self.sampler(logprobs)

    def verdict(self, draft: Draft, logits: mx.array) -> list:
        """The tokens that the text grows by: right drafted ones, then one of the model's own.

        Args:
            logits: [T, V] after the text, and after each drafted token.
        """
        drafted = draft.tokens
        if self.sampler is None and not self.processors:
            own = mx.argmax(logits, axis=-1).tolist()
            return own[: _common(own, drafted) + 1]
        given = [mx.array([t], mx.int32) for t in drafted]
        rows = [self._logprobs(logits[i : i + 1], given[:i]) for i in range(len(drafted) + 1)]
        if draft.logprobs is None:
            draw = self.sampler or (lambda x: mx.argmax(x, axis=-1))
            own = mx.concatenate([draw(x) for x in rows]).tolist()
            return own[: _common(own, drafted) + 1]
        return self._leviathan(draft, [self._normal(x) for x in rows])

    @staticmethod
    def _leviathan(draft: Draft, laws: list) -> list:
        V, n = laws[0].shape[-1], len(draft.tokens)
        q = mx.exp(mx.stack([_width(x, V) for x in draft.logprobs]))
        p = mx.exp(mx.concatenate(laws))
        at = mx.array(draft.tokens, mx.int32)[:, None]
        inside = at < V  # a draft model may have more rows in its table than there are tokens
        p_d, q_d = (
            mx.take_along_axis(x, mx.where(inside, at, 0), axis=-1)[:, 0] for x in (p[:n], q)
        )
        stays = (mx.random.uniform(shape=(n,)) * q_d < p_d) & inside[:, 0]
        rest = mx.maximum(p[:n] - q, 0.0)
        # Rounding can reject where p = q, and nothing is left over.
        rest = mx.where(rest.sum(-1, keepdims=True) > 0, rest, p[:n])
        own = mx.random.categorical(mx.log(mx.concatenate([rest, p[n:]])))
        stays, own = stays.tolist(), own.tolist()
        right = stays.index(False) if False in stays else n
        return [*draft.tokens[:right], own[right]]


def _width(x: mx.array, V: int) -> mx.array:
    """[W] -> [V]; tokens the draft model has not are impossible for it."""
    if x.shape[0] < V:
        return mx.pad(x, [(0, V - x.shape[0])], constant_values=-mx.inf)
    return x[:V]


def _common(a: list, b: list) -> int:
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    return n


class Decoder:
    """The reply to a prompt that a sequence has read but for its last token, with drafts.

    Args:
        sequence: A CachedSequence, extended in place. drafts: LookupDrafts or ModelDrafts; may be
            used again for the next reply. judge: See there. last: The prompt's last token.
        max_tokens: -1 is no limit. should_stop: Asked while a draft model reads the prompt.

    Attributes:
        tally: What drafting brought so far; also that of `drafts`.

    Raises:
        UsageError: The cache cannot go back.
    """

    def __init__(
        self, sequence: Any, drafts: Any, judge: Judge, last: int, max_tokens: int = -1,
        should_stop: Callable | None = None,
    ):  # fmt: skip
        if sequence.obstacle:
            raise UsageError(f"No drafts: {sequence.obstacle} cannot take tokens back.")
        self.sequence, self.drafts, self.judge = sequence, drafts, judge
        self.last, self.max_tokens, self.should_stop = last, max_tokens, should_stop
        self.tally = drafts.tally = Tally()
        self._text, self._end, self._trial = [], 0, None

    @property
    def _yielded(self) -> int:
        return len(self._text) - self._end

    def tokens(self) -> Iterator[int | None]:
        """None when the first token is there, then the ids."""
        self._text = [*self.sequence.tokens, self.last]
        self._end = len(self._text)
        self.judge.know([t for t in self._text if t >= 0])  # others are unknown
        if self.max_tokens:
            self.drafts.start(self._text, self.should_stop)
            if self.should_stop is not None and self.should_stop():
                return
        try:
            for token in self._found():
                if not self._yielded:
                    yield None
                self._text.append(token)
                yield token
        finally:
            self._settle()
        if not self.max_tokens:
            yield None

    def _found(self) -> Iterator[int]:
        while self._yielded != self.max_tokens:
            room = self.max_tokens - self._yielded - 1 if self.max_tokens > 0 else UNLIMITED
            with mx.stream(generation_stream):
                draft = self.drafts.propose(self._text, room, self.judge.choose)
            yield from self._checked(draft) if draft.tokens else self._plain(room)

    def _checked(self, draft: Draft) -> list:
        """One pass over the pending token and a draft; what the text grows by."""
        self._close()
        self.sequence.begin()
        with mx.stream(generation_stream):
            cache = self.sequence.cache
            trial = Trial(self.sequence.model, cache, [self._text[-1], *draft.tokens])
            found = self.judge.verdict(draft, trial.logits[0])
            trial.keep(len(found))
            self.judge.know(found)
        self._trial = trial
        self.drafts.heard(draft, len(found) - 1)
        self.tally.count(len(draft.tokens), len(found) - 1)
        return found

    def _plain(self, room: int) -> Iterator[int]:
        """Decode without drafts, one pass ahead of what is read, while drafts are hopeless."""
        self._close()
        following = self._step(mx.array([self._text[-1]], mx.int32))
        self.sequence.extended(self._text[-1:])
        while room and self.drafts.hopeless(self._text):
            now, following = following, self._step(following)
            token = int(now.item())
            self.tally.count(0, 0)
            self.sequence.extended([token])  # only now, as in CachedSequence
            yield token
            room -= 1
            if room % 256 == 0:
                mx.clear_cache()
        self.tally.count(0, 0)
        yield int(following.item())

    def _step(self, token: mx.array) -> mx.array:
        self.sequence.begin()
        with mx.stream(generation_stream):
            logits = self.sequence.model(token[None], cache=self.sequence.cache)[:, -1]
            found = self.judge.next(logits)
            self.judge.know(found)
            mx.async_eval(found)
        return found

    def _close(self, beyond: int = 0):
        """Note the last trial, less its last tokens."""
        trial, self._trial = self._trial, None
        if trial is not None:
            with mx.stream(generation_stream):
                trial.keep(trial.kept - beyond)
            self.sequence.extended(trial.tokens[: trial.kept], trial.tokens[trial.kept :])

    def _settle(self):
        """Bring the sequence to exactly the prompt and what was yielded."""
        if self._trial is not None:
            held = len(self.sequence) + self._trial.kept
            self._close(max(0, held - len(self._text)))
        if len(self.sequence) == len(self._text) - 1:
            self.sequence.read(self._text[-1:])
        self.drafts.cut(len(self._text))
