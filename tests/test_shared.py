"""Forks that hold what they have in common once: rows, batches, memory."""

import hydra_mlx  # noqa: F401  (before mlx)
from hydra_mlx import kv_cache
from hydra_mlx.batch import Batch
from hydra_mlx.batch_cache import HydraBatchCache
from hydra_mlx.cache import cache_bytes
from hydra_mlx.kv_cache import HydraKVCache
from hydra_mlx.ops.partial import Partial, in_order, scan, shared_part
from hydra_mlx.prompt_cache import StoredCache, fingerprint, load_cache, save_cache
from hydra_mlx.sequence import CachedSequence

import mlx.core as mx
import numpy as np
import pytest

from .sequences import BITS, VARIANTS, V, broken_step, difference, model_of, sequence, some
from .tolerance import rel_rms

LEAST = 8  # tokens worth sharing, in these tests
ROUNDING = 1e-5  # float32, sums in another order


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(kv_cache, "SHARED", LEAST)


def shared_tokens(s: CachedSequence) -> int:
    return max((sum(p.n for p in c.shared) for c in s.cache if hasattr(c, "shared")), default=0)


def equal(s: CachedSequence, name: str):
    """Keys, values and states as without sharing; the reply after one more token too."""
    other = sequence(name, s.tokens)
    assert difference(s.cache, other.cache) < 10 * ROUNDING, len(s)
    a, b = (x.model(mx.array([[3]]), cache=x.fork().cache) for x in (s, other))
    assert rel_rms(a, b) < 10 * ROUNDING


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("seed", range(8))
def test_random_sequences(name, seed, tmp_path):
    """Read, fork, go back into what is shared, trim, save and open: as if nothing were shared."""
    rng = np.random.RandomState(seed)
    live = [sequence(name, some(rng.randint(4, 30), seed))]
    for step in range(10):
        i = rng.randint(len(live))
        s, what = live[i], rng.randint(5)
        if what == 0:
            s.read(some(rng.randint(1, 20), 10 * seed + step))
        elif what == 1:
            live.append(s.fork(share=True))
        elif what == 2:
            s.back_to(rng.randint(len(s) + 1))
        elif what == 3:
            list(s.generate(some(rng.randint(1, 4), step), rng.randint(0, 4)))
        elif name in BITS or step % 3 == 0:
            path = tmp_path / f"{seed}-{step}.safetensors"
            file = StoredCache(
                s.cache, s.tokens, "", len(s), [], fingerprint(s.model), checkpoints=s.checkpoints
            )
            save_cache(path, file)
            found = load_cache(path, s.model)
            live[i] = CachedSequence(s.model, found.checkpoints, found.cache, found.tokens, s.kv)
    for s in live:
        equal(s, name)


def test_what_is_shared_is_not_copied_and_never_changes():
    base = sequence("fused", some(40))
    entry = next(c for c in base.cache if hasattr(c, "shared"))
    before = entry.nbytes
    forks = [base.fork(share=True) for _ in range(3)]
    part = entry.shared[0]
    assert part.n == 40 and entry.keys is None and entry.nbytes == before
    held = [mx.array(x) for x in (part.keys, part.values)]
    for i, s in enumerate([base, *forks]):
        s.read(some(5 + i, i))
        s.back_to(len(s) - 3)
        mine = next(c for c in s.cache if hasattr(c, "shared"))
        assert mine.shared[0].keys is part.keys
    assert all(mx.array_equal(x, y) for x, y in zip(held, (part.keys, part.values), strict=True))
    forks[0].back_to(20)
    # Replayed from the checkpoint at 16, whose four tokens are its own now.
    assert shared_tokens(forks[0]) == 16 and shared_tokens(forks[1]) == 40
    forks[0].read(some(4))
    equal(forks[0], "fused")
    forks[1].back_to(0)
    assert shared_tokens(forks[1]) == 0 and len(forks[1]) == 0


def test_few_tokens_are_copied():
    base = sequence("fused", some(LEAST - 1))
    assert shared_tokens(base.fork(share=True)) == shared_tokens(base) == 0
    base.read(some(1))
    assert shared_tokens(base.fork()) == 0 == shared_tokens(base)
    assert shared_tokens(base.fork(share=True)) == LEAST == shared_tokens(base)


def test_a_chain_of_forks():
    """A fork of a fork of a fork has three shared parts; all of them are read."""
    s = sequence("8,4 bit", some(12))
    for i in range(3):
        s = s.fork(share=True)
        s.read(some(9 + i, i))
    entry = next(c for c in s.cache if hasattr(c, "shared"))
    assert [p.n for p in entry.shared] == [12, 9, 10]
    equal(s, "8,4 bit")


def test_unknown_consumers_get_all_keys():
    cache = HydraKVCache()
    k, v = mx.random.normal((1, 2, 30, 32)), mx.random.normal((1, 2, 30, 32))
    cache.update_and_fetch(k[:, :, :20], v[:, :, :20])
    other = cache.fork(share=True)
    keys, values = other.update_and_fetch(k[:, :, 20:], v[:, :, 20:])
    assert other.own == 10 and mx.array_equal(keys, k) and mx.array_equal(values, v)
    assert mx.array_equal(other.as_stock().keys, k)
    few = other.to_quantized(32, (8, 4))
    assert not few.shared and few.own == 30
    for x, y in zip(few.keys, mx.quantize(k, 32, 8), strict=True):
        assert mx.array_equal(x, y)
    with pytest.raises(ValueError, match="shared keys"):
        HydraKVCache.merge([other, cache])


# ------------------------------------------------------------------------------------ batches


@pytest.mark.parametrize("name", VARIANTS)
def test_batches_of_forks(name):
    """Rows that share all, part or nothing, and of other lengths; joined, left, gone back."""
    rng = np.random.RandomState(5)
    base = sequence(name, some(21, 1))
    rows = [base.fork(share=True) for _ in range(3)]
    for i, s in enumerate(rows):
        s.read(some(2 + 3 * i, i))
    rows[2].back_to(13)  # shares fewer rows than the others
    rows.append(sequence(name, some(6, 9)))  # shares none
    rows.append(rows[0].fork(share=True))
    texts = [s.tokens for s in rows]
    batch = Batch(model_of(name))
    batch.put(rows[:4])
    for turn in range(12):
        order = [rows.index(r) for r in batch.rows]
        given = [int(rng.randint(V)) for _ in order]
        logits = batch.step(mx.array(given))
        for at, i in enumerate(order):
            texts[i] = [*texts[i], given[at]]
            plain = sequence(name, texts[i][:-1])
            one = plain.model(mx.array([texts[i][-1:]]), cache=plain.cache)[0, -1]
            assert rel_rms(logits[at], one) < 10 * ROUNDING, (turn, i)
        if turn == 3:
            batch.put([rows[4]])
        if turn == 6:
            batch.take([rows[1], rows[3]])
            assert rows[1].tokens == texts[1]
            rows[1].back_to(10)
            texts[1] = texts[1][:10]
            equal(rows[1], name)
            batch.put([rows[1]])
    batch.take(list(batch.rows))
    for s, text in zip(rows, texts, strict=True):
        assert s.tokens == text
        equal(s, name)


def test_a_batch_reads_shared_keys_once_for_all(monkeypatch):
    """One scan of the shared part for all rows, not one a row; its buffers stay where they are."""
    from hydra_mlx.ops import partial

    base = sequence("all FA", some(2000))
    rows = [base.fork(share=True) for _ in range(4)]
    batch = Batch(model_of("all FA"))
    part = rows[0].cache[0].shared[0]
    batch.put(rows)
    assert all(s[0] is part for s in batch._cache[0].shared)
    seen = []
    real = partial.scan

    def spy(q, k, *more):
        seen.append((q.shape, k.shape))
        return real(q, k, *more)

    monkeypatch.setattr(partial, "scan", spy)
    batch.step(mx.array([1, 2, 3, 4]))
    assert [(q[2], k[2]) for q, k in seen] == [(4, 2000)] * 2  # 4 rows as tokens, in 2 layers
    assert batch._cache[0].nbytes < 2 * part.nbytes
    batch.take(rows)
    assert rows[3].cache[0].shared[0] is part


def test_a_broken_step_of_a_shared_batch(monkeypatch):
    base = sequence("one of each", some(12))
    rows = [base.fork(share=True), base.fork(share=True)]
    rows[0].read(some(3))
    batch = Batch(model_of("one of each"))
    batch.put(rows)
    broken_step(monkeypatch, batch, [3, 4])
    batch.step(mx.array([5, 6]))
    batch.take(rows)
    assert rows[1].tokens == [*some(12), 6]
    for s in rows:
        equal(s, "one of each")


def test_batch_cache_by_itself():
    """Merge, append, filter, extend and extract keep every row's keys, in full precision."""
    rng = np.random.RandomState(0)

    def one(n):
        c = HydraKVCache()
        x = mx.array(rng.normal(size=(2, 1, 2, n, 16)).astype(np.float32))
        if n:
            c.update_and_fetch(x[0], x[1])
        return c, x

    made = [one(n) for n in (3, 0, 7, 300)]
    batch = HydraBatchCache.merge([c for c, _ in made[:3]])
    assert batch.offset.tolist() == [3, 0, 7] and batch.padding == [4, 7, 0]
    new = mx.array(rng.normal(size=(2, 3, 2, 1, 16)).astype(np.float32))
    batch.append(new[0], new[1])
    batch.extend(HydraBatchCache.merge([made[3][0]]))
    batch.filter(mx.array([3, 0]))
    assert batch.offset.tolist() == [300, 4] and batch.padding == [0, 296]
    row = batch.extract(1)
    want = mx.concatenate([made[0][1], new[:, :1]], axis=3)
    assert mx.array_equal(mx.stack(row.keys_and_values()), want)
    assert mx.array_equal(mx.stack(batch.extract(0).keys_and_values()), made[3][1])
    assert batch.trim(9) == 4 and batch.offset.tolist() == [296, 0]
    with pytest.raises(ValueError, match="one form"):
        HydraBatchCache.merge([HydraKVCache(), HydraKVCache(8, 8)])


# ------------------------------------------------------------------------- attention in parts


@pytest.mark.parametrize("most", [1, 2**20])
@pytest.mark.parametrize("few", [None, (8, 4, 32)])
def test_attention_in_parts(most, few):
    """Three parts of the keys, joined, are attention over all; rows that see none of some too."""
    rng = np.random.RandomState(1)
    B, Hq, Hk, T, D = 4, 4, 2, 3, 32

    def make(*shape):
        return mx.array(rng.normal(size=shape).astype(np.float32))

    def packed(x, bits):
        return mx.quantize(x, 32, bits) if few else x

    def plain(x, bits):
        return mx.dequantize(*mx.quantize(x, 32, bits), 32, bits) if few else x

    q = make(B, Hq, T, D)
    parts = [[make(1, Hk, n, D) for _ in "kv"] for n in (700, 5)]
    own = [make(B, Hk, 11, D) for _ in "kv"]
    bits = few[:2] if few else (0, 0)
    held = [tuple(map(packed, x, bits)) for x in parts]
    groups = [([2, 0], held), ([1], held[1:])]
    found = scan(q, *map(packed, own, bits), 0.2, "causal", few, most)
    y = found.join(shared_part(q, groups, 0.2, few, most)).result
    for b, seen in enumerate([parts, parts[1:], parts, []]):
        rows = [[p[i] for p in seen] + [own[i][b : b + 1]] for i in (0, 1)]
        k, v = (mx.concatenate([plain(x, n) for x in r], axis=2) for r, n in zip(rows, bits))  # noqa: B905
        want = mx.fast.scaled_dot_product_attention(q[b : b + 1], k, v, scale=0.2, mask="causal")
        assert rel_rms(y[b : b + 1], want) < ROUNDING, b


def test_rows_in_order():
    a, b = mx.array([[1.0], [2.0]]), mx.array([[3.0]])
    (x,) = in_order([(a,), (b,)], [3, 0, 1], 5, (9.0,))
    assert x[:, 0].tolist() == [2, 3, 9, 1, 9]
    one = Partial(mx.zeros((1, 1)), mx.zeros((1, 1)), mx.ones((1, 1)))
    assert one.join(one).total.item() == 2
    assert cache_bytes([HydraKVCache()]) == (0, 0)
