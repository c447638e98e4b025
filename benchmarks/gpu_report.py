"""The figures of docs/kernels.md in one run on one GPU, about three minutes, most of it compiling.

    python benchmarks/gpu_report.py [--json FILE]

The gated delta rule beside mlx_lm's packed kernel and MLX's own; attention over 512K keys beside
mlx_lm's quantised one; a decode step of Qwen3-1.7B's geometry at 128K tokens with kernels, with
operations and as mlx_lm's Qwen3; peak memory of reading 32K tokens into plain and quantised caches.
Each line is printed when it is there; the last line is JSON. gpu_delta.py, gpu_attention.py,
gpu_step.py and sweep_fa_decode.py measure the same at more sizes.
"""

import argparse
import json
import sys
import time
from contextlib import nullcontext

import hydra_mlx  # noqa: F401
from hydra_mlx.kernels import dispatch, la_prefill

import gpu_attention
import gpu_delta
import gpu_step
import mlx.core as mx
from timing import chained_ms, median_ms


class Report:
    """Lines as they come, and all of them at the end."""

    def __init__(self):
        self.start, self.rows = time.perf_counter(), {}

    def say(self, name: str, value: float, unit: str):
        """Print and keep one figure."""
        self.rows[name] = {"value": value, "unit": unit}
        print(f"[{time.perf_counter() - self.start:4.0f} s] {name}: {value:.4g} {unit}", flush=True)


def delta_rule(report: Report, way: str, lengths: tuple):
    """la_prefill, B=1, 12 heads, D=128, bf16."""
    for T in lengths:
        a = gpu_delta.inputs(T, mx.bfloat16)
        ours = median_ms(lambda a=a: la_prefill.run(*a, route=way), 9)
        report.say(f"delta rule {T} tokens", ours, "ms")
        if way == "cuda":
            packed = median_ms(lambda a=a: gpu_delta.packed(*a), 5)
            report.say(f"delta rule {T} tokens, packed body", packed, "ms")
        own = (*a[:3], mx.exp(a[3]), *a[4:])
        runs = 3 if T <= 4096 else 1
        mlx = median_ms(lambda own=own: mx.fast.gated_delta_update(*own), runs)
        report.say(f"delta rule {T} tokens, mx.fast.gated_delta_update", mlx, "ms")


def attention(report: Report, way: str, S: int):
    """fa_decode over 4 key/value heads, 4 queries, D=128."""

    for bits in (None, 8, 4):
        caches = [gpu_attention.cache(4, S, 128, mx.bfloat16, bits)[0] for _ in range(2)]
        mx.eval([kv.parts for kv in caches])
        q = mx.random.normal((1, 1, 4, 128), dtype=mx.bfloat16)
        name = f"attention {S} keys, {bits or 16} bit"
        ms = chained_ms(gpu_attention.ours(way), q, caches, runs=3)
        report.say(name, ms, "ms")
        report.say(f"{name}, bandwidth", 4 * S * caches[0].row_bytes / 1e6 / ms, "GB/s")

        calls = (8, 40) if bits is None else (2, 8)
        mlx = chained_ms(gpu_attention.theirs(bits), q.swapaxes(1, 2), caches, calls=calls, runs=2)
        report.say(f"{name}, mlx", mlx, "ms")
        del caches
        mx.clear_cache()


def decode(report: Report, model, S: int):
    """Tokens a second at S tokens of context, kernels and operations."""
    for name, inside, steps in (("kernels", nullcontext, 60), ("operations", _operations, 10)):
        cache = gpu_step.filled(model.make_cache(), S, len(gpu_step.FA_HEADS), gpu_step.recurrent())
        with inside():
            report.say(f"decode at {S}, {name}", gpu_step.decode(model, cache, steps), "tok/s")
        del cache
        mx.clear_cache()


def _operations():
    return dispatch.substitute(None)


def prefill(report: Report, model, T: int, step: int = 2048):
    """Peak bytes above the weights and tokens a second of reading T tokens."""
    for bits in (None, 8, 4):
        peak, speed = gpu_step.prefill_peak(model, T, bits, step)
        name = f"prefill of {T} tokens, {bits or 16} bit"
        report.say(f"{name}, peak", peak / 2**20, "MiB")
        report.say(name, speed, "tok/s")


def main(argv=None) -> int:
    """Measure and print; returns the exit code."""
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--json")
    args = p.parse_args(argv)
    way, why = dispatch.route()
    if way == "ops":
        print(f"No GPU to run kernels on ({why}).", file=sys.stderr)
        return 2
    report = Report()
    delta_rule(report, way, (2048, 32768))
    attention(report, way, 524288)
    model = gpu_step.hydra()
    decode(report, model, 131072)
    prefill(report, model, 32768)
    del model
    mx.clear_cache()
    report.say("decode at 131072, mlx_lm Qwen3", gpu_step.stock_decode(131072), "tok/s")
    text = json.dumps({"device": str(mx.device_info()), "rows": report.rows})
    if args.json:
        with open(args.json, "w") as f:
            f.write(text)
    print(text)
    return 1 if dispatch.TRUST.failed else 0


if __name__ == "__main__":
    sys.exit(main())
