"""What has been said, and the text and token ids that a model reads for it; no model in here.

Each turn knows what it added to what the model had read before, so the ids of any earlier moment
are known to the last one, though a text can be encoded in several ways. A chat template may show
earlier turns differently later on (without their thinking, for example); then a turn says how much
of what was read still stands.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from . import prompts
from .errors import UsageError
from .rollback import common_prefix
from .text import join


class Read(NamedTuple):
    """What a model reads: the text, and its token ids."""

    text: str
    ids: list


@dataclass(frozen=True)
class Turn:
    """A message and its reply, or a document with which the next message begins.

    Attributes:
        user: The message, or the document's text. reply: None for a document.
        source: Where a document is from, in words.
        kept: (characters, ids) of what was read before that this turn begins with; None where
            nobody knows what was read, as in files of other programs.
        text, ids: What comes after these.
        ended: Why the reply ended: "stop", "length" or "interrupt".
    """

    user: str
    reply: str | None = None
    source: str = ""
    kept: tuple | None = None
    text: str = ""
    ids: tuple = ()
    ended: str = "stop"

    def of(self, before: Read, after: Read) -> "Turn":
        """This turn, which took what a model had read from one to the other."""
        if after.text.startswith(before.text):
            a = len(before.text)
        else:
            a = len(os.path.commonprefix([before.text, after.text]))
        b = common_prefix(after.ids, before.ids)
        return replace(self, kept=(a, b), text=after.text[a:], ids=tuple(after.ids[b:]))


class Conversation:
    """Turns under a system prompt, rendered by a chat template.

    Attributes:
        turns: In order; changed by whoever lets a model read. options: Template and system prompt.
    """

    def __init__(self, tokenizer: Any, options: prompts.ChatOptions, turns: Sequence = ()):
        """A conversation.

        Raises:
            UsageError: There is no chat template, or it does not take the system prompt.
        """
        if not options.active(tokenizer):
            raise UsageError(
                "This model's tokenizer has no chat template.",
                "Add --use-default-chat-template, or use `hydra-mlx generate`.",
            )
        self.tokenizer, self.options, self.turns = tokenizer, options, list(turns)
        self.prompt("Hello", 0)

    def __len__(self) -> int:
        return len(self.turns)

    def messages(self, n: int | None = None) -> list:
        """The first n turns as a template takes them, an open document not included."""
        system = self.options.system
        found = [] if system is None else [{"role": "system", "content": system}]
        opened = ""
        for t in self.turns[:n]:
            opened = join(opened, t.user)
            if t.reply is not None:
                found.append({"role": "user", "content": opened})
                found.append({"role": "assistant", "content": t.reply})
                opened = ""
        return found

    def document(self, n: int | None = None) -> str:
        """What the message after the first n turns begins with; empty without documents."""
        opened = ""
        for t in self.turns[:n]:
            opened = join(opened, t.user) if t.reply is None else ""
        return opened

    def state(self, n: int | None = None) -> Read:
        """What a model has read after the first n turns."""
        turns, text, ids = self.turns[:n], "", []
        for t in turns:
            if t.kept is None:
                text, ids = "", []
            else:
                a, b = t.kept
                text, ids = text[:a] + t.text, [*ids[:b], *t.ids]
        if turns and turns[-1].kept is None:
            document, messages = self.document(n), self.messages(n)
            if document:
                text = open_text(self.tokenizer, messages, document, self.options)
            else:
                text = prompts.render(self.tokenizer, messages, self.options, reply=False)
            ids = prompts.encode(self.tokenizer, text, False)
            # From now on this is what was read: later turns build on it.
            last = replace(turns[-1], kept=(0, 0), text=text, ids=tuple(ids))
            self.turns[len(turns) - 1] = last
        return Read(text, ids)

    def prompt(self, user: str, n: int | None = None) -> Read:
        """What a model reads before it replies to a message after the first n turns.

        Raises:
            UsageError: The template fails.
        """
        content = join(self.document(n), user)
        messages = [*self.messages(n), {"role": "user", "content": content}]
        return self._goes_on(prompts.render(self.tokenizer, messages, self.options), n)

    def opened(self, document: str, n: int | None = None) -> Read:
        """What a model reads of a document after the first n turns, up to where a message follows.

        Raises:
            UsageError: The template fails, or changes the document.
        """
        whole = join(self.document(n), document)
        return self._goes_on(open_text(self.tokenizer, self.messages(n), whole, self.options), n)

    def replied(self, before: Read, tokens: Sequence) -> tuple:
        """(what was said, what a model has read with it), for a reply's ids after a prompt."""
        decode = self.tokenizer.decode
        ended = bool(tokens) and tokens[-1] in self.tokenizer.eos_token_ids
        # All of it, a stop string too: the conversation is what the model has read.
        said = decode(list(tokens[:-1] if ended else tokens))
        text = before.text + said + (decode(list(tokens[-1:])) if ended else "")
        return said, Read(text, [*before.ids, *tokens])

    def with_system(self, system: str | None) -> "Conversation":
        """The same turns under another system prompt.

        Raises:
            UsageError: The template does not take it.
        """
        return Conversation(self.tokenizer, replace(self.options, system=system), self.turns)

    def _goes_on(self, text: str, n: int | None) -> Read:
        """A text as ids: the model's own for what it has read, as long as the text begins so."""
        known = self.state(n)
        ids = prompts.encode(self.tokenizer, text, False)
        own = known.text and text.startswith(known.text)
        if own and ids[: len(known.ids)] != known.ids:
            rest = prompts.encode(self.tokenizer, text[len(known.text) :], False)
            ids = [*known.ids, *rest]
        return Read(text, ids)


def open_text(tokenizer: Any, messages: list, document: str, options: prompts.ChatOptions) -> str:
    """The text of a conversation whose last message, not in `messages`, begins with a document.

    Raises:
        UsageError: The template fails, or does not show the document as it is.
    """
    mark = next(m for m in map("question{}".format, range(10**6)) if m not in document)
    turn = {"role": "user", "content": join(document, mark)}
    text, found, _ = prompts.render(tokenizer, [*messages, turn], options).rpartition(mark)
    if not found or document.strip() not in text:
        raise UsageError(
            "The chat template changes the document.",
            "generate and `cache read` have --ignore-chat-template.",
        )
    return text
