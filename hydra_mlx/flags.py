"""The programs' flags as data, read from their parsers: for shell completion and docs/cli.md."""

import argparse
import importlib
from dataclasses import dataclass

FOLDERS = ("DIR",)
FILES = ("FILE", "PATH", "MODEL", "BASE")


@dataclass(frozen=True)
class Flag:
    """One flag or argument.

    Attributes:
        names: ("--model",), short ones last; empty for an argument without a flag.
        value: What stands for its value ("PATH"); "" where it takes none.
        many: Whether it takes several values. optional: Whether an argument may be left out.
        choices: Its only values, as text. repeats: Whether the flag may be given again.
        help: One line. group: Title of its group in --help.
    """

    names: tuple
    value: str
    many: bool
    optional: bool
    choices: tuple
    repeats: bool
    help: str
    group: str

    @property
    def completes(self) -> str:
        """What its value is: "choice", "folder", "file", "text", or "" without one."""
        if not self.value:
            return ""
        if self.choices:
            return "choice"
        kind = self.value.upper()
        return "folder" if kind in FOLDERS else "file" if kind in FILES else "text"


def parser_of(command: str) -> argparse.ArgumentParser:
    """The parser of a command of __main__.COMMANDS."""
    from .__main__ import COMMANDS

    return importlib.import_module(f".{COMMANDS[command][0]}", __package__).build_parser()


def flags_of(parser: argparse.ArgumentParser) -> list:
    """Its Flags in the order of --help, hidden ones left out."""
    out = []
    for group in parser._action_groups:  # argparse offers no public way to list them
        for action in group._group_actions:
            if action.help is not argparse.SUPPRESS:
                out.append(_flag(action, group.title or ""))
    return out


def _flag(action: argparse.Action, group: str) -> Flag:
    names = tuple(sorted(action.option_strings, key=lambda n: not n.startswith("--")))
    choices = tuple(str(c) for c in action.choices or ())
    value = ""
    if action.nargs != 0:
        shown = action.metavar or ("|".join(choices) if choices else action.dest.upper())
        value = shown if isinstance(shown, str) else " ".join(shown)
    said = action.help or ""
    return Flag(
        names,
        value,
        action.nargs in ("*", "+"),
        action.nargs in ("*", "?") or (bool(names) and not action.required),
        choices,
        isinstance(action, (argparse._AppendAction, argparse._ExtendAction)),
        said % vars(action) if "%" in said else said,
        "flags" if group in ("options", "optional arguments") else group,
    )


def usage(command: str, prog: str, flags: list) -> str:
    """The usage line, the same whatever the terminal and the version of Python."""
    parts = [f"{prog} {command}", "[flags]"]
    for f in flags:
        if f.names and not f.optional:
            parts.append(f"{f.names[0]} {f.value}")
    for f in flags:
        if not f.names:
            shown = f"{f.value} ..." if f.many else f.value
            parts.append(f"[{shown}]" if f.optional else shown)
    return " ".join(parts)
