"""The whole transfer on a small model, from nothing: does the student learn what its base says?

A byte-level Llama of about a million weights learns the sources of Python's standard library (the
same code trains it: every head full attention, stage "long"); then it is migrated and transferred.
Prints one JSON line. Fresh files are held out.

python benchmarks/transfer_small.py WORK [--base-steps 1500] [--align 200] [--distil 800]
"""

import argparse
import json
import random
import sys
import sysconfig
from pathlib import Path

import hydra_mlx  # noqa: F401  (before mlx: it chooses the BLAS library)
from hydra_mlx.__main__ import main as hydra
from hydra_mlx.sources import IDENTITY, open_source
from hydra_mlx.training.state import read_log
from hydra_mlx.training.student import read_weights

import mlx.core as mx
from mlx_lm.models import llama

SIZES = {
    "model_type": "llama", "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16, "vocab_size": 256,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True,
    "max_position_embeddings": 2048, "eos_token_id": 0,
}  # fmt: skip


def write_text(folder: Path):
    """Sources of the standard library as packed bytes, one file in twelve held out."""
    from hydra_mlx.tokens import write_packed

    import numpy as np

    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    random.Random(0).shuffle(files)
    for name, part in (
        ("held-out", files[::12]),
        ("train", [f for i, f in enumerate(files) if i % 12]),
    ):
        (folder / name).mkdir()
        write_packed(folder / name, [np.frombuffer(f.read_bytes() + b"\0", np.uint8) for f in part])


def write_base(folder: Path, weights: dict):
    """A plain Llama checkpoint."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SIZES))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "pt"})


def random_weights() -> dict:
    """What the base begins with."""
    from mlx.utils import tree_flatten

    mx.random.seed(0)
    model = llama.Model(llama.ModelArgs.from_dict(SIZES))
    shapes = tree_flatten(model.parameters())
    return {n: x if x.ndim == 1 else 0.04 * mx.random.normal(x.shape) for n, x in shapes}


def run(*argv):
    """One hydra-mlx command; ends the program when it fails."""
    code = hydra([str(a) for a in argv])
    if code:
        sys.exit(code)


def main(argv: list | None = None) -> int:
    """Everything in order; returns the exit code."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("work", type=Path)
    p.add_argument("--base-steps", type=int, default=1500)
    p.add_argument("--align", type=int, default=200)
    p.add_argument("--distil", type=int, default=800)
    args = p.parse_args(argv)
    work = args.work
    work.mkdir(parents=True, exist_ok=True)
    write_text(work)
    text = ["--text", work / "train", "--eval-text", work / "held-out", "--eval-tokens", 16384]
    common = [*text, "--batch", 8, "--length", 128, "--no-compile", "--log-every", 100]
    write_base(work / "random", random_weights())
    keys = [f"--set={k}={json.dumps(v)}" for k, v in IDENTITY.items()]
    run(
        "migrate",
        work / "random",
        "--select",
        "fixed",
        "--ratio",
        "0:1",
        *keys,
        "--out",
        work / "f0",
    )
    flags = ["--stage", "long", "--steps", args.base_steps, "--lr", 2e-3, "--student", work / "f0"]
    run("transfer", *flags, *common, "--out", work / "f1")
    weights = read_weights(open_source(work / "f1", None))
    write_base(
        work / "base", {n.replace("self_attn.fa.", "self_attn."): x for n, x in weights.items()}
    )
    out = {}
    for gamma in ("one", "rms"):
        name = f"{gamma}-student"
        how = ["--gamma", "rms", *text[:2], "--length", 128] if gamma == "rms" else []
        run("migrate", work / "base", "--select", "fixed", *how, "--out", work / name)
        losses = []
        for stage, steps in (("align", args.align), ("distil", args.distil)):
            target = work / f"{gamma}-{stage}"
            flags = ["--stage", stage, "--steps", steps, "--student", work / name]
            rate = ["--lr", 2e-3 if stage == "align" else 1e-3]
            run("transfer", *flags, *rate, *common, "--teacher", work / "base", "--out", target)
            rows = [
                r for r in read_log(work / f"{target.name}.run" / "losses.jsonl") if "eval" in r
            ]
            losses += [r["eval"] for r in rows[len(losses) > 0 :]]
            name = target.name
        keys = ("kl", "perplexity_ratio")
        out[gamma] = [{k: round(e[k], 4) for k in keys} for e in losses]
        out["teacher_perplexity"] = losses[0]["teacher_perplexity"]
    print(json.dumps(out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
