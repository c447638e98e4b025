"""Going back: any sequence of operations on a cache equals a fresh run, bit for bit."""

import random

import hydra_mlx  # noqa: F401  (before mlx)
from hydra_mlx.cache import quantise_cache
from hydra_mlx.checkpoints import Checkpoints
from hydra_mlx.errors import CacheError, UsageError
from hydra_mlx.kernels import dispatch
from hydra_mlx.kv_cache import HydraKVCache
from hydra_mlx.rollback import append, common_prefix, keepable, reuse, rollback

import mlx.core as mx
import pytest
from mlx_lm.models.cache import BatchKVCache

from .metal_host.testing import needs_metal_host
from .sequences import (
    VARIANTS,
    Run,
    V,
    contents,
    difference,
    model_of,
    new_cache,
    some,
    start,
)
from .test_model_kernels import Counting, make_model
from .tolerance import LOGITS_FLOAT32


def operate(run: Run, rng: random.Random) -> Run | None:
    """One random operation; a fork is returned."""
    tokens, n = run.tokens, rng.choice([1, 2, 3, 5, 8, 13, 21])
    new = [rng.randrange(V) for _ in range(n)]
    what = rng.choice(
        ["append", "append", "call", "decode", "back", "back", "undo", "fork", "edit"]
    )
    if what == "append":
        run.append(new, rng.choice([4, 8, 16]), rng.random() < 0.3)
    elif what == "call":
        run.call(new[: run.points.grid.every], rng.random() < 0.3)
    elif what == "decode":
        for t in new[:5]:
            run.call([t])
    elif what == "back":
        run.back(rng.randint(0, len(tokens)))
    elif what == "undo":
        model_of(run.name)(mx.array([new]), cache=run.cache)
        assert run.back(len(tokens)) == 0
    elif what == "fork":
        return run.fork()
    else:
        changed = tokens[: rng.randint(0, len(tokens))] + new
        expected = keepable(run.points, tokens, changed)
        kept = reuse(model_of(run.name), run.cache, run.points, tokens, changed)
        assert kept == expected
        assert kept < len(changed) and changed[:kept] == tokens[:kept]
        run.cut(kept)
        run.append(changed[kept:], 8)
    return None


@pytest.mark.parametrize("name", VARIANTS)
def test_random_sequences_equal_a_fresh_run(name):
    """64 sequences a model, 576 in all, of 8 operations; forks go on beside their parents."""
    for seed in range(64):
        rng = random.Random(f"{name} {seed}")
        runs = [start(name, every=rng.choice([8, 16]), most=rng.choice([2, 4, 6]), marks=2)]
        for _ in range(8):
            fork = operate(rng.choice(runs), rng)
            if fork is not None and len(runs) < 3:
                runs.append(fork)
        for run in runs:
            run.check()
            assert len(run.points.positions) <= run.points.grid.most + 2


@pytest.mark.parametrize("name", ["mixed", "one of each", "8 bit"])
def test_calls_longer_than_a_chunk(name):
    """Across the 64-token chunks of ops.gated_delta, to every kind of position."""
    for position in (0, 1, 63, 64, 65, 128, 200, 256, 257, 300, 331):
        run = start(name, every=128, most=4)
        run.append(some(331), 128)
        run.back(position)
        run.check()
        run.append(some(90, 1), 128)
        run.check()


# ----------------------------------------------------------------------------------- documents


@pytest.mark.parametrize("name", ["mixed", "4 bit"])
@pytest.mark.parametrize("most", [4, 32])
def test_an_edit_recomputes_the_tail(name, most):
    """And gives the cache and the logits of a fresh run, bit for bit."""
    model, T, N = model_of(name), 512, 32
    for share in (0.3, 0.6, 0.95):
        old = some(T)
        at = int(share * T)
        new = [*old[:at], (old[at] + 1) % V, 3, *old[at + 1 :]]
        run = start(name, every=N, most=most)
        run.append(old, N)
        bound = run.points.bound(at)
        assert common_prefix(new, old) == at and (most == 4 or bound == N)
        kept = reuse(model, run.cache, run.points, old, new)
        assert len(new) - kept < len(new) - at + bound
        logits = append(model, run.cache, run.points, new[kept:])
        fresh = start(name, every=N, most=most)
        assert mx.array_equal(logits, append(model, fresh.cache, fresh.points, new))
        assert difference(run.cache, fresh.cache) == 0


def test_turns_cost_nothing_to_go_back_to():
    run = start("mixed", every=64, most=2, marks=2)
    for turn in range(4):
        run.append(some(21, turn), 64, mark=True)
        run.call([5])
    assert run.back(84 + 3) == 0 and run.back(63 + 2) == 0
    run.check()
    assert run.back(42 + 1) == 43  # the mark before was one too many
    run.check()


def test_reuse_says_what_is_kept():
    model, old = model_of("mixed"), some(40)

    def kept(new: list) -> int:
        run = start("mixed", every=16, most=4)
        run.append(old, 16)
        n = reuse(model, run.cache, run.points, old, new)
        assert n == run.cache[0].offset == run.points.calls.end
        return n

    assert kept(old + [1]) == 40 and kept(old) == 32 and kept(old[:33]) == 32
    assert kept(old[:32]) == 16 and kept([old[0] ^ 1]) == 0 and kept([]) == 0
    assert common_prefix([], [1]) == 0 and common_prefix([1, 2], [1, 2, 3]) == 2


def test_one_document_many_forks():
    document = start("mixed", every=16, most=4)
    document.append(some(50), 16, mark=True)
    forks = [document.fork() for _ in range(3)]
    for i, run in enumerate(forks):
        run.append(some(10 + i, i), 16)
        run.back(45 + i)
        run.append(some(5, i), 16)
    for run in [document, *forks]:
        run.check()


def test_nothing_stale_is_left():
    for name in ("mixed", "4 bit", "all LA"):
        run = start(name, every=16, most=4)
        run.append(some(60), 16)
        other = run.fork()
        run.back(37)
        for c in run.cache:
            if isinstance(c, HydraKVCache):
                keys, values = c.state[:2]
                few = isinstance(keys, tuple)
                assert {x.shape[2] for x in ((*keys, *values) if few else (keys, values))} == {37}
            elif hasattr(c, "offset"):
                for x in (c.keys, c.values):
                    assert not mx.any(x[..., 37:, :]).item()
        other.check()


# -------------------------------------------------------------------------------------- bounds


@pytest.mark.parametrize("name", ["mixed", "one of each", "all LA"])
def test_rounded_and_recut_replays_stay_close(name):
    """Tolerances of docs/cache.md: bfloat16 states, and replays in other calls."""
    for dtype, exact, tolerance in (
        ("bfloat16", True, 1e-2),
        ("float32", False, LOGITS_FLOAT32),
    ):
        run = start(name, every=32, most=8, dtype=dtype)
        run.append(some(100), 32)
        for t in some(40, 1):
            run.call([t])
        n = rollback(model_of(name), run.cache, run.points, run.tokens, 135, exact)
        assert n == 135 - 128
        run.cut(135)
        fresh = start(name)
        for call in run.calls:
            fresh.call(call)
        assert 0 < difference(run.cache, fresh.cache) < tolerance


def test_a_call_broken_off_is_undone():
    run = start("one of each", every=16, most=4)
    run.append(some(20), 16)
    layers = model_of("one of each").model.layers
    last = layers[2]
    for times in (1, 3):
        try:
            layers[2] = None  # the layers before it have moved their caches, it has not
            for _ in range(times):
                with pytest.raises(TypeError):
                    model_of("one of each")(mx.array([[1, 2, 3]]), cache=run.cache)
        finally:
            layers[2] = last
        assert len({c.offset for c in run.cache if hasattr(c, "offset")}) == 2
        assert run.back(20) == 0
        run.check()


def test_a_rollback_broken_off_is_mended(monkeypatch):
    from hydra_mlx import rollback as module

    run = start("one of each", every=16, most=4)
    run.append(some(45), 5)
    for broken in ("_forward", "_restore"):
        with monkeypatch.context() as patch:
            patch.setattr(module, broken, lambda *args: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                rollback(model_of(run.name), run.cache, run.points, run.tokens, 37)
        assert run.points.calls.end == 32
        run.cut(32)
        run.back(32)
        run.check()
        run.append(some(13, 2), 5)


def test_what_cannot_be_done():
    model, tokens = model_of("mixed"), some(20)
    run = start("mixed", every=16, most=4)
    run.append(tokens, 16)
    before = contents(run.cache)

    def refused(error, words, position=10, cache=run.cache, points=run.points, ids=tokens):
        with pytest.raises(error, match=words):
            rollback(model, cache, points, ids, position)

    refused(UsageError, "Position 21 is outside the 20 tokens", 21)
    refused(UsageError, "Position -1", -1)
    refused(UsageError, "3 token ids, expected at least 10", ids=tokens[:3])
    refused(CacheError, "is not of this model", cache=run.cache[:-1])
    refused(CacheError, "head size differs", cache=_read("8 bit", tokens))
    refused(CacheError, "is not of this model", cache=_read("all LA", tokens))
    refused(CacheError, "belong to another cache", cache=_read("mixed", tokens))
    refused(
        CacheError, "holds 7 tokens, but its checkpoints go to 20", cache=_read("mixed", [1] * 7)
    )
    refused(CacheError, "holds 0 tokens", cache=new_cache("mixed"))
    batch = model.make_cache()
    model(mx.array([tokens, tokens]), cache=batch)
    refused(CacheError, "one sequence", cache=batch)
    batched = [BatchKVCache([0]) if hasattr(c, "offset") else c for c in model.make_cache()]
    refused(CacheError, "BatchKVCache cannot go back", cache=batched)
    with pytest.raises(CacheError, match="Call note after each"):
        append(model, _read("mixed", tokens), start("mixed").points, [1])
    with pytest.raises(CacheError, match="Use rollback"):
        run.points.note(new_cache("mixed"))
    with pytest.raises(UsageError, match="step is 0"):
        append(model, run.cache, run.points, [1], 0)
    with pytest.raises(UsageError, match="the checkpoints go to 20"):
        reuse(model, run.cache, run.points, tokens[:5], tokens)
    for options in ({"every": 0}, {"most": 3}, {"most": 0}, {"marks": -1}, {"dtype": "float16"}):
        with pytest.raises(UsageError, match="Checkpoints"):
            Checkpoints(**options)
    assert all(
        a is b or mx.array_equal(a, b) for a, b in zip(before, contents(run.cache), strict=True)
    )
    run.check()


def _read(name: str, tokens: list) -> list:
    cache = new_cache(name)
    model_of(name)(mx.array([tokens]), cache=cache)
    return cache


@needs_metal_host
@pytest.mark.parametrize("bits", [None, 8])
def test_the_kernels_path_is_exact_too(bits):
    """The kernels' text, executed by the host runtime, decodes and replays to the same bits."""
    model, counting = make_model(), Counting()
    caches = [model.make_cache(), model.make_cache()]
    if bits:
        caches = [quantise_cache(c, bits, 32) for c in caches]
    cache, fresh = caches
    points, tokens = Checkpoints(every=8, most=4), some(22)
    with dispatch.substitute(counting.backend):
        append(model, cache, points, tokens[:16])
        for t in tokens[16:]:
            append(model, cache, points, [t])
        assert rollback(model, cache, points, tokens, 19) == 3
        counted = sum(counting.launches.values())
        for call in (tokens[:8], tokens[8:16], *([t] for t in tokens[16:19])):
            model(mx.array([call]), cache=fresh)
        assert sum(counting.launches.values()) > counted > 0
    assert difference(cache, fresh) == 0
