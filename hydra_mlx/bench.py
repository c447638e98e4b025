"""hydra-mlx bench: speed and memory by context length, models side by side in one run.

hydra-mlx bench my-model --lengths 1K,4K,16K
hydra-mlx bench my-model --vs Qwen/Qwen3-1.7B --plot bench.png
hydra-mlx bench --geometry 1.7b --ratio 3:1,full --kv-bits 4
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import cli, text
from .bench_report import plot, rows, table
from .errors import UsageError
from .needle import numbers

LENGTHS = {"cpu": (256, 1024), "gpu": (1024, 4096, 16384, 65536)}
DECODE = {"cpu": 16, "gpu": 64}
SIZES = {  # changes to predict.BASE_17B
    "1.7b": {},
    "0.6b": {"hidden_size": 1024, "intermediate_size": 3072},
}
RATIOS = ("3:1", "7:1", "full")
EPILOG = """\
Each measurement reads a prompt of random tokens and then decodes. A table row is the median of the
runs with the least and the most; in each run the models take turns, the order changing. "most" is
the cost model's prediction: every weight, key, value and state moved once, at the bandwidth that is
named; 100 % is not reachable. The peak is that of MLX for one model: weights, cache and work.

--geometry needs no weights: HydraHead of Qwen3's sizes with random ones in 4 bits; ratio `full` is
mlx_lm's own Qwen3 of these sizes.

The last line on stdout is JSON. Ctrl-C ends the measuring and prints what there is.
"""


def build_parser() -> cli.Parser:
    """Flags of `hydra-mlx bench`."""
    p = cli.parser("bench", __doc__, EPILOG)
    p.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="model folder or hub id (default: the small one in this package)",
    )
    p.add_argument(
        "--vs", action="append", default=[], metavar="PATH", help="another model; repeatable"
    )
    p.add_argument("--geometry", choices=tuple(SIZES), help="random weights of Qwen3's sizes")
    p.add_argument(
        "--ratio",
        metavar="LIST",
        help="of --geometry: 3:1, 7:1, full, or several (default 3:1)",
    )
    p.add_argument(
        "--lengths",
        type=numbers(int, 2, 1 << 24, "a length of 2 tokens or more (4K is 4096)"),
        metavar="LIST",
        help="prompt tokens (default: 256,1K on a CPU, else 1K,4K,16K,64K)",
    )
    p.add_argument(
        "--decode",
        type=cli.number(int, 1),
        metavar="N",
        help="tokens after each prompt (default: 16 on a CPU, else 64)",
    )
    p.add_argument(
        "--runs", type=cli.number(int, 1), default=3, metavar="N", help="of each (default 3)"
    )
    p.add_argument("--kv-bits", type=int, metavar="N", help="quantise keys and values: 8 or 4")
    p.add_argument("--kv-group-size", type=int, metavar="N", help="32 or 64 (default 64)")
    p.add_argument(
        "--prefill-step-size",
        type=cli.number(int, 1),
        default=2048,
        metavar="N",
        help="prompt tokens at a time (default 2048)",
    )
    p.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="of unquantised weights; auto keeps them, except float32 on a CPU",
    )
    p.add_argument("--seed", type=int, default=0, metavar="N", help="of the prompts (default 0)")
    p.add_argument("--plot", type=Path, metavar="FILE", help="draw a PNG")
    cli.add_common(p)
    return p


def check_flags(args: argparse.Namespace) -> list:
    """Flags that contradict each other; returns the ratios of --geometry.

    Raises:
        UsageError: The first such flag.
    """
    if args.geometry is None and args.ratio is not None:
        raise UsageError("--ratio has no effect without --geometry.")
    if args.geometry is not None and args.model is not None:
        raise UsageError("--geometry stands for MODEL.", "Compare with a model by --vs PATH.")
    if args.kv_group_size is not None and args.kv_bits is None:
        raise UsageError("--kv-group-size has no effect without --kv-bits.")
    if args.geometry is not None and args.dtype != "auto" and not args.vs:
        raise UsageError("--dtype has no effect on the random 4-bit weights of --geometry.")
    ratios = [] if args.geometry is None else (args.ratio or "3:1").split(",")
    for ratio in ratios:
        if ratio not in RATIOS:
            raise UsageError(f"--ratio is {ratio!r}, expected one of {', '.join(RATIOS)}.")
    if len(set(ratios)) != len(ratios):
        raise UsageError(f"--ratio {args.ratio} names one twice.")
    return ratios


def random_model(size: str, ratio: str) -> Any:
    """A model of SIZES[size] with random weights in 4 bits; see EPILOG."""
    import mlx.core as mx
    import mlx.nn as nn

    from .model import Model
    from .predict import BASE_17B, geometry

    mx.random.seed(0)
    if ratio == "full":
        from mlx_lm.models import qwen3

        config = {**BASE_17B, **SIZES[size], "rms_norm_eps": 1e-6, "model_type": "qwen3"}
        config["max_position_embeddings"] = 40960
        model = qwen3.Model(qwen3.ModelArgs.from_dict(config))
    else:
        from dataclasses import replace

        model = Model(replace(geometry(ratio), **SIZES[size]))
    model.set_dtype(mx.bfloat16)
    allowed = getattr(model, "quant_predicate", None) or (lambda path, module: True)
    nn.quantize(
        model, 64, 4, class_predicate=lambda p, m: hasattr(m, "to_quantized") and allowed(p, m)
    )
    model.eval()
    mx.eval(model.parameters())
    return model


def load(args: argparse.Namespace, ratios: Sequence) -> list:
    """The models as Subjects, MODEL or --geometry first."""
    from mlx.utils import tree_flatten

    from .loading import load_model, resolve_path
    from .manifest import model_name
    from .measure import Subject

    found = []
    for ratio in ratios:
        model = random_model(args.geometry, ratio)
        nbytes = sum(x.nbytes for _, x in tree_flatten(model.parameters()))
        found.append(Subject(f"{args.geometry} {ratio}", model, nbytes, "random, 4 bits"))
    for path in [*([args.model] if args.geometry is None else []), *args.vs]:
        folder = resolve_path(path)
        model = load_model(folder, args.dtype)
        report = model.load_report
        name = model_name(path, folder.resolve()) or str(folder)
        found.append(Subject(text.printable(name), model, report.nbytes, report.weights))
    for i, s in enumerate(found):
        if s.label in {x.label for x in found[:i]}:
            s.label = f"{s.label} ({i + 1})"
    return found


def work(args: argparse.Namespace) -> int:
    """Measure and print; returns the exit code."""
    ratios = check_flags(args)
    if args.plot is not None:
        from .heatmap import require_matplotlib

        require_matplotlib("--plot")
        cli.check_target(args.plot)
    from .__main__ import version_text
    from .generation import check_kv_bits
    from .loading import on_cpu
    from .measure import Settings, bandwidth, compare, make_prompt_cache, vocabulary
    from .stats import backend

    kind = "cpu" if on_cpu() else "gpu"
    lengths = sorted(args.lengths or LENGTHS[kind])
    decode = args.decode or DECODE[kind]
    group = args.kv_group_size or 64
    settings = Settings(decode, args.prefill_step_size, args.kv_bits, group, args.seed)
    subjects = load(args, ratios)
    if args.kv_bits is not None:
        for s in subjects:
            check_kv_bits(s.model, make_prompt_cache(s.model), args.kv_bits, group, 0)
    device, blas = backend()
    with cli.Interrupt() as stop, cli.progress("bench", not args.quiet, "runs") as bar:
        vocab = min(vocabulary(s.model) for s in subjects)
        speed, tflops, source = bandwidth(subjects[0].model)
        cells = compare(
            subjects, lengths, args.runs, vocab, settings, stop,
            bar, cli.is_out_of_memory,
        )  # fmt: skip
    found = rows(cells, speed, tflops)
    where = ", ".join(x for x in (device, blas) if x)
    cache = "full precision" if args.kv_bits is None else f"{args.kv_bits} bits"
    print(f"{where}; {version_text()}")
    print(
        f"{text.count(args.runs, 'run')}, {decode} tokens decoded, cache in {cache}; most: {source}"
    )
    for s in subjects:
        print(f"{s.label}: {text.size(s.nbytes)} of weights, {s.weights}")
    print("\n".join(table(found)) if found else "Nothing was measured.")
    if stop.requested:
        cli.say("Interrupted; the figures are of what was measured before.")
    if args.plot is not None and any("decode_tps" in r for r in found):
        plot(found, args.plot.expanduser(), f"{where}; cache in {cache}")
    result = {
        "device": where,
        "versions": version_text(),
        "settings": {**asdict(settings), "runs": args.runs, "lengths": lengths},
        "bandwidth_gb_s": round(speed, 3),
        "bandwidth_source": source,
        "models": [{"model": s.label, "bytes": s.nbytes, "weights": s.weights} for s in subjects],
        "interrupted": stop.requested,
        "rows": found,
    }
    print(json.dumps(result))
    return cli.INTERRUPTED if stop.requested else 0


def main(argv: Sequence | None = None) -> int:
    """Entry point of `hydra-mlx bench`; returns the exit code."""
    return cli.run(build_parser(), work, argv)


if __name__ == "__main__":
    sys.exit(main())
