"""Chunked gated delta rule against mlx_lm's per-token operations, in one run.

    python benchmarks/gated_delta.py [--tokens 4096] [--heads 12] [--dim 128]

Prints time and peak memory of both on the default device (inputs not counted), then their ratios
and one JSON line. Exit code 1 when ours is less than 5 times faster or needs more than a quarter
of the memory.
"""

import argparse
import json
import statistics
import sys
import time

from hydra_mlx import blas
from hydra_mlx.ops import gated_delta

import mlx.core as mx
from mlx_lm.models.gated_delta import gated_delta_ops


def measure(f, runs: int) -> tuple:
    """Median seconds of f() after one warm-up, and its peak bytes above what is alive now."""
    mx.eval(f())
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        mx.eval(f())
        times.append(time.perf_counter() - start)
    return statistics.median(times), mx.get_peak_memory() - before


def main(argv=None) -> int:
    """Measure, print, and judge against the target; returns the exit code."""
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--tokens", type=int, default=4096)
    p.add_argument("--heads", type=int, default=12)
    p.add_argument("--dim", type=int, default=128)
    p.add_argument("--runs", type=int, default=3)
    args = p.parse_args(argv)
    T, H, D = args.tokens, args.heads, args.dim
    keys = mx.random.split(mx.random.key(0), 5)
    q, k, v = (mx.random.normal((1, T, H, D), key=keys[i]) for i in range(3))
    q = q / mx.linalg.norm(q, axis=-1, keepdims=True) * D**-0.5
    k = k / mx.linalg.norm(k, axis=-1, keepdims=True)
    g = -mx.exp(mx.random.uniform(-7, 0, (1, T, H), key=keys[3]))
    beta = mx.random.uniform(0, 1, (1, T, H), key=keys[4])
    state = mx.zeros((1, H, D, D))
    alpha = mx.exp(g)
    mx.eval(q, k, v, g, beta, state, alpha)
    ours_s, ours_b = measure(lambda: gated_delta(q, k, v, g, beta, state), args.runs)
    theirs_s, theirs_b = measure(lambda: gated_delta_ops(q, k, v, alpha, beta, state), 1)
    o, theirs_o = (
        gated_delta(q, k, v, g, beta, state)[0],
        gated_delta_ops(q, k, v, alpha, beta, state)[0],
    )
    error = (mx.linalg.norm(o - theirs_o) / mx.linalg.norm(theirs_o)).item()
    faster, smaller = theirs_s / ours_s, theirs_b / ours_b
    print(
        f"gated delta rule, B=1 H={H} D={D} T={T} float32, {mx.default_device()}, {blas.in_use()}"
    )
    print(f"  hydra_mlx chunked      {ours_s:8.3f} s  {ours_b / 2**20:8.1f} MiB peak")
    print(f"  mlx_lm gated_delta_ops {theirs_s:8.3f} s  {theirs_b / 2**20:8.1f} MiB peak")
    print(
        f"  {faster:.1f} times faster, 1/{smaller:.1f} of the memory, outputs differ by {error:.1e}"
    )
    print(json.dumps({"faster": faster, "memory_ratio": 1 / smaller, "relative_error": error}))
    return 0 if faster >= 5 and smaller >= 4 and error < 1e-4 else 1


if __name__ == "__main__":
    sys.exit(main())
