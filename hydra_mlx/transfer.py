"""hydra-mlx transfer: train a migrated model to do what its base does, in three stages.

hydra-mlx transfer --stage align  --student student --teacher BASE --text DIR --steps 5000 --out s1
hydra-mlx transfer --stage distil --student s1 --teacher BASE --text DIR --steps 20000 --out s2
hydra-mlx transfer --stage long   --student s2 --text LONG --steps 2000 --out s3

States and losses are kept in OUT.run; the same command goes on after any interruption. OUT appears
when the stage is done, in the layout that `hydra-mlx convert` reads.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import cli, heatmap, text
from .errors import HydraError, UsageError

# Learning rate and sequence length of each stage (spec section 4).
DEFAULTS = {"align": (1e-3, 512), "distil": (1e-4, 512), "long": (1e-5, 16384)}
DTYPES = ("float32", "bfloat16", "float16")


def build_parser() -> argparse.ArgumentParser:
    """Flags of `hydra-mlx transfer`."""
    count, share = cli.number(int, 1), cli.number(float, 0.0)
    p = cli.parser("transfer", __doc__)
    a = p.add_argument
    a("--stage", choices=tuple(DEFAULTS), required=True)
    a("--student", metavar="DIR", required=True, help="of migrate, or of the stage before")
    a("--teacher", metavar="PATH", help="the base model: folder, hub id or .gguf")
    a("--out", metavar="DIR", required=True, help="checkpoint to write at the end")
    a(
        "--text",
        metavar="PATH",
        action="append",
        required=True,
        help="text files, packed tokens or folders; may be repeated",
    )
    a("--steps", type=count, help="optimizer steps of the stage")
    a("--tokens", type=cli.number(float, 1), help="instead of --steps: tokens to see, as 3e8")
    a("--batch", type=count, default=8, help="sequences in a step (default: 8)")
    a("--length", type=count, help="tokens of a sequence (default: 512, 512, 16384)")
    a("--accumulate", type=count, default=1, help="parts a batch is computed in (default: 1)")
    a("--lr", type=share, help="peak learning rate (default: 1e-3, 1e-4, 1e-5)")
    a("--warmup", type=cli.number(int, 0), help="steps (default: a fiftieth)")
    a("--lr-end", type=cli.number(float, 0, 1), default=0.0, help="last rate over peak")
    a("--clip", type=share, default=1.0, help="largest gradient norm (default: 1)")
    a("--kl", type=share, help="weight of the KL (default: 1 in distil, 0 in long)")
    a("--ce", type=share, help="weight of next-token loss (default: 0 in distil, 1 in long)")
    a("--chunk", type=count, default=1024, help="positions whose logits exist at a time")
    a("--logit-scale", choices=("off", "on"), default="off", help="in training (default: off)")
    a(
        "--dtype",
        choices=DTYPES,
        help="of the arithmetic (default: float32 on a CPU, else bfloat16)",
    )
    a("--save-dtype", choices=DTYPES, default="float32", help="of OUT (default: float32)")
    a("--grad-checkpoint", action="store_true", help="less memory, about a third more time")
    a("--no-compile", action="store_true", help="without mx.compile")
    a("--seed", type=int, default=0, help="of the order of the text")
    a("--save-every", type=count, default=200, metavar="STEPS")
    a("--keep", type=count, default=2, metavar="N", help="states to keep (default: 2)")
    a("--log-every", type=count, default=10, metavar="STEPS")
    a("--eval-text", metavar="PATH", action="append", default=[], help="text not trained on")
    a("--eval-every", type=cli.number(int, 0), default=0, metavar="STEPS", help="0: at the ends")
    a("--eval-tokens", type=count, default=32768, help="of it to use (default: 32768)")
    a("--eval-needle", metavar="N", type=count, action="append", default=[], help="haystack length")
    a("--needles", type=count, default=2, help="for each length and depth (default: 2)")
    a("--plot", metavar="FILE", help="PNG of the losses")
    a("--restart", action="store_true", help="forget OUT.run and begin anew")
    a("--overwrite", action="store_true", help="replace an existing OUT")
    cli.add_common(p)
    return p


@dataclass
class Plan:
    """A stage, ready to run.

    Attributes:
        recipe: steps.Recipe. source: The opened student. teacher: Opened base, or None.
        documents: To train on. rhythm: loop.Rhythm.
    """

    recipe: Any
    source: Any
    teacher: Any
    documents: Any
    rhythm: Any


def make_recipe(args: argparse.Namespace):
    """The recipe that the flags ask for.

    Raises:
        UsageError: Flags that contradict each other.
    """
    from .loading import on_cpu
    from .training.steps import Recipe

    rate, length = DEFAULTS[args.stage]
    length = args.length or length
    if (args.steps is None) == (args.tokens is None):
        raise UsageError("Give either --steps or --tokens.")
    steps = args.steps or max(1, round(args.tokens / (args.batch * length)))
    if args.batch % args.accumulate:
        raise UsageError(
            f"--batch {args.batch} is not divisible by --accumulate {args.accumulate}."
        )
    if args.stage == "align" and not (args.kl is None and args.ce is None):
        raise UsageError("--kl and --ce have no effect in align.")
    kl = float(args.stage == "distil") if args.kl is None else args.kl
    ce = float(args.stage == "long") if args.ce is None else args.ce
    if args.stage != "align" and kl + ce == 0:
        raise UsageError("--kl 0 and --ce 0 leave nothing to learn.")
    if args.teacher is None and (args.stage == "align" or kl):
        raise UsageError(f"--stage {args.stage} needs --teacher, the base model, for its loss.")
    return Recipe(
        stage=args.stage,
        steps=steps,
        length=length,
        batch=args.batch,
        accumulate=args.accumulate,
        lr=rate if args.lr is None else args.lr,
        warmup=steps // 50 if args.warmup is None else args.warmup,
        lr_end=args.lr_end,
        clip=args.clip,
        seed=args.seed,
        kl=kl,
        ce=ce,
        dtype=args.dtype or ("float32" if on_cpu() else "bfloat16"),
        logit_scale=args.logit_scale == "on",
        chunk=args.chunk,
    )


def make_plan(args: argparse.Namespace) -> Plan:
    """Open everything and check that it fits, before any time is spent.

    Raises:
        HydraError: See the messages.
    """
    from .convert import resolve_source
    from .target import check_target, real_path
    from .teacher import open_base, source_tokenizer
    from .tokens import Batches, read_documents
    from .training.evaluate import Needles
    from .training.loop import Rhythm
    from .training.student import open_student

    recipe = make_recipe(args)
    if args.plot:
        heatmap.require_matplotlib("--plot")
        cli.check_target(Path(args.plot))
    source = open_student(resolve_source(args.student, None))
    check_target(source.path, real_path(Path(args.out)), args.overwrite)
    teacher = None
    if args.teacher is not None:
        teacher = open_base(resolve_source(args.teacher, None))
        require_pair(source.args, teacher.args, recipe, args)
    vocab, tokenizer = source.args.vocab_size, lambda: source_tokenizer(source)
    documents = read_documents(args.text, vocab, tokenizer)
    Batches(documents, recipe.length, recipe.seed)
    windows = needles = None
    if args.eval_text:
        held_out = read_documents(args.eval_text, vocab, tokenizer)
        width = min(recipe.length, held_out.total - 1)
        batches = Batches(held_out, width, 0)
        windows = batches.take(0, min(batches.windows, max(1, args.eval_tokens // width)))
    if args.eval_needle:
        needles = Needles(tuple(args.eval_needle), args.needles, recipe.seed, tokenizer())
        needles.check()
    rhythm = Rhythm(args.log_every, args.save_every, args.eval_every, windows, needles)
    return Plan(recipe, source, teacher, documents, rhythm)


def require_pair(student, teacher, recipe, args: argparse.Namespace):
    """Refuse a teacher that this student cannot learn from.

    Raises:
        UsageError: Their sizes differ, or the sequences are longer than the teacher can read.
    """
    names = ["vocab_size"]
    if recipe.stage == "align":
        names += ["hidden_size", "num_hidden_layers"]
    for name in names:
        one, other = getattr(student, name), getattr(teacher, name)
        if one != other:
            raise UsageError(
                f"{name} is {one} in the student and {other} in the teacher.",
                "Give as --teacher the model that the student was made from.",
            )
    longest = teacher.max_position_embeddings
    if longest is not None and recipe.length > longest:
        raise UsageError(
            f"The teacher reads {longest:,} tokens; --length is {recipe.length:,}.",
            "Use a shorter --length, or --stage long without --teacher.",
        )


def run_stage(args: argparse.Namespace, plan: Plan, stop) -> bool:
    """Train, then write OUT; False when it was interrupted, and will go on next time."""
    from .model import Model
    from .teacher import load_teacher
    from .tokens import Batches
    from .training.loop import train
    from .training.plot import plot_losses
    from .training.state import LOG, Run, read_log
    from .training.steps import Trainer, parameter_count
    from .training.student import fingerprint, read_weights, write_student

    out, recipe = Path(args.out).expanduser(), plan.recipe
    folder = out.with_name(f"{out.name}.run")
    inputs = {"student": fingerprint(plan.source.path), "text": plan.documents.fingerprint()}
    if plan.teacher is not None:
        inputs["teacher"] = fingerprint(plan.teacher.path)
    run = Run(folder, recipe, inputs, args.keep, args.restart)
    weights = read_weights(plan.source)
    teacher = None if plan.teacher is None else load_teacher(plan.teacher, recipe.dtype)
    trainer = Trainer(
        recipe, plan.source.args, weights, teacher, args.grad_checkpoint, not args.no_compile
    )
    batches = Batches(plan.documents, recipe.length, recipe.seed)
    student, total = Model(plan.source.args), parameter_count(weights)
    frozen = {n: x for n, x in weights.items() if n not in trainer.weights}
    del weights
    say = (lambda line: None) if args.quiet else cli.say
    say(
        f"{recipe.stage}: {parameter_count(trainer.weights):,} of "
        f"{total:,} weights, {recipe.steps:,} steps of "
        f"{recipe.tokens_per_step:,} tokens from {plan.documents.total:,}, {recipe.dtype}"
    )
    report = lambda record: say(describe(record, recipe))  # noqa: E731
    done = train(trainer, run, batches, plan.rhythm, student, frozen, report, stop)
    if args.plot:
        title = f"{recipe.stage}, {recipe.length} tokens a sequence"
        plot_losses(read_log(folder / LOG), Path(args.plot).expanduser(), title)
    if not done:
        say(f"Stopped; the same command goes on from {folder}.")
        return False
    with cli.progress("writing", enabled=not args.quiet) as bar:
        final = {**frozen, **trainer.weights}
        write_student(plan.source, final, out, args.save_dtype, args.overwrite, bar)
    say(f"wrote {out}")
    return True


def describe(record: dict, recipe) -> str:
    """One line of the log for people."""
    if "eval" in record:
        found = "  ".join(f"{k} {v:,.4g}" for k, v in record["eval"].items())
        return f"step {record['step']:,}  held out: {found}"
    shown = [f"step {record['step']:,}/{recipe.steps:,}"]
    for key in ("loss", "kl", "ce", "relative", "grad_norm"):
        if key in record:
            shown.append(f"{key} {record[key]:.4g}")
    shown += [text.rate(record["tokens_per_s"]), text.size(record["peak_memory"])]
    return "  ".join(shown)


def work(args: argparse.Namespace) -> int:
    """Do what the flags say; returns the exit code."""
    plan = make_plan(args)
    with cli.Interrupt() as interrupt:
        try:
            done = run_stage(args, plan, interrupt)
        except (MemoryError, RuntimeError) as e:
            if not cli.is_out_of_memory(e):
                raise
            raise HydraError(
                f"Out of memory ({text.first_line(e)}).",
                "Try --accumulate, --grad-checkpoint or a smaller --chunk; states are kept.",
            ) from e
    return 0 if done else cli.INTERRUPTED


def main(argv: list | None = None) -> int:
    """Entry point of `hydra-mlx transfer`; returns the exit code."""
    return cli.run(build_parser(), work, argv)


if __name__ == "__main__":
    sys.exit(main())
