"""Launches the decode kernels a few times, for a checker of memory accesses to watch.

    compute-sanitizer --tool memcheck  --kernel-regex kns=hydra python benchmarks/sanitize.py
    compute-sanitizer --tool racecheck --kernel-regex kns=hydra python benchmarks/sanitize.py

Inputs are made by numpy, so that little else runs. Checks nothing itself but that the results are
finite; the checker's verdict is the answer.
"""

import argparse
import sys

import hydra_mlx  # noqa: F401
from hydra_mlx.config import HydraArgs
from hydra_mlx.kernels import dispatch, fa_decode, fa_prefill, hydra_decode, la_decode, la_prefill
from hydra_mlx.mixer import FusedMixer

import mlx.core as mx
import numpy as np

D, HEADS, KEYS = 64, [0, 1, 4], 150
CONFIG = {
    "model_type": "hydrahead", "weights_form": "fused", "hidden_size": 64,
    "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 6,
    "num_key_value_heads": 3, "head_dim": D, "vocab_size": 64, "rms_norm_eps": 1e-6,
    "rope_theta": 1e4, "max_position_embeddings": 4096, "fa_qk_norm": True, "la_qk_norm": True,
    "full_attention_heads": [HEADS], "tie_word_embeddings": True,
}  # fmt: skip
RNG = np.random.RandomState(0)


def random(*shape: int, dtype: mx.Dtype = mx.bfloat16) -> mx.array:
    """Normally distributed."""
    return mx.array(RNG.randn(*shape).astype(np.float32), dtype)


def cache(Hk: int, bits: int | None) -> fa_decode.KeyValues:
    """KEYS random tokens in a buffer of 256."""

    def half():
        if bits is None:
            return random(1, Hk, 256, D)
        words = RNG.randint(0, 2**32, (1, Hk, 256, D * bits // 32), np.uint64).astype(np.uint32)
        return mx.array(words), random(1, Hk, 256, D // 32), random(1, Hk, 256, D // 32)

    return fa_decode.KeyValues(half(), half(), KEYS, bits, bits, None if bits is None else 32)


def main(argv=None) -> int:
    """Run; returns the exit code."""
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.parse_args(argv)
    way, why = dispatch.route()
    if way == "ops":
        print(f"No GPU to run kernels on ({why}).", file=sys.stderr)
        return 2
    layer = hydra_decode.HydraLayer.of(FusedMixer(HydraArgs.from_dict(CONFIG), 0))
    la, results = layer.la, {}
    for T in (1, 3):
        x, ab = random(1, T, la.R), random(1, T, 2 * la.heads)
        tail, state = random(1, 3, 3 * la.heads * D), random(1, la.heads, D, D, dtype=mx.float32)
        rest = (x, ab, KEYS, tail, state)
        results[f"la_decode T={T}"] = la_decode.run(la, *rest, way)[:2]
        for bits in (None, 4):
            kv, q = cache(layer.Hk, bits), random(1, T, 3, D)
            name = f"T={T} bits={bits}"
            results[f"fa_decode {name}"] = fa_decode.run(q, kv, layer.kv_of_fa, 0.1, route=way)
            results[f"hydra_decode {name}"] = hydra_decode.run(layer, *rest, kv, way)[:2]
    q, k, v = (random(1, 70, 3, D) * 0.1 for _ in range(3))
    g, beta = -mx.abs(random(1, 70, 3, dtype=mx.float32)), mx.full((1, 70, 3), 0.5)
    for which in ("chunked", "steps"):
        results[f"la_prefill {which}"] = la_prefill.run(q, k, v, g, beta, route=way, which=which)
    kv = cache(2, 4)
    results["fa_prefill"] = fa_prefill.run(random(1, 40, 3, D), kv, (0, 1, 1), 0.1, route=way)
    bad = 0
    for name, out in results.items():
        arrays = out if isinstance(out, (tuple, list)) else [out]
        fine = all(np.isfinite(np.array(a.astype(mx.float32))).all() for a in arrays)
        bad += not fine
        print(f"{name}: {'ran' if fine else 'NOT FINITE'}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
