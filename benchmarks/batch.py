"""Several replies about one document: python benchmarks/batch.py [--tokens N] [--rows N] [--json F]

A model with random weights that has read a document; so many forks of it decode together, each with
a question of its own behind the document. Measured in one run: a step of the batch that holds and
reads the document once (CachedSequence.fork(share=True)), of one that pads and copies it for each
row, and of one sequence alone, each one ahead of what is read; what each adds to the memory that is
in use, and its peak. The document is random keys and values. On a GPU the model has Qwen3-1.7B's
geometry and 4-bit weights, on a CPU it is small and float32. The last line is JSON.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable

import hydra_mlx  # noqa: F401
from hydra_mlx.batch import Batch
from hydra_mlx.cache import own_cache, quantise_cache
from hydra_mlx.config import HydraArgs
from hydra_mlx.kernels import dispatch
from hydra_mlx.model import Model
from hydra_mlx.sequence import CachedSequence
from hydra_mlx.text import size

import gpu_step
import mlx.core as mx
from mlx_lm.models.cache import ArraysCache

SMALL = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 1000,
    "full_attention_heads": [[0, 4]] * 4,
}  # fmt: skip
QUESTION = 100  # tokens behind the document, all alike: MLX on CUDA compiles for each length


def small() -> Model:
    """For a CPU, float32."""
    args = {"model_type": "hydrahead", "weights_form": "fused", **SMALL}
    model = Model(HydraArgs.from_dict(args))
    model.eval()
    mx.eval(model.parameters())
    return model


def document(model: Model, tokens: int, bits: int | None) -> CachedSequence:
    """A sequence that holds so many tokens, random keys, values and states."""

    def kv(cache):
        own_cache(cache, tokens)
        if bits is not None:
            quantise_cache(cache, bits, 64)

    s = CachedSequence(model, kv=kv)
    heads = len(model.model.layers[0].self_attn.heads.kv)
    D, dtype = model.args.head_dim, model.model.norm.weight.dtype
    s.read([1, 2, 3])
    for c in s.cache:
        if not isinstance(c, ArraysCache):
            more = (mx.random.normal((1, heads, tokens - 3, D)).astype(dtype) for _ in range(2))
            c.append(*more)
            mx.eval(c.state[:2])
    s._ids += [1] * (tokens - 3)  # as if they had been read, in one call
    s._note(tokens - 3)
    mx.clear_cache()
    return s


def held(base: CachedSequence, rows: int, share: bool) -> list:
    """Forks that have read a question each."""
    forks = [base.fork(share) for _ in range(rows)]
    for i, s in enumerate(forks):
        s.read([(7 * i + j) % 900 for j in range(QUESTION)])
    return forks


def steps(one: Callable, rows: int, n: int) -> float:
    """Milliseconds of a step: tokens [B] -> logits [B, V], the next begun before one is read."""
    token, start = mx.ones((rows,), mx.int32), 0.0
    for i in range(n + 6):
        if i == 6:
            mx.eval(token)
            start = time.perf_counter()
        following = mx.argmax(one(token), axis=-1)
        mx.async_eval(following)
        mx.eval(token)
        token = following
    mx.eval(token)
    return 1000 * (time.perf_counter() - start) / n


def replies(base: CachedSequence, rows: int, share: bool, together: bool, n: int) -> dict:
    """Milliseconds of a step, bytes that are in use besides what was before, and their peak.

    Args:
        together: In a batch; else one fork by itself, which has its own copy of the document.
    """
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    forks, batch = held(base, rows, share), Batch(base.model)
    if together:
        batch.put(forks)
        ms = steps(batch.step, rows, n)
    else:
        ms = steps(lambda t: base.model(t[None], cache=forks[0].cache)[:, -1], 1, n)
    mx.clear_cache()
    row = {"ms": ms, "bytes": mx.get_active_memory() - before}
    row["peak"] = mx.get_peak_memory() - before
    batch.take(list(batch.rows))
    return row


def main(argv=None) -> int:
    """Measure and print; returns the exit code."""
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--tokens", type=int, default=16384)
    p.add_argument("--rows", type=int, nargs="+", default=[8])
    p.add_argument("--kv-bits", nargs="+", default=["none", "4"], help="none, 8, 4")
    p.add_argument("--steps", type=int, default=20)
    p.add_argument("--json", metavar="FILE")
    args = p.parse_args(argv)
    gpu = dispatch.route()[0] != "ops"
    model = gpu_step.hydra() if gpu else small()
    result = {"device": str(mx.device_info()), "tokens": args.tokens}
    for word in args.kv_bits:
        bits = None if word == "none" else int(word)
        base = document(model, args.tokens, bits)
        one = replies(base, 1, False, False, args.steps)
        whole = sum(c.nbytes for c in base.cache if not isinstance(c, ArraysCache))
        print(f"{args.tokens} tokens, kv-bits {word}: keys and values {size(whole)}; one reply "
              f"{one['ms']:.2f} ms a token, {size(one['bytes'])} more in use",
              flush=True)  # fmt: skip
        for rows in args.rows:
            found = {}
            for kind, share in (("padded copies", False), ("shared", True)):
                found[kind] = row = replies(base, rows, share, True, args.steps)
                print(f"  {rows} replies, {kind}: a step {row['ms']:.2f} ms, "
                      f"{rows * one['ms'] / row['ms']:.2f} times as fast as one by one; "
                      f"{size(row['bytes'])} more in use, peak {size(row['peak'])}",
                      flush=True)  # fmt: skip
            result[f"{word} bits, {rows} rows"] = {"alone": one, **found}
        print("  paths:", model.layers[0].self_attn.kernels.paths, flush=True)
        del base
        mx.clear_cache()
    text = json.dumps(result)
    if args.json:
        with open(args.json, "w") as f:
            f.write(text)
    print(text)
    return 1 if dispatch.TRUST.failed else 0


if __name__ == "__main__":
    sys.exit(main())
