"""hydra-mlx doctor: is everything here that is needed, and does it compute right?

hydra-mlx doctor
hydra-mlx doctor my-model --report report.txt

A line each: ok, warn (works, could be better) or fail. Exit code 1 when something fails.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import cli, default_model, diagnosis, redact
from .diagnosis import FAIL, OK, WARN, Line
from .errors import UsageError
from .text import count, first_line, printable

COLOURS = {OK: 32, WARN: 33, FAIL: 31}
FAILED = 1  # exit code
REPORT = "Please report it: hydra-mlx doctor --report FILE"
INSTEAD = "Operations are used instead, which is slower."
ANSWERS = "Do not trust any answer of a model here."
EPILOG = """\
The report has the same lines, the versions and the settings, without names of people, folders
above the model's, or values of unknown variables. Read it before you send it.
"""


def build_parser() -> cli.Parser:
    """Flags of `hydra-mlx doctor`."""
    p = cli.parser("doctor", __doc__, EPILOG)
    p.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="model folder or cached hub id (default: the small one in this package)",
    )
    p.add_argument("--report", metavar="FILE", type=Path, help="write a file for a bug report")
    p.add_argument(
        "--deadline",
        type=cli.number(float, 0, 3600),
        default=5.0,
        metavar="SECONDS",
        help="begin no check after this time; 0 checks everything (default 5)",
    )
    p.add_argument("--verbose", action="store_true", help="a line for every kernel check")
    p.add_argument("--debug", action="store_true", help="show tracebacks")
    return p


class Examination:
    """Runs checks until the time is over, printing each line as it comes.

    Attributes:
        lines: All so far. late: Names of what was not reached.
    """

    def __init__(self, deadline_s: float, colour: bool):
        self.end = time.perf_counter() + deadline_s if deadline_s else float("inf")
        self.colour, self.lines, self.late = colour, [], []

    def over(self, name: str) -> bool:
        """Whether there is no time for `name`; remembers it then."""
        if time.perf_counter() < self.end:
            return False
        self.late.append(name)
        return True

    def add(self, line: Line):
        """Print and keep a line."""
        self.lines.append(line)
        print(shown(line, self.colour), flush=True)

    def ask(self, name: str, look: Callable[[], list]):
        """Print what look() finds, if there is time."""
        if self.over(name):
            return
        try:
            found = look()
        except Exception as e:  # the doctor must not be what breaks
            found = [Line(FAIL, name, f"{type(e).__name__}: {first_line(e)}")]
        for line in found:
            self.add(line)


def shown(line: Line, colour: bool = False) -> str:
    """A line as it is printed; what to do comes below what was found."""
    status = f"{line.status:5}"
    if colour:
        status = f"\x1b[{COLOURS[line.status]}m{status}\x1b[0m"
    todo = f"\n{'':19}-> {printable(line.todo)}" if line.todo else ""
    return f"{status} {line.what:12} {printable(line.found)}{todo}"


def kernels(exam: Examination, facts: Any, verbose: bool):
    """A small model against the reference, then every kernel against its twin.

    Args:
        facts: Of the user's model, or None. verbose: A line for each check, not for each kernel.
    """
    from . import kernel_checks
    from .kernel_paths import DTYPES
    from .kernels import dispatch

    try:
        backend = dispatch.backend()
    except UsageError:  # said already
        backend = None
    own = None if facts is None or facts.form == "plain" else facts.args
    dtype = DTYPES["BF16" if own is None else facts.dtype]
    passed: dict = {}
    with dispatch.substitute(backend):
        for check in kernel_checks.checks(backend, own, dtype):
            if exam.over(check.name):
                continue
            arithmetic = check.name == kernel_checks.ARITHMETIC
            what = "arithmetic" if arithmetic else "kernel"
            try:
                error, wrong = check.run()
            except Exception as e:  # the whole model may break in any way
                error, wrong = None, first_line(e)
            if wrong:
                todo = ANSWERS if arithmetic else INSTEAD
                exam.add(Line(FAIL, what, f"{check.name}: {wrong}", f"{todo} {REPORT}"))
                continue
            if verbose or arithmetic:
                exam.add(Line(OK, what, f"{check.name}, difference {error:.2g}"))
            else:
                passed.setdefault(check.name.split(",")[0], []).append(error)
    for kernel, errors in passed.items():
        found = f"{kernel}: as its twin in {count(len(errors), 'case')}, "
        exam.add(Line(OK, "kernel", f"{found}largest difference {max(errors):.2g}"))
    if backend is None:
        exam.add(Line(OK, "kernels", "none in use here: operations"))


def report(exam: Examination, paths: Sequence) -> str:
    """The text of --report; of the paths only the last parts stay in it."""
    from huggingface_hub.constants import HF_HUB_CACHE

    lines = ["# hydra_mlx doctor", "", *(shown(x) for x in exam.lines)]
    lines += ["", "## Settings", "", *(redact.environment() or ["none"])]
    try:
        import mlx.core as mx

        lines += ["", "## Device", "", *(f"{k}: {v}" for k, v in sorted(mx.device_info().items()))]
    except Exception as e:  # said above already
        lines += ["", f"no device: {first_line(e)}"]
    return redact.without_names("\n".join(lines) + "\n", [HF_HUB_CACHE, *paths])


def work(args: argparse.Namespace) -> int:
    """Look at everything; returns the exit code."""
    from .facts import find
    from .heatmap import wants_colour

    if args.report is not None:
        cli.check_target(args.report)
        if args.report.expanduser().exists():
            raise UsageError(f"{args.report} exists.", "Choose another name, or remove it first.")
    path = default_model.PLACE if args.model is None else find(args.model)
    exam = Examination(args.deadline, wants_colour(sys.stdout))
    facts = None

    def look_at_model() -> list:
        nonlocal facts
        lines, facts = diagnosis.model(path)
        return lines

    looks = {"versions": diagnosis.versions, "backend": diagnosis.backend}
    looks |= {"memory": diagnosis.memory, "hub cache": diagnosis.disk}
    looks |= {"extras": diagnosis.extras}
    for name, look in looks.items():
        exam.ask(name, look)
    exam.ask("model", look_at_model)
    if facts is not None and path.is_dir():
        exam.ask("tokenizer", lambda: diagnosis.tokenizer(path))
    if not any(x.what == "mlx" and x.status == FAIL for x in exam.lines):
        kernels(exam, facts, args.verbose)
    if exam.late:
        found = f"{count(len(exam.late), 'check')} not reached in {args.deadline:g} s: "
        more = f" and {len(exam.late) - 3} more" if len(exam.late) > 3 else ""
        todo = "hydra-mlx doctor --deadline 0 runs them all."
        exam.add(Line(WARN, "time", found + "; ".join(exam.late[:3]) + more, todo))
    failed, warned = (sum(x.status == s for x in exam.lines) for s in (FAIL, WARN))
    print(f"{count(failed, 'failure')}, {count(warned, 'warning')}")
    if args.report is not None:
        from .files import write_whole

        named = [str(path.absolute()), str(path), args.model or ""]
        said = report(exam, named)
        write_whole(args.report.expanduser(), lambda beside: beside.write_text(said, "utf-8"))
        cli.say(f"Wrote {args.report}; read it before you send it.")
    return FAILED if failed else 0


def main(argv: Sequence | None = None) -> int:
    """Entry point of `hydra-mlx doctor`; returns the exit code."""
    return cli.run(build_parser(), work, argv)


if __name__ == "__main__":
    sys.exit(main())
