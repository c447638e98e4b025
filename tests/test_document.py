"""`hydra-mlx cache`: a document that was read once answers like one that is read each time."""

import json
import os

import hydra_mlx  # noqa: F401  (before mlx)
from hydra_mlx import cli
from hydra_mlx.prompt_cache import load_cache

import pytest

TEXT = "".join(f"Line {i} of a long report.\n" for i in range(40))
RAW = "--ignore-chat-template"


@pytest.fixture
def report(tmp_path):
    path = tmp_path / "report.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out.safetensors"


def ok(result):
    assert result[0] == 0, result[2]
    return result[1]


def refused(result, *words):
    code, out, err = result
    assert code == 2 and not out and "Traceback" not in err, err
    assert len(err.strip().splitlines()) <= 2 and all(w in err for w in words), err


def info(program, out):
    return json.loads(ok(program("cache", "info", out, "--json", model=False)))


def read(program, *argv, model=True):
    """`cache read`; the fixture's --model must come after the action."""
    return program("cache", "read", *argv, model=model)


@pytest.fixture
def program(program, tiny_model_dir):
    def run(command, *argv, model=True):
        if command == "cache" and argv[0] == "read" and "--model" not in argv:
            argv = (*argv, "--model", tiny_model_dir)
        return program(command, *argv, model=model and command != "cache")

    return run


def stats(result):
    assert result[0] == 0, result[2]
    return json.loads(result[2].strip().splitlines()[-1])


@pytest.mark.parametrize("bits", [(), ("--kv-bits", "8,4"), ("--kv-bits", "4")], ids=str)
@pytest.mark.parametrize("chat", [(), ("--system-prompt", "Be terse"), (RAW,)], ids=str)
def test_a_question_follows(program, report, out, chat, bits):
    group = ("--kv-group-size", 32) if bits else ()
    ok(read(program, report, "--out", out, *chat, *bits, *group, "--quiet"))
    before = out.read_bytes()
    held = info(program, out)["tokens"]
    prompt = ("Why?",) if RAW not in chat else (f"@{report}", "Why?")
    flags = ("-m", 8, "--prompt-cache", out, "--prompt-cache-ro", "--stats", "json", *chat)
    result = program("generate", *prompt, *flags)
    assert stats(result)["cached_tokens"] == held > 1000
    assert stats(result)["processed_tokens"] < 40
    if not bits:
        assert result[1] == ok(program("generate", f"@{report}", "Why?", "-m", 8, *chat))
    assert out.read_bytes() == before


def test_the_whole_prompt_will_do_too(program, report, out):
    """generate @report.txt "Why?" finds the document in the file."""
    ok(read(program, report, "--out", out))
    flags = ("-m", 8, "--prompt-cache", out, "--stats", "json")
    short = program("generate", "Why?", *flags, "--prompt-cache-ro")
    long = program("generate", f"@{report}", "Why?", *flags)
    assert short[1] == long[1] and stats(long)["cached_tokens"] == stats(short)["cached_tokens"]
    found = load_cache(out)
    assert [m["role"] for m in found.messages] == ["user", "assistant"] and not found.open_turn
    assert found.messages[0]["content"] == TEXT + "\nWhy?"


def test_several_files_and_stdin(program, report, out, tmp_path, stdin):
    other = tmp_path / "other.txt"
    other.write_text("No newline at its end")
    stdin(b"From a pipe.")
    ok(read(program, other, "-", report, "--out", out, RAW))
    assert load_cache(out).text == "No newline at its end\n\nFrom a pipe.\n\n" + TEXT
    for bad in ("", " \n\n"):
        other.write_text(bad)
        refused(read(program, other, "--out", tmp_path / "new"), "is empty")
    other.write_bytes(b"abc\xff")
    refused(read(program, other, "--out", tmp_path / "new"), "UTF-8", "offset 3")
    refused(read(program, "-", "-", "--out", tmp_path / "new"), "given twice")
    refused(read(program, tmp_path / "gone", "--out", tmp_path / "new"), "cannot be read")
    assert not (tmp_path / "new").exists()


def test_interrupted_and_taken_up(program, report, out, monkeypatch):
    class Impatient(cli.Interrupt):
        calls = 0

        def __call__(self):
            self.calls += 1
            return self.calls > 3

    flags = (report, "--out", out, "--prefill-step-size", 256)
    with monkeypatch.context() as patch:
        patch.setattr(cli, "Interrupt", Impatient)
        code, _, err = read(program, *flags)
    assert code == 130 and "holds 768 tokens" in err and "the same command goes on" in err
    part = info(program, out)
    assert part["tokens"] == 768 and part["wanted"] > 1000 and part["turns"] == []
    assert "are missing" in ok(program("cache", "info", out))
    again = read(program, *flags)
    assert "has 768 of them" in again[2]
    whole = load_cache(out)
    ok(read(program, *flags, "--overwrite"))
    fresh = load_cache(out)
    assert whole.tokens == fresh.tokens and whole.text == fresh.text
    assert whole.checkpoints.positions == fresh.checkpoints.positions
    from .sequences import difference

    assert difference(whole.cache, fresh.cache) == 0
    assert info(program, out)["wanted"] == 0


def test_interrupted_at_once(program, report, out, monkeypatch):
    monkeypatch.setattr(cli.Interrupt, "__call__", lambda self: True)
    code, _, err = read(program, report, "--out", out)
    assert code == 130 and "nothing was saved" in err and not out.exists()


def test_a_changed_document(program, report, out):
    flags = (report, "--out", out, "--prefill-step-size", 256)
    ok(read(program, *flags))
    before = out.read_bytes()
    same = read(program, *flags)
    assert "already" in same[2] and out.read_bytes() == before
    report.write_text(TEXT.replace("Line 30 of", "Line XXX of"))
    refused(read(program, *flags), "another document", "--update")
    assert out.read_bytes() == before
    result = read(program, *flags, "--update")
    assert "has 768 of them" in result[2]
    assert program("generate", "Why?", "-m", 8, "--prompt-cache", out, "--prompt-cache-ro")[
        1
    ] == ok(program("generate", f"@{report}", "Why?", "-m", 8))
    report.write_text(TEXT[:300])  # shorter than what is there
    ok(read(program, *flags, "--update"))
    assert load_cache(out).text.endswith(TEXT[:300] + "\n\n")
    report.write_text(TEXT)  # what is there is its beginning, but for the blank line
    refused(read(program, *flags), "another document")


def test_flags(program, report, out, make_model_dir, tmp_path):
    flags = (report, "--out", out)
    refused(read(program, *flags, "--kv-bits", "x"), "8,4")
    refused(read(program, *flags, "--kv-bits", "4,4,4"), "8,4")
    refused(read(program, *flags, "--kv-bits", "7"), "kv-bits is 7")
    refused(read(program, *flags, "--kv-group-size", "32"), "without --kv-bits")
    refused(read(program, *flags, "--checkpoints", "2x"), "2x")
    refused(read(program, *flags, RAW, "--system-prompt", "x"), "--system-prompt")
    refused(read(program, *flags, "--update", "--overwrite"), "not allowed with")
    refused(read(program, report, "--out", tmp_path), "is a folder")
    refused(read(program, report, "--out", tmp_path / "no" / "x"), "does not exist")
    refused(program("cache", "--quiet", model=False), "ACTION")
    refused(program("cache", "write", model=False), "write")
    assert not out.exists()
    ok(read(program, *flags, "--checkpoints", "1MB", "--checkpoint-dtype", "bfloat16"))
    assert info(program, out)["dtype"] == "bfloat16"
    report.write_text(TEXT + "and more")
    before = out.read_bytes()
    update = (*flags, "--update")
    refused(read(program, *update, "--checkpoint-dtype", "float32"), "as bfloat16")
    refused(read(program, *update, "--kv-bits", "4", "--kv-group-size", 32), "another form")
    refused(read(program, *update, "--model", make_model_dir(seed=1)), "another model")
    report.write_text(TEXT)
    refused(read(program, *flags, "--model", make_model_dir(seed=1)), "another model")
    assert out.read_bytes() == before
    out.write_bytes(before[:-1])
    result = read(program, *flags)
    refused(result, "incomplete", " --overwrite")
    assert "--prompt-cache-overwrite" not in result[2]
    ok(read(program, *flags, "--overwrite"))
    assert os.listdir(tmp_path) and not [p for p in tmp_path.iterdir() if p.name[0] == "."]


def test_no_room(program, report, out, monkeypatch):
    import shutil

    from hydra_mlx import reading
    from hydra_mlx.machine import Machine

    with monkeypatch.context() as patch:
        patch.setattr(reading, "machine", lambda: Machine(10**6, "is free here"))
        refused(read(program, report, "--out", out), "976.6 KiB is free here", "What fits")
    usage = shutil.disk_usage(out.parent)._replace(free=4096)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    refused(read(program, report, "--out", out), "4.0 KiB are free")
    assert not out.exists()


def test_a_template_that_changes_the_text(program, make_model_dir, report, out, tmp_path):
    import shutil

    folder = tmp_path / "m"
    shutil.copytree(make_model_dir(), folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["chat_template"] = "{{ messages[-1].content | upper }}"
    path.write_text(json.dumps(config))
    refused(read(program, report, "--out", out, "--model", folder), "changes the document")
    config["chat_template"] = "{{ messages[-1].content | trim }}>"
    path.write_text(json.dumps(config))
    ok(read(program, report, "--out", out, "--model", folder))
    flags = ("Why?", "-m", 4, "--model", folder, "--prompt-cache", out, "--stats", "json")
    assert stats(program("generate", *flags))["cached_tokens"] > 1000
