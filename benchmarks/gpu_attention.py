"""fa_decode and fa_prefill on a GPU, against MLX's own attention: agreement, time, bandwidth.

    python benchmarks/gpu_attention.py [--keys 131072 524288] [--json FILE]

Device time is the slope of a chain of calls over caches in turn (timing.chained_ms), beside the
median of single calls with their synchronisation; the last line is JSON.
"""

import argparse
import json
import sys
from collections.abc import Callable

import hydra_mlx  # noqa: F401
from hydra_mlx.kernels import fa_decode, fa_prefill
from hydra_mlx.kernels.dispatch import route

import mlx.core as mx
from mlx_lm.models.base import quantized_scaled_dot_product_attention
from timing import chained_ms, median_ms

SCALE = 128**-0.5


def error(a: mx.array, b: mx.array) -> float:
    """||a - b|| / ||b||, NaN as infinity."""
    a, b = a.astype(mx.float32), b.astype(mx.float32)
    e = (mx.linalg.norm(a - b) / mx.linalg.norm(b)).item()
    return e if e == e else float("inf")


def cache(Hk: int, S: int, D: int, dtype: mx.Dtype, bits: int | None) -> tuple:
    """Keys and values as KeyValues, and in full precision of the same numbers."""
    k, v = (mx.random.normal((1, Hk, S, D), dtype=dtype, key=mx.random.key(i)) for i in (1, 2))
    if bits is None:
        return fa_decode.KeyValues(k, v, S), k, v
    kq, vq = (mx.quantize(x, group_size=64, bits=bits) for x in (k, v))
    full = [mx.dequantize(*x, group_size=64, bits=bits) for x in (kq, vq)]
    return fa_decode.KeyValues(kq, vq, S, bits, bits, 64), *full


def ours(way: str) -> Callable:
    """fa_decode of q [1, 1, 4, 128], a query on each of 4 key/value heads."""
    return lambda q, kv: fa_decode.run(q, kv, (0, 1, 2, 3), SCALE, route=way)


def theirs(bits: int | None) -> Callable:
    """MLX's attention of q [1, 4, 1, 128], or mlx_lm's over a quantised cache."""
    if bits is None:
        return lambda q, kv: mx.fast.scaled_dot_product_attention(
            q, kv.keys, kv.values, scale=SCALE
        )
    return lambda q, kv: quantized_scaled_dot_product_attention(
        q, kv.keys, kv.values, SCALE, None, 64, bits
    )


def main(argv=None) -> int:
    """Measure and print; returns the exit code."""
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--keys", type=int, nargs="+", default=[131072, 524288])
    p.add_argument("--json")
    args = p.parse_args(argv)
    way, why = route()
    if way == "ops":
        print(f"No GPU to run kernels on ({why}).", file=sys.stderr)
        return 2
    rows, bad = [], 0
    limits = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 6e-3}
    for name in limits:
        for bits in (None, 8, 4):
            for D in (64, 128):
                dtype = getattr(mx, name)
                kv, k, v = cache(3, 1000, D, dtype, bits)
                kv_of_fa = (0, 1, 1, 2, 2, 2)
                q = mx.random.normal((1, 2, 6, D), dtype=dtype)
                out = fa_decode.run(q, kv, kv_of_fa, D**-0.5, route=way)
                full = [x.astype(mx.float32)[:, mx.array(kv_of_fa)] for x in (k, v)]
                q32 = q.astype(mx.float32).swapaxes(1, 2)
                ref = mx.fast.scaled_dot_product_attention(
                    q32, *full, scale=D**-0.5, mask="causal"
                ).swapaxes(1, 2)
                e = error(out, ref)
                bad += e > limits[name]
                print(f"fa_decode {name} bits={bits} D={D}: relative error {e:.2e}")
                rows.append({"check": "fa_decode", "dtype": name, "bits": bits, "D": D, "error": e})
    for S in args.keys:
        for bits in (None, 8, 4):
            caches = [cache(4, S, 128, mx.bfloat16, bits)[0] for _ in range(3)]
            q = mx.random.normal((1, 1, 4, 128), dtype=mx.bfloat16)
            mx.eval(q, [kv.parts for kv in caches])

            row = {"S": S, "bits": bits, "gb": 4 * S * caches[0].row_bytes / 1e9}
            for name, f, x in (
                ("ours", ours(way), q),
                ("MLX", theirs(bits), q.swapaxes(1, 2)),
            ):
                row[name] = chained_ms(f, x, caches, runs=3)
                row[f"{name} wall"] = median_ms(lambda f=f, x=x, kv=caches[0]: f(x, kv))
            print(
                f"S={S} bits={bits}: "
                + ", ".join(
                    f"{n} {row[n]:.3f} ms ({1000 * row['gb'] / row[n]:.0f} GB/s; "
                    f"one call with its synchronisation {row[f'{n} wall']:.3f} ms)"
                    for n in ("ours", "MLX")
                )
                + f", {row['MLX'] / row['ours']:.2f} times"
            )
            rows.append(row)
            del caches
            mx.clear_cache()
    for bits in (8, 4):
        kv, k, v = cache(2, 700, 128, mx.bfloat16, bits)
        q = mx.random.normal((1, 150, 4, 128), dtype=mx.bfloat16)
        out = fa_prefill.run(q, kv, (0, 0, 1, 1), 128**-0.5, route=way)
        full = [x.astype(mx.float32) for x in (k, v)]
        q32 = q.astype(mx.float32).swapaxes(1, 2)
        ref = mx.fast.scaled_dot_product_attention(q32, *full, scale=128**-0.5, mask="causal")
        e = error(out, ref.swapaxes(1, 2))
        bad += e > limits["bfloat16"]
        print(f"fa_prefill bits={bits}: relative error {e:.2e}")
        rows.append({"check": "fa_prefill", "bits": bits, "error": e})
    text = json.dumps({"device": str(mx.device_info()), "rows": rows})
    if args.json:
        with open(args.json, "w") as f:
            f.write(text)
    print(text)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
