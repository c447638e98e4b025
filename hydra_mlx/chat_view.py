"""A reply on the screen: word by word, thinking dimmed or hidden, no colour where it is unwanted.

The text itself is not changed; what is hidden is in the conversation all the same.
"""

import os
import re
import sys
from collections.abc import Iterator
from typing import Any

THINKING = ("dim", "show", "hide")
LONGEST = 24  # characters of a word that may wait for its end
DIM, PLAIN = "\x1b[2m", "\x1b[0m"
# Scripts that put blanks between words; others are printed as they come.
_OPEN_WORD = re.compile("[0-9A-Za-z'\u2019\u00c0-\u1fff]+\\Z")


def has_colour(stream: Any) -> bool:
    """Whether to send escape sequences to a stream; see no-color.org."""
    dumb = os.environ.get("TERM") == "dumb"
    return stream.isatty() and not dumb and not os.environ.get("NO_COLOR")


def dim(text: str, stream: Any) -> str:
    """Text that is less important than the rest, for a stream."""
    return f"{DIM}{text}{PLAIN}" if has_colour(stream) else text


def short(n: int) -> str:
    """A number of tokens in few letters: 870, 4.1k, 41k."""
    return str(n) if n < 1000 else f"{n / 1000:.1f}k" if n < 10_000 else f"{n / 1000:.0f}k"


class Words:
    """Holds back a word that comes in pieces until it is whole."""

    def __init__(self):
        self.held = ""

    def push(self, text: str) -> str:
        """What can be printed now."""
        text = self.held + text
        found = _OPEN_WORD.search(text)
        cut = found.start() if found and len(found.group()) <= LONGEST else len(text)
        self.held = text[cut:]
        return text[:cut]

    def rest(self) -> str:
        """What was held back."""
        text, self.held = self.held, ""
        return text


class Thinking:
    """Splits text that comes in pieces into what is thought and what is said; drops the tags."""

    def __init__(self, start: str | None, end: str | None, inside: bool = False):
        """Nothing is thought where start is None; inside: the prompt has opened it already."""
        self.tags, self.inside, self.held = (start, end), inside, ""

    def push(self, text: str) -> Iterator[tuple]:
        """(whether it is thought, text) of all that is certain now."""
        if self.tags[0] is None:
            yield False, text
            return
        text = self.held + text
        while True:
            tag = self.tags[self.inside]
            before, found, after = text.partition(tag)
            if not found:
                break
            yield self.inside, before
            self.inside, text = not self.inside, after
        n = min(len(tag) - 1, len(text))
        keep = next((n for n in range(n, 0, -1) if text.endswith(tag[:n])), 0)
        self.held = text[len(text) - keep :]
        yield self.inside, text[: len(text) - keep]

    def rest(self) -> tuple:
        """What was held back."""
        text, self.held = self.held, ""
        return self.inside, text


class View:
    """Prints one reply.

    view = View(out, "dim", tokenizer, prompt_text)
    view.push(part.text)
    view.end()

    Attributes:
        thinks: Whether the reply is in the middle of its thinking.
    """

    def __init__(self, out: Any, mode: str, tokenizer: Any, prompt: str):
        """A reply's view.

        Args:
            out: cli.Reply. mode: Of THINKING. prompt: What the model has read, whose end may have
                opened the thinking.
        """
        start = getattr(tokenizer, "think_start", None)
        opened = start is not None and prompt.rstrip().endswith(start)
        self.split = Thinking(start, getattr(tokenizer, "think_end", None), opened)
        self.words, self.out, self.mode = Words(), out, mode
        self.colour = has_colour(sys.stdout)
        self._dimmed = self._said = False

    @property
    def thinks(self) -> bool:
        """Whether the thinking has not ended."""
        return self.split.inside

    def push(self, text: str):
        """The next piece of the reply."""
        for thought, piece in self.split.push(text):
            self._print(thought, piece)

    def end(self):
        """The reply is over: what was held back, and the end of the line."""
        thought, text = self.split.rest()
        self._print(thought, text)
        self._write(self.words.rest())
        self._dim(False)
        self.out.write("\n")

    def _print(self, thought: bool, text: str):
        if thought and self.mode == "hide":
            return
        if not thought and not self._said and self.split.tags[0] is not None:
            text = text.lstrip("\n")  # blank lines between thinking and reply
        if not text:
            return
        if thought != self._dimmed and self.mode == "dim":
            self._write(self.words.rest())
            if self._dimmed:
                self.out.write("\n\n")
            self._dim(thought)
        self._said = self._said or not thought
        self._write(self.words.push(text))

    def _dim(self, on: bool):
        if on != self._dimmed:
            self._dimmed = on
            self._escape(DIM if on else PLAIN)

    def _escape(self, code: str):
        if self.colour and not self.out.broken:
            sys.stdout.write(code)
            sys.stdout.flush()

    def _write(self, text: str):
        if text:
            self.out.write(text)
