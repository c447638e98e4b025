"""Launches every kernel a few times, for a checker of memory accesses to watch.

    compute-sanitizer --tool memcheck python benchmarks/sanitize.py
    compute-sanitizer --tool racecheck python benchmarks/sanitize.py

Checks nothing itself but that the results are finite; the checker's exit code is the answer.
"""

import argparse
import sys

import hydra_mlx  # noqa: F401
from hydra_mlx.cache import quantise_cache
from hydra_mlx.config import HydraArgs
from hydra_mlx.kernels import dispatch
from hydra_mlx.model import Model

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

CONFIG = {
    "model_type": "hydrahead", "weights_form": "fused", "hidden_size": 64,
    "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 3, "vocab_size": 64, "rms_norm_eps": 1e-6, "rope_theta": 1e4,
    "max_position_embeddings": 4096, "tie_word_embeddings": True, "fa_qk_norm": True,
    "la_qk_norm": True, "full_attention_heads": [[0, 1, 4], [], [0, 1, 2, 3, 4, 5]],
}  # fmt: skip


def main(argv=None) -> int:
    """Run; returns the exit code."""
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.parse_args(argv)
    way, why = dispatch.route()
    if way == "ops":
        print(f"No GPU to run kernels on ({why}).", file=sys.stderr)
        return 2
    for D in (64, 128):
        for dtype in (mx.bfloat16, mx.float32):
            model = Model(HydraArgs.from_dict({**CONFIG, "head_dim": D}))
            model.set_dtype(dtype)
            model.eval()
            for bits in (None, 8, 4):
                cache = make_prompt_cache(model)
                if bits is not None:
                    quantise_cache(cache, bits, 32)
                for T in (100, 1, 1, 3, 8):
                    y = model(mx.random.randint(0, 64, (1, T)), cache=cache)
                    if not mx.isfinite(y).all().item():
                        print(f"not finite: D={D} {dtype} bits={bits} T={T}", file=sys.stderr)
                        return 1
    print(f"{len(dispatch.TRUST.passed)} specialisations ran, {len(dispatch.TRUST.failed)} refused")
    for key, error in dispatch.TRUST.passed.items():
        print(f"  {error:.1e}  {dispatch.describe(key)}")
    return 1 if dispatch.TRUST.failed else 0


if __name__ == "__main__":
    sys.exit(main())
