"""What requests share: prefixes by rollback, memory by segments, the model by turns."""

import json
import threading
import time

import hydra_mlx  # noqa: F401  (before mlx)
from hydra_mlx.checkpoints import Checkpoints
from hydra_mlx.generation import make_sequence, stream_generate
from hydra_mlx.server_pool import Pool
from hydra_mlx.server_rows import Together, fits

import mlx.core as mx
import numpy as np
import pytest

from .sequences import BITS, difference, model_of, some
from .serving import serving

CLOSE = 1e-5  # of caches whose calls were cut differently, float32


def text(n: int, seed: int = 0) -> str:
    letters = np.random.RandomState(seed).choice(list("abcdefgh ,."), n)
    return "".join(letters)


@pytest.fixture(scope="module")
def served(tiny_model_dir):
    with serving(tiny_model_dir) as found:
        yield found


def single(served, prompt: str, n: int, **more) -> str:
    ids = served.tokenizer.encode(prompt)
    return "".join(p.text for p in stream_generate(served.model, served.tokenizer, ids, n, **more))


def ask(served, prompt: str, n: int = 6) -> tuple:
    """(text, cached tokens), the text compared with a single run's."""
    r = served.complete(prompt, max_tokens=n)
    found = r["choices"][0]["text"]
    assert found == single(served, prompt, n)
    served.quiet()
    return found, r["usage"]["prompt_tokens_details"]["cached_tokens"]


def together(calls: list) -> list:
    """Results of functions that run at the same time."""
    out = [None] * len(calls)

    def run(i):
        out[i] = calls[i]()

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(calls))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    return out


# ------------------------------------------------------------------------------- what is reused


def test_cached_tokens_are_those_not_computed(served, monkeypatch):
    """Edits, the same again, a continuation: prompt and reply are all that goes through."""
    through = []
    kind, call = type(served.model), type(served.model).__call__

    def counted(self, inputs, *args, **more):
        through.append(inputs.size)
        return call(self, inputs, *args, **more)

    document = text(1500, 1)
    edited = document[:900] + "#" + document[901:]
    first = document + " What?"
    for prompt, least in (
        (first, 0),
        (first, 1505),  # regenerate
        (document + " Who?", 1500 - 512),
        (edited + " What?", 512),
        (first + single(served, first, 6) + " And?", len(first)),  # the next turn
        ("x" + document, 0),
    ):
        expected = single(served, prompt, 6)
        with monkeypatch.context() as m:
            m.setattr(kind, "__call__", counted)
            through.clear()
            r = served.complete(prompt, max_tokens=6)
            served.quiet()
        assert r["choices"][0]["text"] == expected
        cached = r["usage"]["prompt_tokens_details"]["cached_tokens"]
        assert cached >= least and sum(through) == len(prompt) - cached + 6, (prompt[-10:], cached)


def test_turns_and_system_prompts_are_marked(served):
    """Beginnings shorter than the distance of checkpoints are reused too."""

    def chat(messages):
        body = {"messages": messages, "max_tokens": 4}
        status, r = served.request("POST", "/v1/chat/completions", body)
        assert status == 200
        served.quiet()
        return r["choices"][0]["message"]["content"], r["usage"]

    system = {"role": "system", "content": text(100, 2)}
    said, usage = chat([system, {"role": "user", "content": "One?"}])
    assert usage["prompt_tokens_details"]["cached_tokens"] == 0
    _, usage = chat([system, {"role": "user", "content": "Another?"}])
    assert usage["prompt_tokens_details"]["cached_tokens"] >= 100
    turns = [system, {"role": "user", "content": "One?"}, {"role": "assistant", "content": said}]
    _, usage = chat([*turns, {"role": "user", "content": "More?"}])
    assert usage["prompt_tokens_details"]["cached_tokens"] >= 100 + 8
    _, edited = chat([*turns, {"role": "user", "content": "Less?"}])  # the last turn edited
    before = edited["prompt_tokens"] - edited["prompt_tokens_details"]["cached_tokens"]
    assert before < 60


def test_a_document_is_read_once_by_all_who_ask_at_once(tiny_model_dir, tiny):
    with serving(tiny_model_dir, model=tiny) as s:
        document = text(2100, 3)
        prompts = [f"{document} Question {i}?" for i in range(6)]
        replies = together([lambda p=p: s.complete(p, max_tokens=5) for p in prompts])
        for p, r in zip(prompts, replies, strict=True):
            assert r["choices"][0]["text"] == single(s, p, 5)
        cached = sorted(r["usage"]["prompt_tokens_details"]["cached_tokens"] for r in replies)
        assert cached[0] == 0 and cached[1] >= 2048
        s.quiet()
        # Six conversations, one document: its rows are held once.
        row = s.engine.memory.token_bytes
        held = sum(x.nbytes for x in s.engine.pool.segments.values())
        assert held < row * (2100 + 6 * 80)
        assert len(s.engine.pool) == 7  # and what was read when the others came in


@pytest.mark.parametrize("flags", [(), ("--kv-bits", "8", "--kv-group-size", "32")])
def test_a_reply_under_way_is_shared(tiny_model_dir, tiny, flags):
    """Batched or alone, a reply goes on as if nobody had looked."""
    few = {"kv_bits": 8, "kv_group_size": 32} if flags else {}
    with serving(tiny_model_dir, *flags, model=tiny) as s:
        document = text(700, 4)
        expected = single(s, document + " A", 150, **few)
        c = s.open({"prompt": document + " A", "max_tokens": 150, "stream": True})
        r = c.getresponse()
        while b"data:" not in r.readline():
            pass
        other = s.complete(document + " B", max_tokens=3)
        assert other["usage"]["prompt_tokens_details"]["cached_tokens"] >= 512
        rest = r.read().decode()
        assert rest.endswith("[DONE]\n\n")
        again = s.complete(document + " A", max_tokens=150)
        assert again["choices"][0]["text"] == expected
        chunks = [json.loads(x[6:]) for x in rest.split("\n\n") if x.startswith("data: {")]
        assert expected.endswith("".join(c["choices"][0]["text"] for c in chunks))
        assert sum(bool(c["choices"][0]["text"]) for c in chunks) >= 100


def test_few_bits_share_batches(tiny_model_dir, tiny, monkeypatch):
    """Replies over keys and values in few bits decode together too."""
    most = []
    step = Together.step
    monkeypatch.setattr(
        Together, "step", lambda self, heard: most.append(len(self.jobs)) or step(self, heard)
    )
    few = {"kv_bits": (8, 4), "kv_group_size": 32}
    with serving(tiny_model_dir, "--kv-bits", "8,4", "--kv-group-size", "32", model=tiny) as s:
        prompts = [text(n, n) for n in (5, 40, 300, 411)]
        expected = [single(s, p, 60, **few) for p in prompts]
        calls = [lambda p=p: s.complete(p, max_tokens=60)["choices"][0]["text"] for p in prompts]
        assert together(calls) == expected
    assert max(most) >= 3


def test_many_at_once_equal_single_runs(served):
    """Lengths from 5 to 1500: several batches, rows that join and leave."""
    rng = np.random.RandomState(5)
    prompts = [text(int(n), i) for i, n in enumerate(rng.choice([5, 40, 300, 1100, 1500], 20))]
    lengths = [int(n) for n in rng.randint(1, 40, 20)]
    expected = [single(served, p, n) for p, n in zip(prompts, lengths, strict=True)]
    calls = [
        lambda p=p, n=n: served.complete(p, max_tokens=n)["choices"][0]["text"]
        for p, n in zip(prompts, lengths, strict=True)
    ]
    assert together(calls) == expected
    served.quiet()
    assert served.engine.used == 0


def test_a_long_prompt_does_not_block_replies(tiny_model_dir, tiny):
    """Between two tokens of a reply lies one step of the prompt, not all of it."""
    with serving(tiny_model_dir, "--prefill-step-size", "256", model=tiny) as s:
        calls = []
        step, read = s.engine._decode, s.engine._read_some
        s.engine._decode = lambda: (calls.append("token") if s.engine._groups else None, step())
        s.engine._read_some = lambda job: (calls.append("step"), read(job))
        c = s.open({"prompt": "abc", "max_tokens": 200, "stream": True})
        while "token" not in calls:
            time.sleep(0.001)
        s.complete(text(4000, 6), max_tokens=1)
        assert c.getresponse().read().endswith(b"[DONE]\n\n")
        first = calls.index("step", 1)
        between = calls[first : len(calls) - calls[::-1].index("step")]
        assert between.count("step") >= 7 and "stepstep" not in "".join(between)


# ---------------------------------------------------------------------------------- what is kept


def test_cache_memory_is_a_bound(tiny_model_dir, tiny):
    with serving(tiny_model_dir, "--cache-memory", "3MB", model=tiny) as s:
        pool = s.engine.pool
        base = text(600, 7)
        for i in range(12):
            s.complete(base + text(500, 10 + i), max_tokens=4)
            s.quiet()
            assert pool.nbytes <= 3e6
        assert pool.evicted > 3 and len(pool) > 1
        held = sum(x.nbytes for seg in pool.segments.values() for p in seg.rows for x in p)
        arrays = {}
        for e in pool.entries:
            arrays |= e.arrays
        assert held + sum(arrays.values()) == pool.nbytes
        s.complete(base + text(500, 21), max_tokens=4)  # the latest is there
        _, cached = ask(s, base + text(500, 21), 4)
        assert cached > 1090
    with serving(tiny_model_dir, "--cache-memory", "off", model=tiny) as s:
        for _ in range(2):
            assert ask(s, base, 3)[1] == 0 and len(s.engine.pool) == 0


def test_memory_is_flat(tiny_model_dir, tiny):
    """Sixty requests later MLX holds no more than after twenty, but for the pool."""
    with serving(tiny_model_dir, "--cache-memory", "1MB", model=tiny) as s:
        held = []
        for i in range(60):
            s.complete(text(150, i), max_tokens=3)
            s.quiet()
            if i % 20 == 19:
                mx.clear_cache()
                held.append(mx.get_active_memory() - s.engine.pool.nbytes)
        assert held[-1] - held[0] < 100_000, held


# -------------------------------------------------------------------------------------- the pool


def pool_of(name: str, limit: int = 10**9) -> Pool:
    def fresh():
        points = Checkpoints(every=8, most=8)
        return make_sequence(model_of(name), None, (), points, BITS.get(name), 32)

    return Pool(fresh, limit)


def fresh_cache(pool: Pool, tokens: list) -> list:
    s = pool.fresh()
    s.read(tokens)
    return s.cache


@pytest.mark.parametrize("name", ["mixed", "one of each", "all LA", "all FA", "4 bit"])
def test_what_comes_out_of_the_pool_is_exact(name):
    """Forks, edits and continuations, moved and copied; grid positions bit for bit."""
    pool, rng = pool_of(name), np.random.RandomState(8)
    texts = [some(50, 1)]
    for turn in range(10):
        base = texts[rng.randint(len(texts))]
        cut = int(rng.randint(0, len(base) + 1))
        tokens = [*base[:cut], *some(int(rng.randint(1, 30)), 100 + turn)]
        before = pool.nbytes
        spare = None if rng.rand() < 0.7 else int(before * rng.rand())
        s, links = pool.take(tokens, int(rng.randint(0, 300)), spare)
        if spare is not None:
            assert pool.nbytes <= max(spare, before and max(e_bytes(pool), default=0))
        kept = len(s)
        assert s.tokens == tokens[:kept] and kept < len(tokens)
        s.read(tokens[kept:])
        expected = fresh_cache(pool, tokens)
        assert difference(s.cache, expected) < CLOSE
        links = pool.put(s, links)
        s.read([3, 1])
        assert difference(s.cache, fresh_cache(pool, [*tokens, 3, 1])) < CLOSE
        pool.put(s, links, release=True)
        texts.append([*tokens, 3, 1])
    pool.trim(0)
    assert pool.nbytes == 0 and not pool.segments and not pool.entries


def e_bytes(pool: Pool) -> list:
    sizes = {k: s.nbytes for k, s in pool.segments.items()}
    return [sum(sizes[k] for k, _ in e.links) + sum(e.arrays.values()) for e in pool.entries]


def test_a_fork_outlives_what_it_came_from():
    pool = pool_of("mixed")
    base = some(64, 2)
    s, links = pool.take(base)
    s.read(base)
    pool.put(s, links, release=True)
    fork, links = pool.take([*base[:40], 1, 2])
    pool.trim(0)  # what it shares is gone meanwhile
    fork.read([1, 2])
    pool.put(fork, links, release=True)
    assert [s.n for s in pool.segments.values()] == [42]
    again, _ = pool.take([*base[:40], 1, 2, 3])
    again.read([3])
    assert difference(again.cache, fresh_cache(pool, [*base[:40], 1, 2, 3])) < CLOSE


def test_rows_nobody_uses_are_given_up():
    pool = pool_of("mixed")
    base = some(64, 3)
    s, links = pool.take(base)
    s.read(base)
    pool.put(s, links, release=True)
    fork, links = pool.take([*base[:32], 1])
    fork.read([1])
    pool.put(fork, links, release=True)
    pool.entries.remove(next(e for e in pool.entries if e.tokens == base))
    pool._settle()
    assert sorted(s.n for s in pool.segments.values()) == [1, 32]


def test_an_array_of_its_own():
    """A segment of one head's rows is no view of the whole buffer."""
    pool = pool_of("mixed")
    s, _ = pool.take([1])
    s.read(some(2000, 4))
    mx.clear_cache()
    before = mx.get_active_memory()
    pool.put(s, (), release=True)
    pool.entries[0].links = ((next(iter(pool.segments)), 20),)
    pool._settle()
    del s
    mx.clear_cache()
    freed = before - mx.get_active_memory()
    assert freed > 1900 * 2 * 2 * 16 * 4 * 0.9


def test_which_rows_share_a_batch():
    assert fits([], 10**6) and fits([10, 1024], 3) and fits([5000], 4000)
    assert not fits([100], 5000) and not fits([5000, 3000], 2400) and fits([5000, 3000], 2500)
