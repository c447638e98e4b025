"""What a person or a pipe types: lines, blocks between three quotes, and what was pasted.

Three ways to read, of which the best one that is there is taken: prompt_toolkit, readline, plain
lines. A Line knows whether it may be a command: what is pasted at its beginning or stands between
quotes may not.
"""

import contextlib
import importlib.util
import json
import os
import select
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .chat_view import dim
from .errors import UsageError

KINDS = ("prompt_toolkit", "readline", "plain")
PROMPT, MORE = "> ", ". "
QUOTES = '"""'
PASTED = "\u2063"  # INVISIBLE SEPARATOR: readline puts it before what is pasted
HISTORY = 1000  # entries kept
AT_ONCE = 0.03  # seconds within which a pasted line follows the one before


@dataclass(frozen=True)
class Line:
    """One thing that was typed. literal: It is a message, whatever it looks like."""

    text: str
    literal: bool = False

    @property
    def is_command(self) -> bool:
        """Whether it begins with a single slash that was typed."""
        return not self.literal and self.text.startswith("/") and not self.text.startswith("//")

    @property
    def message(self) -> str:
        """The text to be sent; the first of two slashes is an escape."""
        return self.text[1:] if not self.literal and self.text.startswith("//") else self.text


class Cleared(Exception):
    """Ctrl-C at a prompt with something typed: the line is dropped, nothing else."""


class History:
    """Lines of earlier chats, in a file of the user's own; None keeps them for this chat only."""

    def __init__(self, path: Path | None):
        """The history in a file.

        Raises:
            UsageError: The file cannot be read or written.
        """
        self.path, self.entries = path, []
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
            lines = path.read_text("utf-8", "replace").splitlines()
            for line in lines[-HISTORY:]:
                with contextlib.suppress(ValueError):  # a line that was half written
                    self.entries.append(str(json.loads(line)))
            if len(lines) > 2 * HISTORY:
                beside = path.with_name(f".{path.name}.{os.getpid()}")
                beside.write_text("".join(json.dumps(e) + "\n" for e in self.entries), "utf-8")
                beside.chmod(0o600)
                beside.replace(path)
        except OSError as e:
            raise UsageError(
                f"The history {path} cannot be used ({e.strerror or e}).",
                "Give another file with --history FILE, or --history off.",
            ) from e

    def add(self, line: Line):
        """Keep a line, in a form that gives the same line when it is taken up again."""
        escaped = line.literal and line.text.startswith("/")
        text = "/" + line.text if escaped else line.text
        if not text.strip() or (self.entries and self.entries[-1] == text):
            return
        self.entries.append(text)
        if self.path is not None:
            with contextlib.suppress(OSError), self.path.open("a", encoding="utf-8") as f:
                f.write(json.dumps(text) + "\n")


def unquoted(text: str) -> str | None:
    """The inside of a block between three quotes; None while it is open."""
    body = text.lstrip()[len(QUOTES) :]
    if not body.rstrip().endswith(QUOTES):
        return None
    return body.rstrip()[: -len(QUOTES)].removeprefix("\n").removesuffix("\n")


def is_block(text: str) -> bool:
    """Whether a block between three quotes begins here."""
    return text.lstrip().startswith(QUOTES)


class PlainInput:
    """Lines of stdin as they are; the prompt, if any, goes to stderr.

    Attributes:
        stopped: Whether Ctrl-C came so soon after the line that no signal was made of it.
    """

    stopped = False

    def __init__(self, ask: bool):
        self.ask = ask

    def read(self, status: str) -> Line:
        """The next line.

        Args:
            status: Shown before the prompt.

        Raises:
            EOFError: There are no more. UsageError: It is not UTF-8.
        """
        if self.ask and status:
            print(dim(status, sys.stderr), file=sys.stderr)
        return lines_to_line(self._line)

    def _line(self, prompt: str) -> str:
        if self.ask:
            print(prompt, end="", file=sys.stderr, flush=True)
        try:
            text = sys.stdin.readline()
        except UnicodeDecodeError as e:
            raise UsageError(
                f"stdin is not UTF-8 text: byte {e.object[e.start]:#04x}.",
                "Convert it first, for example with: iconv -f ISO-8859-1 -t UTF-8",
            ) from None
        if not text:
            raise EOFError
        return text.removesuffix("\n").removesuffix("\r")


def lines_to_line(ask: Callable) -> Line:
    """One line, or the lines of a block; ask(prompt) gives the next one or raises EOFError."""
    text = ask(PROMPT)
    if PASTED in text:
        return Line(text.replace(PASTED, ""), text.startswith(PASTED))
    if not is_block(text):
        return Line(text)
    while unquoted(text) is None:
        try:
            text += "\n" + ask(MORE).replace(PASTED, "")
        except EOFError:
            raise UsageError(f"The block that {QUOTES} opens has no end.") from None
    return Line(unquoted(text), True)


class ReadlineInput:
    """Lines edited with readline, which macOS may have as libedit."""

    stopped = False

    def __init__(self, history: History):
        import readline

        self.readline, self.history, self.status, self.more = readline, history, "", False
        # libedit knows nothing of pasting: lines that come at once are taken as pasted.
        self.marks = "libedit" not in (readline.__doc__ or "")
        readline.set_auto_history(False)
        if self.marks:
            for line in (
                "set enable-bracketed-paste on",
                f'"\\e[200~": "{PASTED}\\e[299~"',
                '"\\e[299~": bracketed-paste-begin',
                "tab: self-insert",
            ):
                readline.parse_and_bind(line)
        for entry in history.entries:
            readline.add_history(entry)

    def read(self, status: str) -> Line:
        """As PlainInput.read; raises Cleared and KeyboardInterrupt too."""
        if status and status != self.status:
            print(dim(status, sys.stdout), flush=True)
        self.status = status
        try:
            line = lines_to_line(self._line)
        except KeyboardInterrupt:
            print(flush=True)
            if self.more or self.readline.get_line_buffer().replace(PASTED, ""):
                raise Cleared from None
            raise
        n = len(self.history.entries)
        self.history.add(line)
        for entry in self.history.entries[n:]:
            self.readline.add_history(entry)
        return line

    def _line(self, prompt: str) -> str:
        self.more = prompt == MORE
        text = input(prompt)
        if self.marks:
            return text
        more = [text]
        while select.select([sys.stdin], [], [], AT_ONCE)[0]:
            more.append(input(""))
        return text if len(more) == 1 else PASTED + "\n".join(more)


class ToolkitInput:
    """Lines edited with prompt_toolkit: several lines, completion, a status bar."""

    def __init__(self, history: History, commands: list):
        from prompt_toolkit import PromptSession
        from prompt_toolkit.output import ColorDepth

        from .chat_keys import Completer, Past, key_bindings, take_ctrl_c

        self.literal = self.stopped = False
        self.take_ctrl_c = take_ctrl_c
        no_colour = bool(os.environ.get("NO_COLOR"))
        self.prompt = PromptSession(
            history=Past(history, lambda text: self._line(text)),
            key_bindings=key_bindings(self),
            completer=Completer(commands),
            complete_while_typing=False,
            multiline=True,
            prompt_continuation=lambda width, number, wrapped: "" if wrapped else MORE,
            color_depth=ColorDepth.DEPTH_1_BIT if no_colour else None,
            style=_style(no_colour),
        )
        self.prompt.default_buffer.on_text_changed += self._changed

    def read(self, status: str) -> Line:
        """As ReadlineInput.read."""
        self.literal = False
        text = self.prompt.prompt(PROMPT, bottom_toolbar=status or None)
        self.stopped = self.take_ctrl_c(self.prompt.input)
        return self._line(text)

    def pasted(self):
        """Something was pasted where the text begins."""
        self.literal = True

    def _changed(self, buffer: Any):
        if not buffer.text:
            self.literal = False

    def _line(self, text: str) -> Line:
        if not self.literal and is_block(text):
            return Line(unquoted(text) or "", True)
        return Line(text, self.literal)


def _style(no_colour: bool) -> Any:
    from prompt_toolkit.styles import Style

    return Style.from_dict(
        {"bottom-toolbar": "noreverse" if no_colour else "noreverse fg:ansigray"}
    )


def choose(wanted: str | None, interactive: bool) -> tuple:
    """(how to read, what to tell about it).

    Args:
        wanted: One of KINDS; None takes the best there is.

    Raises:
        UsageError: It is not there, or stdin is no terminal.
    """
    if not interactive:
        if wanted not in (None, "plain"):
            raise UsageError(f"--input {wanted} needs a terminal.", "Leave --input out.")
        return "plain", ""
    there = {k: k == "plain" or importlib.util.find_spec(k) is not None for k in KINDS}
    if wanted is not None and not there[wanted]:
        hint = 'pip install "hydra_mlx[chat]"' if wanted == "prompt_toolkit" else "Leave it out."
        raise UsageError(f"--input {wanted}: this Python has no {wanted}.", hint)
    dumb = os.environ.get("TERM") == "dumb"
    best = wanted or ("plain" if dumb else next(k for k in KINDS if there[k]))
    if wanted is None and not there["prompt_toolkit"]:
        return best, f'Lines are edited with {best}; more with: pip install "hydra_mlx[chat]"'
    return best, ""


def make(kind: str, interactive: bool, history: Path | None, commands: list) -> Any:
    """An input of a kind.

    Raises:
        UsageError: See History.
    """
    if kind == "plain":
        return PlainInput(interactive)
    past = History(history)
    return ReadlineInput(past) if kind == "readline" else ToolkitInput(past, commands)
