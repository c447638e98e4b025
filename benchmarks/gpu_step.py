"""A whole decode step and a quantised prefill on a GPU, beside mlx_lm's Qwen3 of the same size.

    python benchmarks/gpu_step.py [--tokens 131072] [--prefill 32768] [--json FILE]

HydraHead of Qwen3-1.7B's geometry (28 layers, 16 heads, 4 of them FA, E=2048, 4-bit weights, all
random) with that many tokens in its cache: tokens a second with the kernels, with the operations,
and mlx_lm's Qwen3 under the same conditions. Then the peak memory of reading a prompt into a
quantised cache. The last line is JSON.
"""

import argparse
import json
import sys
import time

import hydra_mlx  # noqa: F401
from hydra_mlx.cache import own_cache, quantise_cache
from hydra_mlx.config import HydraArgs
from hydra_mlx.kernels import dispatch
from hydra_mlx.model import Model

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import qwen3
from mlx_lm.models.cache import ArraysCache, KVCache

SIZE = {
    "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
    "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 40960,
    "tie_word_embeddings": True,
}  # fmt: skip
FA_HEADS = [1, 6, 8, 15]  # on 4 different key/value heads


def quantised(model: nn.Module) -> nn.Module:
    """bf16, 4-bit weights, evaluation mode."""
    model.set_dtype(mx.bfloat16)
    allowed = getattr(model, "quant_predicate", None) or (lambda path, module: True)
    nn.quantize(
        model, 64, 4, class_predicate=lambda p, m: hasattr(m, "to_quantized") and allowed(p, m)
    )
    model.eval()
    mx.eval(model.parameters())
    return model


def hydra() -> nn.Module:
    """HydraHead with random weights."""
    heads = [FA_HEADS] * SIZE["num_hidden_layers"]
    more = {"full_attention_heads": heads, "fa_qk_norm": True, "la_qk_norm": True}
    args = {"model_type": "hydrahead", "weights_form": "fused", **SIZE, **more}
    return quantised(Model(HydraArgs.from_dict(args)))


def filled(cache: list, S: int, heads: int, state: tuple = ()) -> list:
    """The cache with S random tokens in every KVCache, random states in every ArraysCache."""
    for c in cache:
        if isinstance(c, KVCache):
            shape = (1, heads, S + 256, SIZE["head_dim"])
            c.keys, c.values = (mx.random.normal(shape, dtype=mx.bfloat16) for _ in range(2))
            c.offset = S
            mx.eval(c.keys, c.values)
        elif isinstance(c, ArraysCache):
            c[0], c[1] = (mx.random.normal(s).astype(t) for s, t in state)
            mx.eval(c[0], c[1])
    return cache


def decode(model: nn.Module, cache: list, steps: int = 40) -> float:
    """Tokens a second of greedy decoding, the next step queued while one runs."""
    token = mx.array([[1]])
    start = 0.0
    for i in range(steps + 8):
        if i == 8:
            mx.eval(token)
            start = time.perf_counter()
        following = mx.argmax(model(token, cache=cache)[:, -1:], axis=-1)
        mx.async_eval(following)
        mx.eval(token)  # as mlx_lm's generate_step: one step ahead, no more
        token = following
    mx.eval(token)
    return steps / (time.perf_counter() - start)


def recurrent() -> tuple:
    """Shapes and dtypes of a layer's conv tail and state, for filled."""
    Hl, D = SIZE["num_attention_heads"] - len(FA_HEADS), SIZE["head_dim"]
    return ((1, 3, 3 * Hl * D), mx.bfloat16), ((1, Hl, D, D), mx.float32)


def prefill_peak(model: nn.Module, tokens: int, bits: int | None, step: int = 2048) -> tuple:
    """Peak bytes above the weights, and tokens a second after the first step, of a prompt."""
    cache = model.make_cache()
    if bits is not None:
        quantise_cache(cache, bits, 64)
    own_cache(cache, tokens)
    prompt = mx.random.randint(0, 1000, (1, tokens))
    mx.eval(prompt)
    mx.clear_cache()
    mx.reset_peak_memory()
    held, start = mx.get_active_memory(), 0.0
    for at in range(0, tokens, step):
        model.model(prompt[:, at : at + step], cache=cache)
        mx.eval([c.state for c in cache])
        mx.clear_cache()
        if at == 0:  # builds and checks the kernels
            start = time.perf_counter()
    return mx.get_peak_memory() - held, (tokens - step) / (time.perf_counter() - start)


def stock_decode(S: int) -> float:
    """Tokens a second of mlx_lm's Qwen3 of the same size, 4-bit weights, bf16 cache of S tokens."""
    config = {**SIZE, "model_type": "qwen3"}
    model = quantised(qwen3.Model(qwen3.ModelArgs.from_dict(config)))
    layers, heads = SIZE["num_hidden_layers"], SIZE["num_key_value_heads"]
    return decode(model, filled([KVCache() for _ in range(layers)], S, heads))


def main(argv=None) -> int:
    """Measure and print; returns the exit code."""
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--tokens", type=int, default=131072)
    p.add_argument("--prefill", type=int, default=32768)
    p.add_argument("--json")
    args = p.parse_args(argv)
    way, why = dispatch.route()
    if way == "ops":
        print(f"No GPU to run kernels on ({why}).", file=sys.stderr)
        return 2
    S = args.tokens
    result = {"device": str(mx.device_info()), "tokens": S}
    model = hydra()
    state = recurrent()
    for name, bits in (("bf16", None), ("8 bit", 8), ("4 bit", 4)):
        cache = filled(model.make_cache(), S, len(FA_HEADS), state)
        if bits is not None:
            quantise_cache(cache, bits, 64)
            mx.eval([c.state for c in cache])
        result[f"kernels {name}"] = decode(model, cache)
        beside = ""
        if bits is None:  # MLX on CUDA has no quantised product for any number of keys
            with dispatch.substitute(None):
                result[f"operations {name}"] = decode(model, cache, 10)
            beside = f", {result[f'operations {name}']:.1f} with the operations"
        print(f"{name} cache: {result[f'kernels {name}']:.1f} tok/s with the kernels{beside}")
        del cache
        mx.clear_cache()
    short = filled(model.make_cache(), 64, len(FA_HEADS), state)
    result["kernels, 64 tokens"] = decode(model, short)
    print(f"64 tokens in the cache: {result['kernels, 64 tokens']:.1f} tok/s")
    print(model.layers[0].self_attn.kernels.paths)
    for bits in (None, 8, 4):
        peak, speed = prefill_peak(model, args.prefill, bits)
        result[f"prefill {bits}"] = {"peak": peak, "tps": speed}
        print(f"prefill of {args.prefill} tokens, {bits or 16} bit: {peak / 2**20:.0f} MiB above "
              f"the weights, {speed:.0f} tok/s")  # fmt: skip
    print(model.layers[0].self_attn.kernels.paths)
    del model, short
    mx.clear_cache()
    result["mlx_lm Qwen3"] = stock_decode(S)
    print(f"mlx_lm's Qwen3, bf16 cache: {result['mlx_lm Qwen3']:.1f} tok/s")
    text = json.dumps(result)
    if args.json:
        with open(args.json, "w") as f:
            f.write(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
