"""The chat in a pseudo-terminal: every command, pastes, Ctrl-C, kill -9; with each way to type."""

import importlib.util
import os
import random
import re
import time

import hydra_mlx
from hydra_mlx.prompts import ChatOptions
from hydra_mlx.session_plan import How

import pytest

from .terminals import Terminals
from .test_session import reopen, start

TOOLKIT = importlib.util.find_spec("prompt_toolkit") is not None
KINDS = [
    pytest.param("prompt_toolkit", marks=pytest.mark.skipif(not TOOLKIT, reason="not installed")),
    "readline",
]
N = 24  # tokens of a reply
METER = r"ctx [\d.k]+ · kv [\d.]+ \w+ · state [\d.]+ \w+ · \d+ checkpoints?"


@pytest.fixture(scope="module")
def terminals():
    t = Terminals()
    yield t
    t.close()


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture
def chat(terminals, tiny_model_dir, tmp_path, kind):
    """chat(flags..., env=..., without=...) -> a Terminal at its first prompt."""

    def begin(*argv, n=N, **options):
        flags = ("--model", tiny_model_dir, "-m", n, "--history", tmp_path / "history")
        t = terminals.start(*flags, "--input", kind, *argv, **options)
        t.expect("/help lists the commands")
        t.expect(">")
        return t

    yield begin
    terminals.reap()


def replies(tiny, *messages, n: int = N) -> list:
    """What a fresh conversation says."""
    session = start(tiny, every=512, chat=ChatOptions())
    return ["".join(p.text for p in session.reply(m, How(n))) for m in messages]


def leave(t):
    t.quiet()
    t.send("\x04")
    assert t.wait() == 0, t.text
    assert "Traceback" not in t.text


def shown(reply: str) -> str:
    return re.escape(reply)


def test_a_conversation(chat, tiny, tmp_path):
    one, two, other = *replies(tiny, "One", "Two"), replies(tiny, "One", "Zwei")[1]
    t, file = chat(), tmp_path / "talk"
    t.ask("One", shown(one))
    t.expect(f"Ended by max-tokens {N}")
    t.ask("Two", shown(two))
    t.expect(METER)
    t.ask("/regen", shown(two))
    assert "At temp 0 the reply will be the same" in t.text
    t.ask("/edit Zwei", shown(other))
    t.ask(f"/save {file}", r"holds [\d,]+ tokens")
    t.ask("/undo", "Took back “Zwei”")
    t.ask("Two", shown(two))
    t.ask("/context", "checkpoints +4")
    assert "“One”" in t.text and "“Two”" in t.text
    t.ask(f"/load {file}", "2 turns")
    t.ask("/regen", shown(other))
    t.ask("/stats", "ended by length")
    assert "cached)" in t.text
    t.ask("/clear", "Forgot 2 turns")
    t.ask("One", shown(one))
    t.ask("/exit", "")
    assert t.wait() == 0


def test_wrong_input(chat, tmp_path):
    t = chat()
    for line, answer in {
        "/savefoo": "Did you mean /save",
        "/Exit": "Did you mean /exit",
        "/etc/passwd": "is not a command; nothing was sent",
        "/undo": "nothing to take back",
        "/undo 3": "/undo takes nothing after it",
        "/regen": "There is no message yet",
        "/edit": "There is no message yet",
        "/stats": "There was no reply yet",
        "/save": "/save needs the name of a file",
        f"/save {tmp_path}/x": "nothing to save yet",
        "/save /nowhere/x": "is not a folder",
        "/load": "/load needs FILE",
        "/load /nowhere": "cannot be read",
        f"/load {__file__}": "is no prompt cache",
        "/read": "/read needs FILE",
        "/read /nowhere": "cannot be read",
        "/read /bin/true": "is not UTF-8",
        "/set temp": "expected names and values",
        "/set temp warm": "temp: invalid float value",
        "/set temp -1": "temp is -1.0, expected 0 or more",
        "/set top-p 0.5": "top-p has no effect at temp 0",
        "/set warmth 3": "'warmth' is not a setting",
        "/set prompt-lookup maybe": "expected on or off",
        "/set max-tokens 0": "leaves no room",
    }.items():
        t.ask(line, answer)
        t.expect(">")
    t.ask("/context", "context +0 tokens")
    leave(t)


def test_settings_and_system(chat, tiny):
    t = chat()
    t.ask("/set", "temp +0.0")
    t.ask("/set max-tokens 5 prompt_lookup=on", "prompt-lookup +on  .changed.")
    one = replies(tiny, "One", n=5)[0]
    t.ask("One", shown(one) + r"\s")
    t.ask("/system", "There is no system prompt")
    t.ask("/system Be brief.", r"The next message reads \d+ tokens again")
    t.ask("/system", r"Be brief\.")
    session = start(tiny, chat=ChatOptions(system="Be brief."))
    t.ask("/clear", "Forgot")
    reply = "".join(p.text for p in session.reply("One", How(5)))
    t.ask("One", shown(reply) + r"\s")
    t.ask("/system none", "Removed the system prompt")
    t.ask("/set max-context 60", "max-context +60")
    t.ask("Two " * 9, "context is full: with this")
    t.ask("/clear", "Forgot")
    t.ask("Two", shown(replies(tiny, "Two", n=5)[0]) + r"\s")
    t.expect(r"ctx \d+/60")
    leave(t)


def test_pastes_and_blocks(chat, tiny, tmp_path, kind):
    file = tmp_path / "a file.txt"
    file.write_text("Some text.")
    t = chat()
    t.paste("/exit\n/undo")
    t.ask("", shown(replies(tiny, "/exit\n/undo")[0]))
    t.ask("/undo", "Took back “/exit /undo”")
    t.paste("/exit")
    t.ask("", shown(replies(tiny, "/exit")[0]))
    t.ask("/clear", "Forgot")
    t.ask('"""', r"\n\.")
    t.send("/exit\r")
    t.expect(r"\n\.")
    t.ask('two"""', shown(replies(tiny, "/exit\ntwo")[0]))
    t.quiet()
    t.send('"""\r')
    t.expect(r"\n\.")
    t.quiet()
    t.send("\x03")  # the block is dropped, not the chat
    if kind == "readline":
        t.ask('"""', r"\n\.")
        t.send("\x04")
        t.expect("has no end")
    t.ask("/clear", "Forgot")
    t.ask("//exit", shown(replies(tiny, "/exit")[0]))
    t.ask("/clear", "Forgot")
    t.send("/read ")
    t.paste(f"'{file}'")
    t.ask("", r"Read a file.txt: \d+ tokens")
    t.ask("What?", shown(replies(tiny, "Some text.\n\nWhat?")[0]))
    leave(t)


def test_the_editor(chat, tiny, tmp_path):
    script = tmp_path / "edit.sh"
    script.write_text('#!/bin/sh\ngrep -q One "$1" && printf "Zwei" > "$1"\n')
    script.chmod(0o755)
    t = chat(env={"EDITOR": str(script), "VISUAL": ""})
    t.ask("One", shown(replies(tiny, "One")[0]))
    t.ask("/edit", shown(replies(tiny, "Zwei")[0]))
    t.ask("/edit", "ended with 1; nothing was sent")
    t.ask("/context", "“Zwei”")
    leave(t)
    t = chat(env={"EDITOR": "", "VISUAL": ""})
    t.ask("One", shown(replies(tiny, "One")[0]))
    t.ask("/edit", "EDITOR is not set")
    leave(t)


def test_history(chat, tiny):
    t = chat()
    t.ask("One", shown(replies(tiny, "One")[0]))
    t.paste("/exit")
    t.ask("", "Ended by")
    leave(t)
    t = chat()
    t.ask("\x1b[A\x1b[A", shown(replies(tiny, "One")[0]))  # the one before the last
    t.ask("/clear", "Forgot")
    t.send("\x1b[A\x1b[A\x1b[A")  # what was pasted is still no command
    t.quiet()
    t.ask("", shown(replies(tiny, "/exit")[0]))
    leave(t)


# --------------------------------------------------------------------------------- Ctrl-C


def test_ctrl_c(chat, tiny, tmp_path):
    whole = replies(tiny, "One", n=20)[0]
    t = chat(n=2000)
    t.ask("One", shown(whole[:9]))
    t.send("\x03")
    t.expect("Stopped; the reply stays as it is")
    t.ask("/context", "“One”, broken off")
    t.ask("/set max-tokens 12", "max-tokens")
    t.ask("/regen", shown(whole[:12]) + r"\s")
    t.ask("/undo", "Took back")
    t.ask("One", shown(whole[:12]) + r"\s")
    t.quiet()
    t.send("not sent")
    t.quiet()
    t.send("\x03")  # drops the line
    t.ask("/context", "“One”")
    assert "not sent”" not in t.text
    t.quiet()
    t.send("\x03")
    assert t.wait() == 130 and "Traceback" not in t.text


def test_ctrl_c_with_enter(chat):
    """Read in one go with Enter, or discarded with it: the reply is stopped or never begins."""
    t = chat(n=100000)
    t.quiet()
    t.send("One")
    t.quiet()
    before = t.prompts
    t.send("\r\x03")
    assert t.prompt(before)
    t.ask("/context", "context +[0-9]")
    leave(t)


def test_ctrl_c_twice_ends_it(chat):
    t = chat(n=100000)
    t.ask("One", "One.*\n.{9}")
    t.send("\x03")
    t.expect("Stopped")
    t.quiet()
    t.send("\x03")
    assert t.wait() == 130 and "Traceback" not in t.text


def test_ctrl_c_while_reading(chat, tiny, tmp_path):
    """What was read is not read again, and the message is not lost."""
    file = tmp_path / "long.txt"
    file.write_text("A long text, to be read. " * 100)
    t = chat("--prefill-step-size", 64)
    t.ask(f"/read {file}", r"[1-9]\d*/2,\d+ tokens")
    t.send("\x03")
    found = t.expect("Stopped; long.txt is not in the conversation|The next message begins")
    if "Stopped" in found:
        t.ask("/context", "context +0 tokens")
        t.ask(f"/read {file}", "The next message begins with it")
    t.ask("Why?", "Ended by")
    t.ask("/undo", "Took back “Why")
    t.ask("/undo", "Took back long.txt")
    t.ask("One", shown(replies(tiny, "One")[0]))
    leave(t)


def test_ctrl_c_at_random_moments(chat, tiny, tmp_path):
    """Whatever was broken off, the session goes on as a fresh one does."""
    rng, file = random.Random(7), tmp_path / "text.txt"
    file.write_text("Some text. " * 150)
    expected = replies(tiny, "One", "Two", n=12)
    t = chat(n=400)
    for _ in range(6):
        t.quiet()
        t.send(rng.choice(["Tell me", f"/read {file}", "/regen", "Go on"]))
        t.quiet(0.05)
        before = t.prompts
        t.send("\r")
        time.sleep(rng.random() * 0.5)
        t.send("\x03")
        t.prompt(before)
        t.quiet(0.3)
        if t.is_over():  # it came when there was nothing to stop
            assert t.wait() == 130 and "Traceback" not in t.text
            t = chat(n=400)
    t.ask("/set max-tokens 12", r"12  \(changed\)")
    t.ask("/clear", "Forgot")
    t.ask("One", shown(expected[0]) + r"\s")
    t.ask("Two", shown(expected[1]) + r"\s")
    leave(t)


# ------------------------------------------------------------------------------- sessions


def test_a_session_file(chat, tiny, tmp_path):
    file = tmp_path / "talk.safetensors"
    t = chat("--session", file)
    assert "new, written on leaving" in t.text
    t.ask("One", shown(replies(tiny, "One")[0]))
    leave(t)
    t = chat("--session", file)
    assert "1 turn" in t.text
    t.ask("Two", shown(replies(tiny, "One", "Two")[1]))
    t.ask("/save", r"holds [\d,]+ tokens")  # its own file
    os.utime(file)
    t.ask("/save", "was changed since; nothing was written")
    t.ask(f"/save {tmp_path}/talk.safetensors", "nothing was written")
    t.ask(f"/save --overwrite {file}", r"holds [\d,]+ tokens")
    leave(t)
    assert len(reopen(tiny, file).talk) == 2


def test_leaving_never_loses_a_session(chat, tiny, tmp_path):
    """Its file was written by another: the chat stays until told again."""
    file, other = tmp_path / "talk", tmp_path / "other"
    t = chat("--session", file)
    t.ask("One", "Ended by")
    t.ask(f"/save {other}", r"holds [\d,]+ tokens")
    file.write_bytes(other.read_bytes())
    t.ask("Two", "Ended by")
    t.ask("/exit", "The chat goes on")
    t.ask(f"/load {other}", "nothing was written")  # which would lose it too
    t.ask(f"/save --overwrite {file}", r"holds [\d,]+ tokens")
    t.ask(f"/load {other}", "1 turn")
    t.ask("Drei", "Ended by")
    leave(t)
    assert [x.user for x in reopen(tiny, file).talk.turns] == ["One", "Two"]
    assert [x.user for x in reopen(tiny, other).talk.turns] == ["One", "Drei"]


@pytest.mark.parametrize("old", [False, True], ids=["new", "overwrite"])
def test_kill_while_saving(terminals, tiny_model_dir, tiny, tmp_path, old):
    """The file is the old one, the new one or none, never a half one."""
    rng, file, seen = random.Random(old), tmp_path / "talk", []
    flags = ("--model", tiny_model_dir, "-m", 4, "--history", "off", "--input", "readline")
    for i in range(6):
        file.unlink(missing_ok=True)
        t = terminals.start(*flags, slow=0.01)
        t.ask("One", "Ended by")
        if old:
            t.ask(f"/save {file}", "holds")
        t.ask("Two", "Ended by")
        t.quiet()
        t.send(f"/save --overwrite {file}\r")
        time.sleep(rng.random() * 0.2 if i else 2)
        assert t.kill() == -9
        seen.append(len(reopen(tiny, file).talk) if file.exists() else 0)
    assert seen[0] == 2 and {*seen} == ({1, 2} if old else {0, 2})
    t = terminals.start(*flags, "--session", file)
    t.expect(">")
    t.ask("Three", "Ended by")
    leave(t)
    assert not list(tmp_path.glob(".*.part"))  # what was killed is swept up


# ----------------------------------------------------------------------------------- the screen


def test_colour(chat, make_model_dir):
    t = chat()
    t.ask("One", "Ended by")
    assert b"\x1b[2m" in t.raw
    leave(t)
    t = chat(env={"NO_COLOR": "1"})
    t.ask("One", "Ended by")
    t.ask("/savefoo", "Did you mean")
    assert {*re.findall(rb"\x1b\[([0-9;]*)m", t.raw)} <= {b"", b"0", b"7", b"27"}  # 7: a paste
    leave(t)


def test_without_prompt_toolkit(terminals, tiny_model_dir, tiny):
    flags = ("--model", tiny_model_dir, "-m", N, "--history", "off")
    t = terminals.start(*flags, without=("prompt_toolkit",))
    t.expect(r'edited with readline; more with: pip install "hydra_mlx\[chat\]"')
    t.ask("One", shown(replies(tiny, "One")[0]))
    leave(t)
    t = terminals.start(*flags, "--input", "prompt_toolkit", without=("prompt_toolkit",))
    assert t.wait() == 2 and "this Python has no prompt_toolkit" in t.text
    t = terminals.start(*flags, without=("prompt_toolkit", "readline"))
    t.expect("edited with plain")
    t.ask("One", shown(replies(tiny, "One")[0]))
    leave(t)
    t = terminals.start(*flags, env={"TERM": "dumb"})
    t.ask("One", shown(replies(tiny, "One")[0]))
    assert b"\x1b" not in t.raw
    leave(t)
    assert hydra_mlx
