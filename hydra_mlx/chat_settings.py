"""What /set changes: the flags of a reply, by the same names and with the same checks."""

import argparse
import re
import shlex
from collections.abc import Sequence
from typing import Any

from . import cli, draft_flags, sampling
from .chat_view import THINKING
from .errors import UsageError

MAX_TOKENS = 2048
FIXED = ("draft_model",)  # chosen when the chat begins
ALONE = "`/set` alone shows all of them."


def add_flags(p: argparse.ArgumentParser):
    """The flags of a reply, for the program and for /set."""
    p.add_argument(
        "--max-tokens",
        "-m",
        type=cli.number(int, -1),
        default=MAX_TOKENS,
        metavar="N",
        help=f"longest reply; -1 is no limit (default {MAX_TOKENS})",
    )
    p.add_argument(
        "--max-context",
        type=cli.number(int, 1),
        metavar="N",
        help="tokens that the conversation may have; a message over it is refused",
    )
    p.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before TEXT; repeatable"
    )
    p.add_argument(
        "--thinking",
        choices=THINKING,
        default="dim",
        help="what to do with a model's thinking (default dim)",
    )
    p.add_argument(
        "--stats",
        choices=("off", "text", "json"),
        default="off",
        help="figures of each reply on stderr (default off)",
    )
    sampling.add_flags(p)
    draft_flags.add_flags(p)


class Settings:
    """The settings of a chat.

    Attributes:
        values: A namespace of what add_flags makes. sampling: SamplingOptions of it.
    """

    def __init__(self, args: argparse.Namespace, model: Any = None, draft: Any = None):
        """Settings from a program's flags.

        Args:
            model: What depends on it is checked when it is given. draft: From load_draft.

        Raises:
            UsageError: Values that are out of range, or would do nothing.
        """
        self._parser = cli.Parser("/set", "")
        add_flags(self._parser)
        actions = [a for a in self._parser._actions if a.dest != "help"]
        self._switches = {a.dest for a in actions if a.nargs == 0}
        self.values = argparse.Namespace(**{a.dest: getattr(args, a.dest) for a in actions})
        self.model, self.draft = model, draft
        self.sampling = self._checked(self.values)
        self.drafts = self._make(self.values)

    def _checked(self, values: argparse.Namespace) -> sampling.SamplingOptions:
        if "" in values.stop:
            raise UsageError("--stop is empty, which would end every reply at once.")
        if values.max_tokens == 0:
            raise UsageError("--max-tokens is 0, which leaves no room for a reply.")
        draft_flags.check(values)
        options = sampling.from_args(values)
        vocab = sampling.vocab_size(self.model)
        if vocab is not None:
            options.check_vocab(vocab)
        return options

    def _make(self, values: argparse.Namespace) -> Any:
        """The drafter of some values."""
        return None if self.model is None else draft_flags.make(values, self.model, self.draft)

    def set(self, text: str) -> list:
        """Change some, all or none of them.

        Args:
            text: "temp 0.7 top-p 0.9"; "default" takes a value back; of `stop` and `logit-bias`
                the rest of the line.

        Returns:
            Names of what was changed.

        Raises:
            UsageError: An unknown name, or a value that the flag would not take.
        """
        pairs = self._pairs(text)
        values = argparse.Namespace(**{**vars(self.values), "stop": []})
        argv, back = [], []
        for name, value in pairs:
            shown = name.replace("_", "-")
            if name in FIXED:
                raise UsageError(f"{shown} can only be chosen when the chat begins.", ALONE)
            if name not in vars(self.values):
                raise UsageError(f"{shown!r} is not a setting.", ALONE)
            if value == "default" or (value == "off" and self._defaults(name) is None):
                back.append(name)
            elif name in self._switches:
                if value not in ("on", "off"):
                    raise UsageError(f"{shown} is {value!r}, expected on or off.", ALONE)
                setattr(values, name, value == "on")
            else:
                argv.append(f"{sampling.flag(name)}={value}")
        try:
            self._parser.parse_args(argv, values)
            for name in back:
                setattr(values, name, self._defaults(name))
            if "stop" not in (name for name, _ in pairs):
                values.stop = self.values.stop
            options, drafts = self._checked(values), self._make(values)
        except UsageError as e:
            plain = re.sub(r"--([a-z])", r"\1", e.message.removeprefix("/set: argument "))
            hint = re.sub(r"--([a-z])", r"\1", e.hint) if "Add" in e.hint else ALONE
            raise UsageError(plain, hint) from None
        self.values, self.sampling, self.drafts = values, options, drafts
        return [name for name, _ in pairs]

    def _defaults(self, name: str) -> Any:
        value = self._parser.get_default(name)
        return list(value) if isinstance(value, list) else value

    def _pairs(self, text: str) -> list:
        name, _, rest = text.strip().partition(" ")
        name = name.replace("-", "_")
        if name in ("stop", "logit_bias") and rest.strip():
            return [(name, rest.strip())]
        try:
            words = [w for word in shlex.split(text) for w in word.split("=", 1)]
        except ValueError:
            words = []
        if not words or len(words) % 2:
            raise UsageError(
                f"/set {text.strip()[:60]}: expected names and values, such as /set temp 0.7.",
                ALONE,
            )
        return [(n.replace("-", "_"), v) for n, v in zip(words[::2], words[1::2], strict=True)]

    def lines(self, names: Sequence | None = None) -> list:
        """One for each setting, or for those named: name, value, and whether it was changed."""
        names = list(vars(self.values)) if names is None else list(dict.fromkeys(names))
        found, width = [], max(map(len, names))
        for name in names:
            value = getattr(self.values, name)
            star = "" if value == self._defaults(name) else "  (changed)"
            if isinstance(value, list):
                value = ", ".join(map(repr, value))
            if value is None or isinstance(value, bool):
                value = "on" if value else "off"
            value = "none" if value == "" else value
            found.append(f"{name.replace('_', '-'):<{width}}  {value}{star}")
        return found

    def how(self, tokenizer: Any) -> Any:
        """A How for Session.reply."""
        from .session_plan import How

        sampler, processors = self.sampling.make(tokenizer)
        v, law = self.values, self.sampling.law(tokenizer) if self.drafts else None
        return How(
            v.max_tokens, sampler, processors, tuple(v.stop), v.max_context, self.drafts, law
        )
