"""Text in and out: reading prompts, printing on terminals, human units, stop strings.

A prompt is taken as it is: nothing is unescaped, stripped or normalised.
"""

import os
import re
import stat
import sys
from collections.abc import Sequence
from pathlib import Path

from .errors import UsageError

# Everything that moves a cursor or changes a terminal's state; tab and newline stay.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def count(n: int, noun: str) -> str:
    """ "1 token", "1,234 tokens"."""
    return f"{n:,} {noun}" + ("" if n == 1 else "s")


def size(nbytes: float) -> str:
    """Bytes in binary units: "512 B", "3.4 MiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(nbytes) < 1024 or unit == "GiB":
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    raise AssertionError("unreachable")


def rate(per_second) -> str:
    """Tokens per second; "-" where there was too little to measure."""
    return "-" if per_second is None else f"{per_second:,.1f} tok/s"


def printable(text: str) -> str:
    """Text for a terminal: control characters, which a model may well produce, shown as U+FFFD."""
    return _CONTROL.sub("\ufffd", text)


def first_line(error: BaseException, limit: int = 200) -> str:
    """The first line of an exception's message, or the name of its class."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:limit]


class StopMatcher:
    """Finds stop strings in text that comes in pieces, and holds back what may become one."""

    def __init__(self, stops: Sequence):
        self.stops = tuple(stops)
        self.held = ""

    def push(self, text: str) -> tuple:
        """(text that is safe to print, whether a stop string was found)."""
        text = self.held + text
        found = [i for i in (text.find(s) for s in self.stops) if i >= 0]
        if found:
            self.held = ""
            return text[: min(found)], True
        keep = 0
        for stop in self.stops:
            longest = min(len(stop) - 1, len(text))
            keep = max(keep, next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0))
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep], False


def decode(data: bytes, where: str) -> str:
    """Bytes as text.

    Raises:
        UsageError: They are not UTF-8; the message names the offset.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as e:
        raise UsageError(
            f"{where} is not UTF-8 text: byte {data[e.start]:#04x} at offset {e.start}.",
            "Convert it first, for example with: iconv -f ISO-8859-1 -t UTF-8",
        ) from None


def join(before: str, after: str) -> str:
    """Two texts with a blank line between, as read_prompt puts it between files and prompt."""
    return before + ("" if not before else "\n" if before.endswith("\n") else "\n\n") + after


AT_SIGN = "A prompt that begins with the sign @ itself is written @@."


def read_file(name: str, what: str = "prompt file", hint: str = AT_SIGN) -> str:
    """The text of a file.

    Args:
        what, hint: For the error: what the file is, what to do.

    Raises:
        UsageError: It cannot be read or is not UTF-8.
    """
    path = Path(name).expanduser()
    try:
        return decode(path.read_bytes(), str(path))
    except (OSError, ValueError) as e:
        why = getattr(e, "strerror", None) or first_line(e)
        raise UsageError(f"The {what} {name!r} cannot be read ({why}).", hint) from None


def piped_stdin() -> str | None:
    """Text that another program or a file sends to stdin; None for a terminal or /dev/null."""
    stream = sys.stdin
    if stream is None or stream.closed or stream.isatty():
        return None
    try:
        if stat.S_ISCHR(os.fstat(stream.fileno()).st_mode):
            return None
    except (OSError, ValueError):
        pass  # not a file of the system: a replaced stdin, which can be read
    return read_stdin()


def read_stdin(what: str = "prompt") -> str:
    """All of stdin.

    Raises:
        UsageError: There is none, or it is not UTF-8.
    """
    if sys.stdin is None or sys.stdin.closed:
        raise UsageError(f"The {what} was to come from stdin, which is closed.")
    return decode(sys.stdin.buffer.read(), "stdin")


def read_prompt(items: Sequence, files: Sequence) -> str:
    """Join what the user gave: files and piped text first, then the prompt, a blank line between.

    Args:
        items: Prompt arguments: text, "@path" for a file, "-" for stdin, "@@..." for text that
            begins with an @. At most one of them is text.
        files: Paths given with --file.

    Raises:
        UsageError: Nothing was given, or something unreadable.
    """
    pieces, texts, stdin = [read_file(f) for f in files], [], None
    for item in items:
        if item == "-":
            if stdin is not None:
                raise UsageError("'-' is given twice, but stdin can be read only once.")
            stdin = read_stdin()
            pieces.append(stdin)
        elif item.startswith("@") and not item.startswith("@@"):
            pieces.append(read_file(item[1:]))
        else:
            texts.append(_checked(item[1:] if item.startswith("@@") else item))
    if len(texts) > 1:
        raise UsageError(
            f"Several prompts are given: {texts[0][:30]!r} and {texts[1][:30]!r}.",
            "Put a prompt of several words in quotes.",
        )
    if stdin is None:
        piped = piped_stdin()
        pieces = [piped, *pieces] if piped else pieces
    prompt = ""
    for piece in [*(p for p in pieces if p), *texts]:
        prompt = join(prompt, piece)
    if not prompt.strip():
        found = "The prompt is empty." if items or files or stdin else "There is no prompt."
        raise UsageError(found, "Give it as an argument, as @file, or pipe text in.")
    return prompt


def _checked(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        decode(os.fsencode(text), "The prompt argument")
        raise UsageError("The prompt argument is not UTF-8 text.") from None
    return text
