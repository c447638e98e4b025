"""How a result of `hydra-mlx score` is shown: text on a terminal, PNG files."""

import sys
from collections.abc import Callable
from pathlib import Path

from . import heatmap


def show(data: dict):
    """The heat map and the summary, on stdout."""
    score, summary = data["score"], data["summary"]
    colour = heatmap.wants_colour(sys.stdout)
    print(heatmap.text_map(score, range(len(score)), range(len(score[0])), colour))
    best = ", ".join(f"{i}.{h} ({score[i][h]:.2f})" for i, h in data["ranking"][:10])
    print(f"best heads (layer.head)  {best}")
    shares = ", ".join(f"{100 * v:.1f} % above {k}" for k, v in summary["share_raw_above"].items())
    print(f"raw effects              {shares}")
    if summary["half_spearman"] is not None:
        overlap = summary["half_top_quarter_overlap"]
        print(
            f"halves of the pairs      Spearman {summary['half_spearman']:.3f}, "
            f"{100 * overlap:.0f} % of the best quarter in common"
        )
    skipped = ", ".join(f"{c} {n}" for c, n in summary["skipped_pairs"].items())
    print(f"pairs                    {summary['pairs']}; skipped: {skipped}")
    for c in set(summary["skipped_pairs"]) - set(data["capabilities"]):
        print(f"                         all of {c} were skipped, which does not count therefore")
    if known := data.get("knockout"):
        print(f"right answers with heads removed ({known['ablation']} ablation), by score / random")
        for c, curve in known["accuracy"]["score"].items():
            other = known["accuracy"]["random"][c]
            steps = zip(known["removed"], curve, other, strict=True)
            print(f"  {c:<7}" + "  ".join(f"{n}: {a:.2f}/{b:.2f}" for n, a, b in steps))


def draw(data: dict, path: Path, note: Callable):
    """The heat map as PNG, and beside it the knockout curve if there is one."""
    score, name = data["score"], data["model"]["name"]
    heads = range(len(score[0]))
    axes = ("head", "layer")
    heatmap.png_map(path, score, range(len(score)), heads, axes, f"{name}: head scores")
    note(f"wrote {path}")
    if known := data.get("knockout"):
        curves = {
            f"{c}, {'by score' if o == 'score' else o}": y
            for o, found in known["accuracy"].items()
            for c, y in found.items()
        }
        beside = path.with_name(f"{path.stem}-knockout{path.suffix}")
        labels = (f"heads removed ({known['ablation']} ablation)", "right answers")
        heatmap.png_curves(beside, known["removed"], curves, labels, f"{name}: knockout")
        note(f"wrote {beside}")
