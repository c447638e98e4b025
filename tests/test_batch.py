"""Batches: each row equals its single run, and stays a sequence of its own."""

import json

import hydra_mlx
from hydra_mlx import kv_cache
from hydra_mlx.batch import Batch
from hydra_mlx.checkpoints import Checkpoints
from hydra_mlx.errors import CacheError, UsageError
from hydra_mlx.generation import make_sequence
from hydra_mlx.replies import stream_replies
from hydra_mlx.sampling import SamplingOptions
from hydra_mlx.sequence import CachedSequence

import mlx.core as mx
import numpy as np
import pytest

from .planted import planted_model
from .sequences import (
    BITS,
    VARIANTS,
    V,
    broken_step,
    difference,
    model_of,
    new_cache,
    sequence,
    some,
)
from .tolerance import rel_rms

ROUNDING = 1e-5  # of a batch against single runs, float32


def fresh(name: str, tokens: list) -> list:
    cache = new_cache(name)
    model_of(name)(mx.array([tokens]), cache=cache)
    return cache


@pytest.mark.parametrize("name", VARIANTS)
def test_rows_equal_single_runs(name):
    """Ragged rows, one of them empty, that join, leave, are rolled back and join again."""
    rng = np.random.RandomState(3)
    rows = [sequence(name, some(n, n)) for n in (5, 0, 19)]
    texts = [r.tokens for r in rows]
    batch = Batch(model_of(name))
    batch.put(rows[:2])
    where = {0, 1}
    for turn in range(24):
        order = [rows.index(r) for r in batch.rows]
        given = {i: int(rng.randint(V)) for i in order}
        logits = batch.step(mx.array([given[i] for i in order]))
        for at, i in enumerate(order):
            texts[i] = [*texts[i], given[i]]
            single = model_of(name)(mx.array([texts[i]]), cache=new_cache(name))[0, -1]
            assert rel_rms(logits[at], single) < 10 * ROUNDING, (turn, i)
        if turn == 3:
            batch.put([rows[2]])
            where.add(2)
        if turn in (8, 15):
            out = [rows[turn % 3], rows[0]] if turn == 8 else [rows[1]]
            batch.take(out)
            for r in out:
                i = rows.index(r)
                assert r.tokens == texts[i]
                assert difference(r.cache, fresh(name, texts[i])) < ROUNDING
                r.back_to(len(r) - 3)
                texts[i] = texts[i][:-3]
                assert difference(r.cache, fresh(name, texts[i])) < ROUNDING
            batch.put(out)
    batch.take(list(batch.rows))
    assert len(batch) == 0
    for r, text in zip(rows, texts, strict=True):
        assert r.tokens == text and difference(r.cache, fresh(name, text)) < ROUNDING


def test_rows_keep_checkpoints_while_they_decode():
    """A rollback into what was decoded in a batch replays a few tokens, not all of it."""
    row = sequence("mixed", some(4))
    batch = Batch(model_of("mixed"))
    batch.put([row, sequence("mixed", some(9))])
    for _ in range(40):
        batch.step(mx.array([1, 2]))
    batch.take([row])
    assert len([p for p in row.checkpoints.positions if p > 8]) >= 3
    assert row.fork().back_to(41) <= 8
    row.back_to(30)
    assert difference(row.cache, fresh("mixed", [*some(4), *[1] * 26])) < ROUNDING


def test_forks_share_a_document():
    document = some(30, 1)
    base = sequence("mixed", document)
    rows = [base.fork() for _ in range(3)]
    for i, r in enumerate(rows):
        r.read(some(2 + i, i))
    batch = Batch(model_of("mixed"))
    batch.put(rows)
    batch.step(mx.array([3, 4, 5]))
    batch.take(rows)
    for i, r in enumerate(rows):
        assert difference(r.cache, fresh("mixed", [*document, *some(2 + i, i), 3 + i])) < ROUNDING
    assert base.tokens == document and difference(base.cache, fresh("mixed", document)) < ROUNDING


def test_a_broken_step_is_undone(monkeypatch):
    rows = [sequence("one of each", some(n)) for n in (3, 6)]
    batch = Batch(model_of("one of each"))
    batch.put(rows)
    batch.step(mx.array([1, 2]))
    broken_step(monkeypatch, batch, [3, 4])
    batch.step(mx.array([5, 6]))
    batch.take(rows)
    for n, r, given in zip((3, 6), rows, ([1, 5], [2, 6]), strict=True):
        assert r.tokens == [*some(n), *given]
        assert difference(r.cache, fresh("one of each", r.tokens)) < ROUNDING


def test_what_cannot_be():
    row, batch = sequence("mixed", some(4)), Batch(model_of("mixed"))
    batch.put([row])
    for use in (lambda: row.read([1]), row.fork, lambda: row.back_to(1)):
        with pytest.raises(CacheError, match="in a batch"):
            use()
    with pytest.raises(UsageError, match="once"):
        batch.put([row])
    with pytest.raises(UsageError, match="another"):
        batch.put([sequence("fused", [1])])
    with pytest.raises(UsageError, match="for 1 rows"):
        batch.step(mx.array([1, 2]))
    with pytest.raises(UsageError, match="not in the batch"):
        batch.take([sequence("mixed")])
    few = Batch(model_of("8 bit"))
    few.put([sequence("8 bit", [1, 2])])
    plain = CachedSequence(model_of("8 bit"))
    plain.read([1])
    with pytest.raises(UsageError, match="different forms: 8 bits, full precision"):
        few.put([plain])
    batch.put([])
    batch.take([row])
    assert row.tokens == some(4) and row.read([1]) == 1


# ------------------------------------------------------------------------------------ replies

PROMPTS = [
    "The quick brown fox",
    "The quick brown dog jumps",
    "The quick brown f",
    "T",
    "The quick",
]


def replies(tiny: tuple, prompts=PROMPTS, **options) -> dict:
    """{number: (text, finish reason, tokens)}."""
    ids = [tiny[1].encode(p) for p in prompts]
    found = {i: ["", None, []] for i in range(len(prompts))}
    for parts in stream_replies(*tiny, ids, **options):
        for i, part in parts:
            assert found[i][1] is None
            found[i][0] += part.text
            found[i][1] = part.finish_reason
            found[i][2] += [] if part.token is None else [part.token]
    return found


def single(tiny: tuple, prompt: str, **options) -> list:
    parts = list(hydra_mlx.stream_generate(*tiny, prompt, **options))
    tokens = [p.token for p in parts if p.token is not None]
    return ["".join(p.text for p in parts), parts[-1].finish_reason, tokens]


@pytest.mark.parametrize("rows", [1, 2, 8])
def test_replies_equal_single_ones(tiny, rows):
    text = single(tiny, PROMPTS[0], max_tokens=20)[0]
    for options in ({}, {"stop": text[5:8]}, {"max_tokens": 1}, {"max_tokens": 0}):
        options = {"max_tokens": 20, **options}
        kept = []
        found = replies(tiny, rows=rows, sequences=kept, **options)
        for i, prompt in enumerate(PROMPTS):
            assert found[i] == single(tiny, prompt, **options)
            assert kept[i].tokens == [*tiny[1].encode(prompt), *found[i][2]]


def test_a_shared_beginning_is_read_once(tiny):
    document = "".join(map(chr, np.random.RandomState(0).randint(65, 90, 120)))
    prompts = [document + q for q in ("What?", "Who is it?", "Why")]
    read = []
    base = CachedSequence(tiny[0], Checkpoints(every=32, most=8))
    call = CachedSequence._call
    try:
        CachedSequence._call = lambda self, ids: read.append(len(ids)) or call(self, ids)
        found = replies(tiny, prompts, max_tokens=6, base=base)
    finally:
        CachedSequence._call = call
    assert 120 <= sum(read) < 150
    assert [found[i] for i in range(3)] == [single(tiny, p, max_tokens=6) for p in prompts]
    assert tiny[1].decode(base.tokens) == document + "Wh"


def test_penalties_and_sampling_by_row(tiny):
    _, processors = SamplingOptions(presence_penalty=50.0).make(tiny[1])
    found = replies(tiny, max_tokens=8, logits_processors=processors)
    for i, prompt in enumerate(PROMPTS):
        assert found[i] == single(tiny, prompt, max_tokens=8, logits_processors=processors)
    sampler, _ = SamplingOptions(temp=3.0).make(tiny[1])
    mx.random.seed(1)
    hot = replies(tiny, max_tokens=8, sampler=sampler)
    assert len({hot[i][0] for i in range(5)}) == 5


def test_interrupts_leave_whole_sequences(tiny):
    for after in (0, 1, 4):
        kept, steps = [], []
        ids = [tiny[1].encode(p) for p in PROMPTS]
        said = {i: [] for i in range(5)}
        for parts in stream_replies(
            *tiny, ids, 9, rows=2, sequences=kept, should_stop=lambda n=after, s=steps: len(s) >= n
        ):
            steps.append(1)
            for i, part in parts:
                said[i] += [] if part.token is None else [part.token]
        assert all(p.finish_reason == "interrupt" for _, p in parts) and len(parts) == 5
        for i, s in enumerate(kept):
            if s is not None and said[i]:
                assert s.tokens == [*ids[i], *said[i]]
                assert len(s.fork().tokens) == len(s)


def test_closed_early(tiny):
    kept = []
    stream = stream_replies(*tiny, [[5, 6], [7, 8, 9]], 9, sequences=kept)
    lists = [next(stream) for _ in range(4)]
    stream.close()
    for i, s in enumerate(kept):
        said = [p.token for parts in lists for j, p in parts if j == i]
        assert s.tokens == [*([5, 6], [7, 8, 9])[i], *said] and len(said) == 3


def test_a_stock_model_has_no_batch_in_few_bits(tiny):
    base = make_sequence(planted_model(), kv_bits=8, kv_group_size=32)
    base.read([1, 2, 3])
    with pytest.raises(UsageError, match="few bits"):
        stream_replies(base.model, tiny[1], [[5, 9]], 8, base=base)


def test_a_stock_model(tiny):
    llama = planted_model()
    prompts = [[5, 9, 31, 3, 4, 7, 5], [2, 3], [8, 9, 31, 8]]
    wanted = [list(CachedSequence(llama).generate(p, 8)) for p in prompts]
    found = {0: [], 1: [], 2: []}
    for parts in stream_replies(llama, tiny[1], prompts, 8):
        for i, part in parts:
            found[i].append(part.token)
    assert [found[i] for i in range(3)] == wanted


@pytest.mark.parametrize(
    "prompts, options",
    [
        ([], {}),
        ([[]], {}),
        ([[1]], {"rows": 0}),
        ([[1]], {"max_tokens": -2}),
        ([[1]], {"stop": ""}),
    ],
)
def test_arguments_that_cannot_be(tiny, prompts, options):
    with pytest.raises(UsageError):
        stream_replies(*tiny, prompts, **options)


# ------------------------------------------------------------------------------------ program


def test_prompts_of_a_file(program, tmp_path):
    lines, before = ["Hello there", "@home", "-"], tmp_path / "before.txt"
    (tmp_path / "lines").write_text("\n".join([lines[0], "", *lines[1:], "  "]))
    before.write_text("Some text")
    flags = ("--prompts", tmp_path / "lines", "-m", 12, "--stats", "json")
    code, out, err = program("generate", f"@{before}", "--batch-size", 2, *flags)
    assert code == 0, err
    found = [json.loads(line) for line in out.splitlines()]
    assert [f["index"] for f in found] == [0, 1, 2]
    for line, f in zip(lines, found, strict=True):
        single = program("generate", f"Some text\n\n{line}", "-m", 12)
        assert (f["text"], f["tokens"], f["finish_reason"]) == (single[1][:-1], 12, "length")
    assert json.loads(err)["generated_tokens"] == 36
    hot = ("--temp", 2, "--seed", 3)
    assert program("generate", *flags, *hot)[1] == program("generate", *flags, *hot)[1] != out


def test_prompts_about_a_document(program, tiny_model_dir, tmp_path, monkeypatch):
    """A document read once, many questions: each as if asked alone, in full precision and in few
    bits; nothing of the document is read again, and the file is as it was."""
    monkeypatch.setattr(kv_cache, "SHARED", 64)
    text = "".join(map(chr, np.random.RandomState(2).randint(65, 90, 300)))
    (tmp_path / "book.txt").write_text(text)
    (tmp_path / "lines").write_text("What?\nWho is it?\nWhy then\n")
    for bits in ((), ("--kv-bits", "8,4", "--kv-group-size", 32)):
        file = tmp_path / f"book{len(bits)}.safetensors"
        read_it = ("cache", "read", tmp_path / "book.txt", "--model", tiny_model_dir, "--out", file)
        code, _, err = program(*read_it, *bits)
        assert code == 0, err
        before = file.read_bytes()
        cache = ("--prompt-cache", file, "--prompt-cache-ro", "-m", 9)
        alone = [
            program("generate", text + "\n\n" + q, *cache, "--quiet")[1][:-1]
            for q in ("What?", "Who is it?", "Why then")
        ]
        read, call = [], CachedSequence._call
        monkeypatch.setattr(
            CachedSequence,
            "_call",
            lambda self, ids, r=read, c=call: r.append(len(ids)) or c(self, ids),
        )
        args = ("generate", f"@{tmp_path / 'book.txt'}", "--prompts", tmp_path / "lines", *cache)
        code, out, err = program(*args, "--stats", "json")
        monkeypatch.setattr(CachedSequence, "_call", call)
        assert code == 0, err
        assert [json.loads(line)["text"] for line in out.splitlines()] == alone
        assert sum(read) < 60 and file.read_bytes() == before
        code, out, _ = program(*args[:4], *bits, "-m", 9)  # the document read by this run
        assert [json.loads(line)["text"] for line in out.splitlines()] == alone


def test_prompts_that_do_not_fit_are_refused(program, tmp_path, monkeypatch):
    from hydra_mlx import machine

    (tmp_path / "lines").write_text("a\nb\n")
    small = machine.Machine(1, "is free on this machine")
    monkeypatch.setattr(machine, "machine", lambda: small)
    code, out, err = program("generate", "--prompts", tmp_path / "lines")
    assert code == 2 and not out and "states of 4 rows" in err and "1 B is free" in err
    code, out, _ = program("generate", "--prompts", tmp_path / "lines", "--no-memory-plan", "-m", 1)
    assert code == 0 and len(out.splitlines()) == 2


@pytest.mark.parametrize(
    "flags, words",
    [
        (("Hello",), "'Hello' is given, and --prompts"),
        (("--kv-bits", 4, "--quantized-kv-start", 9), "--quantized-kv-start is for one prompt"),
        (("--kv-bits", 4, "--kv-group-size", 128), "kv-group-size 32"),
        (("--prompt-lookup",), "--prompt-lookup is for one prompt"),
        (("--prompt-cache", "x"), "Add --prompt-cache-ro"),
        (("--prompt-cache", "x", "--prompt-cache-ro"), "x does not exist"),
        (("--batch-size", 0), "whole number of 1 or more"),
    ],
)
def test_flags_that_do_not_go_with_prompts(program, tmp_path, flags, words):
    (tmp_path / "lines").write_text("a\nb\n")
    code, out, err = program("generate", "--prompts", tmp_path / "lines", *flags)
    assert code == 2 and not out and words in err
    (tmp_path / "lines").write_text("\n \n")
    code, out, err = program("generate", "--prompts", tmp_path / "lines")
    assert code == 2 and "no lines" in err
    code, out, err = program("generate", "--prompts", tmp_path / "none")
    assert code == 2 and "file of prompts" in err and "one prompt on each line" in err
    code, out, err = program("generate", "Hello", "--batch-size", 3)
    assert code == 2 and "without --prompts" in err


@pytest.mark.parametrize("name", [name for name in VARIANTS if name not in BITS])
def test_mlx_lms_batches(name):
    """Ragged prompts through its BatchGenerator give the tokens of single runs."""
    from mlx_lm.generate import BatchGenerator

    model, prompts = model_of(name), [some(n, n) for n in (5, 17, 9, 1)]
    wanted = [list(CachedSequence(model).generate(p, 12)) for p in prompts]
    batch = BatchGenerator(model, prefill_step_size=8)
    found = {uid: [] for uid in batch.insert(prompts, [12] * 4)}
    while sum(map(len, found.values())) < 48:
        for one in batch.next_generated():
            found[one.uid].append(one.token)
    assert list(found.values()) == wanted
