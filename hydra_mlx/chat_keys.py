"""Keys, history and completion for prompt_toolkit; imported only where it is used."""

from collections.abc import Callable, Iterable
from typing import Any

from prompt_toolkit.completion import Completer as Base
from prompt_toolkit.completion import Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.history import History as BaseHistory
from prompt_toolkit.input.typeahead import get_typeahead, store_typeahead
from prompt_toolkit.key_binding import KeyBindings
from prompt_toolkit.keys import Keys

from .chat_input import Cleared, History, is_block, unquoted

WITH_PATH = ("/read ", "/load ", "/save ")


class Past(BaseHistory):
    """A History as prompt_toolkit wants it; to_line(text) says what was typed."""

    def __init__(self, history: History, to_line: Callable):
        super().__init__()
        self.history, self.to_line = history, to_line

    def load_history_strings(self) -> Iterable:
        """The latest first."""
        return reversed(self.history.entries)

    def append_string(self, string: str):
        """Keep what was typed, as History does."""
        n = len(self.history.entries)
        self.history.add(self.to_line(string))
        for entry in self.history.entries[n:]:
            self._loaded_strings.insert(0, entry)

    def store_string(self, string: str):
        """Nothing: append_string has done it."""


class Completer(Base):
    """Commands, and the paths after some of them."""

    def __init__(self, commands: list):
        self.commands, self.paths = commands, PathCompleter(expanduser=True)

    def get_completions(self, document: Document, event: Any) -> Iterable:
        """Of the line up to the cursor."""
        text = document.text_before_cursor
        if not text.startswith("/") or "\n" in text:
            return
        for start in WITH_PATH:
            if text.startswith(start):
                rest = Document(text[len(start) :])
                yield from self.paths.get_completions(rest, event)
                return
        for name in self.commands:
            if name.startswith(text):
                yield Completion(name, -len(text))


def key_bindings(reader: Any) -> KeyBindings:
    """Enter sends, Alt-Enter and Ctrl-J begin a new line, Ctrl-C clears the line or leaves."""
    keys = KeyBindings()

    @keys.add("enter")
    def _(event):
        buffer = event.current_buffer
        if not reader.literal and is_block(buffer.text) and unquoted(buffer.text) is None:
            buffer.newline(copy_margin=False)
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    @keys.add("c-j")
    def _(event):
        event.current_buffer.newline(copy_margin=False)

    @keys.add(Keys.BracketedPaste)
    def _(event):
        data = event.data.replace("\r\n", "\n").replace("\r", "\n")
        if data and event.current_buffer.cursor_position == 0:
            reader.pasted()
        event.current_buffer.insert_text(data)

    @keys.add("c-c")
    @keys.add("<sigint>")
    def _(event):
        typed = event.current_buffer.text
        event.app.exit(exception=Cleared if typed else KeyboardInterrupt, style="class:aborting")

    return keys


def take_ctrl_c(source: Any) -> bool:
    """Whether Ctrl-C was read together with the Enter before it; other keys stay for the next line.

    Args:
        source: prompt_toolkit's input.
    """
    ahead = get_typeahead(source)
    keys = [k for k in ahead if k.key != Keys.ControlC]
    store_typeahead(source, keys)
    return len(keys) < len(ahead)
