"""Runs a stage: batches in, states and log lines out, evaluation now and then."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from mlx.utils import tree_unflatten

from ..errors import HydraError
from ..model import Model
from ..tokens import Batches
from .evaluate import Needles, evaluate
from .state import Run
from .steps import Trainer, cast_weights


@dataclass(frozen=True)
class Rhythm:
    """How often what happens, in steps; 0 never.

    Attributes:
        log, save, evaluate: Steps between two. windows: [N, T + 1] held-out token ids, or None.
        needles: Wanted needle evaluation, or None.
    """

    log: int
    save: int
    evaluate: int
    windows: np.ndarray | None
    needles: Needles | None

    def evaluates(self, step: int, last: int) -> bool:
        """Whether there is an evaluation after `step` steps."""
        if self.windows is None and self.needles is None:
            return False
        return step in (0, last) or (self.evaluate > 0 and step % self.evaluate == 0)


class Meter:
    """Mean losses and tokens per second since the last report; pauses are not counted."""

    def __init__(self):
        self.begin()

    def begin(self):
        """Start again from nothing."""
        self.kept: list = []
        self.started = time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens in here takes no time."""
        mx.eval(self.kept)
        before = time.perf_counter()
        yield
        self.started += time.perf_counter() - before

    def report(self, step: int, tokens_per_step: int, rate: float) -> dict:
        """Wait for what was kept; one record for the log."""
        mx.eval(self.kept)
        seconds = time.perf_counter() - self.started
        names = self.kept[0]
        out = {"step": step, "tokens": step * tokens_per_step}
        out.update({n: sum(k[n].item() for k in self.kept) / len(self.kept) for n in names})
        out["lr"] = rate
        out["tokens_per_s"] = round(len(self.kept) * tokens_per_step / max(seconds, 1e-9), 1)
        out["peak_memory"] = mx.get_peak_memory()
        self.begin()
        return out


def whole(model: Model, frozen: dict, trainer: Trainer) -> Model:
    """A model with the frozen and the trained weights, in the type of the arithmetic."""
    weights = cast_weights({**frozen, **trainer.weights}, trainer.dtype)
    model.update(tree_unflatten(list(weights.items())))
    model.eval()
    return model


def train(
    trainer: Trainer,
    run: Run,
    batches: Batches,
    rhythm: Rhythm,
    student: Model,
    frozen: dict,
    report: Callable[[dict], None],
    stop: Callable[[], bool],
) -> bool:
    """Go on from the run's newest state to the last step.

    Args:
        student: A model in the student's config, to evaluate with. frozen: The weights that
            this stage leaves alone. report: Gets every record of the log. stop: Whether to save
            and stop now.

    Returns:
        Whether the last step was reached.

    Raises:
        HydraError: The loss is no number any more.
    """
    recipe = trainer.recipe
    step, meter = run.resume(trainer), Meter()
    mx.reset_peak_memory()

    def note(record: dict):
        run.log(record)
        report(record)

    def examine():
        model = whole(student, frozen, trainer)
        found = evaluate(model, trainer.teacher, rhythm.windows, rhythm.needles, recipe.chunk)
        note({"step": step, "tokens": step * recipe.tokens_per_step, "eval": found})

    if step == 0 and rhythm.evaluates(0, recipe.steps):
        examine()
    meter.begin()
    while step < recipe.steps:
        tokens = mx.array(batches.take(step * recipe.batch, recipe.batch))
        losses = trainer.advance(tokens)
        if meter.kept:
            mx.eval(meter.kept[-1])  # one step may be under way while the next is prepared
        meter.kept.append(losses)
        step += 1
        leaving = stop()
        due = [every and step % every == 0 for every in (rhythm.log, rhythm.save)]
        if due[0] or leaving or step == recipe.steps:
            record = meter.report(
                step, recipe.tokens_per_step, trainer.optimizer.learning_rate.item()
            )
            if not math.isfinite(record["loss"]):
                raise HydraError(
                    f"The loss is {record['loss']} at step {step}.",
                    "Try a smaller --lr; the states before are whole.",
                )
            note(record)
        if rhythm.evaluates(step, recipe.steps):
            with meter.paused():
                examine()
        if due[1] or leaving or step == recipe.steps:
            with meter.paused():
                run.save(trainer)
        if leaving:
            return step == recipe.steps
    return True
