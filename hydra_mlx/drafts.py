"""Where drafts come from, and how long they should be.

A drafter guesses how a text goes on; speculative.py lets the model check the guesses. Whatever it
guesses, the reply is the same; only the speed depends on it. Lengths follow from counts of right
and wrong guesses alone, never from the clock, so that a run can be repeated.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import ArraysCache

from .cache import CONV, STATE
from .checkpoints import slots_of
from .errors import UsageError
from .ngrams import LONGEST, Ngrams

MOST = 7  # a pass is one known token and the draft; the kernels take 8
# What a pass over several tokens costs more than over one, and each drafted token: parts of a pass
# over one. Measured: docs/speculative.md.
START, EACH = 0.1, 0.1
FADE = 0.92  # of counts, a guess
RETRY = 0.995  # of the way back to the prior, a step without a guess
EVERY = 512  # tokens that a draft model reads at once


@dataclass
class Draft:
    """A guess.

    Attributes:
        tokens: Ids, maybe none. kind: What the drafter counts it under.
        logprobs: [V] float32 for each token, the distribution that it was drawn from; None where
            the guess left nothing to chance.
    """

    tokens: list
    kind: int = 0
    logprobs: list | None = None


@dataclass
class Odds:
    """How often guesses were right, by kind: fading counts.

    Attributes:
        priors: {kind: (right, wrong)} before anything is known. cost: Of a guessed token, pass
            and drafter, where a pass over one token is 1.
    """

    priors: dict
    cost: float
    counts: dict = field(default_factory=dict)

    def length(self, kind: int, most: int) -> int:
        """The draft length that gives most tokens for the time; 0 to `most`.

        With chance a of each token to be right, a pass over n guesses gives 1 + a + ... + a^n.
        """
        right, wrong = self.counts.setdefault(kind, self.priors[kind])
        a, best, length, got, power = right / (right + wrong), 1.0, 0, 1.0, 1.0
        for n in range(1, most + 1):
            power *= a
            got += power
            rate = got / (1 + START + self.cost * n)
            if rate > best:
                best, length = rate, n
        return length

    def heard(self, kind: int, right: int, wrong: int):
        """So many guesses were right before the first wrong one, if any was."""
        a, b = self.counts[kind]
        fade = FADE ** (right + wrong)
        self.counts[kind] = a * fade + right, b * fade + wrong

    def skipped(self, kind: int):
        """No guess, because the odds are bad. They are slowly forgotten, to try again."""
        now, prior = self.counts[kind], self.priors[kind]
        self.counts[kind] = tuple(p + (n - p) * RETRY for n, p in zip(now, prior, strict=True))


class LookupDrafts:
    """Drafts from the text so far (prompt lookup): how it went on the last time it was like this.

    Args:
        most: Tokens of a draft, 1 to 7. least: Tokens that must match.
    """

    def __init__(self, most: int = MOST, least: int = 2):
        check_most(most)
        self.most, self.least = most, least
        # By length of the match: 2, 3, 4-7, 8-15, 16 and more.
        priors = {2: (1, 2), 3: (1, 1), 4: (2, 1), 8: (4, 1), 16: (8, 1)}
        self.odds = Odds(priors, EACH)
        self.index = Ngrams((), least)
        self.tally = None

    @staticmethod
    def _kind(length: int) -> int:
        return max(k for k in (2, 3, 4, 8, 16) if k <= max(length, 2))

    def start(self, text: list, should_stop: Callable | None = None):
        """Take up a text; only what is new is indexed when it continues the last one."""
        n = len(self.index)
        if n > len(text) or self.index.tokens.tolist() != list(text[:n]):
            self.index, n = Ngrams((), self.least), 0
        self.index.extend(text[n:])

    def hopeless(self, text: list) -> bool:
        """Whether no draft should be made after one more token, whichever that is."""
        self._catch_up(text)
        _, length = self.index.find()
        if length == 0:  # a match that begins with the next token is found after one more
            return True
        kind = self._kind(min(length + 1, LONGEST))
        kinds = [k for k in self.odds.priors if k <= kind]
        if any(self.odds.length(k, self.most) for k in kinds):
            return False
        self.odds.skipped(kind)
        return True

    def propose(self, text: list, room: int, choose: Callable | None = None) -> Draft:
        """A draft of at most `room` tokens after the text."""
        self._catch_up(text)
        place, length = self.index.find()
        if place < 0 or room < 1:
            return Draft([])
        kind = self._kind(length)
        n = self.odds.length(kind, min(self.most, room))
        if n == 0:
            self.odds.skipped(kind)
            return Draft([])
        return Draft(self.index.follow(place, n), kind)

    def heard(self, draft: Draft, right: int):
        """So many tokens of a draft were right."""
        self.odds.heard(draft.kind, right, int(right < len(draft.tokens)))

    def cut(self, n: int):
        """The text was cut to n tokens."""

    def _catch_up(self, text: list):
        self.index.extend(text[len(self.index) :])


class ModelDrafts:
    """Drafts from a smaller model with the same tokens.

    Args:
        sequence: A CachedSequence of the draft model; goes where the text goes. most: Tokens of a
            draft, 1 to 7. cost: Of one of its steps, where the main model's is 1; see step_cost.

    Raises:
        UsageError: Its cache cannot go back.
    """

    def __init__(self, sequence: Any, most: int = MOST, cost: float = 0.1):
        check_most(most)
        if sequence.obstacle:
            raise UsageError(f"Not a draft model: {sequence.obstacle} cannot take tokens back.")
        self.sequence, self.most = sequence, most
        self.odds = Odds({0: (3, 1)}, EACH + cost)
        self.tally = None
        self._ahead = []  # tokens that the cache has read since the sequence's end, and
        self._slots = []  # the slots before each of them and after the last
        self._right = 0  # how many of them stay

    def start(self, text: list, should_stop: Callable | None = None):
        """Read a text but its last token; only what is new.

        Raises:
            UsageError: Some of its ids are not known.
        """
        if min(text) < 0:
            raise UsageError(
                "A draft model must read the whole text, but the ids of what the cache holds are "
                "not known.",
                "Use prompt lookup, or a cache with known ids.",
            )
        self._settle()
        text = self._known(text)
        kept = self.sequence.fit(text)
        self.sequence.read(text[kept:-1], should_stop=should_stop)

    def hopeless(self, text: list) -> bool:
        """Whether no draft should be made after one more token."""
        if self.odds.length(0, self.most):
            return False
        self.odds.skipped(0)
        return True

    def propose(self, text: list, room: int, choose: Callable) -> Draft:
        """A draft of at most `room` tokens after the text.

        Args:
            choose: (draft so far, arrays [1]; logits [1, V]) -> (token [1], log-probabilities [V]
                it was drawn from, or None where it is the likeliest).
        """
        self._settle()
        n = self.odds.length(0, min(self.most, room))
        if n == 0:
            return Draft([])
        sequence, new = self.sequence, self._known(text[len(self.sequence) :])
        sequence.read(new[:-EVERY])  # after a long time without drafts
        new = new[-EVERY:]
        sequence.begin()
        logits = self._forward(mx.array(np.asarray(new, np.int32)))
        sequence.extended(new)
        drawn, laws, self._slots = [], [], [slots_of(sequence.cache)]
        sequence.begin()
        for i in range(n):
            token, law = choose(drawn, logits)
            drawn.append(token.astype(mx.int32))
            laws.append(law)
            if i + 1 < n:
                logits = self._forward(token)
                self._slots.append(slots_of(sequence.cache))
        tokens = mx.concatenate(drawn).tolist()
        self._ahead, self._right = tokens[:-1], 0
        return Draft(tokens, 0, None if laws[0] is None else laws)

    def _known(self, tokens: list) -> list:
        """Ids within the draft model's table, which may have fewer rows than the model's."""
        V = getattr(getattr(self.sequence.model, "args", None), "vocab_size", None)
        return tokens if V is None else [min(t, V - 1) for t in tokens]

    def _forward(self, ids: mx.array) -> mx.array:
        return self.sequence.model(ids[None], cache=self.sequence.cache)[:, -1]

    def heard(self, draft: Draft, right: int):
        """So many tokens of a draft were right."""
        self.odds.heard(0, right, int(right < len(draft.tokens)))
        self._right = min(right, len(self._ahead))

    def cut(self, n: int):
        """The text ends at n tokens; what was read beyond is forgotten."""
        self._right = max(0, min(self._right, n - len(self.sequence)))
        self._settle()

    def _settle(self):
        """Take back what was not right."""
        if not self._slots:
            return
        sequence, right = self.sequence, self._right
        pairs = iter(self._slots[right])
        for c in sequence.cache:
            if isinstance(c, ArraysCache):
                c[CONV], c[STATE] = next(pairs)
            else:
                c.trim(len(self._ahead) - right)
        self._slots = []
        sequence.extended(self._ahead[:right])


def step_cost(model: Any, draft: Any) -> float:
    """What a step of a draft model costs, of one of the main model: the weights' bytes."""
    from mlx.utils import tree_flatten

    size = [sum(x.nbytes for _, x in tree_flatten(m.parameters())) for m in (draft, model)]
    return size[0] / max(size[1], 1)


def check_most(most: int):
    """Raise UsageError for a draft length that a pass has no room for."""
    if not 1 <= most <= MOST:
        raise UsageError(f"Drafts of {most} tokens, expected 1 to {MOST}.")


def check_tokenizers(main: Any, draft: Any):
    """Raise UsageError unless two tokenizers have the same tokens."""
    a, b = (t.get_vocab() for t in (main, draft))
    if a == b:
        return
    other = {i: w for w, i in b.items()}
    word, i = (
        min((i, w) for w, i in a.items() if b.get(w) != i)[::-1]
        if a.items() - b.items()
        else min((i, w) for w, i in b.items() if a.get(w) != i)[::-1]
    )
    raise UsageError(
        f"The draft model has other tokens: {len(b)} beside {len(a)}; token {i} is {word!r} "
        f"in one and {other.get(i)!r} in the draft model.",
        "Take a smaller model of the same family.",
    )
