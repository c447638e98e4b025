"""Where a prompt comes from, and what the chat template makes of it."""

import io
import json
import os
import shutil
import sys

from hydra_mlx import text as texts

from .test_generate_program import RAW, failed, stats


def test_where_a_prompt_comes_from(stdin, tmp_path, monkeypatch):
    one, two = tmp_path / "one.txt", tmp_path / "two.txt"
    one.write_text("first\n", newline="")
    two.write_text("sec\\nond é\r\n\ttab", newline="")
    read = texts.read_prompt
    assert read(["text"], []) == "text"
    assert read([f"@{two}"], []) == "sec\\nond é\r\n\ttab"
    assert read([f"@{one}", "ask"], []) == "first\n\nask"
    assert read(["ask"], [str(two), str(one)]) == "sec\\nond é\r\n\ttab\n\nfirst\n\nask"
    assert read(["@@home"], []) == "@home"
    stdin("päip".encode())
    assert read(["ask"], []) == "päip\n\nask"
    stdin(b"piped\n")
    assert read([], []) == "piped\n"
    stdin(b"piped\n")
    assert read(["-", "ask"], [str(one)]) == "first\n\npiped\n\nask"
    monkeypatch.setattr(sys, "stdin", None)
    assert read(["ask"], []) == "ask"


def test_a_terminal_is_not_read(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stdin", Terminal("no"))
    assert texts.read_prompt(["ask"], []) == "ask"


def test_prompts_that_cannot_be_read(program, stdin, tmp_path):
    bad = tmp_path / "latin.txt"
    bad.write_bytes(b"abc\xe9 d")
    failed(program("generate", f"@{bad}"), "0xe9", "offset 3")
    failed(program("generate", "x", "--file", bad), "offset 3")
    stdin(b"\xff")
    failed(program("generate", "-"), "stdin", "offset 0")
    stdin(b"")
    failed(program("generate"), "no prompt")
    failed(program("generate", ""), "empty")
    failed(program("generate", "-p", "  \n"), "empty")
    failed(program("generate", "-"), "empty")
    failed(program("generate", "@/nowhere/at all"), "No such file", "@@")
    failed(program("generate", "@" + str(tmp_path)), "directory")
    failed(program("generate", "two", "words"), "quotes")
    failed(program("generate", "-", "-"), "twice")
    failed(program("generate", os.fsdecode(b"ab\xff")), "offset 2")


def test_chat_template_flags(program):
    def tokens(*flags):
        return stats(program("generate", "Hello", "-m", 1, "--stats", "json", *flags))[
            "prompt_tokens"
        ]

    # <|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n in byte tokens
    assert tokens() == 1 + 5 + 5 + 2 + 1 + 10
    assert tokens(RAW) == 5
    assert tokens("--system-prompt", "Be terse") == 24 + 1 + 7 + 8 + 2
    assert tokens("--prefill-response", "Well") == 24 + 4
    assert tokens("--use-default-chat-template") == 24
    failed(program("generate", "a", RAW, "--system-prompt", "b"), "--system-prompt", "template")
    failed(program("generate", "a", RAW, "--prefill-response", "b"), "--prefill-response")
    failed(program("generate", "a", "--chat-template-config", "[1]"), "JSON object")
    failed(program("generate", "a", "--use-default-chat-template", RAW), "exclude")


def test_template_config_reaches_the_template(program, make_model_dir, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(make_model_dir(), folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["chat_template"] = "{% if loud %}{{ raise_exception('no') }}{% endif %}ab"
    path.write_text(json.dumps(config))
    flags = ("generate", "x", "--model", folder, "-m", 1, "--stats", "json")
    assert stats(program(*flags))["prompt_tokens"] == 2
    failed(program(*flags, "--chat-template-config", '{"loud": true}'), "template fails")


def test_a_tokenizer_without_template(program, make_model_dir):
    flags = ("generate", "Hello", "--model", make_model_dir(template=False), "-m", 1)
    assert stats(program(*flags, "--stats", "json"))["prompt_tokens"] == 5
    default = program(*flags, "--stats", "json", "--use-default-chat-template")
    assert stats(default)["prompt_tokens"] == 24
    failed(program(*flags, "--system-prompt", "x"), "--use-default-chat-template")
