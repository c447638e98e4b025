"""What going back costs and how exact it is: python benchmarks/rollback.py [--tokens N]

Reads a document into a small random model, changes one token at 30, 60 and 95 % of it and reads
the new one: by reuse, and from the start as a cache that cannot go back does. Prints a table,
then differences of caches and logits, and one line of JSON.
"""

import argparse
import json
import time

import hydra_mlx  # noqa: F401  (before mlx)
from hydra_mlx.checkpoints import Checkpoints, checkpoint_bytes
from hydra_mlx.config import HydraArgs
from hydra_mlx.model import Model
from hydra_mlx.rollback import append, fork_cache, reuse, rollback

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map_with_path

CONFIG = {
    "model_type": "hydrahead",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 512,
    "full_attention_heads": [[0], [1], [2], [3]],
}


def random_model() -> Model:
    """Four layers, one FA head to three LA heads, float32."""
    mx.random.seed(0)
    model = Model(HydraArgs.from_dict(CONFIG))

    def fill(name, x):
        scale = 1.0 if "embed" in name else x.shape[-1] ** -0.5
        return x if x.ndim == 1 else mx.random.normal(x.shape) * scale

    model.update(tree_map_with_path(fill, model.parameters()))
    mx.eval(model.parameters())
    return model


def read(model: Model, tokens: list, step: int | None = None, **options) -> tuple:
    """(cache, checkpoints, logits [1, V], seconds) of reading tokens from the start."""
    cache, points = model.make_cache(), Checkpoints(**options)
    start = time.perf_counter()
    logits = append(model, cache, points, tokens, step)
    mx.eval(logits)
    return cache, points, logits, time.perf_counter() - start


def differ(a, b) -> float:
    """Relative RMS difference of two arrays."""
    return float(mx.sqrt(mx.square(a - b).sum() / mx.square(b).sum()))


def worst(a: list, b: list) -> float:
    """Largest of all visible rows, tails and states of two caches."""
    pairs = []
    for x, y in zip(a, b, strict=True):
        rows = hasattr(x, "offset")
        pairs += zip(*((c.keys_and_values() if rows else c.cache) for c in (x, y)), strict=True)
    return max(differ(x, y) for x, y in pairs)


def edits(model: Model, tokens: list, **options) -> list:
    """One row for each place of an edit."""
    cache, points, _, _ = read(model, tokens, **options)
    rows = []
    for percent in (30, 60, 95):
        at = len(tokens) * percent // 100
        new = [*tokens[:at], (tokens[at] + 1) % CONFIG["vocab_size"], *tokens[at + 1 :]]
        mine, beside = fork_cache(cache), points.fork()
        start = time.perf_counter()
        kept = reuse(model, mine, beside, tokens, new)
        logits = append(model, mine, beside, new[kept:])
        mx.eval(logits)
        seconds = time.perf_counter() - start
        fresh, _, expected, whole = read(model, new, **options)
        rows.append(
            {
                "edit_percent": percent,
                "recomputed": len(new) - kept,
                "tail": len(new) - at,
                "seconds": round(seconds, 2),
                "from_start_seconds": round(whole, 2),
                "logits_equal": mx.array_equal(logits, expected).item(),
                "cache_difference": worst(mine, fresh),
            }
        )
    return rows


def closeness(model: Model, tokens: list) -> dict:
    """Differences after going back over decoded tokens, with 300 or none of them replayed."""
    decoded, prompt = tokens[-512:], tokens[:-512]
    out = {}
    for name, dtype, exact, replayed in (
        ("float32, same calls, 300 replayed", "float32", True, 300),
        ("float32, other calls, 300 replayed", "float32", False, 300),
        ("bfloat16, same calls, 300 replayed", "bfloat16", True, 300),
        ("bfloat16, at a checkpoint", "bfloat16", True, 0),
    ):
        position = len(prompt) + replayed
        cache, points, _, _ = read(model, prompt, dtype=dtype)
        for t in decoded:
            append(model, cache, points, [t])
        rollback(model, cache, points, tokens, position, exact)
        fresh, beside, _, _ = read(model, prompt)
        for t in tokens[len(prompt) : position]:
            append(model, fresh, beside, [t])
        x, y = (model(mx.array([[1]]), cache=c) for c in (cache, fresh))
        out[name] = {"cache": worst(cache, fresh), "next_logits": differ(x, y)}
    a, b = (read(model, tokens, step, every=2048) for step in (512, 2048))
    out["fresh runs with steps of 512 and 2048"] = {
        "cache": worst(a[0], b[0]),
        "next_logits": differ(a[2], b[2]),
    }
    return out


def plans() -> list:
    """By formula: what a budget gives HydraHead-1.7B's geometry, 3:1, at a million tokens."""
    layers, end = 28, 1 << 20
    changes = {"num_hidden_layers": layers, "num_attention_heads": 16, "num_key_value_heads": 8}
    changes |= {"head_dim": 128, "full_attention_heads": [[0, 1, 2, 3]] * layers}
    args = HydraArgs.from_dict({**CONFIG, **changes})
    rows = []
    for gib, dtype in ((0.5, "bfloat16"), (1, "bfloat16"), (1, "float32"), (2, "bfloat16")):
        grid = Checkpoints.within(args, int(gib * 2**30), end, dtype=dtype).grid
        bounds = {d: grid.bound(end - d, end) for d in (500, 5000, 50000, 500000)}
        each = checkpoint_bytes(args, dtype)
        rows.append({"GiB": gib, "dtype": dtype, "each": each, "M": grid.most, "bounds": bounds})
    return rows


def main() -> int:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=16384)
    n = parser.parse_args().tokens
    model = random_model()
    tokens = np.random.RandomState(0).randint(0, CONFIG["vocab_size"], n).tolist()
    read(model, tokens[:1024])  # warm up
    result = {"tokens": n, "plans": plans()}
    for r in result["plans"]:
        bounds = ", ".join(f"{b} at {d} from the end" for d, b in r["bounds"].items())
        print(
            f"{r['GiB']} GiB {r['dtype']}: {r['each']} bytes each, M={r['M']}; replays < {bounds}"
        )
    for most in (64, 16):
        rows = result[f"edits, N=512, M={most}"] = edits(model, tokens, every=512, most=most)
        print(f"edits, N=512, M={most}:\n  at %   tail   recomputed   s   from the start s   equal")
        for r in rows:
            print(
                f"  {r['edit_percent']:4} {r['tail']:6} {r['recomputed']:12} {r['seconds']:5} "
                f"{r['from_start_seconds']:12} {r['logits_equal']!s:>11}"
            )
    result["closeness"] = closeness(model, tokens[:4096])
    for name, d in result["closeness"].items():
        print(f"{name}: cache {d['cache']:.1e}, next logits {d['next_logits']:.1e}")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
