"""Which heads stay full attention: by importance, at fixed slots, or at random (spec section 3).

Everything here is arithmetic on lists; the scores come from `hydra-mlx score` or from anywhere.
Axes: L layers, H heads of a layer, K heads that stay full attention.
"""

import json
import math
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from .errors import ConfigError, UsageError

STRATEGIES = ("scores", "fixed", "random")
# Names a scores file may use: ours, and those of `hydra-mlx score`.
NAMES = {"scores": ("scores", "score"), "raw": ("raw", "raw_effect")}


@dataclass(frozen=True)
class Scores:
    """Importance of every head.

    Attributes:
        scores: [L, H], fused over capabilities. raw: [L, H], raw indirect effects, for ties.
        model: What the file says about the model that was scored.
    """

    scores: np.ndarray
    raw: np.ndarray
    model: dict


def read_scores(path: Path, layers: int, heads: int) -> Scores:
    """Read a scores file: {"model", "layers": L, "heads": H, "scores": L x H, "raw": L x H}.

    Args:
        layers, heads: L and H of the model the scores are wanted for.

    Raises:
        UsageError: Unreadable. ConfigError: Not such a file, or for a model of other sizes.
    """
    try:
        data = json.loads(path.read_text("utf-8"))
    except OSError as e:
        raise UsageError(
            f"The scores {path} cannot be read ({e.strerror or type(e).__name__}).",
            "`hydra-mlx score` makes such a file.",
        ) from None
    except (ValueError, RecursionError):
        raise ConfigError(f"The scores {path} are not valid JSON.") from None
    data = data if isinstance(data, dict) else {}
    found = {k: next((data[n] for n in names if n in data), None) for k, names in NAMES.items()}
    if found["scores"] is None:
        raise ConfigError(f'{path} has no "scores".', "`hydra-mlx score` makes such a file.")
    model = data.get("model")
    model = model if isinstance(model, dict) else {}
    for name, want in (("layers", layers), ("heads", heads)):
        have = data.get(name, model.get(name, want))
        if have != want:
            raise ConfigError(
                f"{path} has scores for {name} = {have!r}, the model has {want}.",
                "Score this model, not another one.",
            )
    scores = _matrix(path, "scores", found["scores"], layers, heads)
    raw = scores if found["raw"] is None else _matrix(path, "raw", found["raw"], layers, heads)
    return Scores(scores, raw, model)


def _matrix(path: Path, name: str, rows: Any, layers: int, heads: int) -> np.ndarray:
    try:
        x = np.array(rows, np.float64)
    except (ValueError, TypeError):
        x = np.zeros(0)
    if x.shape != (layers, heads):
        raise ConfigError(
            f'{path}: "{name}" must be {layers} lists of {heads} numbers, one list a layer.'
        )
    if not np.isfinite(x).all():
        raise ConfigError(f'{path}: "{name}" holds NaN or infinity.')
    return x


def parse_ratio(text: str) -> Fraction:
    """The share of full-attention heads in a ratio linear:full, such as 3:1.

    Raises:
        UsageError: Not two whole numbers, or both are 0.
    """
    try:
        linear, full = (int(part) for part in text.split(":"))
        if min(linear, full) < 0 or linear + full == 0:
            raise ValueError
    except ValueError:
        raise UsageError(
            f"--ratio is {text!r}, expected linear:full heads, such as 3:1 or 7:1."
        ) from None
    return Fraction(full, linear + full)


def default_floor(share: Fraction) -> int:
    """Full-attention heads every layer keeps: none down to a quarter, one below (spec 3)."""
    return 0 if share >= Fraction(1, 4) or share == 0 else 1


def count_heads(share: Fraction, layers: int, heads: int, floor: int) -> int:
    """K, the nearest whole number to share * L * H (a half counts up).

    Raises:
        UsageError: The floor asks for more heads than K or than a layer has.
    """
    count = math.floor(share * layers * heads + Fraction(1, 2))
    if floor > heads:
        raise UsageError(f"--floor is {floor}, but a layer has {heads} heads.")
    if floor * layers > count:
        raise UsageError(
            f"--floor {floor} in {layers} layers needs {floor * layers} full-attention heads; "
            f"the ratio gives {count}.",
            "Choose a smaller floor or a ratio with more full-attention heads.",
        )
    return count


def top_heads(scores: np.ndarray, raw: np.ndarray, count: int, floor: int) -> list:
    """The best `count` heads, after each layer's best `floor` are reserved.

    Args:
        scores, raw: [L, H]; ties go by score, raw effect, layer, head.

    Returns:
        L sorted lists of head indices.
    """
    layers, heads = scores.shape
    order = sorted(
        ((i, h) for i in range(layers) for h in range(heads)),
        key=lambda x: (-scores[x], -raw[x], *x),
    )
    chosen: list = [[] for _ in range(layers)]
    reserved = set()
    for i, h in order:
        if len(chosen[i]) < floor:
            chosen[i].append(h)
            reserved.add((i, h))
    for i, h in [x for x in order if x not in reserved][: count - floor * layers]:
        chosen[i].append(h)
    return [sorted(c) for c in chosen]


def fixed_heads(layers: int, heads: int, count: int, floor: int) -> list:
    """Heads at regular slots: `count` spread evenly over the layers, and evenly in each.

    Returns:
        L sorted lists of head indices.

    Raises:
        UsageError: An even spread gives some layer fewer than `floor`.
    """
    each = [(i + 1) * count // layers - i * count // layers for i in range(layers)]
    if min(each) < floor:
        raise UsageError(
            f"Fixed slots give some layer {min(each)} heads; --floor asks for {floor}."
        )
    return [[j * heads // n for j in range(n)] for n in each]


def select_heads(
    strategy: str,
    layers: int,
    heads: int,
    count: int,
    floor: int,
    seed: int,
    scores: Scores | None = None,
) -> list:
    """Full-attention heads of every layer.

    Args:
        strategy: "scores" (needs `scores`), "fixed", or "random" (by `seed`).
        count: K. floor: Heads that every layer keeps at least.

    Returns:
        L sorted lists of head indices, K in all.
    """
    if strategy == "fixed":
        return fixed_heads(layers, heads, count, floor)
    if strategy == "random":
        lottery = np.random.RandomState(seed % 2**32).random_sample((layers, heads))
        return top_heads(lottery, lottery, count, floor)
    if scores is None:
        raise UsageError("--select scores needs --scores FILE.", "`hydra-mlx score` makes it.")
    return top_heads(scores.scores, scores.raw, count, floor)
