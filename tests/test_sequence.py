"""CachedSequence: whatever is done or broken off, it equals a fresh run bit for bit."""

import random
from dataclasses import dataclass

import hydra_mlx  # noqa: F401  (before mlx)
from hydra_mlx.cache import quantise_cache
from hydra_mlx.checkpoints import Checkpoints
from hydra_mlx.errors import CacheError, UsageError
from hydra_mlx.sequence import CachedSequence, best, make_checkpoints

import mlx.core as mx
import pytest
from mlx_lm.models.cache import RotatingKVCache

from .checkpoints import BASE as LLAMA
from .checkpoints import base_model
from .sequences import BITS, VARIANTS, V, difference, model_of, new_cache, some

STEP = 8


def quantise(name: str):
    return (lambda cache: quantise_cache(cache, BITS[name], 32)) if name in BITS else None


def calls_of(start: int, n: int, N: int, step: int = STEP) -> list:
    """Lengths of the calls that read n tokens from a position, counted one token at a time."""
    lengths, here = [], 0
    for position in range(start + 1, start + n + 1):
        here += 1
        if position % step == 0 or position % N == 0 or position == start + n:
            lengths.append(here)
            here = 0
    return lengths


class Broken(Exception):
    """Raised where a call is broken off."""


class Breaking:
    """In the place of a layer: fails at its n-th call, before or after the layer's work."""

    def __init__(self, layers: list, i: int, after: int, late: bool):
        self.layers, self.i, self.left, self.late = layers, i, after, late

    def __enter__(self):
        self.layer, self.layers[self.i] = self.layers[self.i], self

    def __exit__(self, *exc):
        self.layers[self.i] = self.layer

    def __getattr__(self, name):
        return getattr(self.layer, name)

    def __call__(self, *args, **options):
        self.left -= 1
        out = self.layer(*args, **options) if self.left or self.late else None
        if self.left == 0:
            raise Broken
        return out


@dataclass
class Run:
    """A sequence under test, the calls a fresh run makes, and which tokens were the model's."""

    name: str
    sequence: CachedSequence
    calls: list  # token lists
    replied: set  # positions

    @property
    def tokens(self) -> list:
        return [t for call in self.calls for t in call]

    def begin(self, tokens: list):
        """The calls of reading tokens."""
        a, N = len(self.tokens), self.sequence.checkpoints.grid.every
        for n in calls_of(a, len(tokens), N):
            self.calls.append(tokens[:n])
            tokens = tokens[n:]

    def cut(self, position: int):
        kept, calls = 0, []
        for call in self.calls:
            calls.append(call[: position - kept])
            kept += len(calls[-1])
        self.calls = [c for c in calls if c]
        self.replied = {p for p in self.replied if p < position}

    def read(self, tokens: list, mark: bool, should_stop=None):
        self.begin(tokens)
        self.sequence.read(tokens, STEP, should_stop=should_stop, mark=mark)
        self.cut(len(self.sequence))

    def reply(self, tokens: list, n: int, close_after: int = 99, should_stop=None) -> list:
        """Greedy; the calls are known before the end, so that the reply may be broken off."""
        self.begin(tokens[:-1])
        self.calls.append(tokens[-1:])
        stream = self.sequence.generate(tokens, n, step=STEP, should_stop=should_stop)
        said = []
        for token in stream:
            said.append(token)
            self.replied.add(len(self.tokens))
            self.calls.append([token])
            if len(said) == close_after:
                stream.close()
        self.cut(len(self.sequence))
        return said

    def fit(self, new: list):
        expected = self.sequence.keepable(new)
        kept = self.sequence.fit(new)
        assert kept == expected == len(self.sequence) < max(len(new), 1)
        assert new[:kept] == self.tokens[:kept]
        self.cut(kept)
        return kept

    def fork(self) -> "Run":
        return Run(self.name, self.sequence.fork(), list(self.calls), set(self.replied))

    def check(self):
        model, fresh, at = model_of(self.name), new_cache(self.name), 0
        tokens = self.tokens
        assert self.sequence.tokens == tokens and len(self.sequence) == len(tokens)
        for call in self.calls:
            logits = model(mx.array([call]), cache=fresh)
            at += len(call)
            if at in self.replied:
                assert mx.argmax(logits[0, -1]).item() == tokens[at]
        assert difference(self.sequence.cache, fresh) == 0, [len(c) for c in self.calls]
        points = self.sequence.checkpoints
        assert len(points.positions) <= points.grid.most + points.marks


def start(name: str, every: int = 16, most: int = 4, marks: int = 2) -> Run:
    points = Checkpoints(every, most, marks)
    return Run(name, CachedSequence(model_of(name), points, kv=quantise(name)), [], set())


def operate(run: Run, rng: random.Random) -> Run | None:
    """One random operation; a fork is returned."""
    new = [rng.randrange(V) for _ in range(rng.choice([1, 2, 3, 5, 8, 13, 21]))]
    tokens = run.tokens
    what = rng.choice(
        ["read", "reply", "edit", "edit", "regenerate", "fork", "back", "stop", "close", "break"]
    )
    if what == "read":
        run.read(new, rng.random() < 0.3)
    elif what == "reply":
        run.reply(new, rng.randrange(6))
    elif what == "edit":
        changed = tokens[: rng.randint(0, len(tokens))] + new
        run.reply(changed[run.fit(changed) :], 2)
    elif what == "regenerate" and len(tokens) > 2:
        prompt = tokens[: rng.randint(1, len(tokens))]
        run.reply(prompt[run.fit(prompt) :], 3)
    elif what == "fork":
        return run.fork()
    elif what == "back":
        position = rng.randint(0, len(tokens))
        n = run.sequence.back_to(position)
        assert n <= run.sequence.checkpoints.bound(position, STEP)
        run.cut(position)
    elif what == "stop":
        answers = iter([False] * rng.randrange(4))
        run.reply(new, 2, should_stop=lambda: next(answers, True))
    elif what == "close":
        run.reply(new, 9, close_after=rng.randint(1, 4))
    elif what == "break":
        layers = model_of(run.name).model.layers
        breaking = Breaking(
            layers, rng.randrange(len(layers)), rng.randint(1, 6), rng.random() < 0.5
        )
        try:
            with breaking:
                run.reply(new, 3)
        except Broken:
            run.cut(len(run.sequence))
    return None


@pytest.mark.parametrize("name", VARIANTS)
def test_random_sequences_equal_a_fresh_run(name):
    """24 sequences a model, 192 in all, of 8 operations; forks go on beside their parents."""
    for seed in range(24):
        rng = random.Random(f"sequence {name} {seed}")
        runs = [start(name, rng.choice([8, 16, 24]), rng.choice([2, 4, 6]))]
        for _ in range(8):
            fork = operate(rng.choice(runs), rng)
            if fork is not None and len(runs) < 3:
                runs.append(fork)
        for run in runs:
            run.check()


@pytest.mark.parametrize("name", ["mixed", "one of each", "4 bit"])
def test_an_edited_document_equals_a_new_one(name):
    """Reply, cache and all: with the same grid nothing tells them apart."""
    old = some(300)
    for at in (90, 180, 285):
        run, fresh = start(name, 32, 32), start(name, 32, 32)
        run.reply(old, 5)
        new = [*old[:at], (old[at] + 1) % V, 3, *old[at + 1 :]]
        kept = run.fit(new)
        assert at - 32 < kept <= at
        assert run.reply(new[kept:], 20) == fresh.reply(new, 20)
        assert difference(run.sequence.cache, fresh.sequence.cache) == 0
        assert run.sequence.tokens == fresh.sequence.tokens


def test_regenerate_costs_one_token():
    run = start("mixed", 64, 2, 4)
    prompt = some(50)
    first = run.reply(prompt, 6)
    kept = run.fit(prompt)
    assert kept == 49 and run.reply(prompt[kept:], 6) == first
    then = [*run.tokens, 1, 2, 3]
    assert run.fit(then) == 56
    run.reply(then[56:], 4)
    assert run.fit([*then[:56], 9, 9]) == 56  # the last user turn changed: back to the reply's end
    run.check()


def test_broken_off_everywhere():
    """Each layer, each call, before and after: what is left is a whole number of calls."""
    for name in ("mixed", "one of each", "all LA"):
        layers = model_of(name).model.layers
        for i in range(len(layers)):
            for after in (1, 3, 4, 6):
                for late in (False, True):
                    run = start(name)
                    with pytest.raises(Broken), Breaking(layers, i, after, late):
                        run.reply(some(20), 9)
                    run.cut(len(run.sequence))
                    run.check()
                    run.reply([1, 2], 2)
                    run.check()


def test_a_rollback_broken_off():
    name = "one of each"
    layers = model_of(name).model.layers
    run = start(name)
    run.read(some(45), False)
    for i in range(3):
        with pytest.raises(Broken), Breaking(layers, i, 1, True):
            run.sequence.back_to(37)
        assert len(run.sequence) == 32
        run.cut(32)
        run.check()
        run.read(some(13, i), False)


def test_a_broken_beginning_is_empty_again():
    """A layer of LA heads only moves its state before any offset moves."""
    model = model_of("all LA")
    run = start("all LA")
    with pytest.raises(Broken), Breaking(model.model.layers, 1, 1, False):
        run.sequence.read([1, 2, 3])
    assert len(run.sequence) == 0 and run.sequence.tokens == []
    assert all(x is None for c in run.sequence.cache[1:] for x in c.cache)


def test_forks_share_a_document():
    document = start("mixed")
    document.read(some(50), True)
    forks = [document.fork() for _ in range(3)]
    for i, run in enumerate(forks):
        run.reply(some(10 + i, i), 5)
    tokens = forks[1].tokens
    found, kept = best([document.sequence, *(f.sequence for f in forks)], [*tokens, 1])
    assert found is forks[1].sequence and kept == len(tokens)
    found, kept = best([f.sequence for f in forks] + [document.sequence], [*some(50), 30, 30])
    assert found is document.sequence and kept == 50
    assert best([document.sequence], [V - 1, 1]) == (None, 0) and best([], [1]) == (None, 0)
    for run in [document, *forks]:
        run.check()
    assert document.sequence.nbytes > document.sequence.checkpoints.nbytes > 0


def test_reading_in_steps():
    run, seen = start("mixed"), []
    n = run.sequence.read(some(20), 6, lambda done, total: seen.append((done, total)))
    assert n == 20 and seen == [(6, 20), (12, 20), (16, 20), (18, 20), (20, 20)]
    assert run.sequence.read([]) == 0
    with pytest.raises(UsageError, match="step is 0"):
        run.sequence.read([1], 0)
    with pytest.raises(UsageError, match="no tokens"):
        run.sequence.generate([])
    with pytest.raises(UsageError, match="Position 21 is outside the 20"):
        run.sequence.back_to(21)


def test_samplers_and_processors_see_everything():
    seen = []

    def note(tokens, logits):
        seen.append(tokens.tolist())
        return logits

    sequence = CachedSequence(model_of("mixed"))
    sequence.read([1, 2])
    said = list(
        sequence.generate([3, 4], 3, lambda logprobs: mx.array([5]), logits_processors=[note])
    )
    assert said == [5, 5, 5] and sequence.tokens == [1, 2, 3, 4, 5, 5, 5]
    assert seen == [[1, 2, 3, 4, *[5] * n] for n in range(4)]


def test_a_cache_from_elsewhere():
    model, tokens = model_of("mixed"), some(40)
    cache = new_cache("mixed")
    model(mx.array([tokens]), cache=cache)
    sequence = CachedSequence(model, Checkpoints(16, 4), cache, tokens)
    assert sequence.cache is cache and sequence.tokens == tokens
    assert sequence.keepable([*tokens, 1]) == 40 and sequence.keepable([*tokens[:39], 1]) == 0
    list(sequence.generate([1, 2], 3))
    assert sequence.back_to(41) == 0  # the mark before the prompt's last token
    assert sequence.fit([*tokens[:39], 1, 1]) == 0 and len(sequence) == 0
    sequence.read(tokens, 16)
    fresh = CachedSequence(model, Checkpoints(16, 4))
    fresh.read(tokens, 16)
    assert difference(cache, fresh.cache) == 0
    unknown = CachedSequence(model, Checkpoints(16, 4), fresh.fork().cache)
    unknown.read([1] * 5)
    assert len(unknown) == 45 and unknown.keepable(tokens) == 0
    with pytest.raises(CacheError, match="not known"):
        unknown.back_to(30)
    with pytest.raises(CacheError, match="3 token ids, but the cache holds 40"):
        CachedSequence(model, None, fresh.cache, [1, 2, 3])
    with pytest.raises(CacheError, match="go to 40, but the cache holds 0"):
        CachedSequence(model, fresh.checkpoints, new_cache("mixed"))


def test_budgets():
    model = model_of("mixed")
    assert make_checkpoints(model, 10**6).nbytes == 0
    with pytest.raises(UsageError, match="for checkpoints, but one takes"):
        make_checkpoints(model, 100)
    off = CachedSequence(model, make_checkpoints(model, None))
    off.read(some(30), 8, mark=True)
    one = off.checkpoints.nbytes
    off.read(some(30), 8, mark=True)
    assert off.checkpoints.positions == [] and off.checkpoints.nbytes == one
    assert off.keepable([*some(30), 1]) == 0 and off.keepable([*off.tokens, 1]) == 60


# ------------------------------------------------------------------------------- other models


@pytest.fixture(scope="module")
def llama():
    mx.random.seed(3)
    return base_model({"model_type": "llama", **LLAMA})


def test_a_model_of_keys_and_values_goes_back_too(llama):
    old = some(60)
    new = [*old[:33], 1, *old[34:]]
    sequence = CachedSequence(llama, make_checkpoints(llama, 1, every=16))
    fresh = CachedSequence(llama, make_checkpoints(llama, 1, every=16))
    list(sequence.generate(old, 4))
    assert sequence.fit(new) == 32
    assert list(sequence.generate(new[32:], 9)) == list(fresh.generate(new, 9))
    assert difference(sequence.cache, fresh.cache) == 0


def test_a_cache_that_cannot_go_back(llama):
    """It is extended, or begun anew; a call broken off empties it."""
    llama.make_cache = lambda: [RotatingKVCache(32) for _ in llama.layers]
    try:
        sequence = CachedSequence(llama, make_checkpoints(llama, 1))
        said = list(sequence.generate(some(20), 3))
        assert "RotatingKVCache" in sequence.obstacle and len(sequence) == 23
        with pytest.raises(CacheError, match="RotatingKVCache cannot go back"):
            sequence.back_to(10)
        assert sequence.fit([*some(20), *said, 1]) == 23
        other = sequence.fork()
        assert other.fit(some(20)) == 0 and len(sequence) == 23
        assert list(other.generate(some(20), 3)) == said
        with pytest.raises(Broken), Breaking(llama.model.layers, 1, 1, False):
            sequence.read([1])
        assert len(sequence) == 0 and sequence.cache[0].offset == 0
        assert list(sequence.generate(some(20), 3)) == said
    finally:
        del llama.make_cache
