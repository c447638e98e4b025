"""Times every piece of a training step on one GPU and says what a step would take.

usage: python -m tools.transfer_torch.bench --base BASE.gguf --heads HEADS.json
           [--rows 32] [--length 1024] [--tune]

Pieces are compiled for one layer only, so the answer comes before a whole model would be compiled.
--tune tries warps and columns of the delta kernels and names the fastest correct choice, for
train's --tuning. The table comes last.
"""

import argparse
import json
import time
from collections import Counter
from pathlib import Path

import torch

from . import checkpoint, delta
from .loss import distil_loss
from .migrate import migrate, student_config
from .model import Student, Teacher
from .train import parse_tuning

TUNINGS = (
    (4, 8, 4, 32), (4, 4, 4, 32), (4, 8, 4, 64), (4, 8, 8, 64), (8, 8, 4, 32), (4, 8, 2, 32),
    (8, 8, 8, 64), (4, 8, 4, 16),
)  # fmt: skip


def timed(work, device: str, repeat: int = 5) -> tuple[float, float]:
    """Milliseconds of one call, and seconds that the first two took (compilation)."""
    began = time.perf_counter()
    for _ in range(2):
        work()
    _wait(device)
    first, began = time.perf_counter() - began, time.perf_counter()
    for _ in range(repeat):
        work()
    _wait(device)
    return (time.perf_counter() - began) / repeat * 1e3, first


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def both_ways(function, wanted: list):
    """A call of function and of its gradient by `wanted`."""

    def work():
        out = function()
        torch.autograd.grad(out, wanted, torch.ones_like(out), allow_unused=True)

    return work


def tune(inputs: list, device: str) -> tuple[int, ...]:
    """Times the delta kernels under every tuning; returns the fastest that is correct."""
    from . import delta_triton

    small, best = delta.check_inputs(2, 1024, 7, 64, device), {}
    for tuning in TUNINGS:
        delta_triton.TUNING.update(zip(delta_triton.TUNING, tuning, strict=True))
        try:
            errors = delta.relative_errors(
                delta_triton.triton_delta_rule, small, delta.torch_delta_rule
            )
            ms, _ = timed(
                both_ways(lambda: delta_triton.triton_delta_rule(*inputs), inputs), device
            )
        except Exception as error:  # too much shared memory, say
            print(f"tuning {tuning}: {type(error).__name__}: {str(error)[:120]}", flush=True)
            continue
        worst = max(errors.values())
        print(f"tuning {tuning}: {ms:.2f} ms, worst error {worst:.1e}", flush=True)
        if worst < delta.TOLERANCE:
            best[tuning] = ms
    return min(best, key=best.get) if best else TUNINGS[0]


def pieces(student: Student, teacher: Teacher, rows: int, length: int, device: str) -> dict:
    """{piece: (ms, seconds to compile)} for the layer with the most usual number of FA heads."""
    counts = Counter(len(h) for h in student.config["full_attention_heads"])
    usual = counts.most_common(1)[0][0]
    i = [len(h) for h in student.config["full_attention_heads"]].index(usual)
    heads = student.config["num_attention_heads"] - usual or 1
    draw = torch.Generator("cpu").manual_seed(0)
    vocab = student.config["vocab_size"]
    ids = torch.randint(vocab, (rows, length), generator=draw).to(device)
    x = teacher.start(ids).detach()
    leaf = x.clone().requires_grad_()
    delta_in = delta.check_inputs(rows, length, heads, student.D, device)
    mixer, mlp = [student.norms[i], *student.attn[i].values()], list(student.mlps[i])
    h = torch.randn(*x.shape, device=device).to(student.dtype).requires_grad_()
    weight = torch.ones(ids.shape, device=device)
    compiled = device != "cpu"

    def loss():
        th, embed = h.detach(), student.embed
        out = distil_loss(h, embed, th, teacher.embed, ids, weight, 0.0 * weight, compiled)
        return out[0]

    def forward(function):
        with torch.no_grad():
            function()

    optimizer = torch.optim.AdamW(student.parameters(), fused=device != "cpu")

    def step():
        for t in student.parameters():
            t.grad = torch.zeros_like(t) if t.grad is None else t.grad
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()

    work = {
        f"delta rule forward, {heads} heads": lambda: forward(lambda: delta.delta_rule(*delta_in)),
        "delta rule and gradient": both_ways(lambda: delta.delta_rule(*delta_in), delta_in),
        "teacher attention": lambda: forward(lambda: teacher.attention(i, x)),
        "teacher mlp": lambda: forward(lambda: teacher.mlp(i, x)),
        "student attention and gradient": both_ways(
            lambda: student.attention(i, leaf), [leaf, *mixer]
        ),
        "student mlp and gradient": both_ways(lambda: student.mlp(i, leaf), [leaf, *mlp]),
        "loss and gradient": both_ways(loss, [h, student.embed]),
        "clip and optimizer": step,
    }
    out = {}
    for name, call in work.items():
        out[name] = timed(call, device)
        print(f"{name}: {out[name][0]:.2f} ms, first calls {out[name][1]:.1f} s", flush=True)
    return out


def main(argv=None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--heads", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--tuning", type=parse_tuning, default=delta.TUNINGS[0])
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.set_float32_matmul_precision("high")
    base_config, base = checkpoint.load_base(args.base)
    heads = json.loads(args.heads.read_text())["full_attention_heads"]
    config = student_config(base_config, heads)
    start = migrate(base, config, None, 0)
    tensors = {n: t.to(device).requires_grad_() for n, t in start.items()}
    student = Student(config, tensors, dtype, device == "cuda")
    base = {n: t.to(device) for n, t in base.items()}
    teacher = Teacher(base_config, base, dtype, device == "cuda")
    tuning = args.tuning
    if args.tune and device == "cuda":
        tuning = tune(delta.check_inputs(args.rows, args.length, 7, 64, device), device)
    backend = delta.choose_backend(device, tuning=tuning)
    found = pieces(student, teacher, args.rows, args.length, device)
    ms, layers, tokens = (
        {n: t for n, (t, _) in found.items()},
        student.layers,
        args.rows * args.length,
    )
    teach = ms["teacher attention"] + ms["teacher mlp"]
    own = ms["student attention and gradient"]
    align = layers * (teach + own) + ms["clip and optimizer"]
    distil = layers * (teach + own + ms["student mlp and gradient"])
    distil += ms["loss and gradient"] + ms["clip and optimizer"]
    print(f"\n{'piece':36} {'ms':>8} {'us/token/layer':>15}")
    for name, t in ms.items():
        print(f"{name:36} {t:8.2f} {t * 1e3 / tokens:15.4f}")
    print(f"delta rule by {backend}, tuning {','.join(map(str, tuning))}")
    if device == "cuda":
        print(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
    for name, t in (("align", align), ("distil", distil)):
        print(f"{name}: {t:.0f} ms for {tokens} tokens, {tokens / t * 1e3:.0f} tokens/s foreseen")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
