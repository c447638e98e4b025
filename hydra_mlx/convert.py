"""hydra-mlx convert: a checkpoint into an MLX folder, or back into the spec's layout.

hydra-mlx convert --hf-path CHECKPOINT --mlx-path OUT -q
hydra-mlx convert --hf-path BASE --head-map heads.json --mlx-path OUT
hydra-mlx convert --mlx-path OUT --to-hf BACK
"""

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

from . import cli
from .errors import UsageError

DEFAULT_OUT = "mlx_model"
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 1 << 10, "MI": 1 << 20, "GI": 1 << 30}


def build_parser() -> argparse.ArgumentParser:
    """Flags of `hydra-mlx convert`; mlx_lm.convert's names where it has one."""
    p = cli.parser("convert", __doc__)
    p.add_argument(
        "--hf-path",
        "--from",
        metavar="PATH",
        help="source: a HydraHead, Llama or Qwen3 folder, a hub id, or a Llama-family .gguf file",
    )
    p.add_argument(
        "--mlx-path",
        "--to",
        metavar="DIR",
        help=f"folder to write (default: {DEFAULT_OUT}); with --to-hf, the folder to read",
    )
    p.add_argument("--revision", help="branch, tag or commit of a hub id")
    p.add_argument(
        "--head-map",
        metavar="FILE",
        help='plain models only: JSON with "full_attention_heads" (and other config keys), or '
        "`identity` for every head full attention as in the base model",
    )
    p.add_argument("--seed", type=int, help="of tensors that a migration adds (default: 0)")
    p.add_argument("-q", "--quantize", action="store_true", help="quantise the weights")
    p.add_argument("--q-bits", type=int, help="bits per weight: 2, 3, 4, 5, 6, 8 (default: 4)")
    p.add_argument("--q-group-size", type=int, help="weights per scale: 32, 64, 128 (default: 64)")
    p.add_argument("--q-mode", help="affine (default), mxfp4, nvfp4 or mxfp8")
    p.add_argument(
        "--quant-predicate",
        "--recipe",
        help="mixed_2_6, mixed_3_4, mixed_3_6, mixed_4_6, or embed_6, embed_8 (bits of embedding "
        "and output head)",
    )
    p.add_argument(
        "--protect",
        action="append",
        default=[],
        metavar="REGEX",
        help="leave matching modules unquantised; the gates of the recurrence always are",
    )
    p.add_argument("--dtype", help="float32, bfloat16 or float16 for what is not quantised")
    p.add_argument(
        "--no-fuse",
        action="store_true",
        help="keep the tensors of the checkpoint one by one (to train on, or to go back exactly)",
    )
    p.add_argument(
        "--to-hf", metavar="DIR", help="write the spec's layout from an unquantised --mlx-path"
    )
    p.add_argument("--plan", action="store_true", help="print sizes and needs, and do nothing")
    p.add_argument(
        "--verify",
        choices=("none", "quick", "full"),
        default="none",
        help="reload the result and compare it with the source before it gets its name",
    )
    p.add_argument("--overwrite", action="store_true", help="replace an existing target")
    p.add_argument(
        "--max-shard-size",
        default="2GB",
        metavar="SIZE",
        help="largest output file, also the memory held for it (default: 2GB)",
    )
    cli.add_common(p)
    return p


def parse_size(text: str) -> int:
    """Bytes of "500MB", "2GiB" or "1000000".

    Raises:
        UsageError: Not a size, or under a million bytes.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]I?)?B?\s*", text.upper())
    size = int(float(match[1]) * UNITS[match[2] or ""]) if match else 0
    if size < 10**6:
        raise UsageError(
            f"--max-shard-size is {text!r}, expected a size of 1MB or more, such as 2GB."
        )
    return size


def make_job(args: argparse.Namespace):
    """Open the source and turn the flags into a conversion.

    Returns:
        (Job, target folder).

    Raises:
        HydraError: Flags that contradict each other, or a source that cannot be read.
    """
    from .converter import Job
    from .layouts import model_shapes
    from .loading import DTYPES
    from .quantise import make_plan, require_effect
    from .sources import open_source

    back = args.to_hf is not None
    if back and args.mlx_path is None:
        raise UsageError("--to-hf needs --mlx-path, the folder to read.")
    if back and args.hf_path is not None:
        raise UsageError("--to-hf reads --mlx-path; leave out --hf-path.")
    if not back and args.hf_path is None:
        raise UsageError("No source.", "Add --hf-path with a folder, a hub id or a .gguf file.")
    settings = {
        "--q-bits": args.q_bits,
        "--q-group-size": args.q_group_size,
        "--q-mode": args.q_mode,
        "--quant-predicate": args.quant_predicate,
        "--protect": args.protect or None,
    }
    given = [flag for flag, value in settings.items() if value is not None]
    if given and not args.quantize:
        raise UsageError(f"{given[0]} has no effect without -q.", "Add -q to quantise.")
    if back and (args.quantize or args.no_fuse or args.head_map):
        raise UsageError(
            "--to-hf writes unquantised spec layout; leave out -q, --no-fuse and --head-map."
        )
    if args.dtype is not None and args.dtype not in DTYPES:
        raise UsageError(f"--dtype is {args.dtype!r}, expected one of {', '.join(DTYPES)}.")
    if args.seed is not None and args.head_map is None:
        raise UsageError("--seed has no effect without --head-map.")
    shard_bytes = parse_size(args.max_shard_size)
    path = resolve_source(args.mlx_path if back else args.hf_path, args.revision)
    source = open_source(path, args.head_map)
    if back and (source.config.get("quantization") or source.config.get("quantization_config")):
        raise UsageError(
            f"{path} is quantised; the spec's layout holds unquantised weights.",
            "Convert the original again without -q, then use --to-hf on that.",
        )
    if args.no_fuse and source.form == "fused":
        raise UsageError(f"{path} is fused already; --to-hf takes it apart.")
    quant = None
    if args.quantize:
        quant = make_plan(
            source.args,
            args.q_bits,
            args.q_group_size,
            args.q_mode or "affine",
            args.quant_predicate,
            tuple(args.protect),
        )
    form = "spec" if args.no_fuse or back else "fused"
    job = Job(source, form, quant, args.dtype, args.seed or 0, shard_bytes, back)
    if quant is not None:
        require_effect(quant, model_shapes(job.args))
    target = Path(args.to_hf if back else args.mlx_path or DEFAULT_OUT).expanduser()
    return job, target


def resolve_source(text: str, revision: str | None) -> Path:
    """The local path of a folder, a file or a hub id, which is fetched.

    Raises:
        UsageError: There is no such thing, or a revision of something local.
    """
    from .loading import resolve_path

    if revision is None:
        return resolve_path(text)
    if Path(text).expanduser().exists():
        raise UsageError(f"--revision is for hub ids; {text} is local.")
    from .fetch import fetch_hub

    return fetch_hub(text, revision)


def print_plan(job, target: Path, log: Callable[[str], None]):
    """What the conversion would do, in a few lines."""
    from .converter import plan, require_room

    p = plan(job, target)
    heads = sum(len(h) for h in job.args.full_attention_heads)
    total = job.args.num_hidden_layers * job.args.num_attention_heads
    gib = 1 << 30
    log(f"source        {job.source.path} ({job.source.form} form)")
    log(f"keys          {job.source.report.summary()}")
    for kind in ("dropped", "missing", "unexpected"):
        for name in getattr(job.source.report, kind):
            log(f"  {kind}: {name}")
    log(f"heads         {heads} of {total} full attention")
    log(f"target        {target} ({job.form} form)")
    log(
        f"weights       {p.weights / gib:.3f} GiB, {p.parameters / 1e6:.1f} M parameters, "
        f"{p.bits_per_weight:.2f} bits each"
    )
    log(f"disk          {p.weights / gib:.3f} GiB needed, {p.disk_free / gib:.1f} free")
    log(f"memory        {p.memory / gib:.2f} GiB at most, {p.memory_here / gib:.1f} here")
    log(
        f"when it runs  {p.kv_per_token:,} bytes of keys and values a token (bf16), "
        f"{p.state / 1e6:.1f} MB of state a sequence"
    )
    require_room(p)


def work(args: argparse.Namespace) -> int:
    """Do what the flags say; returns the exit code."""

    def log(line: str):
        if not args.quiet:
            print(line, file=sys.stderr)

    from .converter import run
    from .verify import compare

    job, target = make_job(args)
    if args.plan:
        print_plan(job, target, print)
        return 0
    log(f"{job.source.path}: {job.source.report.summary()}")
    for name in job.source.report.dropped:
        log(f"  dropped: {name}")

    def check(folder: Path):
        if args.verify != "none":
            result = compare(job, folder, args.verify, log)
            for line in result.lines(job.quant is not None):
                log(line)

    with cli.progress("converting", enabled=not args.quiet) as bar:
        run(job, target, args.overwrite, bar, check)
    from .shards import read_headers

    size = sum(i.nbytes for i in read_headers(target).values())
    log(f"wrote {target} ({size / 1e6:.1f} MB)")
    return 0


def main(argv: list | None = None) -> int:
    """Entry point of `hydra-mlx convert` and `python convert.py`; returns the exit code."""
    return cli.run(build_parser(), work, argv)


if __name__ == "__main__":
    sys.exit(main())
