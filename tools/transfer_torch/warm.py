"""Compiles every form that training will need, all at once, into PyTorch's cache on disk.

usage: python -m tools.transfer_torch.warm --base BASE.gguf --heads HEADS.json
           [--rows 32] [--length 1024] [--scaled] [--fusion-norm none] [--tuning 4,8,4,32]
           [--workers 12]

A layer's form depends on how many heads of each kind and how many key/value heads it has; a
training process would compile the dozen of them one after the other, about 20 seconds each.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch._functorch.config

from . import checkpoint, delta
from .loss import distil_loss
from .migrate import migrate, student_config
from .model import Student, Teacher, layer_heads
from .train import parse_norm, parse_tuning

REST = -1  # the pieces that all layers share


def forms(config: dict) -> dict[tuple, int]:
    """{what makes the form of a layer: the first layer of that form}"""
    found: dict[tuple, int] = {}
    for i in range(config["num_hidden_layers"]):
        fa, la, kv = layer_heads(config, i)
        found.setdefault((len(fa), len(la), len(kv), config["fusion_norm"]), i)
    return found


def compile_all(jobs: list[list[str]], workers: int, gpus: list[str]) -> list[int]:
    """Runs this program once with each list of arguments, spread over the GPUs.

    Args:
        gpus: Names for CUDA_VISIBLE_DEVICES, taken in turn: the cache serves all that are alike.

    Returns:
        The exit codes.
    """

    def run(numbered: tuple[int, list[str]]) -> int:
        at, job = numbered
        # Of as many as there are cores, each.
        few = {"TORCHINDUCTOR_COMPILE_THREADS": "3", "OMP_NUM_THREADS": "2"}
        env = os.environ | few | ({"CUDA_VISIBLE_DEVICES": gpus[at % len(gpus)]} if gpus else {})
        command = [sys.executable, "-m", "tools.transfer_torch.warm", *job]
        return subprocess.run(command, env=env).returncode

    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(run, enumerate(jobs)))


def compile_one(args: argparse.Namespace) -> None:
    """Run one form forward and backward."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.set_float32_matmul_precision("high")
    torch._functorch.config.autograd_cache_allow_custom_autograd_functions = True
    delta.choose_backend(device, tuning=args.tuning)
    base_config, base = checkpoint.load_base(args.base)
    heads = json.loads(args.heads.read_text())["full_attention_heads"]
    config = student_config(base_config, heads, args.fusion_norm)
    new = {n: t.to(device).requires_grad_() for n, t in migrate(base, config, None, 0).items()}
    student = Student(config, new, dtype, device != "cpu")
    student.scaled = args.scaled
    teacher = Teacher(
        base_config, {n: t.to(device) for n, t in base.items()}, dtype, device != "cpu"
    )
    ids = torch.zeros((args.rows, args.length), dtype=torch.int64, device=device)
    with torch.no_grad():
        leaf = teacher.start(ids)
    leaf.requires_grad_()
    if args.layer != REST:
        student.attention(args.layer, leaf).square().mean().backward()
        return
    with torch.no_grad():
        teacher.mlp(0, leaf + teacher.attention(0, leaf))
    student.mlp(0, leaf).square().mean().backward()
    h = torch.randn_like(leaf, dtype=dtype).requires_grad_()
    ce = torch.zeros(ids.shape, device=device)
    with torch.no_grad():
        th = h.detach().clone()
    distil_loss(h, student.embed, th, teacher.embed, ids, ce, ce, device != "cpu")[0].backward()


def main(argv=None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--heads", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--scaled", action="store_true", help="as in train")
    parser.add_argument("--tuning", type=parse_tuning, default=delta.TUNINGS[0])
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--fusion-norm", type=parse_norm, default="rms")
    parser.add_argument("--layer", type=int, help="compile this one's form only; -1: the rest")
    args = parser.parse_args(argv)
    if args.layer is not None:
        compile_one(args)
        return 0
    base_config, _ = checkpoint.load_base(args.base)
    heads = json.loads(args.heads.read_text())["full_attention_heads"]
    layers = [REST, *forms(student_config(base_config, heads, args.fusion_norm)).values()]
    own = list(sys.argv[1:] if argv is None else argv)
    began = time.time()
    codes = compile_all([[*own, "--layer", str(i)] for i in layers], args.workers, [])
    failed = [layer for layer, code in zip(layers, codes, strict=True) if code]
    print(f"{len(layers)} forms in {time.time() - began:.0f} s; failed: {failed or 'none'}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
