"""What keys and values in few bits cost in quality: python benchmarks/kv_quality.py [MODEL]

Reads texts into a cache in full precision and in 8 and 4 bits, keys and values apart, groups of 32
and 64, and compares the logits of every token: Kullback-Leibler divergence from full precision,
the share of tokens whose likeliest successor stays the same, perplexity. Then asks for needles in
haystacks. Without MODEL it takes the one in this package; docs/cache.md has its figures and those
of its plain base, which `python tools/base_model.py base.gguf` and `hydra-mlx convert --hf-path
base.gguf --head-map identity` make. The last line is JSON.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import hydra_mlx
from hydra_mlx.cache import quantise_cache
from hydra_mlx.kv_cache import in_words
from hydra_mlx.needles import NeedleSettings, accuracy, evaluate

import mlx.core as mx

DOCS = Path(__file__).parents[1] / "docs"
FORMATS = [None, *((k, v, g) for g in (32, 64) for k, v in ((8, 8), (8, 4), (4, 8), (4, 4)))]
STEP = 512


def words(few: tuple | None) -> str:
    """A format as a row's name."""
    return "full precision" if few is None else f"{in_words(*few[:2])} in groups of {few[2]}"


def fresh(model, few: tuple | None) -> list:
    """An empty cache of that format."""
    cache = hydra_mlx.cache.make_cache(model.args)
    return cache if few is None else quantise_cache(cache, few[:2], few[2])


def log_probabilities(model, ids: list, few: tuple | None):
    """Of every token's successor, [n, V] float32 for each piece of STEP tokens."""
    cache = fresh(model, few)
    for a in range(0, len(ids), STEP):
        logits = model(mx.array([ids[a : a + STEP]]), cache=cache)[0].astype(mx.float32)
        yield logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def compare(model, texts: list, full: list, few: tuple | None) -> dict:
    """Means over the tokens of all texts; full: their log-probabilities in full precision."""
    kl = same = loss = 0.0
    total = sum(map(len, texts))
    for ids, pieces in zip(texts, full, strict=True):
        for i, other in enumerate(log_probabilities(model, ids, few)):
            exact = pieces[i]
            kl += (mx.exp(exact) * (exact - other)).sum().item()
            same += (exact.argmax(-1) == other.argmax(-1)).sum().item()
            after = mx.array(ids[i * STEP + 1 : (i + 1) * STEP + 1])
            picked = mx.take_along_axis(other[: after.size], after[:, None], axis=-1)
            loss -= picked.sum().item()
    predicted = total - len(texts)
    return {"kl": kl / total, "top1": same / total, "perplexity": math.exp(loss / predicted)}


def needles(model, tokenizer, few: tuple | None, settings: NeedleSettings) -> dict:
    """Share of right answers by length."""
    model.make_cache = lambda: fresh(model, few)  # where generate gets its cache
    cells = evaluate(model, tokenizer, settings)
    return {str(n): accuracy(cells, 1, n) for n in settings.lengths}


def main(argv=None) -> int:
    """Measure and print; returns the exit code."""
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("model", nargs="?")
    p.add_argument(
        "--text", nargs="*", default=[str(DOCS / n) for n in ("scoring.md", "transfer.md")]
    )
    p.add_argument("--tokens", type=int, default=1024, help="of each text (default: 1024)")
    p.add_argument("--trials", type=int, default=1, help="needles a length and depth; 0: none")
    p.add_argument("--lengths", default="1024,2048")
    p.add_argument("--formats", help="some of them, by number from 0 (full precision): 0,3,8")
    p.add_argument("--json")
    args = p.parse_args(argv)
    model, tokenizer = hydra_mlx.load(args.model)
    texts = [tokenizer.encode(Path(t).read_text("utf-8"))[: args.tokens] for t in args.text]
    lengths = tuple(int(n) for n in args.lengths.split(","))
    settings = NeedleSettings(lengths, (0.1, 0.5, 0.9), trials=max(args.trials, 1), seed=5)
    chosen = FORMATS
    if args.formats:
        chosen = [FORMATS[int(i)] for i in args.formats.split(",")]
    full = [list(log_probabilities(model, ids, None)) for ids in texts]
    mx.eval(full)
    rows = []
    for few in chosen:
        row = {"format": words(few), **compare(model, texts, full, few)}
        rows.append(row)
        print(f"{row['format']:22s} KL {row['kl']:.5f}  same top-1 {100 * row['top1']:.1f} %  "
              f"perplexity {row['perplexity']:.3f}", flush=True)  # fmt: skip
    del full
    for few, row in zip(chosen, rows, strict=True):
        if args.trials:
            row["needles"] = needles(model, tokenizer, few, settings)
            found = ", ".join(f"{n}: {100 * x:.0f} %" for n, x in row["needles"].items())
            print(f"{row['format']:22s} needles {found}", flush=True)
    text = json.dumps({"tokens": sum(map(len, texts)), "trials": args.trials, "rows": rows})
    if args.json:
        Path(args.json).write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
