"""What all programs share: one-line errors and exit codes, Ctrl-C as a flag, argparse in our voice.

Exit codes: 0 done, 2 an error (one or two lines on stderr), 130 Ctrl-C, 141 the reader of our
stdout went away. Importing this loads nothing heavy.
"""

import argparse
import contextlib
import os
import shlex
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from .errors import HydraError, UsageError
from .text import first_line, printable

PROG = "hydra-mlx"
ERROR, INTERRUPTED, BROKEN_PIPE = 2, 130, 141


class Parser(argparse.ArgumentParser):
    """argparse whose errors are UsageErrors, and which never guesses from half a flag name."""

    def __init__(self, prog: str, description: str, epilog: str | None = None):
        super().__init__(
            prog=prog,
            description=description,
            epilog=epilog,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str):
        raise UsageError(f"{self.prog}: {message}", f"Try `{self.prog} --help`.")


class Refuse(argparse.Action):
    """A flag of mlx_lm that cannot be honoured here: using it is an error that says why."""

    def __init__(self, option_strings: list, dest: str, reason: str):
        super().__init__(option_strings, dest, nargs="*", help=argparse.SUPPRESS)
        self.default = argparse.SUPPRESS
        self.reason = reason

    def __call__(self, parser, namespace, values, option_string=None):
        raise UsageError(f"{option_string} is not supported: {self.reason}")


def number(kind: Callable, low: float, high: float = float("inf"), what: str = "") -> Callable:
    """An argparse type: int or float within [low, high], with the range in the error."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high or value == float("inf"):
            noun = "a whole number" if kind is int else "a number"
            limit = f"of {low} or more" if high == float("inf") else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"{text!r} is not {what or f'{noun} {limit}'}")
        return value

    return parse


def wants_debug(argv: Sequence | None) -> bool:
    """Whether --debug is among the arguments; asked before they are parsed."""
    return "--debug" in (sys.argv[1:] if argv is None else argv)


def say(line: str):
    """One line for people, on stderr."""
    print(line, file=sys.stderr, flush=True)


def once(note: Callable) -> Callable:
    """The same without repeating a line."""
    said: set = set()

    def tell(line: str):
        if line not in said:
            said.add(line)
            note(line)

    return tell


def parser(command: str, about: str, epilog: str | None = None) -> Parser:
    """The parser of one subcommand, --debug not included."""
    return Parser(f"{PROG} {command}", about, epilog)


def add_common(p: argparse.ArgumentParser):
    """The flags that every program has which does something to files."""
    p.add_argument("--quiet", action="store_true", help="print nothing but errors")
    p.add_argument("--debug", action="store_true", help="show tracebacks")


def add_haystack(p: argparse.ArgumentParser):
    """--haystack FILE of the programs that hide facts in text."""
    p.add_argument(
        "--haystack",
        action="append",
        default=[],
        metavar="FILE",
        help="text around the facts, instead of made sentences; repeatable",
    )


def run(parser: Parser, work: Callable, argv: Sequence | None = None) -> int:
    """Parse, call work(args) -> exit code, and turn errors into lines; see guard."""
    return guard(lambda: work(parser.parse_args(argv)), wants_debug(argv))


def guard(body: Callable[[], int], debug: bool = False) -> int:
    """Run a program's body and turn whatever goes wrong into lines on stderr and an exit code.

    Args:
        body: Returns the exit code. debug: Print the traceback of any error too.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that is not UTF-8 is no reason to die
    try:
        code = body()
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        silence_stdout()
        return BROKEN_PIPE
    except KeyboardInterrupt as e:
        say(str(e) or "Interrupted.")
        return INTERRUPTED
    except HydraError as e:
        if debug:
            traceback.print_exc()
        say(f"error: {e.message}")
        if e.hint:
            say(e.hint)
        return ERROR
    except Exception as e:
        if debug:
            traceback.print_exc()
        say(f"error: {type(e).__name__}: {first_line(e)}")
        if is_out_of_memory(e):
            say(
                "Out of memory: try --kv-bits 4, a smaller --prefill-step-size or a shorter prompt."
            )
        elif not debug:
            say("This was not expected; run it again with --debug for the traceback.")
        return ERROR


@contextlib.contextmanager
def progress(label: str, enabled: bool = True, unit: str = "") -> Iterator[Callable]:
    """A progress bar on stderr, removed at the end; nothing where stderr is no terminal.

    Yields:
        bar(label, done, total), to be called after each piece of work.
    """
    if not enabled or not sys.stderr.isatty():
        yield lambda label, done, total: None
        return
    from rich import progress as rich
    from rich.console import Console

    columns = (
        rich.TextColumn("{task.description}"),
        rich.BarColumn(),
        rich.TextColumn("{task.completed:,.0f}/{task.total:,.0f}" + f" {unit}".rstrip()),
        rich.TimeRemainingColumn(),
    )
    # stdout is the reply's: rich must not take it over.
    live = rich.Progress(
        *columns, console=Console(stderr=True), transient=True, redirect_stdout=False
    )
    task = live.add_task(label, total=1)

    def bar(label: str, done: int, total: int):
        live.update(task, description=label, completed=done, total=total)
        live.start()  # only now the total is known; starting it again does nothing

    try:
        yield bar
    finally:
        live.stop()


def check_target(path: Path):
    """Whether a file can be put there; asked before hours of work.

    Raises:
        UsageError: There is no such folder, it cannot be written to, or the name is a folder.
    """
    path = path.expanduser()
    if not path.parent.is_dir():
        raise UsageError(
            f"{path.parent} is not a folder; {path.name} cannot be written there.",
            f"Make it first: mkdir -p {shlex.quote(str(path.parent))}",
        )
    if path.is_dir():
        raise UsageError(f"{path} is a folder, expected the name of a file.")
    if not os.access(path.parent, os.W_OK):
        raise UsageError(f"{path.parent} cannot be written to.", "Choose another folder.")


class Meter:
    """Progress with the time left: a bar on a terminal, now and then a line elsewhere."""

    def __init__(self, label: str, quiet: bool, every_s: float = 30.0, unit: str = "steps"):
        self.quiet, self.every_s, self.unit = quiet, every_s, unit
        self._stack = progress(label, not quiet, unit)
        self._start = self._shown = time.perf_counter()
        self._first: int | None = None

    def __enter__(self) -> "Meter":
        self._bar = self._stack.__enter__()
        return self

    def __exit__(self, *exc):
        self._stack.__exit__(*exc)

    def __call__(self, label: str, done: int, total: int):
        """Tell how far the work is."""
        self._bar(label, done, total)
        now = time.perf_counter()
        if self._first is None:
            self._first, self._start = done, now
        if self.quiet or sys.stderr.isatty() or now - self._shown < self.every_s:
            return
        self._shown = now
        speed = (done - self._first) / (now - self._start) if now > self._start else 0
        left = (
            f", about {(total - done) / speed / 60:.0f} min left" if speed and done < total else ""
        )
        say(f"{label}: {done:,} of {total:,} {self.unit}{left}")


def is_out_of_memory(error: Exception) -> bool:
    """Whether Python or MLX ran out of memory."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError)
        and any(w in text for w in ("malloc", "bad_alloc", "out of memory", "insufficient memory"))
    )


def silence_stdout():
    """Send what is still in stdout's buffer nowhere, so that Python's exit does not complain."""
    try:
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, sys.stdout.fileno())
        os.close(devnull)
    except (OSError, ValueError, AttributeError):
        pass  # stdout is no file (a test's buffer) or closed already


class Reply:
    """Writes a reply to stdout as it comes; `broken` once whoever reads it has gone away."""

    def __init__(self):
        self.broken = False
        self.shown = printable if sys.stdout.isatty() else str

    def write(self, text: str):
        """Print and flush; quiet and without effect once stdout is broken."""
        if self.broken:
            return
        try:
            sys.stdout.write(self.shown(text))
            sys.stdout.flush()
        except BrokenPipeError:
            self.broken = True
            silence_stdout()


class Interrupt:
    """Ctrl-C as a flag while a `with` block runs; a second Ctrl-C raises KeyboardInterrupt.

    An exception inside a forward pass would leave the caches of different layers at different
    tokens, so the first one only asks the loop to stop.
    """

    def __init__(self):
        self.requested = False
        self._previous = None

    def __call__(self) -> bool:
        return self.requested

    def _on_signal(self, signum, frame):
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(self, *exc):
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None
