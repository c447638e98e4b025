"""The same small budget for every choice of heads, and with and without the fusion norm: a table.

usage: python -m tools.transfer_torch.ablate warm|run --base BASE.gguf --scores SCORES.json
           --data DATA --out OUT [--variants scores,fixed,random,no-norm] [...]

warm  compiles every form of layer the variants need, into PyTorch's cache on disk
run   trains (align, then distil) and evaluates the variants, one process for each GPU, all with
      the same data, seeds and steps; writes OUT/ablation.json and prints the table

Every variant logs to OUT/VARIANT/log.txt. One that fails has its reason in the table; running
again with --variants naming it alone keeps the others, if all flags but that are the same.
"""

import argparse
import json
import os
import queue
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from hydra_mlx import cli
from hydra_mlx.errors import UsageError
from hydra_mlx.files import write_json
from hydra_mlx.score_file import read_scores
from hydra_mlx.selection import select_heads

import torch

from . import checkpoint, delta, warm
from .ablation_table import collect, table
from .evaluate import held_out, needle_accuracy
from .migrate import student_config
from .model import Student, Teacher, layer_heads
from .train import Run, train
from .train import build_parser as train_parser

# {variant: (how heads are chosen, --fusion-norm of train)}
VARIANTS = {
    "scores": ("scores", "rms"),
    "fixed": ("fixed", "rms"),
    "random": ("random", "rms"),
    "no-norm": ("scores", "none"),
}
# Of the flags, what makes two results comparable.
SETTINGS = (
    "base scores data keep floor head_seed seed rows length align_steps distil_steps align_lr "
    "distil_lr warmup decay mix answer scaled eval_batches needles needle_batches"
).split()
WORKERS_PER_GPU = 6  # compiling processes; each has the model and one batch in memory


def parse_variants(text: str) -> list[str]:
    """["scores", "no-norm"] of "scores,no-norm"."""
    names = text.split(",")
    for name in names:
        if name not in VARIANTS:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(VARIANTS)}")
    return names


def parse_lengths(text: str) -> list[int]:
    """[512, 1024] of "512,1024"."""
    return [int(n) for n in text.split(",")]


def build_parser() -> argparse.ArgumentParser:
    """Flags; --variant is how `run` calls itself for one of them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("action", choices=("warm", "run"))
    add("--base", type=Path, required=True, help="GGUF file or Hugging Face folder of the teacher")
    add("--scores", type=Path, required=True, help="what `hydra-mlx score` wrote for the base")
    add("--data", type=Path, required=True)
    add("--out", type=Path, required=True)
    add("--variants", type=parse_variants, default=list(VARIANTS))
    add("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    add("--keep", type=int, default=68, help="FA heads")
    add("--floor", type=int, default=0, help="FA heads every layer keeps")
    add("--head-seed", type=int, default=0, help="of the random heads")
    add("--seed", type=int, default=1, help="of weights and batches")
    add("--rows", type=int, default=32)
    add("--length", type=int, default=1024)
    add("--align-steps", type=int, default=60)
    add("--distil-steps", type=int, default=200)
    add("--align-lr", type=float, default=1e-3)
    add("--distil-lr", type=float, default=4e-4)
    add("--warmup", type=int, default=20, help="steps of each stage")
    add("--decay", type=float, default=0.2, help="last share of each stage's steps")
    add("--mix", default="teacher=0.7,long=0.15,retrieval=0.15")
    add("--answer", type=float, default=10.0, help="next-token weight of retrieval answers")
    add("--scaled", action="store_true", help="log-length scale on, in training and evaluation")
    add("--eval-batches", type=int, default=4, help="of each held-out text")
    add("--needles", type=parse_lengths, default=[512, 1024], help="lengths, with commas")
    add("--needle-batches", type=int, default=4, help="of --rows tasks, for each kind and length")
    add("--log-every", type=int, default=20)
    add("--loaders", type=int, default=4, help="processes that make batches, for each variant")
    add("--timeout", type=float, default=540.0, help="seconds for one variant, then it is ended")
    add("--workers", type=int, help=f"of warm; {WORKERS_PER_GPU} for each GPU if not given")
    add("--tuning", default=",".join(map(str, delta.TUNINGS[0])), help="as bench prints it")
    add("--no-compile", action="store_true")
    add("--debug", action="store_true", help="show where an error arose")
    add("--keep-models", action="store_true", help="leave the weights in OUT/VARIANT/model")
    return parser


def visible_gpus() -> list[str]:
    """Names for CUDA_VISIBLE_DEVICES; none on a CPU."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return seen.split(",") if seen else [str(i) for i in range(torch.cuda.device_count())]


def settings(args: argparse.Namespace) -> dict:
    """What has to be equal for results to stand in one table."""
    values = {n: getattr(args, n) for n in SETTINGS}
    return {n: v.name if isinstance(v, Path) else v for n, v in values.items()}


def write_heads(args: argparse.Namespace, name: str) -> list[list[int]]:
    """Chooses the FA heads of a variant and writes OUT/NAME/heads.json."""
    scores = read_scores(args.scores)
    layers, heads = scores.score.shape
    chosen = select_heads(
        VARIANTS[name][0], layers, heads, args.keep, args.floor, args.head_seed, scores
    )
    (args.out / name).mkdir(parents=True, exist_ok=True)
    write_json(args.out / name / "heads.json", {"full_attention_heads": chosen})
    return chosen


def compile_forms(args: argparse.Namespace) -> int:
    """`warm`: every form once, whichever variants share it. Returns the exit code."""
    base_config, _ = checkpoint.load_base(args.base)
    shared = ["--base", str(args.base), "--rows", str(args.rows), "--length", str(args.length)]
    shared += ["--tuning", args.tuning, *["--scaled"] * args.scaled]
    jobs: dict[tuple, list[str]] = {}
    for name in args.variants:
        norm, heads = VARIANTS[name][1], write_heads(args, name)
        config = student_config(base_config, heads, None if norm == "none" else norm)
        own = [*shared, "--heads", str(args.out / name / "heads.json"), "--fusion-norm", norm]
        for form, layer in {(warm.REST,): warm.REST, **warm.forms(config)}.items():
            jobs.setdefault(form, [*own, "--layer", str(layer)])
    began, gpus = time.time(), visible_gpus()
    workers = args.workers or WORKERS_PER_GPU * max(1, len(gpus))
    codes = warm.compile_all(list(jobs.values()), workers, gpus)
    failed = [form for form, code in zip(jobs, codes, strict=True) if code]
    print(f"{len(jobs)} forms in {time.time() - began:.0f} s; failed: {failed or 'none'}")
    return 1 if failed else 0


class VariantRun(Run):
    """Keeps weights of the last stage only, and only if asked: two stages share one process."""

    keep_models = False

    def save(self) -> None:
        """Writes OUT/VARIANT/model after distil, without the optimizer."""
        if self.keep_models and self.args.stage == "distil":
            folder = self.args.out.parent / "model"
            checkpoint.save_model(folder, self.student.config, self.student.tensors)


def stage_args(args: argparse.Namespace, stage: str) -> argparse.Namespace:
    """The arguments of train for one stage of a variant."""
    folder, norm = args.out / args.variant, VARIANTS[args.variant][1]
    steps, lr = getattr(args, f"{stage}_steps"), getattr(args, f"{stage}_lr")
    flags = {
        "base": args.base, "heads": folder / "heads.json", "data": args.data,
        "out": folder / stage, "fusion-norm": norm, "steps": steps, "rows": args.rows,
        "length": args.length, "lr": lr, "warmup": args.warmup, "decay": args.decay,
        "mix": args.mix, "answer": args.answer, "seed": args.seed, "workers": args.loaders,
        "log-every": args.log_every, "eval-batches": 0, "tuning": args.tuning,
    }  # fmt: skip
    argv = [x for flag, value in flags.items() for x in (f"--{flag}", str(value))]
    argv += ["--no-compile"] * args.no_compile + ["--scaled"] * args.scaled
    return train_parser().parse_args([stage, *argv])


def last_logged(folder: Path) -> dict:
    """The last means that training logged; {} if it had too few steps."""
    lines = [json.loads(x) for x in (folder / "log.jsonl").read_text().splitlines()]
    return next((x for x in reversed(lines) if "loss" in x), {})


def figures(args: argparse.Namespace, run: Run) -> dict:
    """Held-out text, and needles of student and teacher."""
    out = held_out(
        run.student, run.teacher, args.data, args.rows, args.length, args.eval_batches, run.device
    )
    out |= {"needles": {}, "teacher_needles": {}}
    # Not compiled: another length would be a new form of every layer.
    teacher = Teacher(run.teacher.config, run.teacher.tensors, run.dtype, False)
    student = Student(run.student.config, run.student.tensors, run.dtype, False)
    student.scaled = args.scaled
    for length in args.needles:
        for key, model in (("needles", student), ("teacher_needles", teacher)):
            out[key][str(length)] = needle_accuracy(
                model, teacher, args.data, args.rows, length, run.device, args.needle_batches
            )
    return out


def train_variant(args: argparse.Namespace) -> int:
    """Both stages and the evaluation of one variant in this process; writes its result.json."""
    began, folder, marks = time.time(), args.out / args.variant, {}

    def lap(name: str) -> None:
        marks[name] = round(time.time() - began - sum(marks.values()), 1)

    for stage in ("align", "distil"):
        (folder / stage / "log.jsonl").unlink(missing_ok=True)
    run = VariantRun(stage_args(args, "align"))
    run.keep_models = args.keep_models
    lap("start")
    train(run)
    lap("align")
    run.begin(stage_args(args, "distil"))
    train(run)
    lap("distil")
    for tensor in run.student.tensors.values():
        tensor.grad = None
    del run.optimizer  # 1.3 GB for the 157 M weights of SmolLM2-135M
    result = figures(args, run)
    lap("evaluation")
    config = run.student.config
    kept = [layer_heads(config, i) for i in range(run.student.layers)]
    peak = torch.cuda.max_memory_allocated() / 2**30 if run.device != "cpu" else None
    align, distil = (last_logged(folder / stage) for stage in ("align", "distil"))
    steps = args.align_steps + args.distil_steps
    result |= {
        "variant": args.variant, "settings": settings(args),
        "fusion_norm": config["fusion_norm"],
        "full_attention_heads": config["full_attention_heads"],
        "fa_heads": sum(len(fa) for fa, _, _ in kept), "kv_heads": sum(len(kv) for *_, kv in kept),
        "parameters": sum(t.numel() for t in run.student.tensors.values()),
        "tokens": steps * args.rows * args.length, "align_loss": align.get("loss"),
        "train_kl": distil.get("kl"), "tokens_per_second": distil.get("tok_s"),
        "seconds": marks, "peak_gib": peak and round(peak, 1),
        "device": torch.cuda.get_device_name() if run.device != "cpu" else "cpu",
        "torch": torch.__version__,
    }  # fmt: skip
    write_json(folder / "result.json", result)
    return 0


def run_one(args: argparse.Namespace, own: list[str], name: str, gpus: queue.Queue) -> str:
    """Trains a variant in a process of its own, on a GPU that is free. Returns how it went."""
    folder, gpu, began = args.out / name, gpus.get(), time.time()
    env = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"} | os.environ
    if gpu:
        env["CUDA_VISIBLE_DEVICES"] = gpu  # number 0 inside, as in the cache that warm filled
    command = [sys.executable, "-m", "tools.transfer_torch.ablate", *own, "--variant", name]
    try:
        with (folder / "log.txt").open("w") as log:
            code = subprocess.run(
                command, env=env, stdout=log, stderr=subprocess.STDOUT, timeout=args.timeout
            ).returncode
        state = f"exit code {code}" if code else "done"
    except subprocess.TimeoutExpired:
        state = f"ended after {args.timeout:.0f} s (--timeout)"
    finally:
        gpus.put(gpu)
    if state != "done":
        lines = (folder / "log.txt").read_text(errors="replace").strip().splitlines()
        state = f"{state}: {lines[-1][:160]}" if lines else state
        write_json(folder / "failed.json", {"variant": name, "reason": state})
    print(f"{name}: {state}, {time.time() - began:.0f} s", file=sys.stderr, flush=True)
    return state


def run_all(args: argparse.Namespace, own: list[str]) -> int:
    """`run`: all variants, then the table. Returns the exit code."""
    for name in args.variants:
        write_heads(args, name)
        for old in ("result.json", "failed.json"):
            (args.out / name / old).unlink(missing_ok=True)
    gpus: queue.Queue = queue.Queue()
    slots = visible_gpus() or [""]
    for gpu in slots:
        gpus.put(gpu)
    with ThreadPoolExecutor(len(slots)) as pool:
        runs = [pool.submit(run_one, args, own, name, gpus) for name in args.variants]
        for done in as_completed(runs):  # the file is of use before the last one ends
            done.result()
            rows = collect(args.out, list(VARIANTS), settings(args))
            write_json(args.out / "ablation.json", {"settings": settings(args), "rows": rows})
    print(table(rows, args.needles))
    return 1 if any(run.result() != "done" for run in runs) else 0


def main(argv=None) -> int:
    """Entry point; returns the exit code."""
    own = list(sys.argv[1:] if argv is None else argv)

    def work(args: argparse.Namespace) -> int:
        if args.length % delta.CHUNK:
            raise UsageError(f"--length {args.length} is no multiple of {delta.CHUNK}.")
        return compile_forms(args) if args.action == "warm" else run_all(args, own)

    if "--variant" in own:
        return train_variant(build_parser().parse_args(own))  # the log gets the whole traceback
    return cli.run(build_parser(), work, own)


if __name__ == "__main__":
    raise SystemExit(main())
