"""Writes docs/cli.md, the reference of all commands, from their parsers.

    python tools/cli_reference.py          # writes docs/cli.md
    python tools/cli_reference.py --check  # exit code 1 where it is not current

The text does not depend on the terminal's width or the version of Python, as --help does.
"""

import argparse
import sys
from pathlib import Path

from hydra_mlx import cli, flags
from hydra_mlx.__main__ import COMMANDS

TARGET = Path(__file__).parents[1] / "docs" / "cli.md"
INTRO = """\
# Commands

Made from the programs' own `--help` by `python tools/cli_reference.py`; a test says when it is not
current. Every command is also `python -m hydra_mlx COMMAND`. Exit codes: 0 done, 1 `doctor` found a
failure, 2 an error (one or two lines on stderr; `--debug` adds the traceback), 130 Ctrl-C, 141 the
reader of stdout went away.
"""


def _code(text: str) -> str:
    return f"`{text}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _row(f: flags.Flag) -> str:
    value = f.value + (" ..." if f.many else "")
    names = [f"{n} {value}".strip() for n in f.names] or [value]
    said = f.help
    if f.choices and "|" not in f.value:
        said += f" ({', '.join(f.choices)})" if said else ", ".join(f.choices)
    return f"| {_cell(', '.join(_code(n) for n in names))} | {_cell(said)} |"


def _text(text: str) -> list:
    """A description or an epilog, kept as it was written."""
    lines = [line.rstrip() for line in text.strip().splitlines()]
    return ["```text", *lines, "```", ""] if lines else []


def section(command: str, parser: argparse.ArgumentParser | None = None, level: int = 2) -> list:
    """Lines on one command, its actions included."""
    parser = parser or flags.parser_of(command)
    found = flags.flags_of(parser)
    first, _, rest = (parser.description or "").strip().partition("\n")
    about = first.partition(": ")[2] or first
    lines = [f"{'#' * level} {cli.PROG} {command}", "", about[:1].upper() + about[1:], ""]
    lines += ["```", flags.usage(command, cli.PROG, found), "```", "", *_text(rest)]
    for group in dict.fromkeys(f.group for f in found):
        title = {"positional arguments": "argument"}.get(group, group)
        lines += [f"| {_cell(title)} | |", "|---|---|"]
        lines += [_row(f) for f in found if f.group == group] + [""]
    lines += _text(parser.epilog or "")
    for action in parser._actions:  # argparse offers no public way to list them
        if isinstance(action, argparse._SubParsersAction):
            for name, sub in action.choices.items():
                lines += section(f"{command} {name}", sub, level + 1)
    return lines


def render() -> str:
    """The whole page."""
    lines = [INTRO, "| command | |", "|---|---|"]
    for name, (_, about) in COMMANDS.items():
        lines.append(f"| [{name}](#{cli.PROG}-{name}) | {_cell(about)} |")
    lines.append("")
    for name in COMMANDS:
        lines += section(name)
    return "\n".join(lines).rstrip() + "\n"


def main(argv: list | None = None) -> int:
    """Write or check; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if argv == ["--check"]:
        current = TARGET.is_file() and TARGET.read_text("utf-8") == render()
        print("current" if current else f"{TARGET.name} is not current; run {Path(__file__).name}")
        return 0 if current else 1
    TARGET.write_text(render(), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
