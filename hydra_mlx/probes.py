"""Probes (spec section 3): texts with hidden facts, and pairs (x, x') that differ in one answer.

Everything is built as text and encoded whole with the model's own tokenizer; where the answers are
is then read off the ids, so that no tokenizer has to be understood here.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from . import haystack
from .errors import UsageError

CAPABILITIES = ("single", "multi")
HEADER = "Below is a text with some facts hidden in it. Read it with care.\n\n"
TRIES = 200  # of answers until clean and corrupted one have the same number of tokens


@dataclass(frozen=True)
class Form:
    """One wording of a probe; {key} and {answer} are filled in.

    Attributes:
        kind: Of the answer, see haystack.answer. fact: The hidden sentence. question: After the
            text. lead: Beginning of the reply, up to the answer.
    """

    kind: str
    fact: str
    question: str
    lead: str


FORMS = (  # a sub-probe each; the first is also the one of `hydra-mlx needle`
    Form(
        "digits",
        "The secret number of the {key} is {answer}.",
        "What is the secret number of the {key}?",
        "The secret number of the {key} is",
    ),
    Form(
        "digits",
        "Anyone who calls the {key} has to dial {answer} first.",
        "What has to be dialled first to call the {key}?",
        "Anyone who calls the {key} has to dial",
    ),
    Form(
        "letters",
        "The access code for the {key} was set to {answer}.",
        "Which access code was set for the {key}?",
        "The access code for the {key} was set to",
    ),
    Form(
        "word",
        "The password of the {key} is the word {answer}.",
        "Which word is the password of the {key}?",
        "The password of the {key} is the word",
    ),
    Form(
        "digits",
        "Ticket {answer} was reserved for the {key}.",
        "Which ticket was reserved for the {key}?",
        "The ticket that was reserved for the {key} is number",
    ),
)


@dataclass(frozen=True)
class Pair:
    """Token ids of a clean and a corrupted text, both followed by the clean answer.

    Attributes:
        clean, corrupt: T ids each; they differ only in the answer within the text.
        start: Position of the first answer token at the end that tells the two answers apart.
        minus: The corrupted answer's tokens from there on, A of them; the clean ones are
            clean[start:].
    """

    clean: tuple
    corrupt: tuple
    start: int
    minus: tuple

    @property
    def plus(self) -> tuple:
        """The clean answer's tokens, A of them."""
        return self.clean[self.start :]

    @property
    def reads(self) -> list:
        """The A positions whose logits predict the answer."""
        return list(range(self.start - 1, len(self.clean) - 1))

    @property
    def first_change(self) -> int:
        """The first position where the two texts differ; T where they do not."""
        both = zip(self.clean, self.corrupt)  # noqa: B905
        return next((i for i, (a, b) in enumerate(both) if a != b), len(self.clean))


@dataclass(frozen=True)
class Needle:
    """A text with hidden facts and the question about one of them.

    Attributes:
        body: Text up to the answer that the model is to give. answer: As text. tokens: Of body.
    """

    body: str
    answer: str
    tokens: int


def compose(
    form: Form, fillers: Sequence, facts: Sequence, depths: Sequence, key: str, header: str = HEADER
) -> str:
    """The whole text up to the answer.

    Args:
        fillers: Sentences around the facts. facts: Sentences to hide. depths: Of each fact, 0 is
            the beginning and 1 the end. key: The one asked about.
    """
    # Stable: facts at the same depth keep their order.
    places = sorted((round(d * len(fillers)), i) for i, d in enumerate(depths))
    parts, at = [], 0
    for place, i in places:
        parts += [*fillers[at:place], facts[i]]
        at = place
    parts += fillers[at:]
    question, lead = form.question.format(key=key), form.lead.format(key=key)
    return f"{header}{' '.join(parts)}\n\nQuestion: {question}\nAnswer: {lead}"


def fit(length: int, count_tokens: Any, build: Any) -> int:
    """How many filler sentences make a text of at most `length` tokens, give or take one.

    Args:
        count_tokens: text -> tokens. build: number of filler sentences -> text.

    Raises:
        UsageError: Not even the question fits.
    """
    least = count_tokens(build(0))
    if least > length:
        raise UsageError(
            f"A length of {length} tokens is too short: the question alone takes {least}.",
            "Ask for a greater length or fewer keys.",
        )
    each = max((count_tokens(build(40)) - least) / 40, 1.0)
    n = int((length - least) / each)
    for _ in range(8):
        room = length - count_tokens(build(n))
        step = int(room // each)
        if room >= 0 and step == 0:
            break
        n = max(n + step, 0)
    while n and count_tokens(build(n)) > length:
        n -= 1
    return n


class TextMaker:
    """Sentences that are drawn once and then looked up, so that texts of any length agree."""

    def __init__(self, rng: random.Random, source: Sequence | None):
        self._stream, self._kept = haystack.sentences(rng, source), []

    def __call__(self, n: int) -> list:
        """The first n sentences."""
        while len(self._kept) < n:
            self._kept.append(next(self._stream))
        return self._kept[:n]


def make_needle(
    tokenizer: Any,
    rng: random.Random,
    length: int,
    depth: float,
    keys: int = 1,
    digits: int = 7,
    source: Sequence | None = None,
) -> Needle:
    """A text of about `length` tokens, its answer included, with `keys` facts and a question.

    Args:
        depth: Of the fact that is asked for; the others are put anywhere. source: Sentences to
            use instead of made ones.

    Raises:
        UsageError: The length is too short.
    """
    form, names = FORMS[0], haystack.keys(rng, keys)
    answers = [haystack.answer(rng, form.kind, digits) for _ in names]
    facts = [form.fact.format(key=k, answer=a) for k, a in zip(names, answers, strict=True)]
    depths = [depth, *(rng.random() for _ in names[1:])]
    text = TextMaker(rng, source)

    def build(n: int) -> str:
        return compose(form, text(n), facts, depths, names[0])

    def tokens(body: str) -> int:
        return len(tokenizer.encode(f"{body} {answers[0]}"))

    body = build(fit(length, tokens, build))
    return Needle(body, answers[0], len(tokenizer.encode(body)))


def make_pair(
    tokenizer: Any,
    rng: random.Random,
    form: Form,
    length: int,
    depth: float,
    keys: int = 1,
    source: Sequence | None = None,
) -> Pair:
    """A pair (x, x'): the text of the asked fact has another answer of the same kind and length.

    Raises:
        UsageError: Too short a length, or a tokenizer for which no such answers are found.
    """
    names = haystack.keys(rng, keys)
    others = [haystack.answer(rng, form.kind) for _ in names[1:]]
    depths = [depth, *(rng.random() for _ in others)]
    text = TextMaker(rng, source)
    rest = [form.fact.format(key=k, answer=a) for k, a in zip(names[1:], others, strict=True)]

    def build(n: int, answer: str) -> str:
        fact = form.fact.format(key=names[0], answer=answer)
        return compose(form, text(n), [fact, *rest], depths, names[0])

    first = haystack.answer(rng, form.kind)
    n = fit(
        length,
        lambda body: len(tokenizer.encode(f"{body} {first}")),
        lambda n: build(n, first),
    )
    for _ in range(TRIES):
        plus = haystack.answer(rng, form.kind)
        minus = haystack.answer(rng, form.kind, unlike=plus)
        pair = encode_pair(tokenizer, build(n, plus), build(n, minus), plus, minus)
        if pair is not None and len(pair.clean) <= length:
            return pair
        n = max(n - 1, 0) if pair is not None else n
    raise UsageError(
        f"No two answers of kind {form.kind!r} have the same number of tokens in this tokenizer, "
        f"or {length} tokens are too few for the question.",
        "Ask for a greater --length.",
    )


def encode_pair(tokenizer: Any, clean: str, corrupt: str, plus: str, minus: str) -> Pair | None:
    """Encode a pair; None where the two answers are not interchangeable token by token."""
    x = tuple(tokenizer.encode(f"{clean} {plus}"))
    other = tuple(tokenizer.encode(f"{corrupt} {plus}"))
    wrong = tuple(tokenizer.encode(f"{clean} {minus}"))
    if not len(x) == len(other) == len(wrong):
        return None
    start = next((i for i, (a, b) in enumerate(zip(x, wrong)) if a != b), 0)  # noqa: B905
    changed = [i for i, (a, b) in enumerate(zip(x, other)) if a != b]  # noqa: B905
    # The answer must be the end of the text, and the change must lie before it.
    if start == 0 or not changed or changed[-1] >= start - 1:
        return None
    if tuple(tokenizer.encode(clean))[: start - 1] != x[: start - 1]:
        return None
    return Pair(x, other, start, wrong[start:])


def pair_rng(seed: int, capability: str, sub_probe: int, index: int) -> random.Random:
    """The random numbers of one pair: the same whatever else is made before it."""
    return random.Random(f"{seed}/{capability}/{sub_probe}/{index}")
