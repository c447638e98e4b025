"""hydra-mlx needle: hide facts in long texts and ask for one, by length and depth.

hydra-mlx needle MODEL --lengths 1K,4K,16K --trials 5 --out needle.json --png needle.png
hydra-mlx needle MODEL --keys 1,4 --haystack book.txt --seed 7
"""

import argparse
import contextlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import cli, heatmap
from .errors import UsageError
from .needles import NeedleSettings, accuracy, evaluate, table
from .text import count

FORMAT = "hydra_mlx needle accuracy"
EPILOG = """\
Each text hides one sentence such as "The secret number of the amber falcon is 1234567." (--keys 4:
four of them with different names), and ends with the question about one and the beginning of the
answer. The reply is decoded greedily; it is right if the first number in it is the hidden one,
digit for digit. Texts depend on --seed and --haystack only, so that models can be compared.

--out FILE: a run that was interrupted or killed goes on with the same command.
"""


def numbers(kind: Callable, low: float, high: float, what: str) -> Callable:
    """An argparse type: several numbers with commas between; 4K is 4096."""

    def one(text: str):
        scale = 1
        if kind is int and text[-1:] in ("k", "K"):
            text, scale = text[:-1], 1024
        try:
            value = kind(text) * scale
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
        return value

    def parse(text: str) -> tuple:
        found = tuple(one(part.strip()) for part in text.split(","))
        if len(set(found)) != len(found):
            raise argparse.ArgumentTypeError(f"{text!r} has a number twice")
        return found

    return parse


def build_parser() -> cli.Parser:
    """Flags of `hydra-mlx needle`."""
    p = cli.parser("needle", __doc__, EPILOG)
    d = NeedleSettings()
    p.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="model folder or hub id (default: the small one in this package)",
    )
    p.add_argument(
        "--lengths",
        type=numbers(int, 32, 2**31, "a length of 32 tokens or more"),
        default=d.lengths,
        metavar="LIST",
        help="in tokens (default: 1K,2K,4K)",
    )
    p.add_argument(
        "--depths",
        type=numbers(float, 0, 1, "a depth from 0 to 1"),
        default=d.depths,
        metavar="LIST",
        help="where the fact is (default: 0,0.25,0.5,0.75,1)",
    )
    p.add_argument(
        "--keys",
        type=numbers(int, 1, 64, "a number of keys from 1 to 64"),
        default=d.keys,
        metavar="LIST",
        help="facts in a text (default: 1); 1,4 does both",
    )
    p.add_argument(
        "--trials", type=cli.number(int, 1), default=1, metavar="N", help="a cell (default: 1)"
    )
    p.add_argument(
        "--digits",
        type=cli.number(int, 1, 32),
        default=7,
        metavar="N",
        help="of the number (default: 7)",
    )
    p.add_argument("--seed", type=int, default=0, help="of the texts (default: 0)")
    cli.add_haystack(p)
    p.add_argument("--chat", action="store_true", help="use the tokenizer's chat template")
    p.add_argument("--out", metavar="FILE", help="write the result as JSON")
    p.add_argument("--png", metavar="FILE", help="draw a heat map for each number of keys")
    p.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="of unquantised weights; auto keeps them, except float32 on a CPU",
    )
    p.add_argument("--overwrite", action="store_true", help="replace the file of --out")
    cli.add_common(p)
    return p


def check_files(args: argparse.Namespace):
    """Whether the results can be written; asked before the work.

    Raises:
        UsageError: They cannot.
    """
    if args.overwrite and args.out is None:
        raise UsageError("--overwrite has no effect without --out FILE.")
    if args.png is not None:
        heatmap.require_matplotlib()
    for name in (args.out, args.png):
        if name is not None:
            cli.check_target(Path(name))
    if args.out is not None and args.out == args.png:
        raise UsageError("--png and --out name the same file.", "Choose another --png.")
    if args.out is not None and Path(args.out).expanduser().exists() and not args.overwrite:
        raise UsageError(f"{args.out} is there already.", "Choose another --out, or --overwrite.")


def work(args: argparse.Namespace) -> int:
    """Do what the flags say; returns the exit code."""
    check_files(args)
    from . import loading, stats

    path = loading.resolve_path(args.model)
    model, tokenizer = loading.load(path, args.dtype)
    if args.chat and not getattr(tokenizer, "chat_template", None):
        raise UsageError(
            "--chat is given, but the tokenizer has no chat template.", "Leave --chat out."
        )
    return measure(args, path, tokenizer, stats.backend()[0], model)


def measure(
    args: argparse.Namespace,
    path: Path,
    tokenizer: Any,
    device: str,
    model: Any = None,
    reply: Callable | None = None,
    program: str = "hydra-mlx needle",
) -> int:
    """Ask all texts, print and write the results; returns the exit code.

    Args:
        args: Of build_parser. path: Folder of the model. device: What computes the replies.
        model, reply: One of them, as of needles.evaluate. program: What was typed to begin it.
    """
    from . import haystack, loading
    from .journal import Journal, partial_path, versions
    from .manifest import model_hash, model_name

    note: Callable = (lambda line: None) if args.quiet else cli.say
    source = haystack.file_sentences(args.haystack) if args.haystack else None
    settings = NeedleSettings(
        args.lengths, args.depths, args.keys, args.trials, args.digits, args.seed, args.chat
    )
    limit = loading.read_config(path).get("max_position_embeddings")
    if isinstance(limit, int) and max(args.lengths) > limit:
        note(f"This model is made for {limit:,} tokens; longer texts are asked all the same.")
    head = {
        "format": FORMAT,
        "format_version": 1,
        "program": program,
        "model": {
            "name": model_name(args.model, path),
            "sha256": model_hash(path),
            "dtype": args.dtype,
        },
        "settings": {
            **asdict(settings),
            "haystack_sha256": haystack.digest(source),
        },
        "versions": versions(),
        "device": device,
    }
    out = None if args.out is None else Path(args.out).expanduser()
    with contextlib.ExitStack() as stack:
        kept = None
        if out is not None:
            kept = stack.enter_context(Journal(partial_path(out, args.overwrite), head))
        meter = stack.enter_context(cli.Meter("needle", args.quiet))
        cells = evaluate(model, tokenizer, settings, source, kept, meter, reply)
        if kept is not None:
            shares = {
                str(k): {str(n): accuracy(cells, k, n) for n in settings.lengths}
                for k in settings.keys
            }
            kept.finish(out, {**head, "accuracy": shares, "cells": cells})
            note(f"wrote {out}")
    if not args.quiet:
        print("\n\n".join(table(cells, settings, k) for k in settings.keys))
    if args.png is not None:
        draw(cells, settings, Path(args.png).expanduser(), head["model"]["name"], note)
    return 0


def draw(cells: list, settings: NeedleSettings, path: Path, name: str, note: Callable):
    """A heat map for each number of keys; the second and later ones beside the first."""
    for k in settings.keys:
        share = {
            (c["length"], c["depth"]): c["right"] / c["trials"] for c in cells if c["keys"] == k
        }
        rows = [[share[n, d] for n in settings.lengths] for d in settings.depths]
        target = path if k == settings.keys[0] else path.with_stem(f"{path.stem}-{k}-keys")
        axes, title = ("tokens", "depth"), f"{name}: needle, {count(k, 'key')}"
        heatmap.png_map(target, rows, settings.depths, settings.lengths, axes, title)
        note(f"wrote {target}")


def main(argv: Sequence | None = None) -> int:
    """Entry point of `hydra-mlx needle`; returns the exit code."""
    return cli.run(build_parser(), work, argv)


if __name__ == "__main__":
    sys.exit(main())
