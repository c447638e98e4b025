"""Greedy tokens of a converted Llama against mlx_lm's own Llama on the same weights.

    python tools/base_model.py base.gguf
    python benchmarks/mlx_lm_tokens.py base.gguf [--tokens 64]

BASE is a plain Llama: a GGUF, a folder or a hub id. It is converted with --head-map identity;
mlx_lm gets its weights as float32. Exit code 1 when any token differs.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import hydra_mlx
from hydra_mlx import convert
from hydra_mlx.sources import open_source
from hydra_mlx.tensors import to_float

import mlx.core as mx
from mlx_lm.models import llama
from mlx_lm.models.cache import make_prompt_cache

PROMPTS = (
    "What is gravity?",
    "Write a short poem about the sea.",
    "Explain how a bicycle stays upright.",
)


def stock_llama(source_path: Path):
    """mlx_lm's Llama with the source's weights in float32."""
    source = open_source(source_path, "identity")
    model = llama.Model(llama.ModelArgs.from_dict(source.config))
    weights = [(n, to_float(source.get(n))) for n in source.names("")]
    model.load_weights(weights, strict=True)
    return model


def greedy(model, prompt: list, n: int) -> list:
    """n greedy tokens after the prompt."""
    cache = make_prompt_cache(model)
    logits, out = model(mx.array([prompt]), cache=cache), []
    for _ in range(n):
        out.append(logits[0, -1].argmax().item())
        logits = model(mx.array([[out[-1]]]), cache=cache)
    return out


def main(argv=None) -> int:
    """Compare and print; returns the exit code."""
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("base", metavar="BASE")
    p.add_argument("--tokens", type=int, default=64)
    args = p.parse_args(argv)
    base = convert.resolve_source(args.base, None)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "base"
        flags = ["--head-map", "identity", "--mlx-path", str(folder), "--quiet"]
        if convert.main(["--hf-path", str(base), *flags]):
            return 2
        ours, tokenizer = hydra_mlx.load(folder, dtype="float32")
    theirs = stock_llama(base)
    wrong = 0
    for text in PROMPTS:
        messages = [{"role": "user", "content": text}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        a, b = greedy(ours, prompt, args.tokens), greedy(theirs, prompt, args.tokens)
        same = sum(x == y for x, y in zip(a, b, strict=True))
        wrong += args.tokens - same
        print(f"{same}/{args.tokens} greedy tokens equal: {text}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
