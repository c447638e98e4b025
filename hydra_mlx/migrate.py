"""hydra-mlx migrate: a pretrained Transformer into an initialised HydraHead checkpoint.

hydra-mlx migrate BASE --scores scores.json --ratio 3:1 --out student
hydra-mlx migrate model.gguf --select fixed --ratio 7:1 --gamma rms --text FILE --out student

The result has the base's weights at their new places and is to be trained: `hydra-mlx transfer`.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from . import cli
from .errors import UsageError


def build_parser() -> argparse.ArgumentParser:
    """Flags of `hydra-mlx migrate`."""
    count = cli.number(int, 1)
    p = cli.parser("migrate", __doc__)
    p.add_argument("base", help="Llama, Mistral or Qwen3: a folder, a hub id, or a .gguf file")
    p.add_argument("--out", metavar="DIR", required=True, help="folder to write")
    p.add_argument("--scores", metavar="FILE", help="of `hydra-mlx score`")
    p.add_argument(
        "--foreign-scores",
        action="store_true",
        help="take scores of other weights too, such as a quantised copy's or a fine-tune's",
    )
    p.add_argument(
        "--select",
        choices=("scores", "fixed", "random"),
        default="scores",
        help="how full-attention heads are chosen (default: scores)",
    )
    p.add_argument("--ratio", default="3:1", help="linear:full heads (default: 3:1)")
    p.add_argument(
        "--floor",
        type=cli.number(int, 0),
        help="full-attention heads in every layer (default: 0 at 3:1, 1 below a quarter)",
    )
    p.add_argument("--seed", type=int, default=0, help="of new tensors and --select random")
    p.add_argument(
        "--gamma",
        choices=("one", "rms"),
        default="one",
        help="head scales: 1, or the RMS of the base's heads on --text (default: one)",
    )
    p.add_argument(
        "--text",
        action="append",
        default=[],
        metavar="PATH",
        help="calibration text for --gamma rms: text files, packed tokens, folders",
    )
    p.add_argument("--tokens", type=count, default=16384, help="of it to use (default: 16384)")
    p.add_argument("--length", type=count, default=512, help="of its sequences (default: 512)")
    p.add_argument("--conv", choices=("identity", "random"), default="identity")
    p.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=JSON",
        help="another key of the HydraHead config, such as fusion_norm=null",
    )
    p.add_argument("--dtype", help="float32, bfloat16 or float16 (default: the base's)")
    p.add_argument("--revision", help="branch, tag or commit of a hub id")
    p.add_argument("--overwrite", action="store_true", help="replace an existing target")
    cli.add_common(p)
    return p


def config_keys(items: list) -> dict:
    """{key: value} of --set items.

    Raises:
        UsageError: One is not KEY=JSON, or sets what the selection decides.
    """
    out = {}
    for item in items:
        key, found, text = item.partition("=")
        try:
            if not found or key == "full_attention_heads":
                raise ValueError
            out[key] = json.loads(text)
        except ValueError:
            raise UsageError(
                f"--set {item!r} is not KEY=JSON.", "For example: --set fusion_norm=null"
            ) from None
    return out


def choose(args: argparse.Namespace, base: Any) -> list:
    """The full-attention heads that the flags ask for, L sorted lists.

    Args:
        base: The opened base model.

    Raises:
        HydraError: Flags or a scores file that do not fit.
    """
    from .manifest import model_hash
    from .score_file import read_scores
    from .selection import count_heads, default_floor, parse_ratio, select_heads

    layers, heads = base.args.num_hidden_layers, base.args.num_attention_heads
    if args.select != "scores" and args.scores:
        raise UsageError(f"--scores has no effect with --select {args.select}.")
    if args.foreign_scores and not args.scores:
        raise UsageError("--foreign-scores has no effect without --scores FILE.")
    share = parse_ratio(args.ratio)
    floor = default_floor(share) if args.floor is None else args.floor
    count = count_heads(share, layers, heads, floor)
    scores = None
    if args.scores:
        scores = read_scores(Path(args.scores).expanduser(), layers, heads)
        if scores.sha256 != model_hash(base.path) and not args.foreign_scores:
            raise UsageError(
                f"{args.scores} has scores of other weights than {args.base}.",
                "Score this model, or add --foreign-scores to take them all the same.",
            )
    return select_heads(args.select, layers, heads, count, floor, args.seed, scores)


def measure_gamma(args: argparse.Namespace, source, progress):
    """Head scales [L, H] from calibration text.

    Raises:
        UsageError: No text, or too little of it.
    """
    from .teacher import head_rms, source_tokenizer
    from .tokens import Batches, read_documents

    if not args.text:
        raise UsageError("--gamma rms needs --text.", "Give some text like that to be trained on.")
    vocab = source.args.vocab_size
    documents = read_documents(args.text, vocab, lambda: source_tokenizer(source))
    width = min(args.length, documents.total - 1)
    batches = Batches(documents, width, args.seed)
    count = min(batches.windows, max(1, args.tokens // width))
    return head_rms(source, batches.take(0, count)[:, :width], max(1, 4096 // width), progress)


def make_job(args: argparse.Namespace, progress=lambda label, done, total: None):
    """Open the base and turn the flags into a conversion.

    Returns:
        (Job, head map).

    Raises:
        HydraError: Flags that contradict each other, or a base that cannot be read.
    """
    from .convert import resolve_source
    from .converter import Job
    from .loading import DTYPES
    from .sources import open_source
    from .target import check_target, real_path
    from .teacher import open_base

    if args.dtype is not None and args.dtype not in DTYPES:
        raise UsageError(f"--dtype is {args.dtype!r}, expected one of {', '.join(DTYPES)}.")
    if args.text and args.gamma != "rms":
        raise UsageError("--text has no effect without --gamma rms.")
    keys = config_keys(args.set)
    if args.gamma == "rms":
        if keys.get("fusion_scale") is False:
            raise UsageError("--gamma rms has no effect with fusion_scale=false.")
        if "fusion_norm" in keys and keys["fusion_norm"] is None:
            raise UsageError("--gamma rms restores a scale that fusion_norm=null never removes.")
    base = open_base(resolve_source(args.base, args.revision))
    check_target(base.path, real_path(Path(args.out)), args.overwrite)
    heads = choose(args, base)
    head_map = {"full_attention_heads": heads, **keys}
    source = open_source(base.path, head_map)
    gamma = measure_gamma(args, base, progress) if args.gamma == "rms" else None
    job = Job(source, "spec", None, args.dtype, args.seed, 2 * 10**9, True, gamma, args.conv)
    return job, head_map


def describe(job, args: argparse.Namespace) -> list:
    """What was chosen, in lines."""
    from .cache import kv_bytes_per_token, state_bytes

    maps = job.args.full_attention_heads
    total = len(maps) * job.args.num_attention_heads
    each = [len(h) for h in maps]
    return [
        f"{sum(each)} of {total} heads stay full attention ({args.select}), "
        f"{min(each)} to {max(each)} a layer",
        f"{int(kv_bytes_per_token(job.args)):,} bytes of keys and values a token (bf16), "
        f"{state_bytes(job.args) / 1e6:.1f} MB of state a sequence",
    ]


def work(args: argparse.Namespace) -> int:
    """Do what the flags say; returns the exit code."""
    from .converter import run
    from .selection import write_heads

    with cli.progress("measuring", enabled=not args.quiet) as bar:
        job, head_map = make_job(args, bar)

    def add_map(folder: Path):
        write_heads(folder, head_map)

    with cli.progress("migrating", enabled=not args.quiet) as bar:
        target = run(job, Path(args.out).expanduser(), args.overwrite, bar, add_map)
    for line in [] if args.quiet else [*describe(job, args), f"wrote {target}"]:
        cli.say(line)
    return 0


def main(argv: list | None = None) -> int:
    """Entry point of `hydra-mlx migrate`; returns the exit code."""
    return cli.run(build_parser(), work, argv)


if __name__ == "__main__":
    sys.exit(main())
