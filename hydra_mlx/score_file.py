"""The score file: `hydra-mlx score` writes it, `hydra-mlx migrate` reads it (docs/scoring.md).

Writer and reader take every name from here. Axes: L layers, H heads of a layer.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .errors import ConfigError
from .files import read_json

FORMAT, VERSION = "hydra_mlx head scores", 1
SCORE, RAW = "score", "raw_effect"
MADE_BY = "`hydra-mlx score MODEL --out FILE` makes such a file."


@dataclass(frozen=True)
class Scores:
    """Importance of every head (spec section 3).

    Attributes:
        score: [L, H], 0 to 1, fused over capabilities. raw: [L, H], raw indirect effects, for
            ties. sha256: Of the weights of the model that was scored, see manifest.model_hash.
    """

    score: np.ndarray
    raw: np.ndarray
    sha256: str


def header(model: dict, probes: dict, versions: dict) -> dict:
    """What a score file belongs to: equal headers, equal scores.

    Args:
        model: At least "sha256", "layers" and "heads".
    """
    return {
        "format": FORMAT,
        "format_version": VERSION,
        "model": model,
        "probes": probes,
        "versions": versions,
    }


def tables(score: np.ndarray, raw: np.ndarray) -> dict:
    """The [L, H] tables and the ranking as the file holds them."""
    return {SCORE: score.tolist(), RAW: raw.tolist(), "ranking": ranking(score, raw)}


def ranking(score: np.ndarray, raw: np.ndarray) -> list:
    """[layer, head] of all heads, best first; ties by score, raw effect, layer, head."""
    heads = [[i, h] for i in range(score.shape[0]) for h in range(score.shape[1])]
    return sorted(heads, key=lambda x: (-score[tuple(x)], -raw[tuple(x)], *x))


def read_scores(path: Path, layers: int | None = None, heads: int | None = None) -> Scores:
    """Read a score file.

    Args:
        layers, heads: L and H of the model the scores are wanted for; None takes any.

    Raises:
        UsageError: Unreadable. ConfigError: Not such a file, or for a model of other sizes.
    """
    data = read_json(path, "The score file", MADE_BY)
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ConfigError(f"{path} is not a score file.", MADE_BY)
    if data.get("format_version") != VERSION:
        raise ConfigError(
            f"{path} has version {data.get('format_version')!r} of the score file, "
            f"expected {VERSION}.",
            "Score the model again with this version of hydra_mlx.",
        )
    model = data.get("model")
    model = model if isinstance(model, dict) else {}
    for name, want in (("layers", layers), ("heads", heads)):
        have = model.get(name)
        if type(have) is not int or have != (have if want is None else want):
            raise ConfigError(
                f"{path} has scores for {name} = {have!r}, the model has {want or name}.",
                "Score this model, not another one.",
            )
    shape = model["layers"], model["heads"]
    tables = (_matrix(path, name, data.get(name), shape) for name in (SCORE, RAW))
    return Scores(*tables, str(model.get("sha256")))


def _matrix(path: Path, name: str, rows: Any, shape: tuple) -> np.ndarray:
    try:
        x = np.array(rows, np.float64)
    except (ValueError, TypeError):
        x = np.zeros(0)
    if x.shape != shape:
        raise ConfigError(
            f'{path}: "{name}" must be {shape[0]} lists of {shape[1]} numbers, one list a layer.',
            MADE_BY,
        )
    if not np.isfinite(x).all():
        raise ConfigError(f'{path}: "{name}" holds NaN or infinity.', MADE_BY)
    return x
