"""hydra-mlx score: how much each attention head of a base model matters for retrieval.

hydra-mlx score MODEL --out scores.json --png scores.png
hydra-mlx score MODEL --length 2048 --pairs 4 --validate
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import cli, haystack, heatmap, score_file
from .errors import UsageError
from .text import count

EPILOG = """\
MODEL is a plain Llama or Qwen3 model: a folder, a hub id or a Llama-family .gguf file; or a folder
that `hydra-mlx convert --head-map identity` wrote. The method is activation patching on pairs of
texts with hidden facts; docs/scoring.md has the definitions.

A run that was interrupted or killed goes on with the same command: what is measured is kept in
FILE.partial. A finished FILE is not measured again; --validate and --png add to it.
"""


def build_parser() -> cli.Parser:
    """Flags of `hydra-mlx score`."""
    p = cli.parser("score", __doc__, EPILOG)
    p.add_argument("model", metavar="MODEL", help="base model: folder, hub id or .gguf file")
    p.add_argument(
        "--out", default="scores.json", metavar="FILE", help="result (default: scores.json)"
    )
    p.add_argument("--png", metavar="FILE", help="draw the heat map; with --validate also a curve")
    whole = cli.number(int, 1)
    p.add_argument(
        "--length",
        type=cli.number(int, 32),
        metavar="N",
        help="tokens of a probe (default: 4096, or what the model is made for)",
    )
    p.add_argument(
        "--capabilities",
        default="single,multi",
        metavar="LIST",
        help="single, multi (several keys) or both (default: single,multi)",
    )
    p.add_argument(
        "--sub-probes", type=cli.number(int, 1, 5), default=5, metavar="N", help="wordings, up to 5"
    )
    p.add_argument("--pairs", type=whole, default=8, metavar="N", help="of each (default: 8)")
    p.add_argument(
        "--keys", type=cli.number(int, 2, 64), default=4, metavar="N", help="in multi (default: 4)"
    )
    p.add_argument("--seed", type=int, default=0, help="of the texts (default: 0)")
    p.add_argument(
        "--rounds",
        type=cli.number(int, 0, 5),
        default=2,
        metavar="N",
        help="of the search for senders (default: 2)",
    )
    p.add_argument(
        "--positions",
        type=cli.number(int, 0),
        default=64,
        metavar="N",
        help="that a sender's change is followed at; 0 is all, exact and slow (default: 64)",
    )
    p.add_argument(
        "--min-gap",
        type=cli.number(float, 0.0),
        default=0.5,
        metavar="X",
        help="skip pairs whose read-outs differ less, in logits (default: 0.5)",
    )
    cli.add_haystack(p)
    p.add_argument(
        "--validate",
        action="store_true",
        help="remove heads by score and at random, and count right answers",
    )
    p.add_argument(
        "--validate-texts", type=whole, metavar="N", help="fresh ones of each kind (default: 10)"
    )
    p.add_argument(
        "--ablation",
        choices=("mean", "zero"),
        help="what a removed head gives: its mean output (default) or zero",
    )
    p.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16", "auto"),
        help="of unquantised weights (default: float32)",
    )
    p.add_argument("--overwrite", action="store_true", help="start anew, whatever FILE holds")
    cli.add_common(p)
    return p


def check_flags(args: argparse.Namespace) -> tuple:
    """The capabilities asked for; flags that would do nothing are errors.

    Raises:
        UsageError: The first wrong flag.
    """
    for name in ("validate_texts", "ablation"):
        if getattr(args, name) is not None and not args.validate:
            raise UsageError(f"--{name.replace('_', '-')} has no effect without --validate.")
    names = tuple(args.capabilities.split(","))
    if not set(names) <= {"single", "multi"} or len(set(names)) != len(names):
        raise UsageError(
            f"--capabilities is {args.capabilities!r}, expected single, multi or single,multi."
        )
    if args.png is not None:
        heatmap.require_matplotlib()
        cli.check_target(Path(args.png))
        if Path(args.png).expanduser().resolve() == Path(args.out).expanduser().resolve():
            raise UsageError("--png and --out name the same file.", "Choose another --png.")
    cli.check_target(Path(args.out))
    return names


def limit_length(wanted: int | None, config: dict) -> int:
    """--length, or its default for this model.

    Raises:
        UsageError: Longer than the model is made for.
    """
    limit = config.get("max_position_embeddings")
    limit = limit if isinstance(limit, int) and limit > 0 else None
    if wanted is None:
        return min(4096, limit or 4096)
    if limit and wanted > limit:
        raise UsageError(
            f"--length is {wanted}, but this model is made for {limit} tokens.",
            f"Ask for a --length up to {limit}.",
        )
    return wanted


def header(args: argparse.Namespace, path: Path, trunk: Any, settings: Any, digest: Any) -> dict:
    """What a result belongs to: equal headers, equal results."""
    from .journal import versions
    from .manifest import model_hash, model_name
    from .patching import LAMBDA

    model = {
        "name": model_name(args.model, path),
        "sha256": model_hash(path),
        "layers": trunk.L,
        "heads": trunk.H,
        "key_value_heads": trunk.Hk,
        "head_dim": trunk.D,
        "dtype": args.dtype or "float32",
    }
    probes = {**asdict(settings), "haystack_sha256": digest, "lambda": LAMBDA}
    return score_file.header(model, probes, versions())


def _same(data: dict, head: dict) -> bool:
    """Whether a result is of these weights and settings; the model's file may have moved."""
    model = data.get("model")
    if isinstance(model, dict):
        data = {**data, "model": {**model, "name": head["model"]["name"]}}
    return all(data.get(k) == v for k, v in head.items())


def read_finished(out: Path, head: dict) -> dict | None:
    """The result that is there already, or None.

    Raises:
        UsageError: The file is something else, or of other settings.
    """
    try:
        data = json.loads(out.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError):
        data = None
    if not isinstance(data, dict) or not _same(data, json.loads(json.dumps(head))):
        raise UsageError(
            f"{out} is there already and holds something else than this run would give.",
            "Choose another --out, or add --overwrite.",
        )
    return data


def work(args: argparse.Namespace) -> int:
    """Do what the flags say; returns the exit code."""
    names = check_flags(args)
    from . import knockout, loading, score_report, scoring
    from .journal import Journal, partial_path
    from .trunk import Trunk, open_base

    note: Callable = (lambda line: None) if args.quiet else cli.say
    source = haystack.file_sentences(args.haystack) if args.haystack else None
    path = loading.resolve_path(args.model)
    model, tokenizer = open_base(path, args.dtype)
    trunk = Trunk(model)
    config = vars(model.args)
    settings = scoring.ScoreSettings(
        limit_length(args.length, config),
        names,
        args.sub_probes,
        args.pairs,
        args.keys,
        args.seed,
        args.rounds,
        args.positions,
        args.min_gap,
    )
    head = header(args, path, trunk, settings, haystack.digest(source))
    out = Path(args.out).expanduser()
    partial = partial_path(out, args.overwrite)
    data = read_finished(out, head)
    if data is None:
        with Journal(partial, head) as journal, cli.Meter("receivers", args.quiet) as meter:
            if journal.values:
                note(f"Going on with {partial}: {count(len(journal.values), 'result')} kept.")
            values = scoring.measure(trunk, tokenizer, settings, source, journal, meter)
            data = {**head, **scoring.result(values, settings)}
            journal.finish(out, data)
        note(f"wrote {out}")
    else:
        note(f"{out} holds this result already; nothing is measured again.")
    texts, kind = args.validate_texts or 10, args.ablation or "mean"
    known = data.get("knockout") or {}
    if args.validate and (known.get("texts"), known.get("ablation")) != (texts, kind):
        with Journal(partial, head) as journal, cli.Meter("knockout", args.quiet) as meter:
            data["knockout"] = knockout.validate(
                trunk, tokenizer, settings, source, data["ranking"], kind, texts, journal, meter
            )
            journal.finish(out, data)
    if not args.quiet:
        score_report.show(data)
    if args.png is not None:
        score_report.draw(data, Path(args.png).expanduser(), note)
    return 0


def main(argv: Sequence | None = None) -> int:
    """Entry point of `hydra-mlx score`; returns the exit code."""
    return cli.run(build_parser(), work, argv)


if __name__ == "__main__":
    sys.exit(main())
