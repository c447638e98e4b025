"""The chat through a pipe, its flags, its settings, and how replies are shown."""

import io
import random
import signal
import subprocess
import sys
from types import SimpleNamespace

from hydra_mlx import chat_flags, chat_settings, chat_view, cli
from hydra_mlx.chat_input import PASTED, History, Line, lines_to_line
from hydra_mlx.chat_loop import Chat
from hydra_mlx.errors import UsageError
from hydra_mlx.prompts import ChatOptions
from hydra_mlx.session_plan import How

import pytest

from .test_session import start

OFF = ("--history", "off")
N = 16


def replies(tiny, *messages, chat=None, n=N) -> list:
    session = start(tiny, every=512, chat=chat or ChatOptions())
    return ["".join(p.text for p in session.reply(m, How(n))) for m in messages]


@pytest.fixture
def chat(program, stdin):
    """chat(text of stdin, flags...) -> (exit code, stdout, stderr)."""

    def run(text, *argv, **options):
        stdin(text if isinstance(text, bytes) else text.encode())
        return program("chat", *OFF, "-m", N, *argv, **options)

    return run


# ------------------------------------------------------------------------------------- pipes


def test_lines_are_turns(chat, tiny):
    one, two = replies(tiny, "One", "Two")
    assert chat("One\n\nTwo\n", "--quiet") == (0, f"{one}\n{two}\n", "")
    code, out, err = chat("One\n/undo\nOne\r\n/regen\n/exit\nTwo\n")
    assert code == 0 and out == f"{one}\n" * 3
    assert "Took back “One”" in err and one not in err and "\x1b" not in err + out
    block = replies(tiny, "/exit\n\n Two")[0]
    assert chat('"""/exit\n\n Two"""\n', "--quiet") == (0, block + "\n", "")
    assert chat("", "--quiet") == (0, "", "")


def test_the_first_error_ends_it(chat, tmp_path):
    for text, words in {
        "/nonsense\nOne\n": "/nonsense is not a command",
        "/load /nowhere\nOne\n": "/nowhere",
        "/edit\nOne\n": "no message yet",
        '"""One\n': "has no end",
        "/set temp 2 top-k 999\n": "top-k is 999",
        b"\xff\n": "stdin is not UTF-8",
    }.items():
        code, out, err = chat(text)
        assert code == 2 and out == "" and words in err and "Traceback" not in err
        assert len(err.strip().splitlines()) <= 2


def test_edit_needs_a_terminal(chat, tiny):
    code, out, err = chat("One\n/edit\n")
    assert code == 2 and out == replies(tiny, "One")[0] + "\n" and "no terminal" in err
    code, out, err = chat("One\n/edit Two\n")
    assert (code, out.split("\n")[1]) == (0, replies(tiny, "Two")[0])


def test_files_and_sessions(chat, tiny, tmp_path):
    text, file = tmp_path / "t.txt", tmp_path / "talk"
    text.write_text("Some text.")
    expected = replies(tiny, "Some text.\n\nWhy?", "How?")
    code, out, err = chat("Why?\n", f"@{text}", "--session", file)
    assert (code, out) == (0, expected[0] + "\n"), err
    assert "Read t.txt" in err and f"{file} holds" in err
    before = file.read_bytes()
    code, out, err = chat("/stats\n", "--session", file)
    assert code == 2 and file.read_bytes() == before  # nothing changed, nothing written
    code, out, err = chat("How?\n/stats\n", "--session", file)
    assert (code, out) == (0, expected[1] + "\n") and "cached)" in err
    code, out, err = chat(f"/save {text}\n", "--session", file)
    assert code == 2 and "is there already; nothing was written" in err
    assert text.read_text() == "Some text."
    file.write_bytes(before[:-9])
    code, out, err = chat("How?\n", "--session", file)
    assert code == 2 and out == "" and "damaged" in err and file.read_bytes() == before[:-9]


@pytest.mark.parametrize(
    "flags, words",
    [
        (("report.txt",), "expected @FILE"),
        (("@/nowhere",), "cannot be read"),
        (("--temp", -1), "--temp is -1"),
        (("--top-p", 0.5), "no effect at --temp 0"),
        (("--kv-bits", 4), "--kv-group-size 32"),
        (("--kv-group-size", 32), "without --kv-bits"),
        (("--checkpoints", "off", "--checkpoint-dtype", "float32"), "no effect"),
        (("--num-draft-tokens", 3), "no effect without"),
        (("--max-tokens", 0), "no room for a reply"),
        (("--stop", ""), "--stop is empty"),
        (("--session", "/nowhere/x"), "is not a folder"),
        (("--input", "readline"), "needs a terminal"),
        (("--chat-template-config", "x"), "JSON"),
        (("--extra-eos-token", "nope"), "not a token"),
        (("--thinking", "loud"), "invalid choice"),
        (("--model", "/nowhere"), "does not exist"),
        (("--prompt", "x"), "unrecognized"),
    ],
)
def test_flags_that_cannot_be_honoured(chat, flags, words):
    code, out, err = chat("One\n", *flags)
    assert code == 2 and out == "" and words in err and "Traceback" not in err


def test_flags_have_an_effect(chat, tiny, make_model_dir):
    one = replies(tiny, "One")[0]
    system = replies(tiny, "One", chat=ChatOptions(system="Be brief."))[0]
    assert chat("One\n", "--quiet", "--system-prompt", "Be brief.")[1] == system + "\n"
    assert chat("One\n", "--quiet", "--stop", one[4:7])[1] == one[: one.index(one[4:7])] + "\n"
    assert chat("One\n", "--prompt-lookup", "--quiet")[1] == one + "\n"
    assert '"generated_tokens": 16' in chat("One\n", "--stats", "json")[2]
    drawn = ("--temp", 2, "--seed", 4, "--quiet")
    assert chat("One\n", *drawn) == chat("One\n", *drawn) != chat("One\n", "--quiet")
    a, b = chat("One\n/regen\n", *drawn)[1].splitlines()
    assert a != b  # drawn anew
    assert chat("One\n/set seed 4\n/regen\n", *drawn)[1].splitlines() == [a, a]
    code, out, err = chat("One\nTwo\n", "--max-context", 40)
    assert code == 2 and out == one + "\n" and "limit is 40" in err
    small = make_model_dir(max_position_embeddings=16)
    assert "the model is made for 16" in chat("One\n", "--model", small)[2]
    code, out, err = chat("One\n", "--model", make_model_dir(template=False))
    assert code == 2 and "no chat template" in err and "--use-default-chat-template" in err


def test_a_reader_that_leaves(tiny_model_dir):
    command = [sys.executable, "-m", "hydra_mlx.chat", "--model", tiny_model_dir, *OFF, "-m", "-1"]
    pipes = {n: subprocess.PIPE for n in ("stdin", "stdout", "stderr")}
    p = subprocess.Popen([str(c) for c in command], **pipes)
    p.stdin.write(b"One\n")
    p.stdin.flush()
    p.stdout.read(5)
    p.stdout.close()
    err = p.stderr.read()
    assert p.wait(60) == 141 and b"Traceback" not in err and b"Broken" not in err


def test_ctrl_c_through_a_pipe(tiny_model_dir, tmp_path):
    command = [sys.executable, "-m", "hydra_mlx.chat", "--model", tiny_model_dir, *OFF, "-m", "-1"]
    pipes = {n: subprocess.PIPE for n in ("stdin", "stdout", "stderr")}
    p = subprocess.Popen([str(c) for c in command], **pipes)
    p.stdin.write(b"One\nTwo\n")
    p.stdin.flush()
    p.stdout.read(5)
    p.send_signal(signal.SIGINT)
    out, err = p.communicate(timeout=60)
    assert p.returncode == 130 and b"Stopped" in err and b"Traceback" not in err


@pytest.mark.parametrize("error", [RuntimeError("[malloc] no memory"), UsageError("not so")])
def test_an_error_in_the_middle_loses_nothing(tiny, monkeypatch, capsys, error):
    """Somebody who types goes on; a pipe ends."""
    lines = ["One", "Two", "Two", None]

    class Typed:
        stopped = False

        def read(self, status):
            line = lines.pop(0)
            if line is None:
                raise EOFError
            return Line(line)

    session, calls = start(tiny, every=512, chat=ChatOptions()), []
    layer = session.model.model.layers[1]

    def break_once(self, *args, **options):
        calls.append(1)
        if len(calls) == 20:
            raise error
        return forward(self, *args, **options)

    forward = type(layer).__call__
    monkeypatch.setattr(type(layer), "__call__", break_once)
    chat = Chat(session, settings("-m", N), Typed(), None, "it")
    chat.interactive = True
    assert chat.run() == 0
    err, one = capsys.readouterr().err, replies(tiny, "One")[0]
    assert str(error).split("]")[-1] in err and "Traceback" not in err
    broken, *rest = session.talk.turns
    assert 0 < len(broken.reply) < N and one.startswith(broken.reply)
    assert broken.ended == "interrupt" and [t.user for t in rest] == ["Two", "Two"]
    session.clear()
    assert "".join(p.text for p in session.reply("One", How(N))) == one
    chat.interactive, lines[:], calls[:] = False, ["Three", None], []
    with pytest.raises(type(error)):
        chat.run()


# -------------------------------------------------------------------------------------- settings


def settings(*argv) -> chat_settings.Settings:
    p = chat_flags.build_parser("")
    model = SimpleNamespace(args=SimpleNamespace(vocab_size=260))
    return chat_settings.Settings(p.parse_args([str(a) for a in argv]), model)


def test_every_setting_can_be_set():
    s = settings("--temp", 0.5)
    values = {
        "max_tokens": "9", "max_context": "99", "stop": "a  b", "thinking": "hide",
        "stats": "json", "temp": "0.7", "top_p": "0.9", "min_p": "0.1", "min_tokens_to_keep": "2",
        "top_k": "5", "xtc_probability": "0.5", "xtc_threshold": "0.2", "repetition_penalty": "2",
        "repetition_context_size": "9", "presence_penalty": "1", "presence_context_size": "9",
        "frequency_penalty": "1", "frequency_context_size": "9", "seed": "5",
        "logit_bias": '{"42": -5}', "prompt_lookup": "on", "num_draft_tokens": "3",
    }  # fmt: skip
    assert {*values} == {*vars(s.values)} - {"draft_model"}
    for name, value in values.items():
        assert s.set(f"{name.replace('_', '-')} {value}") == [name]
    assert s.values.stop == ["a  b"] and s.sampling.temp == 0.7
    assert s.sampling.logit_bias == {42: -5.0} and s.drafts.most == 3
    assert all("(changed)" in line for line in s.lines() if not line.startswith("draft-model"))
    before = vars(s.values).copy()
    for wrong in ("temp 0", "top-k 260", "num-draft-tokens 8", "prompt-lookup off", "stats", ""):
        with pytest.raises(UsageError):
            s.set(wrong or "x")
    assert vars(s.values) == before and s.sampling.temp == 0.7
    text = " ".join(f"{n} default" for n in values if n not in ("stop", "logit_bias"))
    s.set(text)
    s.set("stop default")
    s.set("logit-bias default")
    assert vars(s.values) == vars(settings().values)


# ------------------------------------------------------------------------------------------ lines


def test_lines():
    def line(*texts):
        given = iter(texts)
        return lines_to_line(lambda prompt: next(given))

    assert line("/exit").is_command and line("/exit") == Line("/exit")
    assert not line("//exit").is_command and line("//exit").message == "/exit"
    assert not line(f"{PASTED}/exit").is_command and line(f"{PASTED}//a").message == "//a"
    assert line(f"/read {PASTED}a b") == Line("/read a b")
    assert line('"""', "/a", "", ' b"""') == Line("/a\n\n b", True)
    assert line('"""one"""') == Line("one", True) and line('""""""') == Line("", True)
    assert line(f'{PASTED}"""') == Line('"""', True)
    assert not line(" /exit").is_command


def test_history_files(tmp_path):
    path = tmp_path / "folder" / "history"
    one = History(path)
    for text in ("a\nb", "a\nb", " ", "ü", "/help"):
        one.add(Line(text))
    one.add(Line("/exit", True))
    assert History(path).entries == ["a\nb", "ü", "/help", "//exit"]
    assert path.stat().st_mode & 0o777 == 0o600
    with path.open("a") as f:
        f.write('"half')
    assert History(path).entries == ["a\nb", "ü", "/help", "//exit"]
    path.write_text("".join(f'"{i}"\n' for i in range(2500)))
    assert len(History(path).entries) == 1000 == len(path.read_text().splitlines())
    with pytest.raises(UsageError, match="--history off"):
        History(tmp_path)


# ------------------------------------------------------------------------------------- the screen


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def view(monkeypatch, text: str, mode: str, cut: random.Random, prompt="", start="<t>", tty=False):
    """What a reply looks like that comes in random pieces."""
    monkeypatch.setattr(sys, "stdout", Screen() if tty else io.StringIO())
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    tokenizer = SimpleNamespace(think_start=start, think_end="</t>")
    v = chat_view.View(cli.Reply(), mode, tokenizer, prompt)
    while text:
        n = cut.randint(1, 5)
        v.push(text[:n])
        text = text[n:]
    thinks = v.thinks
    v.end()
    return sys.stdout.getvalue(), thinks


@pytest.mark.parametrize("seed", range(5))
def test_thinking(monkeypatch, seed):
    cut = random.Random(seed)
    text = "<t>\nhm, 1 < 2\n</t>\n\nYes </ t>, so."
    dim, plain = chat_view.DIM, chat_view.PLAIN

    def shown(mode, text=text, **more):
        return view(monkeypatch, text, mode, cut, **more)

    assert shown("hide") == ("Yes </ t>, so.\n", False)
    assert shown("show", tty=True) == ("\nhm, 1 < 2\nYes </ t>, so.\n", False)
    assert shown("dim", tty=True)[0] == f"{dim}\nhm, 1 < 2\n\n\n{plain}Yes </ t>, so.\n"
    assert dim not in shown("dim")[0]
    assert shown("hide", text[3:], prompt="...<t>\n") == ("Yes </ t>, so.\n", False)
    assert shown("hide", "<t>hm") == ("\n", True)
    assert shown("hide", "a<t>b</t>c<t") == ("ac<t\n", False)
    assert shown("hide", start=None) == (text + "\n", False)


def test_words_come_whole():
    words = chat_view.Words()
    pieces = [
        words.push(p) for p in ("Hel", "lo wor", "ld, it", "'s", " 你", "好吗", "x" * 25, "y")
    ]
    assert pieces == ["", "Hello ", "world, ", "", "it's 你", "好吗", "x" * 25, ""]
    assert words.rest() == "y" and words.rest() == ""
