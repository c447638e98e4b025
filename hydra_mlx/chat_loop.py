"""The loop of a chat: a line is read, answered or done, until the end."""

import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import chat_commands, chat_input, cli
from .chat_settings import Settings
from .chat_view import View, dim, short
from .errors import HydraError, UsageError
from .session import Session
from .session_file import describe, save_session
from .text import count, read_file, size

LONG = 512  # tokens to read from where on there is a progress bar


class Chat:
    """A conversation and the terminal it happens in.

    Attributes:
        session: The conversation. settings: What /set changes. interactive: Whether somebody types.
        file: Last opened or written, or None. keep: Written on leaving, or None.
    """

    def __init__(self, session: Session, settings: Settings, reader: Any, opener: Callable, label):
        """A chat.

        Args:
            reader: From chat_input. opener: Path -> Session, of a file. label: The model in words.
        """
        self.settings, self.reader = settings, reader
        self.opener, self.label = opener, label
        self.file: Path | None = None
        self.keep: Path | None = None
        self.quiet = self.debug = self.interactive = self.warned = self.refused = False
        self.limit: int | None = None
        self._take(session)
        self.interrupt, self.seed = cli.Interrupt(), None
        self._known = {}  # resolved path: identity of what this chat opened or wrote there

    def _take(self, session: Session):
        self.session, session.note = session, self.note

    def tell(self, line: str):
        """Something that was asked for."""
        cli.say(line)

    def note(self, line: str):
        """Something worth knowing."""
        if not self.quiet:
            cli.say(dim(line, sys.stderr))

    def apply_seed(self):
        """Begin drawing anew, as the settings say."""
        self.seed = self.settings.sampling.apply_seed()

    def begin(self, file: Path | None, about: str):
        """Say what there is.

        Args:
            file: Of --session, whether it is there or not. about: Of the input.
        """
        if file is not None:
            self.keep, there = file, file.exists()
            found = describe(self.session) if there else "new, written on leaving"
            if there:
                self._opened(file)
            self.note(f"{file}: {found}.")
        if self.interactive:
            self.note(f"{self.label}. /help lists the commands, Ctrl-D leaves. {about}".rstrip())
        self.apply_seed()

    # ------------------------------------------------------------------------------------- the loop

    def run(self) -> int:
        """Read and answer until the end; returns the exit code."""
        while True:
            try:
                line = self.reader.read(self.meter() if self.interactive else "")
            except chat_input.Cleared:
                continue
            except HydraError as e:
                self._failed(e)
                continue
            except (EOFError, KeyboardInterrupt) as e:
                code = 0 if isinstance(e, EOFError) else cli.INTERRUPTED
                if self.may_leave():
                    return self.over(code)
                continue
            try:
                with cli.Interrupt() as self.interrupt:
                    self.interrupt.requested = self.reader.stopped
                    self.do(line)
            except chat_commands.Leave:
                if self.may_leave():
                    return self.over(0)
            except Exception as e:  # the session is whole whatever happened: nothing is lost
                self._failed(e)

    def _failed(self, error: Exception):
        if not self.interactive or isinstance(error, BrokenPipeError):
            raise error

        def again():
            raise error

        cli.guard(again, self.debug)  # prints it

    def may_leave(self) -> bool:
        """Write the session's file if there is one; False, once, where that fails."""
        try:
            with cli.Interrupt() as self.interrupt:
                self._write_kept()
        except HydraError as e:
            if self.refused:
                raise
            self.refused = True
            self._failed(e)
            self.tell("The chat goes on: /save FILE keeps it elsewhere; leave again to give it up.")
            return False
        return True

    def over(self, code: int) -> int:
        """The end; returns the exit code."""
        if self.interactive and code == 0:
            print(flush=True)
        return code

    def _write_kept(self):
        talk = self.session.talk
        if (
            self.keep is not None
            and talk.turns
            and (self.session.changed or self.file != self.keep)
        ):
            self.save(self.keep, False)

    def do(self, line: chat_input.Line):
        """A message or a command."""
        if line.is_command:
            chat_commands.run(self, line.text)
        elif line.text.strip():
            self.answer(line.message)

    def meter(self) -> str:
        """Tokens and memory, in one line."""
        s, limit = self.session.size(), self.settings.values.max_context
        points = count(s.checkpoints, "checkpoint")
        return (
            f"ctx {short(s.tokens)}{f'/{short(limit)}' if limit else ''} · kv {size(s.kv)} · "
            f"state {size(s.state)} · {points}"
        )

    # ----------------------------------------------------------------------------------- the work

    def answer(self, message: str, instead: bool = False):
        """Send a message and print the reply."""
        session, tokenizer, out = self.session, self.session.tokenizer, cli.Reply()
        n = len(session.talk) - instead
        thinks = getattr(tokenizer, "think_start", None) is not None
        text = session.talk.prompt(message, max(n, 0)).text if thinks else ""
        view = View(out, self.settings.values.thinking, tokenizer, text)
        begun, reason = False, None
        with self._bar() as bar:
            parts = session.reply(
                message,
                self.settings.how(tokenizer),
                instead,
                bar,
                lambda: self.interrupt() or out.broken,
                self._going_back,
            )
            with contextlib.closing(parts):
                for part in parts:
                    if part.token is not None and not begun:
                        bar.close()
                        begun = True
                    view.push(part.text)
                    reason = part.finish_reason
        if begun:
            view.end()
        if out.broken:
            raise BrokenPipeError
        self._after(reason, begun, view.thinks)

    def _after(self, reason: str, begun: bool, thinks: bool):
        v, session = self.settings.values, self.session
        if reason == "interrupt":
            if not begun:
                n = count(session.timings.processed_tokens, "token")
                self.note(f"Stopped before the reply, {n} were read. /regen sends it again.")
            else:
                self.note("Stopped; the reply stays as it is. /regen gives another, /undo none.")
        elif reason == "length":
            full = v.max_context is not None and session.size().tokens >= v.max_context
            why = f"max-context {v.max_context:,}" if full else f"max-tokens {v.max_tokens:,}"
            where = ", still in its thinking" if thinks else ""
            what = "/undo or /clear makes room" if full else "/set max-tokens changes that"
            self.note(f"Ended by {why}{where}; {what}.")
        if v.stats != "off":
            cli.say(session.timings.as_json() if v.stats == "json" else session.timings.as_text())
        if reason == "interrupt" and not self.interactive:
            raise KeyboardInterrupt  # whoever sends lines through a pipe wanted all of them
        self._warn()

    def _warn(self):
        n = self.session.size().tokens
        if self.limit and n > self.limit and not self.warned:
            self.warned = True
            self.note(f"The conversation has {n:,} tokens; the model is made for {self.limit:,}.")

    def _going_back(self, tokens: int):
        if tokens > LONG:
            self.note(f"Going back: {count(tokens, 'token')} are computed again.")

    def _bar(self) -> "Bar":
        return Bar("reading", not self.quiet)

    def read(self, path: Path):
        """Put a text file before the next message."""
        text = read_file(str(path), "file", "Give a text file in UTF-8.")
        limit = self.settings.values.max_context
        with self._bar() as bar:
            n = self.session.read(text, path.name, limit, bar, self.interrupt)
        if n == 0:
            self.note(f"Stopped; {path.name} is not in the conversation. /read goes on from there.")
            if not self.interactive:
                raise KeyboardInterrupt
            return
        self.note(f"Read {path.name}: {count(n, 'token')}. The next message begins with it.")
        self._warn()

    def save(self, path: Path, overwrite: bool):
        """Write the conversation and its cache."""
        cli.check_target(path)
        known = self._known.get(path.resolve())
        if path.exists() and not overwrite and known != identity(path):
            why = " and was changed since" if known else ""
            raise UsageError(
                f"{path} is there already{why}; nothing was written.",
                f"Take another name, or /save {chat_commands.OVERWRITE} {path}",
            )
        with self._bar() as bar:
            n = save_session(path, self.session, self.label, bar, self.interrupt)
        self._opened(path)
        self.note(f"{path} holds {count(n, 'token')}, {size(path.stat().st_size)}.")

    def load(self, path: Path):
        """Go on with a saved conversation; this one stays if that fails."""
        new = self.opener(path)
        if self.keep is not None:
            self._write_kept()
            self.keep = path
        self._take(new)
        self._opened(path)
        self.note(f"{path}: {describe(self.session)}.")

    def _opened(self, path: Path):
        self.file = path
        self._known[path.resolve()] = identity(path)


class Bar:
    """A progress bar that appears where there is much to read."""

    def __init__(self, label: str, enabled: bool):
        self.label, self.enabled = label, enabled
        self._stack = contextlib.ExitStack()
        self._bar = None

    def __call__(self, done: int, total: int):
        """How far it is."""
        if self._bar is None and self.enabled and total > LONG:
            self._bar = self._stack.enter_context(cli.progress(self.label, True, "tokens"))
        if self._bar is not None:
            self._bar(self.label, done, total)

    def close(self):
        """Remove it."""
        self._stack.close()
        self._bar = None

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *exc):
        self.close()


def identity(path: Path) -> tuple | None:
    """Changes when a file is written anew; None where there is none."""
    try:
        s = os.stat(path)
    except OSError:
        return None
    return s.st_ino, s.st_mtime_ns, s.st_size
