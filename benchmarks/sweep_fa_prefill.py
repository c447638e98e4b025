"""Which tiles of fa_prefill are best on a GPU: python benchmarks/sweep_fa_prefill.py [--keys N ...]

A prefill step of 2048 tokens over 4-bit keys and values, D=128, bfloat16, one FA head on each of 2
and of 4 key/value heads. Wall-clock of a call with its synchronisation, TFLOP/s of the two products
as if nothing were masked. The last line is JSON.
"""

import argparse
import json
import sys

import hydra_mlx  # noqa: F401
from hydra_mlx.kernels import fa_prefill
from hydra_mlx.kernels.dispatch import relative_rms, route

import mlx.core as mx
from gpu_attention import cache
from timing import median_ms

T, D = 2048, 128
SIMDGROUPS = (8, 4, 2)  # 8 query rows each


def main(argv=None) -> int:
    """Measure and print; returns the exit code."""
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--keys", type=int, nargs="+", default=[8192, 131072])
    args = p.parse_args(argv)
    way, why = route()
    if way == "ops":
        print(f"No GPU to run kernels on ({why}).", file=sys.stderr)
        return 2
    rows, bad = [], 0
    for heads in (2, 4):
        for S in args.keys:
            kv, *_ = cache(heads, S, D, mx.bfloat16, 4)
            q = mx.random.normal((1, T, heads, D), dtype=mx.bfloat16)
            mine = tuple(range(heads))
            plain = fa_prefill.run(q, kv, mine, D**-0.5, route=way)
            for sg in SIMDGROUPS:

                def step(q=q, kv=kv, mine=mine, sg=sg):
                    return fa_prefill.run(q, kv, mine, D**-0.5, route=way, simdgroups=sg)

                bad += relative_rms([step()], [plain]) > 0.01
                ms = median_ms(step, 5)
                flops = 4 * T * S * D * heads / ms / 1e9
                rows.append({"heads": heads, "keys": S, "simdgroups": sg, "ms": ms})
                print(
                    f"{heads} heads, {S} keys, {sg} simdgroups: {ms:.2f} ms, {flops:.1f} TFLOP/s",
                    flush=True,
                )
            del kv
            mx.clear_cache()
    print(json.dumps(rows))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
