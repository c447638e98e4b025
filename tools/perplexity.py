"""How much worse a HydraHead model predicts text than the model it was made from.

    python tools/perplexity.py MODEL BASE --text held-out.tokens.npy --out perplexity.json

MODEL is a folder as it is used: quantised weights, cache, pieces of 512 tokens. BASE is the plain
model (GGUF, folder or hub id) in float32. Windows of each length are cut from the text's documents,
end to end in an order that depends on --seed, as `hydra-mlx transfer` cuts them. The first
--windows of them are read, each from an empty cache, and every token but a window's first is
predicted. The standard error is that of the mean difference over the windows.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hydra_mlx
from hydra_mlx import cli
from hydra_mlx.errors import UsageError
from hydra_mlx.files import write_json
from hydra_mlx.journal import command_line, versions
from hydra_mlx.manifest import model_hash, model_name
from hydra_mlx.needle import numbers
from hydra_mlx.tokens import Batches, Documents, read_documents

import mlx.core as mx
import numpy as np

FORMAT = "hydra_mlx perplexity ratio"
STEP = 512  # tokens whose logits exist at a time


def build_parser() -> cli.Parser:
    """The flags."""
    p = cli.Parser("perplexity.py", __doc__)
    p.add_argument("model", metavar="MODEL", help="folder of a HydraHead model")
    p.add_argument("base", metavar="BASE", help="the plain model it was made from")
    p.add_argument(
        "--text", action="append", required=True, metavar="PATH", help="as of transfer; repeatable"
    )
    length = numbers(int, 2, 1 << 20, "a length of 2 tokens or more")
    p.add_argument("--lengths", type=length, default=(1024, 2048), metavar="LIST")
    p.add_argument(
        "--windows", type=cli.number(int, 2), default=30, metavar="N", help="of each length"
    )
    p.add_argument("--seed", type=int, default=0, help="of the order of documents and windows")
    p.add_argument("--out", metavar="FILE", type=Path, required=True, help="JSON to write")
    cli.add_common(p)
    return p


class Read:
    """A model of MLX, read in pieces through its cache."""

    def __init__(self, model: Any):
        self.model = model

    def log_probabilities(self, ids: np.ndarray) -> Iterator[np.ndarray]:
        """Of what follows each token, [n, V] float32 for each piece of up to STEP tokens."""
        cache = self.model.make_cache()
        for a in range(0, len(ids), STEP):
            logits = self.model(mx.array(ids[None, a : a + STEP]), cache=cache)[0]
            logits = logits.astype(mx.float32)
            yield np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))


def compare(model: Any, base: Any, window: np.ndarray) -> np.ndarray:
    """Means over a window of T + 1 tokens.

    Returns:
        [4] float64: -log p of the next token by the model and by the base, KL(base || model), and
        the share of positions where both have the same likeliest token.
    """
    total, at = np.zeros(4), 0
    ids = window[:-1]
    both = (m.log_probabilities(ids) for m in (model, base))
    for mine, theirs in zip(*both, strict=True):
        n = len(mine)
        following = window[at + 1 : at + n + 1].astype(np.int64)[:, None]
        parts = [-np.take_along_axis(x, following, -1).sum(dtype=float) for x in (mine, theirs)]
        # NumPy's exponential takes a tenth of the time of MLX's on a CPU.
        parts.append((np.exp(theirs) * (theirs - mine)).sum(dtype=float))
        parts.append((mine.argmax(-1) == theirs.argmax(-1)).sum())
        total += parts
        at += n
    return total / len(ids)


def measure(
    model: Any,
    base: Any,
    documents: Documents,
    length: int,
    windows: int,
    seed: int,
    progress: Callable[[int], None] = lambda done: None,
) -> dict:
    """The figures of one length.

    Args:
        model, base: With log_probabilities, as Read. length: T, tokens predicted in a window.
        progress: Called with the number of windows done.

    Raises:
        UsageError: There is less text than that.
    """
    cut = Batches(documents, length, seed)
    if windows > cut.windows:
        raise UsageError(
            f"The text has {cut.windows} windows of {length} tokens, {windows} were asked for.",
            "Give more text, or a smaller --windows.",
        )
    rows = []
    for i in range(windows):
        rows.append(compare(model, base, cut.take(i, 1)[0]))
        progress(i + 1)
    ce, ce_base, kl, same = np.mean(rows, axis=0)
    differences = np.array(rows)[:, 0] - np.array(rows)[:, 1]
    return {
        "length": length,
        "windows": windows,
        "tokens": windows * length,
        "perplexity": math.exp(ce),
        "base_perplexity": math.exp(ce_base),
        "perplexity_ratio": math.exp(ce - ce_base),
        "log_ratio_standard_error": differences.std(ddof=1) / math.sqrt(windows),
        "kl": kl,
        "same_top1": same,
    }


def work(args: argparse.Namespace, command: str, pair: Callable | None = None) -> int:
    """Measure and write; returns the exit code.

    Args:
        command: What was typed. pair: (folder, base) to two readers and what computes, else MLX.
    """
    from hydra_mlx import stats
    from hydra_mlx.convert import resolve_source
    from hydra_mlx.loading import read_config, resolve_path
    from hydra_mlx.teacher import load_teacher, open_base, source_tokenizer

    out = args.out.expanduser()
    cli.check_target(out)
    folder, source = resolve_path(args.model), open_base(resolve_source(args.base, None))
    vocab = source.args.vocab_size
    documents = read_documents(args.text, vocab, lambda: source_tokenizer(source))
    own = read_config(folder)["vocab_size"]
    if own != vocab:
        raise UsageError(f"MODEL knows {own:,} tokens, BASE {vocab:,}.")
    if pair is None:
        model, base = Read(hydra_mlx.load_model(folder)), Read(load_teacher(source))
        device = f"{stats.backend()[0]}, weights {model.model.load_report.weights}"
    else:
        model, base, device = pair(folder, source.path)
    started, found = time.perf_counter(), []
    for length in args.lengths:
        with cli.Meter(f"{length} tokens", args.quiet, unit="windows") as meter:
            tell = lambda n, meter=meter, length=length: meter(  # noqa: E731
                f"{length} tokens", n, args.windows
            )
            row = measure(model, base, documents, length, args.windows, args.seed, tell)
        found.append(row)
        if not args.quiet:
            print(
                f"{length} tokens: perplexity {row['perplexity']:.3f}, of the base "
                f"{row['base_perplexity']:.3f}, ratio {row['perplexity_ratio']:.4f}, "
                f"KL {row['kl']:.4f}, same likeliest token {100 * row['same_top1']:.1f} %"
            )
    result = {
        "format": FORMAT,
        "command": command_line(command, args.argv),
        "model": {"name": model_name(args.model, folder), "sha256": model_hash(folder)},
        "base": {"name": model_name(args.base, source.path), "sha256": model_hash(source.path)},
        "text": {
            "files": [Path(t).name for t in args.text],
            "documents": len(documents.length),
            "tokens": documents.total,
            "sha256": documents.fingerprint(),
        },
        "seed": args.seed,
        "device": device,
        "versions": versions(),
        "seconds": round(time.perf_counter() - started, 1),
        "lengths": found,
    }
    write_json(out, result)
    return 0


def main(
    argv: list | None = None,
    command: str = "python tools/perplexity.py",
    pair: Callable | None = None,
) -> int:
    """Entry point; returns the exit code. command, pair: as of work."""
    argv = sys.argv[1:] if argv is None else argv

    def run(args: argparse.Namespace) -> int:
        args.argv = argv
        return work(args, command, pair)

    return cli.run(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
