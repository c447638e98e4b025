"""What a verification pass costs on a GPU: python benchmarks/gpu_speculative.py [--tokens ...]

HydraHead of Qwen3-1.7B's geometry (gpu_step.py: 28 layers, 4 of 16 heads FA, 4-bit weights, random)
with so many tokens in its cache: a pass over 1 to 8 tokens that is read at once, as drafts need it,
the same with all but some tokens taken back, and single steps one ahead of what is read, as plain
decoding does them. From these, the least share of right guesses that makes drafts of n tokens pay.
The last line is JSON.
"""

import argparse
import json
import statistics
import sys
import time

import hydra_mlx  # noqa: F401
from hydra_mlx.cache import quantise_cache
from hydra_mlx.kernels import dispatch
from hydra_mlx.trial import Trial

import mlx.core as mx
from gpu_step import FA_HEADS, decode, filled, hydra, recurrent


def trial_ms(model, cache: list, T: int, keep: int, runs: int = 25) -> float:
    """Median milliseconds of a pass over T tokens, its argmax read, `keep` tokens kept; the pass
    after it is over the state that was made."""
    times = []
    for i in range(runs + 5):
        start = time.perf_counter()
        trial = Trial(model, cache, [1] * T)
        mx.argmax(trial.logits[0], axis=-1).tolist()
        trial.keep(keep)
        mx.eval([c.state for c in cache])
        if i >= 5:
            times.append(time.perf_counter() - start)
        trial.keep(0)
    return 1000 * statistics.median(times)


def break_even(times: dict, plain: float) -> dict:
    """{n guesses: the chance of each to be right from which on a pass over them pays}."""
    out = {}
    for n in range(1, 8):
        need = times[n + 1] / plain  # tokens a pass must give
        low, high = 0.0, 1.0
        for _ in range(40):
            a = (low + high) / 2
            low, high = (a, high) if sum(a**i for i in range(n + 1)) < need else (low, a)
        out[n] = round(high, 3) if need <= n + 1 else None
    return out


def main(argv=None) -> int:
    """Measure and print; returns the exit code."""
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--tokens", type=int, nargs="+", default=[32768, 131072])
    p.add_argument("--kv-bits", type=int, nargs="*", default=[4], help="besides bf16")
    p.add_argument("--json", metavar="FILE")
    args = p.parse_args(argv)
    way, why = dispatch.route()
    if way == "ops":
        print(f"No GPU to run kernels on ({why}).", file=sys.stderr)
        return 2
    result = {"device": str(mx.device_info())}
    model, state = hydra(), recurrent()
    for S in args.tokens:
        for bits in (None, *args.kv_bits):
            cache = filled(model.make_cache(), S, len(FA_HEADS), state)
            if bits is not None:
                quantise_cache(cache, bits, 64)
                mx.eval([c.state for c in cache])
            passes = {T: trial_ms(model, cache, T, T) for T in range(1, 9)}
            back = {n: trial_ms(model, cache, 8, n) for n in (1, 4, 7)}
            plain = 1000 / decode(model, cache)
            row = {
                "single_steps_ms": plain,
                "pass_ms": passes,
                "8_tokens_n_kept_ms": back,
                "break_even": break_even(passes, plain),
            }
            result[f"{S} tokens, {bits or 16} bit"] = row
            print(f"{S} tokens, {bits or 16} bit: single steps {plain:.2f} ms")
            print("  pass over 1..8 tokens:", " ".join(f"{t:.2f}" for t in passes.values()), "ms")
            print("  of 8, 1, 4, 7 kept:", " ".join(f"{t:.2f}" for t in back.values()), "ms")
            print(f"  pays from this share of right guesses: {row['break_even']}")
            del cache
            mx.clear_cache()
    print(model.layers[0].self_attn.kernels.paths)
    text = json.dumps(result)
    if args.json:
        with open(args.json, "w") as f:
            f.write(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
