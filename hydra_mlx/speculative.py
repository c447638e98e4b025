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
from mlx_lm.generate import generation_stream, maybe_quantize_kv_cache

from .cache import cached_tokens
from .drafts import Draft
from .trial import Trial, check


@dataclass
class Tally:
    """What drafting brought.

    Attributes:
        passes: Of the model, the prompt's apart from its last token not counted. tokens: They gave.
        drafted, accepted: Guessed tokens, and those that stayed.
    """

    passes: int = 0
    tokens: int = 0
    drafted: int = 0
    accepted: int = 0


class Judge:
    """What the model says of a draft.

    Args:
        sampler: log-probabilities [1, V] -> token [1]; None takes the likeliest.
        processors: Each (tokens [T], logits [1, V]) -> logits, a function of these alone.
        law: log-probabilities [1, V] -> those [1, V] of what the sampler draws, up to a constant;
            None where it is not known, or the sampler takes the likeliest.
    """

    def __init__(self, sampler: Callable | None, processors: Sequence, law: Callable | None):
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


class Steps:
    """The tokens of a reply, as mlx_lm's generate_step yields them, with drafts.

    However it ends, the cache holds the prompt and the tokens yielded.

    Args:
        model, cache: With its cache, which is extended in place. prompt: Ids, at least one.
        drafts: LookupDrafts or ModelDrafts; may be used again for the next reply.
        judge: See there. before: Ids of what the cache holds already.
        max_tokens: -1 is no limit. prefill: Tokens that are read at once.
        progress: Called with (prompt tokens read, all), may raise to stop.
        checkpoints: Noted after every pass, or None. kv: mlx_lm's maybe_quantize_kv_cache's
            keywords, or None.

    Raises:
        UsageError: The cache cannot take tokens back.
    """

    def __init__(
        self, model: Any, cache: list, prompt: Sequence, drafts: Any, judge: Judge,
        before: Sequence = (), max_tokens: int = -1, prefill: int = 2048,
        progress: Callable = lambda done, total: None, checkpoints: Any = None,
        kv: dict | None = None,
    ):  # fmt: skip
        check(model, cache)
        self.model, self.cache, self.drafts, self.judge = model, cache, drafts, judge
        self.prompt, self.max_tokens, self.prefill = list(prompt), max_tokens, prefill
        self.progress, self.checkpoints, self.kv = progress, checkpoints, kv
        self.tally = Tally()
        self._text = [*before, *self.prompt]
        self._end = len(self._text)  # of the prompt; the text is yielded from there on
        self._lead = len(self._text) - len(self.prompt) - cached_tokens(cache)
        self._trial = None

    def _held(self) -> int:
        return cached_tokens(self.cache) + self._lead

    def __iter__(self) -> Iterator[tuple]:
        """Yields (token, None)."""
        total = len(self.prompt)
        self._read_prompt()
        try:
            for token in self._tokens():
                if len(self._text) == self._end:
                    self.progress(total, total)
                self._text.append(token)
                yield token, None
        finally:
            self._settle()
        if self.max_tokens == 0:
            self.progress(total, total)

    def _tokens(self) -> Iterator[int]:
        while len(self._text) - self._end != self.max_tokens:
            room = self.max_tokens - (len(self._text) - self._end) - 1
            room = 1 << 30 if room < 0 else room
            draft = Draft([])
            if room:
                with mx.stream(generation_stream):
                    draft = self.drafts.propose(self._text, room, choose=self.judge.choose)
            yield from self._checked(draft) if draft.tokens else self._plain(room)

    def _read_prompt(self):
        total, at = len(self.prompt), 0
        self.progress(0, total)
        while at < total - 1:
            n = min(self.prefill, total - 1 - at)
            with mx.stream(generation_stream):
                self._forward(mx.array(np.asarray(self.prompt[at : at + n], np.int32)))
                mx.eval([c.state for c in self.cache])
            mx.clear_cache()
            at += n
            self.progress(at, total)
        self.judge.know(self._text)
        self.drafts.start(self._text, lambda: self.progress(total - 1, total))

    def _forward(self, ids: mx.array) -> mx.array:
        """A pass that stays; logits [1, V] of its last token."""
        logits = self.model(ids[None], cache=self.cache)[:, -1]
        self._done()
        return logits

    def _done(self):
        if self.kv is not None:
            maybe_quantize_kv_cache(self.cache, **self.kv)
        if self.checkpoints is not None:
            self.checkpoints.note(self.cache)

    def _checked(self, draft: Draft) -> list:
        """One pass over the pending token and a draft; what the text grows by."""
        self._close_trial()
        with mx.stream(generation_stream):
            self._trial = Trial(self.model, self.cache, [self._text[-1], *draft.tokens])
            found = self.judge.verdict(draft, self._trial.logits[0])
            right = len(found) - 1
            self._trial.keep(right + 1)
            self.drafts.heard(draft, right)
            self.judge.know(found)
        self.tally.passes += 1
        self.tally.tokens += len(found)
        self.tally.drafted += len(draft.tokens)
        self.tally.accepted += right
        return found

    def _plain(self, room: int) -> Iterator[int]:
        """Decode without drafts, one pass ahead of what is read, while drafts are hopeless."""
        following = self._step(mx.array([self._text[-1]], mx.int32))
        while room and self.drafts.hopeless(self._text):
            now, following = following, self._step(following)
            yield now.item()
            room -= 1
        yield following.item()

    def _step(self, token: mx.array) -> mx.array:
        self._close_trial()
        with mx.stream(generation_stream):
            found = self.judge.next(self._forward(token))
            self.judge.know(found)
            mx.async_eval(found)
        self.tally.passes += 1
        self.tally.tokens += 1
        return found

    def _close_trial(self):
        if self._trial is not None:
            self._trial = None
            self._done()

    def _settle(self):
        """Bring the cache to exactly the text that was yielded."""
        with mx.stream(generation_stream):
            if self._trial is not None:
                beyond = self._held() - len(self._text)
                if beyond > 0:
                    self._trial.keep(self._trial.kept - beyond)
                self._close_trial()
            if self._held() == len(self._text) - 1:
                self._forward(mx.array(self._text[-1:], mx.int32))
            mx.eval([c.state for c in self.cache])
        self.drafts.cut(len(self._text))
