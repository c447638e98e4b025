"""Speculative decoding: the same replies, the same distribution, caches that are exact after it."""

from types import SimpleNamespace

from hydra_mlx.checkpoints import Checkpoints
from hydra_mlx.config import HydraArgs
from hydra_mlx.drafts import Draft, LookupDrafts, ModelDrafts, Odds, check_tokenizers
from hydra_mlx.errors import UsageError
from hydra_mlx.model import Model
from hydra_mlx.sampling import SamplingOptions
from hydra_mlx.sequence import CachedSequence
from hydra_mlx.speculative import Judge
from hydra_mlx.thinning import Calls
from hydra_mlx.trial import Trial

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import KVCache, RotatingKVCache

from .chi import fits
from .planted import planted_model
from .sequences import BASE, BITS, VARIANTS, V, difference, model_of, new_cache, some
from .tolerance import rel_rms

ROUNDING = 1e-5  # passes over other numbers of tokens, float32


def rounding(name: str) -> float:
    """Of passes over other numbers of tokens; in few bits a last bit can become a whole step."""
    return 3e-2 if name in BITS else ROUNDING


class Scripted:
    """Drafts that are right with a given chance, because they know the reply."""

    def __init__(self, reply: list, right: float, seed: int, most: int = 7):
        self.reply, self.right, self.most = reply, right, most
        self.rng, self.tally = np.random.RandomState(seed), None

    def start(self, text: list, should_stop=None):
        self.end = len(text)

    def hopeless(self, text: list) -> bool:
        return self.rng.rand() < 0.3

    def propose(self, text: list, room: int, choose=None) -> Draft:
        n, at = min(self.rng.randint(0, self.most + 1), room), len(text) - self.end
        guesses = self.reply[at : at + n]
        return Draft([t if self.rng.rand() < self.right else (t + 1) % V for t in guesses])

    def heard(self, draft: Draft, right: int):
        pass

    def cut(self, n: int):
        pass


def sequence(name: str) -> CachedSequence:
    return CachedSequence(model_of(name), Checkpoints(every=8, most=8), new_cache(name))


def reply(of: CachedSequence, prompt: list, n: int = 32, **options) -> list:
    return list(of.generate(prompt, n, step=16, **options))


def same_but_for_ties(name: str, prompt: list, plain: list, other: list):
    """Equal, or from a place on where two tokens are equally likely up to rounding."""
    if plain == other:
        return
    at = next(i for i, (a, b) in enumerate(zip(plain, other, strict=True)) if a != b)
    logits = model_of(name)(mx.array([[*prompt, *plain[:at]]]))[0, -1]
    gap = abs(logits[plain[at]] - logits[other[at]]).item()
    assert gap < 10 * rounding(name) * mx.abs(logits).max().item(), (at, gap)


@pytest.mark.parametrize("name", VARIANTS)
def test_greedy_is_plain_greedy(name):
    for seed in range(3):
        prompt = some(12 + 5 * seed, seed)
        plain = sequence(name)
        wanted = reply(plain, prompt)
        for drafts in (
            Scripted(wanted, 0.7, seed),
            Scripted(wanted, 0.0, seed),
            LookupDrafts(),
            ModelDrafts(sequence("fused" if seed % 2 else "all LA"), 5),
        ):
            mine = sequence(name)
            found = reply(mine, prompt, drafts=drafts)
            same_but_for_ties(name, prompt, wanted, found)
            assert mine.tokens == [*prompt, *found] and drafts.tally.tokens == 32
            if found == wanted:
                assert difference(mine.cache, plain.cache) < rounding(name)


def test_good_drafts_save_passes():
    """And a draft model that is the model itself is always right."""
    prompt = some(20)
    wanted = reply(sequence("mixed"), prompt)
    for drafts in (Scripted(wanted, 1.0, 0), ModelDrafts(sequence("mixed"), 4)):
        reply(sequence("mixed"), prompt, drafts=drafts)
        assert drafts.tally.accepted == drafts.tally.drafted > 0
        assert drafts.tally.passes < 20


@pytest.mark.parametrize("name", VARIANTS)
def test_a_trial_is_taken_back(name):
    model, tokens = model_of(name), some(8, 1)
    cache, before = new_cache(name), new_cache(name)
    for c in (cache, before):
        model(mx.array([some(11)]), cache=c)
    trial = Trial(model, cache, tokens)
    for n in (8, 6, 3, 1):  # and again, to fewer
        trial.keep(n)
        fresh = new_cache(name)
        model(mx.array([some(11)]), cache=fresh)
        model(mx.array([tokens[:n]]), cache=fresh)
        assert difference(cache, fresh) < rounding(name) and trial.kept == n
    trial.keep(0)
    assert difference(cache, before) == 0


def test_a_trial_of_an_empty_cache():
    model, cache = model_of("mixed"), new_cache("mixed")
    Trial(model, cache, [1, 2, 3]).keep(0)
    a, b = model(mx.array([[5, 6]]), cache=cache), model(mx.array([[5, 6]]))
    assert mx.array_equal(a, b)


def replayed(of: CachedSequence, name: str, position: int) -> list:
    """A fresh cache of the calls that are noted, the last one cut."""
    cache, model, calls = new_cache(name), model_of(name), of.checkpoints.calls
    for a, b in calls.between(0, position):
        rejected = calls.rejected(a) if calls.begins(b) else ()
        Trial(model, cache, [*of.tokens[a:b], *rejected]).keep(b - a)
    return cache


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("right", [0.4, 0.9])
def test_rollback_after_drafts_is_exact(name, right):
    """What is noted of a run gives its cache bit for bit, rejected drafts included; so does a
    rollback, which begins at a checkpoint."""
    prompt = some(13, 5)
    wanted = reply(sequence(name), prompt, 24)
    whole = sequence(name)
    reply(whole, prompt, 24, drafts=Scripted(wanted, right, 3))
    calls = whole.checkpoints.calls
    assert any(calls.rejected(p) for p in range(13, 37))
    assert difference(whole.cache, replayed(whole, name, len(whole))) == 0
    again = Calls.of(calls.end, [list(r) for r in calls.runs])  # as files keep them
    assert [again.rejected(p) for p in range(37)] == [calls.rejected(p) for p in range(37)]
    for position in range(14, 37, 4):
        back = whole.fork()
        assert back.back_to(position) <= 24
        assert difference(back.cache, replayed(whole, name, position)) == 0
        back.back_to(position - 3)  # once more, over calls that were noted anew
        assert difference(back.cache, replayed(back, name, position - 3)) == 0


@pytest.mark.parametrize("after", range(1, 12, 2))
def test_closed_anywhere_holds_what_was_yielded(after):
    prompt = some(9, 2)
    wanted = reply(sequence("mixed"), prompt)
    for drafts in (Scripted(wanted, 1.0, 0), ModelDrafts(sequence("mixed"), 5)):
        mine = sequence("mixed")
        found = mine.generate(prompt, drafts=drafts)
        got = [next(found) for _ in range(after)]
        found.close()
        assert got == wanted[:after] and mine.tokens == [*prompt, *got]
        fresh = new_cache("mixed")
        model_of("mixed")(mx.array([mine.tokens]), cache=fresh)
        assert difference(mine.cache, fresh) < ROUNDING


@pytest.mark.parametrize("n", [0, 1, 2])
def test_few_tokens(n):
    prompt = some(9, 2)
    wanted = reply(sequence("mixed"), prompt, n)
    mine = sequence("mixed")
    done = []
    found = mine.generate(
        prompt, n, drafts=Scripted(wanted, 1.0, 0), progress=lambda *a: done.append(a)
    )
    assert list(found) == wanted and len(mine) == 9 + n and done[-1] == (9, 9)


def test_a_broken_pass_is_mended():
    prompt, mine = some(9, 2), sequence("mixed")
    wanted = reply(sequence("mixed"), prompt)
    broken = Scripted(wanted, 1.0, 0)
    found = mine.generate(prompt, drafts=broken)
    got = [next(found)]
    broken.heard = lambda draft, right: 1 / 0
    with pytest.raises(ZeroDivisionError):
        got.extend(found)
    assert mine.tokens == [*prompt, *wanted][: len(mine)] and len(mine) >= 9
    rest = reply(mine, ([*prompt, *wanted])[len(mine) :][:1], 3)
    at = len(mine) - 9 - 3
    assert rest == wanted[at : at + 3]


def test_stock_models():
    """mlx-lm's Llama, as the model and as the draft model."""
    llama = planted_model()
    prompt = [5, 9, 31, 3, 4, 7, 5]

    def new():
        return CachedSequence(llama, Checkpoints(every=8, most=8))

    wanted = list(new().generate(prompt, 20))
    for drafts in (ModelDrafts(new(), 3), LookupDrafts(3)):
        mine = new()
        assert list(mine.generate(prompt, 20, drafts=drafts)) == wanted
        assert drafts.tally.accepted > 0 and mine.tokens == [*prompt, *wanted]
    small = ModelDrafts(new(), 3)
    main = sequence("mixed")
    assert reply(main, prompt, 8, drafts=small) == reply(sequence("mixed"), prompt, 8)
    rotating = CachedSequence(llama, cache=[RotatingKVCache(8) for _ in llama.layers])
    with pytest.raises(UsageError, match="RotatingKVCache"):
        rotating.generate(prompt, drafts=LookupDrafts())
    with pytest.raises(UsageError, match="RotatingKVCache"):
        ModelDrafts(rotating)


@pytest.mark.parametrize("rows", [V + 9, V - 6])
@pytest.mark.parametrize("temp", [0.0, 1.0])
def test_draft_models_with_other_tables(rows, temp):
    """More or fewer rows than the model has: ids stay within both tables."""
    args = HydraArgs.from_dict({**BASE, "vocab_size": rows})
    small, prompt = Model(args), [*some(10), V - 1]
    mx.eval(small.parameters())
    options = SamplingOptions(temp=temp, presence_penalty=0.5)
    sampler, processors = options.make(TOKENIZER)
    drafts, mine = ModelDrafts(CachedSequence(small), 3), sequence("mixed")
    found = reply(
        mine, prompt, sampler=sampler, logits_processors=processors, drafts=drafts,
        law=options.law(TOKENIZER),
    )  # fmt: skip
    assert max(found) < V and drafts.tally.drafted > 0
    assert max(drafts.sequence.tokens) < rows
    if temp == 0:
        assert found == reply(sequence("mixed"), prompt, logits_processors=processors)


def test_a_draft_model_follows_the_conversation():
    """What it has read already it does not read again."""
    drafts = ModelDrafts(sequence("mixed"), 3)
    mine, prompt = sequence("mixed"), some(40, 3)
    first = reply(mine, prompt, 8, drafts=drafts)
    reads = []
    read = drafts.sequence.read
    drafts.sequence.read = lambda tokens, **k: reads.append(len(tokens)) or read(tokens, **k)
    text = [*prompt, *first, *some(5, 4)]
    second = reply(mine, text[len(mine) :], 8, drafts=drafts)
    assert sum(reads) < 8 + 8 + 5 and drafts.tally.accepted > 0
    assert second == reply(sequence("mixed"), text, 8)
    mine.back_to(20)  # an edit
    third = [*prompt[:20], *some(9, 9)]
    assert reply(mine, third[20:], 8, drafts=drafts) == reply(sequence("mixed"), third, 8)


# ----------------------------------------------------------------------------------- sampling

OPTIONS = {
    "plain": {"temp": 1.0},
    "top p": {"temp": 0.8, "top_p": 0.7},
    "min p, top k": {"temp": 1.3, "min_p": 0.1, "top_k": 4},
    "xtc": {"temp": 1.0, "xtc_probability": 0.5, "xtc_threshold": 0.15},
}
TOKENIZER = SimpleNamespace(encode=lambda text, **_: [0], eos_token_ids=[1])


def drawn_from(options: dict, logits: np.ndarray) -> np.ndarray:
    """The distribution that these options ask for, in float64."""
    p = np.exp(logits - logits.max())
    p /= p.sum()
    full = p.copy()
    if "top_p" in options:
        order = np.argsort(-p)
        above = np.cumsum(p[order]) - p[order]
        p[order[above >= options["top_p"]]] = 0
    if "min_p" in options:
        p[full < options["min_p"] * full.max()] = 0
    mixture = [(1.0, p)]
    if "xtc_probability" in options:
        x, over = options["xtc_probability"], p > options["xtc_threshold"]
        cut = p.copy()
        cut[over & (p > p[over].min(initial=2.0)) & (np.arange(len(p)) > 1)] = 0
        mixture = [(1 - x, p), (x, cut)]
    total = 0
    for weight, p in mixture:
        if "top_k" in options:
            p[np.argsort(-p)[options["top_k"] :]] = 0
        q = p ** (1 / options["temp"])
        total = total + weight * q / q.sum()
    return total


@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("drafted", ["certain", "sampled", "sampled, more tokens"])
def test_the_distribution_is_unchanged(kind, drafted):
    """First token, second token after an accepted first one, third after two."""
    options, rng, n = SamplingOptions(**OPTIONS[kind]), np.random.RandomState(1), 1200
    logits = rng.standard_normal((3, 7)).astype(np.float32) * 1.5
    wanted = [drawn_from(OPTIONS[kind], x.astype(float)) for x in logits]
    guesses = [int(np.argsort(w)[-2 if i else -1]) for i, w in enumerate(wanted[:2])]
    sampler, law = options.make(TOKENIZER)[0], options.law(TOKENIZER)
    judge = Judge(sampler, (), law)
    W = 9 if drafted.endswith("more tokens") else 7
    laws = [rng.standard_normal(W) for _ in range(2)]
    laws = [x - np.log(np.exp(x).sum()) for x in laws]
    mx.random.seed(7)
    counts, later = np.zeros((3, 7)), mx.array(logits)
    for _ in range(n):
        if drafted == "certain":
            draft = Draft(guesses)
        else:
            tokens = [rng.choice(W, p=np.exp(x)) for x in laws]
            draft = Draft([int(t) for t in tokens], 0, [mx.array(x, mx.float32) for x in laws])
        found = judge.verdict(draft, later)
        for i, token in enumerate(found):
            counts[i, token] += 1
    assert counts[1].sum() > n / 20
    for i in range(3):
        assert fits(counts[i], wanted[i]), (i, counts[i], wanted[i])


def test_a_wrong_distribution_would_be_noticed():
    """The test's own power: drafts accepted too readily do not fit."""
    rng, p = np.random.RandomState(0), np.array([0.5, 0.3, 0.2])
    kept = rng.rand(2500) < 1.15 * p[0]
    found = np.where(kept, 0, 1 + (rng.rand(2500) > 0.6))
    assert not fits(np.bincount(found, minlength=3), p)
    assert fits(np.bincount(rng.choice(3, 2500, p=p), minlength=3), p)


def test_sampled_replies_of_a_model():
    """The third token of a reply, with a draft model that samples too, against all paths to it."""
    model, prompt, options = model_of("mixed"), some(10, 3), {"temp": 0.7, "top_k": 3}
    chosen = SamplingOptions(**options)

    def after(tokens: list) -> np.ndarray:
        return drawn_from(options, np.array(model(mx.array([tokens]))[0, -1], float))

    wanted = np.zeros(V)
    for a in np.flatnonzero(first := after(prompt)):
        for b in np.flatnonzero(second := after([*prompt, int(a)])):
            wanted += first[a] * second[b] * after([*prompt, int(a), int(b)])
    main, drafts = sequence("mixed"), ModelDrafts(sequence("fused"), 3)
    main.read(prompt[:-1])
    mx.random.seed(3)
    counts, n = np.zeros(V), 300
    sampler, law = chosen.make(TOKENIZER)[0], chosen.law(TOKENIZER)
    for _ in range(n):
        one = main.fork()
        found = list(one.generate(prompt[-1:], 3, sampler, drafts=drafts, law=law))
        counts[found[2]] += 1
    assert fits(counts, wanted), (counts, wanted)


def test_law_and_sampler_agree():
    rng = np.random.RandomState(5)
    for kind, values in OPTIONS.items():
        options = SamplingOptions(**values)
        logits = rng.standard_normal(7)
        sampler, law = options.make(TOKENIZER)[0], options.law(TOKENIZER)
        rows = mx.array(np.tile(logits - np.log(np.exp(logits).sum()), (1, 1)), mx.float32)
        mx.random.seed(1)
        by_law = np.mean([np.array(mx.softmax(law(rows), -1))[0] for _ in range(400)], axis=0)
        drawn = np.bincount([sampler(rows).item() for _ in range(400)], minlength=7)
        assert rel_rms(by_law, drawn_from(values, logits)) < 0.1, kind
        assert fits(drawn, drawn_from(values, logits)), kind
    assert SamplingOptions().law(TOKENIZER) is None


def test_penalties_see_drafted_tokens():
    """Processors get the text up to each place, accepted drafts included."""
    options = SamplingOptions(repetition_penalty=1.5, repetition_context_size=6)
    processors, prompt = options.make(TOKENIZER)[1], some(12, 4)
    wanted = reply(sequence("mixed"), prompt, logits_processors=processors)
    assert wanted != reply(sequence("mixed"), prompt)
    for drafts in (Scripted(wanted, 0.8, 1), LookupDrafts(), ModelDrafts(sequence("mixed"), 4)):
        mine = sequence("mixed")
        assert reply(mine, prompt, logits_processors=processors, drafts=drafts) == wanted
    assert drafts.tally.accepted == drafts.tally.drafted > 0


# ------------------------------------------------------------------------------------- lengths


def test_draft_lengths_follow_the_odds():
    odds = Odds({0: (3, 1)}, 0.11)
    assert 2 <= odds.length(0, 7) <= 6
    for _ in range(20):
        odds.heard(0, 7, 0)
    assert odds.length(0, 7) == 7 and odds.length(0, 3) == 3
    for _ in range(40):
        odds.heard(0, 0, 1)
    assert odds.length(0, 7) == 0
    steps = 0
    while not odds.length(0, 7):
        odds.skipped(0)
        steps += 1
    assert 20 < steps < 400


def test_hopeless_drafts_cost_little():
    """On a text where every guess is wrong, few are made."""
    rng = np.random.RandomState(0)
    drafts = LookupDrafts()
    text = rng.randint(0, 12, 400).tolist()
    drafts.start(text)
    drafted = 0
    for _ in range(2000):
        if not drafts.hopeless(text):
            draft = drafts.propose(text, 100)
            if draft.tokens:
                drafted += len(draft.tokens)
                drafts.heard(draft, 0)
        text.append(int(rng.randint(0, 12)))
    assert drafted < 100  # of 2000 steps, each token an 11 % of one: 0.5 %


def test_lookup_quotes():
    """A reply that copies takes few passes: the planted model, whose answers repeat facts."""
    drafts, period = LookupDrafts(), [7, 8, 9, 10, 11]
    drafts.start(period * 4)
    draft = drafts.propose(period * 4, 100)
    assert draft.tokens == (period * 2)[: len(draft.tokens)] and len(draft.tokens) > 4


@pytest.mark.parametrize("most", [0, 8])
def test_draft_lengths_that_cannot_be(most):
    with pytest.raises(UsageError, match="1 to 7"):
        LookupDrafts(most)
    with pytest.raises(UsageError, match="1 to 7"):
        ModelDrafts(sequence("mixed"), most)


def test_other_tokens_are_refused():
    def tokenizer(*words):
        return SimpleNamespace(get_vocab=lambda: {w: i for i, w in enumerate(words)})

    check_tokenizers(tokenizer("a", "b"), tokenizer("a", "b"))
    with pytest.raises(UsageError, match="token 1 is 'b'.*'c'"):
        check_tokenizers(tokenizer("a", "b"), tokenizer("a", "c"))
    with pytest.raises(UsageError, match="3 beside 2"):
        check_tokenizers(tokenizer("a", "b"), tokenizer("a", "b", "c"))


def test_a_plain_cache_needs_no_states():
    """A stock cache list beside a HydraHead of full-attention heads alone."""
    cache = [KVCache() for _ in range(2)]
    mine = CachedSequence(model_of("all FA"), Checkpoints(every=8, most=8), cache)
    prompt = some(9)
    wanted = reply(sequence("all FA"), prompt)
    assert reply(mine, prompt, drafts=Scripted(wanted, 0.8, 0)) == wanted
