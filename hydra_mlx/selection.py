"""Which heads stay full attention: by importance, at fixed slots, or at random (spec section 3).

Everything here is arithmetic on lists; the scores come from `hydra-mlx score` or from anywhere.
Axes: L layers, H heads of a layer, K heads that stay full attention.
"""

import math
from fractions import Fraction
from pathlib import Path

import numpy as np

from .errors import UsageError
from .files import write_json
from .score_file import Scores, ranking

STRATEGIES = ("scores", "fixed", "random")


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
    check_floor(layers, heads, count, floor)
    return count


def check_floor(layers: int, heads: int, count: int, floor: int):
    """Whether each of the layers can keep `floor` of `count` heads.

    Raises:
        UsageError: The floor asks for more heads than `count` or than a layer has.
    """
    if floor > heads:
        raise UsageError(f"--floor is {floor}, but a layer has {heads} heads.")
    if floor * layers > count:
        raise UsageError(
            f"--floor {floor} in {layers} layers needs {floor * layers} full-attention heads, "
            f"but there are {count}.",
            "Choose a smaller floor or a ratio with more full-attention heads.",
        )


def top_heads(scores: np.ndarray, raw: np.ndarray, count: int, floor: int) -> list:
    """The best `count` heads, after each layer's best `floor` are reserved.

    Args:
        scores, raw: [L, H]; ties go by score, raw effect, layer, head.

    Returns:
        L sorted lists of head indices.
    """
    layers, order = scores.shape[0], ranking(scores, raw)
    chosen: list = [[] for _ in range(layers)]
    rest = []
    for i, h in order:
        if len(chosen[i]) < floor:
            chosen[i].append(h)
        else:
            rest.append((i, h))
    for i, h in rest[: count - floor * layers]:
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

    Raises:
        UsageError: As check_floor; scores are missing.
    """
    check_floor(layers, heads, count, floor)
    if strategy == "fixed":
        return fixed_heads(layers, heads, count, floor)
    if strategy == "random":
        lottery = np.random.RandomState(seed % 2**32).random_sample((layers, heads))
        return top_heads(lottery, lottery, count, floor)
    if scores is None:
        raise UsageError("--select scores needs --scores FILE.", "`hydra-mlx score` makes it.")
    return top_heads(scores.score, scores.raw, count, floor)


def write_heads(folder: Path, head_map: dict):
    """heads.json in a checkpoint's folder: what `hydra-mlx convert --head-map` reads.

    Args:
        head_map: "full_attention_heads" and other HydraHead config keys.
    """
    write_json(folder / "heads.json", head_map)
