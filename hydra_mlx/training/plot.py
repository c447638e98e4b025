"""Loss curves of a stage as a PNG."""

import importlib.util
from pathlib import Path

from ..errors import UsageError

CURVES = {"loss": "loss", "kl": "KL", "ce": "cross-entropy", "relative": "MSE / power"}
HELD_OUT = {"kl": "KL, held out", "perplexity_ratio": "perplexity ratio, held out"}


def require_matplotlib():
    """Say at the start, not after hours, that a plot cannot be drawn.

    Raises:
        UsageError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib.", "pip install 'hydra_mlx[bench]'")


def plot_losses(records: list, path: Path, title: str):
    """Draw training and held-out losses against tokens seen.

    Args:
        records: Of losses.jsonl. path: PNG to write. title: Above the picture.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    train = [r for r in records if "loss" in r]
    for key, label in CURVES.items():
        rows = [r for r in train if key in r and (key == "loss" or r[key] != r["loss"])]
        if rows:
            axes.plot([r["tokens"] for r in rows], [r[key] for r in rows], label=label)
    tests = [r for r in records if "eval" in r]
    for key, label in HELD_OUT.items():
        rows = [r for r in tests if key in r["eval"]]
        if rows:
            x, y = [r["tokens"] for r in rows], [r["eval"][key] for r in rows]
            axes.plot(x, y, "o--", markersize=4, label=label)
    axes.set(xlabel="tokens", yscale="log", title=title)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
