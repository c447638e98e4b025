"""hydra-mlx: one command, a subcommand for each program."""

import difflib
import importlib
import sys
from collections.abc import Sequence

from . import __version__, cli
from .errors import UsageError

PROG = cli.PROG
COMMANDS = {  # name: (module, what it does)
    "generate": ("generate", "Answer one prompt; the reply goes to stdout."),
    "chat": ("chat", "Talk to a model: undo, edit, files, sessions that are kept."),
    "serve": ("serve", "OpenAI's API for one model, on this machine."),
    "cache": ("document", "Read a document once, to ask about it many times."),
    "convert": ("convert", "Turn a checkpoint into a folder that loads fast."),
    "score": ("score", "How much each head of a base model matters for retrieval."),
    "migrate": ("migrate", "Turn a Llama or Qwen3 into a HydraHead model to be trained."),
    "transfer": ("transfer", "Train a migrated model to do what its base does."),
    "needle": ("needle", "Find facts hidden in long texts: accuracy by length and depth."),
    "info": ("info", "What a model is and needs: sizes, head map, tokens that fit."),
    "doctor": ("doctor", "Check this installation, its kernels, and a model."),
    "bench": ("bench", "Speed and memory by context length, models side by side."),
    "cost": ("cost", "Predicted speed on Apple chips, by context length."),
    "completion": ("completion", "A script that makes your shell complete these commands."),
}


def help_text() -> str:
    """What --help prints."""
    width = max(map(len, COMMANDS))
    lines = [f"usage: {PROG} COMMAND [flags]", "", "commands:"]
    lines += [f"  {name:<{width}}  {about}" for name, (_, about) in COMMANDS.items()]
    lines += [
        "",
        f"`{PROG} COMMAND --help` lists the flags of a command; --version prints versions.",
    ]
    return "\n".join(lines)


def version_text() -> str:
    """Versions of this package and of what it runs on."""
    from importlib.metadata import PackageNotFoundError, version

    found = []
    for name in ("mlx", "mlx-lm"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} not installed")
    return f"hydra_mlx {__version__} ({', '.join(found)})"


def _dispatch(argv: list) -> int:
    name = argv[0] if argv else None
    if name in ("-h", "--help", "help"):
        print(help_text())
        return 0
    if name == "--version":
        print(version_text())
        return 0
    if name is None:
        raise UsageError(
            f"No command given; the commands are {', '.join(COMMANDS)}.", f"Try `{PROG} --help`."
        )
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1, 0.5)
        guess = f"Did you mean `{PROG} {near[0]}`? " if near else ""
        raise UsageError(f"{name!r} is not a command.", f"{guess}`{PROG} --help` lists them all.")
    module = importlib.import_module(f".{COMMANDS[name][0]}", __package__)
    return module.main(argv[1:])


def main(argv: Sequence | None = None) -> int:
    """Run a subcommand; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    return cli.guard(lambda: _dispatch(argv), cli.wants_debug(argv))


if __name__ == "__main__":
    sys.exit(main())
