"""Prompt cache files: resumed equals uninterrupted, nothing damaged is used, nothing is lost."""

import json
import os
import random

import hydra_mlx
from hydra_mlx import prompt_cache
from hydra_mlx.errors import CacheError
from hydra_mlx.prompt_cache import StoredCache, fingerprint, load_cache, save_cache

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import load_prompt_cache

RAW = "--ignore-chat-template"


@pytest.fixture
def file(tmp_path):
    return tmp_path / "cache.safetensors"


def ok(result):
    assert result[0] == 0, result[2]
    return result[1]


def refused(result, *words):
    code, out, err = result
    assert code == 2 and not out and "Traceback" not in err
    assert all(w in err for w in words), err


def stats(result):
    assert result[0] == 0, result[2]
    return json.loads(result[2].strip().splitlines()[-1])


def stored(model, tokens, **changes) -> StoredCache:
    cache = model.make_cache()
    mx.eval(model(mx.array([tokens]), cache))
    fields = {"text": "t", "text_tokens": len(tokens), "messages": None, "label": "tiny"}
    return StoredCache(cache, tokens, fingerprint=fingerprint(model), **{**fields, **changes})


# -------------------------------------------------------------------------------------- the file


@pytest.mark.parametrize("bits", [None, 4])
def test_round_trip(tiny, file, bits):
    model, tokens = tiny[0], [5, 6, 7, 8, 9]
    one = stored(model, tokens, text='häl\n"0.hydra_sha256":"', messages=[{"role": "user"}])
    if bits:
        hydra_mlx.cache.quantise_cache(one.cache, bits, 32)
    save_cache(file, one)
    two = load_cache(file, model)
    assert (two.tokens, two.text, two.messages) == (tokens, one.text, one.messages)
    for cache in (two.cache, load_prompt_cache(str(file))):
        a, b = model(mx.array([[3]]), cache), model(mx.array([[3]]), stored(model, tokens).cache)
        assert mx.allclose(a, b, atol=1e-5 if bits is None else 10)
    assert os.listdir(file.parent) == [file.name]


def test_any_name_will_do(tiny, tmp_path):
    save_cache(tmp_path / "plain", stored(tiny[0], [1, 2]))
    assert load_cache(tmp_path / "plain", tiny[0]).tokens == [1, 2]


def test_damage_is_always_noticed(tiny, file):
    """Flip a bit, or cut the file, at 80 places all over it."""
    save_cache(file, stored(tiny[0], [5, 6, 7, 8]))
    whole, rng = file.read_bytes(), random.Random(1)
    header = 8 + int.from_bytes(whole[:8], "little")
    places = [*range(10), *rng.sample(range(10, header), 25), *rng.sample(range(len(whole)), 15)]
    for place in places:
        bad = bytearray(whole)
        bad[place] ^= 1 << rng.randrange(8)
        file.write_bytes(bad)
        with pytest.raises(CacheError):
            load_cache(file, tiny[0])
    for length in [
        0,
        1,
        7,
        8,
        9,
        header - 1,
        header,
        len(whole) - 1,
        *rng.sample(range(len(whole)), 22),
    ]:
        file.write_bytes(whole[:length])
        with pytest.raises(CacheError):
            load_cache(file, tiny[0])
    file.write_bytes(whole + b"x")
    with pytest.raises(CacheError):
        load_cache(file, tiny[0])
    file.write_bytes(whole)
    assert load_cache(file, tiny[0]).tokens == [5, 6, 7, 8]


def test_other_files(tiny, file, tmp_path):
    from mlx_lm.models.cache import save_prompt_cache

    save_prompt_cache(str(file), stored(tiny[0], [1, 2]).cache, {"model": "x"})
    for path, words in (
        (file, "not written by hydra_mlx"),
        (tmp_path, "directory"),
        (tmp_path / "no", "No such file"),
    ):
        with pytest.raises(CacheError, match=words):
            load_cache(path)


def test_parts_that_contradict(tiny, file):
    one = stored(tiny[0], [1, 2, 3])
    one.tokens.append(4)
    save_cache(file, one)
    with pytest.raises(CacheError, match="contradicts"):
        load_cache(file, tiny[0])


def test_fingerprints_differ(tiny, tiny_model_dir, make_model_dir):
    own = fingerprint(tiny[0])
    assert own == fingerprint(hydra_mlx.load_model(tiny_model_dir))
    others = [make_model_dir(seed=1), make_model_dir(rope_theta=500.0)]
    prints = [fingerprint(hydra_mlx.load_model(m)) for m in others]
    prints.append(fingerprint(hydra_mlx.load_model(tiny_model_dir, dtype="bfloat16")))
    assert len({own, *prints}) == 4


def test_a_failed_write_keeps_the_old_file(tiny, file, monkeypatch):
    save_cache(file, stored(tiny[0], [1, 2]))
    before = file.read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prompt_cache.os, "fsync", full)
    with pytest.raises(CacheError, match="No space left"):
        save_cache(file, stored(tiny[0], [1, 2, 3]))
    assert file.read_bytes() == before and os.listdir(file.parent) == [file.name]


# ----------------------------------------------------------------------------------- the program


@pytest.mark.parametrize("kv", [(), ("--kv-bits", 8, "--kv-group-size", 32)])
def test_a_conversation_goes_on(program, tiny, file, kv):
    cached = ("--prompt-cache", file, "--stats", "json", "-m", 10, *kv)
    system = ("--system-prompt", "Be terse")
    first = program("generate", "One", *cached, *system)
    assert stats(first)["cached_tokens"] == 0
    second = program("generate", "Two", *cached)
    n = stats(first)["prompt_tokens"] + 10
    assert stats(second)["cached_tokens"] == n
    assert stats(second)["processed_tokens"] == stats(second)["prompt_tokens"] - n
    third = program("generate", "Three", *cached, *system)
    talk = load_cache(file).messages
    assert [m["role"] for m in talk] == ["system"] + 3 * ["user", "assistant"]
    assert [m["content"] for m in talk[2::2]] == [r[1][:-1] for r in (first, second, third)]
    if not kv:
        text = tiny[1].apply_chat_template(talk[:-1], tokenize=False, add_generation_prompt=True)
        assert ok(program("generate", text, RAW, "-m", 10)) == third[1]
    refused(program("generate", "x", *cached, "--system-prompt", "Rhyme"), "differs")
    assert load_cache(file).messages == talk


def test_one_text_many_questions(program, file):
    ok(program("generate", "A long text. ", RAW, "-m", 0, "--prompt-cache", file))
    before = file.read_bytes()
    ro = (RAW, "-m", 8, "--prompt-cache", file, "--prompt-cache-ro", "--stats", "json")
    for question in ("Why?", "How?"):
        result = program("generate", "A long text. " + question, *ro)
        assert stats(result)["cached_tokens"] == 13 and stats(result)["processed_tokens"] == 4
        assert result[1] == ok(program("generate", "A long text. " + question, RAW, "-m", 8))
    same = program("generate", "A long text. ", *ro)
    assert "12 of them are reused" in same[2] and stats(same)["cached_tokens"] == 12
    assert same[1] == ok(program("generate", "A long text. ", RAW, "-m", 8))
    refused(program("generate", "Another text", *ro), "does not begin with")
    assert file.read_bytes() == before


TEXT = "".join(f"Line {i} of a text that is edited later. " for i in range(40))  # 1590 tokens


@pytest.mark.parametrize("kv", [(), ("--kv-bits", "8,4", "--kv-group-size", 32)])
def test_an_edited_text(program, file, kv):
    """What comes before the edit is kept as far back as a checkpoint; the rest is as if new."""
    flags = (RAW, "-m", 12, "--stats", "json", "--prefill-step-size", 256, *kv)
    at = TEXT.index("Line 30")
    edited = TEXT[:at] + "Something else. " + TEXT[at:]
    ok(program("generate", TEXT, *flags, "--prompt-cache", file))
    result = program("generate", edited, *flags, "--prompt-cache", file)
    kept = at // 256 * 256
    assert stats(result)["cached_tokens"] == kept > 1000
    assert stats(result)["processed_tokens"] == len(edited) - kept
    assert f"{kept:,} of them are reused: the prompt differs after" in result[2]
    fresh = program("generate", edited, *flags, "--prompt-cache", file.with_name("new"))
    assert fresh[1] == result[1] and stats(fresh)["cached_tokens"] == 0
    one, two = load_cache(file), load_cache(file.with_name("new"))
    assert one.tokens == two.tokens and len(one.tokens) == len(edited) + 12
    states = [tree_flatten([c.state for c in stored.cache]) for stored in (one, two)]
    for (name, a), (same, b) in zip(*states, strict=True):
        assert name == same and (a == b if not isinstance(a, mx.array) else mx.array_equal(a, b))
    again = program("generate", edited, *flags, "--prompt-cache", file)  # another reply, same text
    assert stats(again)["processed_tokens"] == 1 and again[1] == result[1]
    shorter = program("generate", edited[:700], *flags, "--prompt-cache", file, "--prompt-cache-ro")
    assert stats(shorter)["cached_tokens"] == 512 and "ends before they do" in shorter[2]


def test_checkpoint_flags(program, file):
    flags = ("generate", TEXT, RAW, "-m", 4, "--stats", "json", "--prompt-cache", file)
    ok(program(*flags, "--checkpoints", "off"))
    assert load_cache(file).checkpoints is None
    changed = ("generate", TEXT[:-9] + "x" + TEXT[-9:], *flags[2:])
    result = program(*changed, "--checkpoints", "1MB", "--checkpoint-dtype", "bfloat16")
    assert stats(result)["cached_tokens"] == 0 and "0 of them can be reused" in result[2]
    points = load_cache(file).checkpoints
    assert points.dtype == "bfloat16" and points.positions[-3:] == [1536, 1590, 1595]
    refused(program(*changed, "--checkpoint-dtype", "float32"), "has them as bfloat16")
    wider = program(*flags, "--checkpoints", "2MB")
    assert stats(wider)["cached_tokens"] == 1536
    assert load_cache(file).checkpoints.grid.most > points.grid.most
    none = program(*changed, "--checkpoints", "off")
    assert stats(none)["cached_tokens"] == 1536 and load_cache(file).checkpoints is None
    refused(program(*flags, "--checkpoints", "20"), "expected off, or a size")
    refused(program(*flags, "--checkpoints", "off", "--checkpoint-dtype", "float32"), "no effect")
    refused(program(*flags, "--checkpoints", "2MB", "--prompt-cache-ro"), "the file's are used")
    refused(program("generate", "x", "--checkpoints", "2MB"), "without --prompt-cache")


def test_a_replacement_broken_off_leaves_the_file(program, file, monkeypatch):
    from hydra_mlx import cli

    flags = ("-m", 4, RAW, "--prompt-cache", file)
    ok(program("generate", TEXT, *flags))
    before = file.read_bytes()
    answers = iter([False] * 3)
    monkeypatch.setattr(cli.Interrupt, "__call__", lambda self: next(answers, True))
    code, out, err = program("generate", TEXT[:300] + "!" + TEXT[300:], *flags)
    assert (code, out) == (130, "") and "is as it was" in err and "Interrupted after 1,024" in err
    assert file.read_bytes() == before


def test_one_document_in_a_chat(program, file):
    ok(program("generate", "A long text.", "-m", 0, "--prompt-cache", file))
    result = program("generate", "Why?", "-m", 8, "--prompt-cache", file, "--stats", "json")
    assert stats(result)["cached_tokens"] == 20 and "reused" not in result[2]


def test_overwrite(program, file):
    ok(program("generate", "One", "-m", 4, "--prompt-cache-file", file))
    flags = ("generate", "Two", RAW, "-m", 4, "--prompt-cache", file)
    refused(program(*flags), "holds a conversation")
    ok(program(*flags, "--prompt-cache-overwrite"))
    assert load_cache(file).messages is None
    refused(program("generate", "x", "-m", 4, "--prompt-cache", file), "plain text")
    file.write_bytes(b"damaged")
    refused(program(*flags), "damaged")
    assert file.read_bytes() == b"damaged"
    ok(program(*flags, "--prompt-cache-overwrite"))


def test_a_template_that_rewrites_the_past(program, make_model_dir, file, tmp_path):
    import shutil

    folder = tmp_path / "m"
    shutil.copytree(make_model_dir(), folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["chat_template"] = "{{ messages | length }}:{{ messages[-1].content }}>"
    path.write_text(json.dumps(config))
    flags = ("-m", 4, "--model", folder, "--prompt-cache", file, "--stats", "json", "--quiet")
    ok(program("generate", "One", *flags))
    second = program("generate", "Two", *flags)
    assert stats(second)["cached_tokens"] == 0 and "earlier turns differently" in second[2]
    assert len(load_cache(file).messages) == 4


def test_wrong_model_or_place(program, make_model_dir, file, tmp_path):
    flags = ("generate", "One", "-m", 4, "--prompt-cache", file)
    ok(program(*flags))
    before = file.read_bytes()
    refused(program(*flags, "--model", make_model_dir(seed=1)), "belongs to another model")
    refused(program(*flags, "--dtype", "float16"), "belongs to another model")
    assert file.read_bytes() == before
    refused(program(*flags[:-1], tmp_path), "is a folder")
    refused(program(*flags[:-1], tmp_path / "no" / "file"), "does not exist")
    refused(program(*flags[:-1], tmp_path / "new", "--prompt-cache-ro"), "does not exist")


def test_damaged_file_in_the_program(program, file):
    flags = ("generate", "One", "-m", 4, "--prompt-cache", file)
    ok(program(*flags))
    data = bytearray(file.read_bytes())
    data[-9] ^= 4
    file.write_bytes(data)
    refused(program(*flags), "checksum", "--prompt-cache-overwrite")
    assert file.read_bytes() == bytes(data)


def test_kv_bits_of_the_file(program, file):
    bits = ("--kv-bits", 4, "--kv-group-size", 32)
    flags = ("-m", 4, "--prompt-cache", file, "--stats", "json")
    ok(program("generate", "One", *flags, *bits))
    kept = program("generate", "Two", *flags)
    assert "kv-bits 4" in stats(kept)["kv"] and "keeping to that" in kept[2]
    refused(
        program("generate", "Two", *flags, "--kv-bits", 8, "--kv-group-size", 32), "holds 4 bits"
    )
    ok(program("generate", "One", *flags, "--prompt-cache-overwrite"))
    assert "kv-bits 4" in stats(program("generate", "Two", *flags, *bits))["kv"]


def test_interrupted_prompt_is_taken_up(program, file, monkeypatch):
    from hydra_mlx import cli

    class Impatient(cli.Interrupt):
        calls = 0

        def __call__(self):
            self.calls += 1
            return self.calls > 3

    flags = ("generate", "A prompt of some length", "-m", 6, "--prefill-step-size", 8)
    cached = ("--prompt-cache", file, "--stats", "json")
    with monkeypatch.context() as patch:
        patch.setattr(cli, "Interrupt", Impatient)
        code, out, err = program(*flags, *cached)
    assert (code, out) == (130, "") and "Interrupted after 16 of 42" in err
    assert load_cache(file).tokens[-1] and len(load_cache(file).tokens) == 16
    again = program(*flags, *cached)
    assert stats(again)["cached_tokens"] == 16 and again[1] == ok(program(*flags))
    assert len(load_cache(file).messages) == 2


def test_the_models_own_tokens_stay(tiny):
    """A reply whose text would be encoded another way is still continued from its tokens."""
    one = StoredCache([], [1, 2, 3], "ab", 3, None, "")
    assert one.match("abc", [9, 8], lambda rest: [7]) == ([1, 2, 3, 7], 3)
    assert one.match("xbc", [9, 8], lambda rest: [7]) == ([9, 8], 0)
    assert one.match("aX", [1, 2, 8], lambda rest: [7]) == ([1, 2, 8], 2)
