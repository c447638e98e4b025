"""Memory of reading a prompt beyond its cache: python benchmarks/prefill_memory.py [--tokens LIST]

Reads prompts of several lengths into a small random model, each in a process of its own, through
the loop that generate uses. Prints MLX's peak and the process's, the bytes of the cache beside the
formulas, and what is left when weights and cache are taken off: that may not grow. The last line
is JSON.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import hydra_mlx  # noqa: F401  (before mlx)
from hydra_mlx.cache import (
    cache_bytes,
    kv_bytes_per_token,
    mean_itemsize,
    own_cache,
    quantise_cache,
    state_bytes,
)
from hydra_mlx.config import HydraArgs
from hydra_mlx.generate import parse_bits
from hydra_mlx.model import Model

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm.generate import generate_step

CONFIG = {
    "model_type": "hydrahead",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "vocab_size": 4096,
    "full_attention_heads": [[0], [2]],
}


def random_model() -> Model:
    """Two layers, one FA head to three LA heads, float32."""
    mx.random.seed(0)
    model = Model(HydraArgs.from_dict(CONFIG))

    def fill(name, x):
        return x if x.ndim == 1 else mx.random.normal(x.shape) * x.shape[-1] ** -0.5

    model.update(tree_map_with_path(fill, model.parameters()))
    mx.eval(model.parameters())
    model.eval()
    return model


def read(tokens: int, step: int, bits: int | tuple | None, reserved: bool = True) -> dict:
    """Figures of one prompt, in bytes and seconds."""
    model = random_model()
    weights = sum(x.nbytes for _, x in tree_flatten(model.parameters()))
    cache = own_cache(model.make_cache())
    if bits is not None:
        quantise_cache(cache, bits, 32)
    own_cache(cache, tokens if reserved else 0)
    prompt = mx.random.randint(0, CONFIG["vocab_size"], (tokens,))
    mx.eval(prompt)
    mx.clear_cache()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    mx.reset_peak_memory()
    start = time.perf_counter()
    for _ in generate_step(prompt, model, max_tokens=0, prompt_cache=cache, prefill_step_size=step):
        pass
    seconds = time.perf_counter() - start
    kv, state = cache_bytes(cache)
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    room = next(c.allocated for c in cache if hasattr(c, "allocated"))
    return {
        "tokens": tokens,
        "peak": mx.get_peak_memory(),
        "process": (after - before) * unit,
        "kv": kv,
        "kv formula": room * kv_bytes_per_token(model.args, mean_itemsize(cache, 4)),
        "state": state,
        "state formula": state_bytes(model.args, 4),
        "beyond": mx.get_peak_memory() - weights - prompt.nbytes - kv - state,
        "seconds": seconds,
    }


def child(tokens: int, step: int, bits: str | None) -> dict:
    """`read` in a process of its own."""
    command = [sys.executable, __file__, "--one", str(tokens), "--step", str(step)]
    command += [] if bits is None else ["--kv-bits", bits]
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
    return json.loads(done.stdout)


def main(argv=None) -> int:
    """Measure and print; returns the exit code."""
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--tokens", default="8192,16384,32768,65536")
    p.add_argument("--step", type=int, default=512)
    p.add_argument("--kv-bits")
    p.add_argument("--one", type=int, help="one length, in this process; JSON only")
    args = p.parse_args(argv)
    if args.one is not None:
        bits = None if args.kv_bits is None else parse_bits(args.kv_bits)
        print(json.dumps(read(args.one, args.step, bits)))
        return 0
    rows = []
    print("tokens   peak MiB  process MiB  kv MiB  state KiB  beyond MiB  seconds")
    for n in (int(t) for t in args.tokens.split(",")):
        r = child(n, args.step, args.kv_bits)
        rows.append(r)
        if (r["kv"], r["state"]) != (r["kv formula"], r["state formula"]):
            print(f"the cache is not as the formulas say: {r}", file=sys.stderr)
            return 1
        print(f"{n:6d} {r['peak'] / 2**20:10.1f} {r['process'] / 2**20:12.1f} "
              f"{r['kv'] / 2**20:7.1f} {r['state'] / 2**10:10.1f} {r['beyond'] / 2**20:11.2f} "
              f"{r['seconds']:8.1f}", flush=True)  # fmt: skip
    growth = max(r["beyond"] for r in rows) / min(r["beyond"] for r in rows) - 1
    print(f"beyond weights and cache: {100 * growth:.1f} % from least to most")
    print(json.dumps({"step": args.step, "kv_bits": args.kv_bits, "rows": rows, "growth": growth}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
