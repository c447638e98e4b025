"""The three stages of the transfer on one or more GPUs (or, for tests, a CPU).

usage: python -m tools.transfer_torch.train align|distil|long --base BASE.gguf
           --heads HEADS.json --data DIR --out DIR [...]
           [--then distil|long ... ]
       torchrun --nproc-per-node 2 -m tools.transfer_torch.train ...

align   every layer's attention learns the teacher's attention output on the teacher's inputs
distil  all weights learn the teacher's next-token distribution
long    the same at greater length, with the next-token loss on top or alone

A run starts from --model (a folder in the HydraHead layout), else from a fresh migration; with
--resume from OUT/last, exactly where it stopped. It ends after --steps or --minutes, whichever is
first, and leaves OUT/last (float32 weights, optimizer) and OUT/log.jsonl. The learning rate is
constant after its warm-up and falls to zero over the last --decay share of --steps, or the last
--decay-minutes: run without either to go on later.

--then begins another stage in the same process, from the weights as they are; its flags are added
to those before, and its --minutes count from the start of the process.
"""

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch._functorch.config
import torch.distributed as dist

from . import checkpoint, delta
from .data import Batches, InTurn, loader, parse_mix
from .evaluate import evaluate
from .grid import Format, Grid
from .loss import distil_loss
from .migrate import initial_weights, student_config
from .model import Student, Teacher

STAGES = ("align", "distil", "long")
SAVE_SECONDS = 12  # writing weights and optimizer, 1.9 GB
CLOCK_STEPS = 8
TEACHER_LENGTH = 8192  # what the base was trained for
TEACHER_START = 512  # tokens of a later window in which the teacher knows too little


def parse_tuning(text: str) -> tuple[int, ...]:
    """The values of delta_triton.TUNING out of "4,8,4,32"."""
    warps, gradient_warps, walk_warps, columns = (int(x) for x in text.split(","))
    return warps, gradient_warps, walk_warps, columns


def parse_norm(text: str) -> str | None:
    """The config's fusion_norm of "rms" or "none"."""
    if text not in ("rms", "none"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither rms nor none")
    return None if text == "none" else text


def build_parser() -> argparse.ArgumentParser:
    """Flags of the three stages."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("stage", choices=STAGES)
    add("--base", type=Path, required=True, help="GGUF file or Hugging Face folder of the teacher")
    add("--heads", type=Path, required=True, help='JSON with "full_attention_heads"')
    add("--data", type=Path, required=True)
    add("--out", type=Path, required=True)
    add("--model", type=Path, help="start from this HydraHead folder")
    add("--resume", action="store_true", help="go on from OUT/last")
    add("--fusion-norm", type=parse_norm, default="rms", help="rms, or none for the ablation")
    add("--steps", type=int, default=1 << 40)
    add("--minutes", type=float, default=1e9, help="of wall clock, all included")
    add("--rows", type=int, default=32, help="sequences a step on each GPU")
    add("--length", type=int, default=1024, help="tokens a sequence, a multiple of 64")
    add("--short", type=int, help="every other step: as many tokens in rows of this length")
    add("--lr", type=float, default=4e-4)
    add("--warmup", type=int, default=50, help="steps")
    add("--decay", type=float, default=0.0, help="last share of --steps")
    add("--decay-minutes", type=float, default=0.0, help="last minutes of --minutes")
    add("--mix", type=parse_mix, default=parse_mix("teacher=0.7,long=0.15,retrieval=0.15"))
    add("--kl", type=float, default=1.0, help="weight of KL to the teacher")
    add("--ce", type=float, default=0.0, help="weight of the next-token loss")
    add("--answer", type=float, default=0.0, help="next-token weight of retrieval answers, added")
    add("--scaled", action="store_true", help="train with the log-length scale on")
    add("--quantise", type=Format.parse, help="train on this grid: bits,group,embedding's bits")
    add("--quantise-minutes", type=float, default=1e9, help="only in the last so many of --minutes")
    add("--seed", type=int, default=1)
    add("--workers", type=int, default=4)
    add("--log-every", type=int, default=20)
    add("--save-every", type=int, default=0, help="steps; 0: at the end only")
    add("--eval-every", type=int, default=0, help="steps; 0: at the end only")
    add("--eval-batches", type=int, default=2, help="0: no evaluation")
    add("--no-compile", action="store_true")
    add("--tuning", type=parse_tuning, default=delta.TUNINGS[0], help="as bench prints it")
    add("--delta", choices=("auto", *delta.BACKENDS), default="auto")
    return parser


def one_device() -> None:
    """Shows this process its own GPU only, as number 0, before CUDA starts.

    PyTorch's cache of compiled code keeps the number of the device, so that other numbers would
    compile everything again.
    """
    if "LOCAL_RANK" in os.environ:
        seen = os.environ.get("CUDA_VISIBLE_DEVICES")
        numbers = seen.split(",") if seen else [str(i) for i in range(64)]
        os.environ["CUDA_VISIBLE_DEVICES"] = numbers[int(os.environ["LOCAL_RANK"])]


class Run:
    """Teacher, student, optimizer and this process's place among the others."""

    def __init__(self, args):
        self.args, self.began = args, time.time()
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device, self.left = "cpu", None
        if torch.cuda.is_available():
            self.device = "cuda:0"  # see one_device
            torch.cuda.set_device(self.device)
        if self.world > 1:
            dist.init_process_group("nccl" if self.device != "cpu" else "gloo")
        self.compiled = self.device != "cpu" and not args.no_compile
        self.dtype = torch.bfloat16 if self.device != "cpu" else torch.float32
        torch.set_float32_matmul_precision("high")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the loader's workers fork
        # One compiled form for each combination of head counts, about a dozen.
        torch._dynamo.config.recompile_limit = 256
        # Without it nothing around TritonDelta is found in the cache that warm.py fills.
        torch._functorch.config.autograd_cache_allow_custom_autograd_functions = True
        if args.delta == "auto":
            delta.choose_backend(self.device, self.say, args.tuning)
        else:
            delta.set_backend(args.delta)
        self._build()

    def say(self, *words) -> None:
        """Prints on the first process only."""
        if self.rank == 0:
            print(f"[{time.time() - self.began:6.1f}s]", *words, flush=True)

    def _build(self) -> None:
        args, last = self.args, self.args.out / "last"
        last = last if last.exists() else self.args.out / "old"
        base_config, base = checkpoint.load_base(args.base)
        to = {n: t.to(self.device) for n, t in base.items()}
        self.teacher = Teacher(base_config, to, self.dtype, self.compiled)
        heads = json.loads(args.heads.read_text())["full_attention_heads"]
        config, state = student_config(base_config, heads, args.fusion_norm), None
        if args.resume:
            config, tensors = checkpoint.load_model(last)
            state = torch.load(last / "training.pt", map_location=self.device, weights_only=True)
        elif args.model:
            config, tensors = checkpoint.load_model(args.model)
        else:
            rows = Batches(args.data, {"teacher": 1.0}, 16, min(args.length, 512), args.seed)
            plain = Teacher(base_config, to, self.dtype, False)
            ids = torch.from_numpy(rows[0][0][:, :-1]).to(self.device)
            tensors = initial_weights(base, config, plain, ids, args.seed)
        if config["full_attention_heads"] != [sorted(set(h)) for h in heads]:
            raise ValueError(f"{args.heads} is another head map than the model's")
        if config.get("fusion_norm", "rms") != args.fusion_norm:
            raise ValueError(f"--fusion-norm is not the model's: {config.get('fusion_norm')!r}")
        tensors = {n: t.to(self.device) for n, t in tensors.items()}
        self.student = Student(config, tensors, self.dtype, self.compiled)
        for t in tensors.values():
            t.requires_grad_()  # all, and the inputs in align: one compiled form for all stages
        self.begin(args)
        if state:
            self.step = state["step"]
            self.optimizer.load_state_dict(state["optimizer"])
        count = sum(t.numel() for t in self.trained)
        self.say(f"{args.stage}: {count / 1e6:.1f} M parameters trained, from step {self.step}")

    def begin(self, args) -> None:
        """Step 0 of the stage of args: the weights as they are, a new optimizer."""
        self.args, self.step, self.left = args, 0, None
        self.student.scaled = args.scaled
        self.grid = Grid(self.student.tensors, args.quantise) if args.quantise else None
        self.trained = self.student.parameters(".self_attn." if args.stage == "align" else "")
        fused = self.device != "cpu"
        self.optimizer = torch.optim.AdamW(
            self.trained, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=fused
        )

    def save(self) -> None:
        """Writes OUT/last; a kill meanwhile leaves the old one there or in OUT/old."""
        if self.rank:
            return
        new, last, old = (self.args.out / n for n in ("new", "last", "old"))
        checkpoint.save_model(new, self.student.config, self.student.tensors)
        state = {"optimizer": self.optimizer.state_dict(), "step": self.step}
        torch.save(state, new / "training.pt")
        shutil.rmtree(old, ignore_errors=True)
        if last.exists():
            last.rename(old)
        new.rename(last)
        shutil.rmtree(old, ignore_errors=True)

    @contextmanager
    def rounded(self) -> Iterator[None]:
        """The weights on the grid of --quantise while it is on, then exact again."""
        on = self.grid and (self.left or 0.0) <= self.args.quantise_minutes * 60
        if on:
            self.grid.round()
        yield
        if on:
            self.grid.restore()

    def rate(self) -> tuple[float, bool]:
        """The learning-rate factor of this step, and whether time is up; by the first's clock."""
        args, step = self.args, self.step
        factor = min(1.0, (step + 1) / max(1, args.warmup))
        if args.decay:
            factor = min(factor, (args.steps - step) / max(1.0, args.decay * args.steps))
        left = args.minutes * 60 - (time.time() - self.began) - SAVE_SECONDS
        if self.world > 1:
            # Asking waits for the GPU, so only now and then.
            if step % CLOCK_STEPS == 0 or self.left is None:
                clock = torch.tensor([left], device=self.device)
                dist.broadcast(clock, 0)
                self.left = clock.item()
        else:
            self.left = left
        left = self.left
        if args.decay_minutes:
            factor = min(factor, max(0.0, left) / (args.decay_minutes * 60))
        return factor, left <= 0

    def align_step(self, ids) -> torch.Tensor:
        """Relative squared error, mean over layers; leaves gradients. Returns [1]."""
        n, total = self.student.layers, 0.0
        with torch.no_grad():
            x = self.teacher.start(ids[:, :-1])
        for i in range(n):
            with torch.no_grad():
                wanted = self.teacher.attention(i, x).float()
                scale = wanted.square().mean()
            got = self.student.attention(i, x.detach().requires_grad_()).float()
            loss = (got - wanted).square().mean() / scale / n
            loss.backward()
            total = total + loss.detach()
            with torch.no_grad():
                x = self.teacher.mlp(i, x + wanted)
        return total[None]

    @torch.no_grad()
    def teach(self, ids, marks) -> tuple[torch.Tensor | None, torch.Tensor]:
        """The teacher's hidden states [B, T, E], or None; the weight of its KL [B, T].

        Rows longer than it was trained for are read in windows. What a later window cannot know
        has no weight: its first tokens, and answers about what came before it.
        """
        args, x = self.args, ids[:, :-1]
        kl, T = torch.full(x.shape, args.kl, device=x.device), x.shape[1]
        if not args.kl:
            return None, kl
        if T <= TEACHER_LENGTH:
            return self.teacher.hidden(x), kl
        at = torch.arange(T, device=x.device)
        blind = (at >= TEACHER_LENGTH) & ((at % TEACHER_LENGTH < TEACHER_START) | (marks > 0))
        th = self.teacher.hidden(x.reshape(-1, TEACHER_LENGTH)).view(*x.shape, -1)
        return th, kl.masked_fill(blind, 0.0)

    def distil_step(self, ids, marks) -> torch.Tensor:
        """KL and next-token loss; leaves gradients. Returns [loss, KL, next-token loss]."""
        args, (th, kl) = self.args, self.teach(ids, marks)
        h = self.student.hidden(ids[:, :-1])
        # Without a teacher the next-token loss is all there is.
        ce = args.ce + args.answer * marks.float() if th is not None else 0.0 * marks + 1.0
        parts = distil_loss(
            h, self.student.embed, th, self.teacher.embed, ids[:, 1:], kl, ce, self.compiled
        )
        parts[0].backward()
        return torch.stack([p.detach() for p in parts])

    def update(self, factor: float) -> torch.Tensor:
        """Averages gradients over processes, clips, steps. Returns the norm before clipping."""
        grads = [t.grad for t in self.trained]
        if self.world > 1:
            flat = torch.cat([g.flatten() for g in grads])
            dist.all_reduce(flat)
            flat /= self.world
            parts = flat.split([g.numel() for g in grads])
            torch._foreach_copy_(grads, [p.view_as(g) for p, g in zip(parts, grads, strict=True)])
        norm = torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = self.args.lr * factor
        self.optimizer.step()
        for t in self.student.tensors.values():
            t.grad = None
        return norm

    def evaluate(self) -> dict:
        """Held-out figures; every process computes them, which costs no more than waiting."""
        args = self.args
        length = args.short or args.length
        rows = args.rows * args.length // length
        with self.rounded():
            return evaluate(
                self.student, self.teacher, args.data, rows, length, args.eval_batches, self.device
            )


def train(run: Run) -> None:
    """The loop of one stage."""
    args, names = run.args, ("loss",) if run.args.stage == "align" else ("loss", "kl", "ce")
    args.out.mkdir(parents=True, exist_ok=True)
    log = (args.out / "log.jsonl").open("a") if run.rank == 0 else None

    def note(entry: dict) -> None:
        run.say(json.dumps(entry))
        if log:
            log.write(json.dumps({"stage": args.stage, "step": run.step} | entry) + "\n")
            log.flush()

    batches = Batches(args.data, args.mix, args.rows, args.length, args.seed, run.rank)
    if args.short:
        rows = args.rows * args.length // args.short
        short = Batches(args.data, args.mix, rows, args.short, args.seed, run.rank)
        batches = InTurn(short, batches)
    tokens, sums, since, first = args.rows * args.length * run.world, 0.0, time.time(), run.step
    counted = 0
    for ids, marks in loader(batches, run.step, args.steps, args.workers):
        factor, over = run.rate()
        if over:
            break
        ids, marks = (x.to(run.device, non_blocking=True) for x in (ids, marks))
        with run.rounded():
            parts = run.align_step(ids) if args.stage == "align" else run.distil_step(ids, marks)
        norm = run.update(factor)
        run.step, counted, sums = run.step + 1, counted + 1, sums + torch.cat([parts, norm[None]])
        if run.step == first + 1:
            run.say(f"first step done, loss {parts[0].item():.4f}")
            since, counted, sums = time.time(), 0, 0.0  # compilation is not speed
        elif run.step % args.log_every == 0:
            means = (sums / counted).tolist()
            if not all(map(lambda m: m == m and abs(m) < 1e30, means)):
                raise FloatingPointError(f"step {run.step}: {means}; OUT/last is as it was")
            speed = counted * tokens / (time.time() - since)
            entry = dict(zip((*names, "norm"), (round(m, 5) for m in means), strict=True))
            note(entry | {"lr": args.lr * factor, "tok_s": round(speed), "seen": run.step * tokens})
            since, counted, sums = time.time(), 0, 0.0
        if args.eval_every and args.eval_batches and run.step % args.eval_every == 0:
            note(run.evaluate())
            since, counted, sums = time.time(), 0, 0.0
        if args.save_every and run.step % args.save_every == 0:
            run.save()
    run.save()
    if args.eval_batches:
        note(run.evaluate())


def check(args: argparse.Namespace) -> None:
    """Lengths that go with the chunks and with the teacher's windows, or SystemExit."""
    for length in (args.length, args.short or args.length):
        if length % delta.CHUNK or args.rows * args.length % length:
            raise SystemExit(f"rows of {length} are no multiple of {delta.CHUNK}, or do not fill "
                             f"{args.rows} x {args.length} tokens")  # fmt: skip
        if args.kl and length > TEACHER_LENGTH and length % TEACHER_LENGTH:
            raise SystemExit(f"{length} is no multiple of {TEACHER_LENGTH}, which the teacher "
                             "reads at a time; --kl 0 does without it")  # fmt: skip


def parse_stages(words: list[str]) -> list[argparse.Namespace]:
    """The arguments of every stage; flags after --then are added to those before it."""
    stages, flags = [], []
    while words:
        end = words.index("--then") if "--then" in words else len(words)
        flags += words[1:end]
        stages.append(build_parser().parse_args([*words[:1], *flags]))
        check(stages[-1])
        words = words[end + 1 :]
    return stages or [build_parser().parse_args([])]


def main(argv=None) -> int:
    """Entry point; returns the exit code."""
    stages = parse_stages(list(sys.argv[1:] if argv is None else argv))
    one_device()
    run = Run(stages[0])
    train(run)
    for args in stages[1:]:
        run.begin(args)
        train(run)
    if run.device != "cpu":
        run.say(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
    if run.world > 1:
        dist.barrier()
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
