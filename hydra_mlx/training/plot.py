"""Loss curves of a stage as a PNG."""

from pathlib import Path

from .. import heatmap

CURVES = {"loss": "loss", "kl": "KL", "ce": "cross-entropy", "relative": "MSE / power"}
HELD_OUT = {"kl": "KL, held out", "perplexity_ratio": "perplexity ratio, held out"}


def plot_losses(records: list, path: Path, title: str):
    """Draw training and held-out losses against tokens seen.

    Args:
        records: Of losses.jsonl. path: PNG to write. title: Above the picture.

    Raises:
        UsageError: No matplotlib, or the file cannot be written.
    """
    figure = heatmap.figure(7, 4.2)
    axes = figure.add_subplot()
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
    heatmap.save(figure, path)
