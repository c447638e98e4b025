"""Which sizes of fa_decode are best on a GPU, beside MLX's own attention.

    python benchmarks/sweep_fa_decode.py [--keys 131072 524288] [--json FILE] [--seconds 80]

One query on each of 4 key/value heads, D=128, bfloat16. Device time of chained calls over caches in
turn (timing.chained_ms), GB/s with every cache byte read once. The first row, 256 keys, is what a
call costs anyway. Configurations not reached within --seconds are left out and counted.
"""

import argparse
import json
import sys
import time

import hydra_mlx  # noqa: F401
from hydra_mlx.kernels import fa_decode
from hydra_mlx.kernels.dispatch import relative_rms, route

import mlx.core as mx
from gpu_attention import cache
from timing import chained_ms

HEADS = (0, 1, 2, 3)
SCALE = 128**-0.5
# per_core is the number of threadgroups that a multiprocessor's 65536 registers hold (ptxas.py), so
# that one wave of equal threadgroups does it all: registers * 32 * simdgroups each.
CONFIGS = {
    None: (
        {},
        {"combine_simdgroups": 16},
        {"combine_simdgroups": 32},
        {"per_core": 2},
        {"per_core": 8},
        {"simdgroups": 4, "per_core": 8},
        {"unroll": 8, "per_core": 2},
        {"unroll": 8, "simdgroups": 4, "per_core": 5},
    ),
    8: (
        {},
        {"per_core": 2},
        {"simdgroups": 4, "per_core": 5},
        {"lanes": 16, "simdgroups": 4, "per_core": 7},
    ),
    4: (
        {},
        {"per_core": 2},
        {"simdgroups": 4, "per_core": 4},
        {"lanes": 8, "unroll": 2, "simdgroups": 4, "per_core": 6},
        {"lanes": 16, "simdgroups": 4, "per_core": 8},
    ),
}


def text(config: dict) -> str:
    """A configuration in one short word."""
    return " ".join(f"{n}={x}" for n, x in config.items()) or "as it is"


class Sweep:
    """Measurements within a time.

    Attributes:
        rows: What was measured. bad: Configurations that disagree with the default one.
        left_out: How many were not reached.
    """

    def __init__(self, way: str, seconds: float):
        self.way, self.end = way, time.perf_counter() + seconds
        self.rows, self.bad, self.left_out = [], 0, 0

    def row(self, S: int, bits: int | None, name: str, gb: float, measure) -> None:
        """Measure, print and keep one row."""
        if time.perf_counter() > self.end:
            self.left_out += 1
            return
        try:
            ms = measure()
        except Exception as e:  # a configuration may not compile: the rest is still of use
            self.bad += 1
            print(f"{S:8} {bits or 'bf16':>5}  {name}: {str(e).splitlines()[0][:80]}")
            return
        print(f"{S:8} {bits or 'bf16':>5} {1000 * ms:9.1f} us {1000 * gb / ms:8.0f} GB/s  {name}")
        self.rows.append({"S": S, "bits": bits, "config": name, "ms": ms, "GBps": 1000 * gb / ms})

    def ours(self, S: int, bits: int | None, config: dict, caches: list) -> None:
        """One configuration of fa_decode, checked against the default one."""
        q = mx.random.normal((1, 1, 4, 128), dtype=mx.bfloat16, key=mx.random.key(7))

        def step(q, kv, config=config):
            return fa_decode.run(q, kv, HEADS, SCALE, route=self.way, **config)

        def measure():
            error = relative_rms([step(q, caches[0])], [step(q, caches[0], {})])
            if error > 0.01:
                raise ArithmeticError(f"differs by {error:.2g} from the default")
            return chained_ms(step, q, caches)

        self.row(S, bits, text(config), 4 * S * caches[0].row_bytes / 1e9, measure)

    def mlx(self, S: int, caches: list) -> None:
        """mx.fast.scaled_dot_product_attention, the same way."""
        q = mx.random.normal((1, 4, 1, 128), dtype=mx.bfloat16, key=mx.random.key(7))

        def step(q, kv):
            return mx.fast.scaled_dot_product_attention(q, kv.keys, kv.values, scale=SCALE)

        gb = 4 * S * caches[0].row_bytes / 1e9
        self.row(S, None, "MLX", gb, lambda: chained_ms(step, q, caches))


def main(argv=None) -> int:
    """Measure and print; returns the exit code."""
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--keys", type=int, nargs="+", default=[131072, 524288])
    p.add_argument("--json")
    p.add_argument("--seconds", type=float, default=80)
    args = p.parse_args(argv)
    way, why = route()
    if way == "ops":
        print(f"No GPU to run kernels on ({why}).", file=sys.stderr)
        return 2
    sweep = Sweep(way, args.seconds)
    for bits, configs in CONFIGS.items():
        for S in (256, *args.keys) if bits is None else args.keys:
            caches = [cache(4, S, 128, mx.bfloat16, bits)[0] for _ in range(3)]
            mx.eval([kv.parts for kv in caches])
            if bits is None:
                sweep.mlx(S, caches)
            for config in configs if S != 256 else configs[:1]:
                sweep.ours(S, bits, config, caches)
            del caches
            mx.clear_cache()
    if sweep.left_out:
        print(f"{sweep.left_out} configurations left out: time.")
    document = json.dumps({"device": str(mx.device_info()), "rows": sweep.rows})
    if args.json:
        with open(args.json, "w") as f:
            f.write(document)
    print(document)
    return 1 if sweep.bad else 0


if __name__ == "__main__":
    sys.exit(main())
