"""The commands of a chat: what begins with a slash, is spelled exactly, and was typed."""

import difflib
import os
import shlex
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from .errors import UsageError
from .text import count, printable, size

OVERWRITE = "--overwrite"


class Command(NamedTuple):
    """A command: what follows its name (empty: nothing may), what it does, work(chat, rest)."""

    takes: str
    about: str
    work: Callable


class Leave(Exception):
    """The chat is over."""


def run(chat: Any, text: str):
    """Do what a line that begins with a slash says.

    Raises:
        UsageError: There is no such command, or it does not take what follows it. Leave: /exit.
    """
    name, _, rest = text.partition(" ")
    name, rest = name.rstrip(), rest.strip()
    if name not in COMMANDS:
        near = difflib.get_close_matches(name.split("\n")[0].lower(), COMMANDS, 1, 0.5)
        guess = f"Did you mean {near[0]}? " if near else ""
        raise UsageError(
            f"{name.splitlines()[0][:40]} is not a command; nothing was sent.",
            f"{guess}/help lists them; begin with // to send text that begins with a slash.",
        )
    takes, _, work = COMMANDS[name]
    if rest and not takes:
        raise UsageError(f"{name} takes nothing after it; nothing was done.", f"Type {name} alone.")
    if not rest and takes and not takes.startswith("["):
        raise UsageError(f"{name} needs {takes}; nothing was done.", f"For example: {name} {takes}")
    work(chat, rest)


def _help(chat: Any, rest: str):
    width = max(len(f"{n} {c.takes}") for n, c in COMMANDS.items())
    for name, c in COMMANDS.items():
        chat.tell(f"{f'{name} {c.takes}':<{width}}  {c.about}")
    chat.tell('"""             begins and ends a message of several lines; so does a paste')
    chat.tell("Ctrl-C          ends the reply; at an empty prompt, the chat. Ctrl-D leaves too")


def _exit(chat: Any, rest: str):
    raise Leave


def _clear(chat: Any, rest: str):
    n = len(chat.session.talk)
    chat.session.clear()
    chat.note(f"Forgot {count(n, 'turn')}; the system prompt stays.")


def _undo(chat: Any, rest: str):
    session = chat.session
    if session.unsent is not None:
        session.unsent = None
        chat.note("The message that got no reply is forgotten; the turns before it stay.")
        return
    turn = session.undo()
    what = turn.source or "a document" if turn.reply is None else f"“{_short(turn.user)}”"
    chat.note(f"Took back {what}.")


def _regen(chat: Any, rest: str):
    session = chat.session
    if session.unsent is not None:
        chat.answer(session.unsent)
        return
    turn = session.last_reply()
    if chat.settings.sampling.temp == 0 and turn.ended != "interrupt":
        chat.note("At temp 0 the reply will be the same; /set temp 0.7 gives others.")
    chat.answer(turn.user, instead=True)


def _edit(chat: Any, rest: str):
    session, unsent = chat.session, chat.session.unsent
    old = unsent if unsent is not None else session.last_reply().user
    new = rest or edited(old, chat.interactive)
    if not new.strip() or (not rest and new == old):
        chat.note("Nothing was changed.")
        return
    chat.answer(new, instead=unsent is None)


def edited(text: str, interactive: bool) -> str:
    """A text after the user had it in $VISUAL or $EDITOR.

    Raises:
        UsageError: There is no editor or no terminal, or it failed.
    """
    editor = os.environ.get("VISUAL") or os.environ.get("EDITOR")
    if not interactive or not editor:
        why = "$EDITOR is not set" if interactive else "there is no terminal for an editor"
        raise UsageError(f"/edit: {why}.", "Give the new text after it: /edit TEXT")
    with tempfile.TemporaryDirectory(prefix="hydra-mlx-") as folder:
        path = Path(folder) / "message.md"
        path.write_text(text + "\n", "utf-8")
        try:
            code = subprocess.call([*shlex.split(editor), str(path)])
            new = path.read_text("utf-8")
        except (OSError, ValueError) as e:
            why = getattr(e, "strerror", None) or e
            raise UsageError(
                f"/edit: the editor {editor!r} failed ({why}).", "Set $EDITOR, or /edit TEXT."
            ) from None
    if code:
        raise UsageError(f"/edit: {editor!r} ended with {code}; nothing was sent.")
    return new.removesuffix("\n")


def _system(chat: Any, rest: str):
    session = chat.session
    if not rest:
        now = session.talk.options.system
        chat.tell("There is no system prompt." if now is None else printable(now))
        return
    again = session.set_system(None if rest == "none" else rest)
    more = f" The next message reads {count(again, 'token')} again." if again else ""
    chat.note(f"{'Removed' if rest == 'none' else 'Changed'} the system prompt.{more}")


def _set(chat: Any, rest: str):
    if not rest:
        for line in chat.settings.lines():
            chat.tell(line)
        return
    names = chat.settings.set(rest)
    if "seed" in names:
        chat.apply_seed()
    chat.note("\n".join(chat.settings.lines(names)))


def _save(chat: Any, rest: str):
    words = rest.split(" ", 1)
    overwrite = words[0] == OVERWRITE
    name = rest.removeprefix(OVERWRITE).strip() if overwrite else rest
    path = _path(name) if name else chat.file
    if path is None:
        raise UsageError("/save needs the name of a file.", "For example: /save talk.safetensors")
    chat.save(path, overwrite)


def _load(chat: Any, rest: str):
    chat.load(_path(rest))


def _read(chat: Any, rest: str):
    chat.read(_path(rest))


def _stats(chat: Any, rest: str):
    timings = chat.session.timings
    if timings is None:
        raise UsageError("There was no reply yet.")
    for line in timings.as_text().splitlines():
        chat.tell(line)


def _context(chat: Any, rest: str):
    session, limit = chat.session, chat.settings.values.max_context
    s, points, talk = session.size(), session.sequence.checkpoints, session.talk
    of = f" of {limit:,}" if limit else ", no limit"
    chat.tell(f"context      {count(s.tokens, 'token')}{of}")
    before = 0
    for i, turn in enumerate(talk.turns):
        end = len(talk.state(i + 1).ids)
        what = turn.source if turn.reply is None else f"“{_short(turn.user)}”"
        broken = ", broken off" if turn.ended == "interrupt" else ""
        chat.tell(f"  {i + 1:>3}  {end - before:>9,}  {what}{broken}")
        before = end
    chat.tell(f"cache        keys and values {size(s.kv)}, states {size(s.state)}")
    at = ", ".join(f"{n:,}" for n in points.positions[-6:])
    where = f"{'..., ' if len(points.positions) > 6 else ''}{at}"
    chat.tell(
        f"checkpoints  {s.checkpoints}, {size(s.checkpoint_bytes)}{f', at {where}' if at else ''}"
    )
    if session.sequence.obstacle:
        chat.tell(f"             none: {session.sequence.obstacle} cannot go back")


def _short(text: str) -> str:
    line = printable(" ".join(text.split()))
    return line if len(line) <= 40 else line[:39] + "…"


def _path(text: str) -> Path:
    """A path as people type it: with or without quotes, ~ for the home folder."""
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        text = text[1:-1]
    return Path(text).expanduser()


COMMANDS = {
    "/help": Command("", "what can be typed here", _help),
    "/exit": Command("", "leave the chat", _exit),
    "/clear": Command("", "forget all turns, keep the system prompt", _clear),
    "/undo": Command("", "take the last turn or document back", _undo),
    "/regen": Command("", "another reply to the last message", _regen),
    "/edit": Command("[TEXT]", "change the last message: in $EDITOR, or to TEXT", _edit),
    "/system": Command("[TEXT]", "show or change the system prompt; none removes it", _system),
    "/set": Command("[NAME VALUE ...]", "show or change settings, such as temp 0.7", _set),
    "/save": Command(f"[{OVERWRITE}] [FILE]", "keep the conversation and its cache", _save),
    "/load": Command("FILE", "go on with a saved conversation or document", _load),
    "/read": Command("FILE", "read a text file; the next message begins with it", _read),
    "/stats": Command("", "figures of the last reply", _stats),
    "/context": Command("", "what takes how much of context and memory", _context),
}
