"""What a training step costs, on random weights: python benchmarks/training.py [--long]

Tokens a second and peak memory of each stage, with and without mx.compile (best of nine), and with
--long the gradient of the gated delta rule and a step of stage long at 16384 tokens.
"""

import argparse
import sys
import time

import hydra_mlx  # noqa: F401  (before mlx: it chooses the BLAS library)
from hydra_mlx import ops
from hydra_mlx.config import HydraArgs
from hydra_mlx.model import Model
from hydra_mlx.sources import IDENTITY
from hydra_mlx.training.steps import STAGES, Recipe, Trainer

import mlx.core as mx
from mlx.utils import tree_flatten


def make(hidden: int, layers: int) -> tuple:
    """(student's config, its weights, teacher) of random weights; a quarter of heads stay."""
    sizes = {
        "hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": hidden // 4,
        "vocab_size": 260, "tie_word_embeddings": True, "rope_theta": 10000.0,
        "fa_qk_norm": False, "la_qk_norm": False,
    }  # fmt: skip
    args = HydraArgs(**sizes, full_attention_heads=[[0]] * layers)
    teacher = Model(HydraArgs(**sizes, **IDENTITY, full_attention_heads=[[0, 1, 2, 3]] * layers))
    teacher.freeze()
    return args, dict(tree_flatten(Model(args).parameters())), teacher


def recipe(stage: str, batch: int, length: int) -> Recipe:
    """A stage of float32."""
    kl = float(stage == "distil")
    return Recipe(
        stage, 100, length, batch, 1, 1e-3, 10, 0.0, 1.0, 0, kl, 1 - kl, "float32", False, 1024
    )


def measure(trainer: Trainer, tokens: mx.array) -> tuple:
    """(seconds, bytes above what was held) of one step."""
    mx.eval(trainer.weights)
    mx.reset_peak_memory()
    held, start = mx.get_active_memory(), time.perf_counter()
    trainer.advance(tokens)
    mx.eval(trainer.weights, trainer.optimizer.state)
    return time.perf_counter() - start, mx.get_peak_memory() - held


def stages():
    """Each stage, 8 x 256 tokens, four layers of 128."""
    args, weights, teacher = make(128, 4)
    tokens = mx.random.randint(0, 256, (8, 257))
    for stage in STAGES:
        plain, fast = (
            Trainer(recipe(stage, 8, 256), args, weights, teacher, False, c) for c in (False, True)
        )
        found = {}
        for _ in range(9):  # in turn, so that a busy machine is unfair to neither
            for how, trainer in (("eager", plain), ("compiled", fast)):
                found.setdefault(how, []).append(measure(trainer, tokens))
        for how, rows in found.items():
            seconds, peak = min(s for s, _ in rows), max(p for _, p in rows[2:])
            print(f"{stage:7} {how:9} {2048 / seconds:8.0f} tok/s  +{peak / 1e6:.0f} MB")


def long():
    """16384 tokens."""
    T, H, D = 16384, 2, 32
    q, k, v, w = (mx.random.normal((1, T, H, D)) for _ in range(4))
    k = ops.l2_normalise(k)
    g, beta = -0.1 * mx.random.uniform(shape=(1, T, H)), mx.random.uniform(shape=(1, T, H))
    grad = mx.grad(lambda *x: (ops.gated_delta(*x)[0] * w).sum(), argnums=[0, 1, 2, 3, 4])
    mx.eval(q, k, v, w, g, beta)
    for _ in range(2):
        mx.reset_peak_memory()
        held, start = mx.get_active_memory(), time.perf_counter()
        mx.eval(grad(q, k, v, g, beta))
        seconds, peak = time.perf_counter() - start, mx.get_peak_memory() - held
    print(
        f"gated_delta gradient, {T} tokens, {H} heads of {D}: {seconds:.2f} s, +{peak / 1e6:.0f} MB"
    )
    args, weights, _ = make(32, 2)
    trainer = Trainer(recipe("long", 1, T), args, weights, None, False, False)
    seconds, peak = measure(trainer, mx.random.randint(0, 256, (1, T + 1)))
    print(f"long, one sequence of {T}, 2 layers of 32: {seconds:.1f} s, +{peak / 1e6:.0f} MB")


def main(argv: list | None = None) -> int:
    """Print the figures; returns the exit code."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--long", action="store_true")
    long() if p.parse_args(argv).long else stages()
    return 0


if __name__ == "__main__":
    sys.exit(main())
