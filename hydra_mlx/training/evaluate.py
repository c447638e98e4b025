"""How far the student is from its teacher, on text that neither is trained on.

Axes: N windows, T tokens of a window.
"""

import math
import random
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from .. import needles
from ..model import Model
from ..probes import make_needle
from .losses import hidden_states, output_matrix, position_losses


@dataclass(frozen=True)
class Needles:
    """What needle evaluation is wanted during training.

    Attributes:
        lengths: Tokens of the texts. trials: Texts of each length and depth. seed: Of all.
        tokenizer: The model's.
    """

    lengths: tuple
    trials: int
    seed: int
    tokenizer: Any

    def check(self):
        """Make a text of each length; asked before the training.

        Raises:
            UsageError: A length is too short for the question.
        """
        for length in self.lengths:
            make_needle(self.tokenizer, random.Random(0), length, 0.5)

    def accuracy(self, model: Model, length: int) -> float:
        """Share of single-key needles found over all depths."""
        settings = needles.NeedleSettings(lengths=(length,), trials=self.trials, seed=self.seed)
        return needles.accuracy(needles.evaluate(model, self.tokenizer, settings), 1, length)


def compare(student: Model, teacher: Model | None, windows: np.ndarray, chunk: int) -> dict:
    """KL(teacher || student) in nats per token, perplexities and their ratio.

    Args:
        windows: [N, T + 1] token ids. teacher: None gives the student's perplexity only.
        chunk: Positions whose logits exist at a time.

    Returns:
        {"tokens", "perplexity"} and with a teacher {"kl", "teacher_perplexity",
        "perplexity_ratio"}.
    """
    kl = ce = ce_teacher = 0.0
    for row in windows:
        tokens, targets = mx.array(row[None, :-1]), mx.array(row[1:])
        h, w = hidden_states(student, tokens)[0], output_matrix(student)
        if teacher is None:
            ce += position_losses(h, w, targets, chunk=chunk)[1].item()
            continue
        h_teacher, w_teacher = hidden_states(teacher, tokens)[0], output_matrix(teacher)
        one = position_losses(h, w, targets, h_teacher, w_teacher, chunk)
        kl, ce = kl + one[0].item(), ce + one[1].item()
        ce_teacher += position_losses(h_teacher, w_teacher, targets, chunk=chunk)[1].item()
    n = windows.shape[0] * (windows.shape[1] - 1)
    out = {"tokens": n, "perplexity": _exp(ce / n)}
    if teacher is not None:
        out["kl"] = kl / n
        out["teacher_perplexity"] = _exp(ce_teacher / n)
        out["perplexity_ratio"] = _exp((ce - ce_teacher) / n)
    return out


def _exp(x: float) -> float:
    return math.exp(min(x, 700.0))


def evaluate(
    student: Model,
    teacher: Model | None,
    windows: np.ndarray | None,
    needles: Needles | None,
    chunk: int,
) -> dict:
    """Everything that was asked for, as one flat record."""
    out = {} if windows is None else compare(student, teacher, windows, chunk)
    if needles is not None:
        out.update({f"needle_{n}": needles.accuracy(student, n) for n in needles.lengths})
    return out
