"""Evaluation during and after training: perplexity ratio, KL to the teacher, needle accuracy.

usage: python -m tools.transfer_torch.evaluate --base BASE.gguf --model FOLDER --data DIR
           [--length 1024] [--needles 1024,2048,4096]
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from . import checkpoint, delta
from .data import Batches
from .loss import token_losses
from .model import Student, Teacher

EVAL_SEED = 99
SHORTEST_NEEDLE = 256


def _hidden(model, tokens):
    # With gradients on, the form that training compiled serves evaluation too; without it they
    # would only take memory.
    with torch.set_grad_enabled(model.compiled):
        return model.hidden(tokens).detach()


def compare(student, teacher, ids: np.ndarray, marks: np.ndarray, device) -> dict[str, float]:
    """Sums over one batch: tokens, KL, next-token losses, answers, answers wholly right."""
    ids = torch.from_numpy(ids).to(device)
    marks = torch.from_numpy(marks).to(device).bool()
    x, y = ids[:, :-1], ids[:, 1:]
    hs = _hidden(student, x)
    with torch.no_grad():
        ht = teacher.hidden(x)
    kl, ce, teacher_ce, hit = token_losses(hs, student.embed, ht, teacher.embed, y)
    right = (hit.view(y.shape) | ~marks).all(1) & marks.any(1)
    return {
        "tokens": kl.numel(), "kl": kl.sum().item(), "ce": ce.sum().item(),
        "teacher_ce": teacher_ce.sum().item(), "answers": marks.any(1).sum().item(),
        "right": right.sum().item(),
    }  # fmt: skip


def held_out(student, teacher, folder: Path, rows: int, length: int, batches: int, device) -> dict:
    """{"long": {...}, "teacher": {...}}: KL and perplexities on held-out text."""
    out = {}
    for name in ("long", "teacher"):
        data = Batches(folder, {name: 1.0}, rows, length, EVAL_SEED, part="held")
        sums = [compare(student, teacher, *data[i], device) for i in range(batches)]
        n, total = sum(s["tokens"] for s in sums), {k: sum(s[k] for s in sums) for k in sums[0]}
        out[name] = {
            "kl": round(total["kl"] / n, 4),
            "ppl": round(float(np.exp(total["ce"] / n)), 3),
            "teacher_ppl": round(float(np.exp(total["teacher_ce"] / n)), 3),
            "ratio": round(float(np.exp((total["ce"] - total["teacher_ce"]) / n)), 4),
        }
    return out


def evaluate(student, teacher, folder: Path, rows: int, length: int, batches: int, device) -> dict:
    """What held_out gives, and {"single": share, "multi": share} of retrieval tasks."""
    out = held_out(student, teacher, folder, rows, length, batches, device)
    if length < SHORTEST_NEEDLE:
        return out
    return out | needle_accuracy(student, teacher, folder, rows, length, device)


def needle_accuracy(
    student, teacher, folder: Path, rows: int, length: int, device, batches: int = 1
) -> dict:
    """Share of tasks of about `length` ids whose every answer token is the first choice."""
    data = Batches(folder, {"retrieval": 1.0}, rows, length, EVAL_SEED, part="held")
    out = {}
    for kind in ("single", "multi"):
        sums = [compare(student, teacher, *data.needles(i, kind), device) for i in range(batches)]
        right, answers = (sum(s[n] for s in sums) for n in ("right", "answers"))
        out[kind] = round(right / max(1, answers), 3)
    return out


def main(argv=None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--needles", default="1024,2048,4096", help="lengths, with commas")
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    delta.choose_backend(device)
    base_config, base = checkpoint.load_base(args.base)
    config, tensors = checkpoint.load_model(args.model)
    teacher = Teacher(base_config, {n: t.to(device) for n, t in base.items()}, dtype, False)
    student = Student(config, {n: t.to(device) for n, t in tensors.items()}, dtype, False)
    for scaled in (False, True):
        student.scaled = scaled
        rows = max(1, 16384 // args.length)
        text = evaluate(student, teacher, args.data, rows, args.length, args.batches, device)
        print(json.dumps({"scaled": scaled, "length": args.length} | text), flush=True)
        for length in map(int, args.needles.split(",")):
            rows = max(1, min(32, 65536 // length))
            found = needle_accuracy(student, teacher, args.data, rows, length, device)
            print(json.dumps({"scaled": scaled, "length": length} | found), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
