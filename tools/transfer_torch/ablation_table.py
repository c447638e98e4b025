"""The table of ablate.py: its rows from the results of the variants, and as Markdown."""

import json
from pathlib import Path

LOWER, HIGHER = "KL and ratio: lower is better", "needles: higher is better"
BLANK = "-"


def collect(out: Path, variants: list[str], settings: dict) -> list[dict]:
    """One row a variant, in order: its result, or {"variant", "reason"} if it has none.

    A result that was made with other settings counts as none.
    """
    rows = []
    for name in variants:
        row = {"variant": name, "reason": "not run"}
        for file in ("failed.json", "result.json"):
            if (out / name / file).exists():
                row = json.loads((out / name / file).read_text())
        if row.get("settings", settings) != settings:
            row = {"variant": name, "reason": "was run with other settings"}
        rows.append(row)
    return rows


def _line(cells: list) -> str:
    return "| " + " | ".join(str(c) for c in cells) + " |"


def _text(row: dict) -> list:
    """KL and perplexity ratio on held-out documents and on the teacher's text."""
    return [row[text][key] for text in ("long", "teacher") for key in ("kl", "ratio")]


def _needles(needles: dict, lengths: list[int]) -> list:
    return [needles[str(n)][kind] for n in lengths for kind in ("single", "multi")]


def table(rows: list[dict], lengths: list[int]) -> str:
    """Markdown: rows of `collect`, the teacher's needles last; lengths of the needles in tokens."""
    head = ["variant", "FA heads", "key/value heads", "weights", "align loss"]
    head += ["KL documents", "ratio documents", "KL teacher text", "ratio teacher text"]
    head += [f"{kind} {n}" for n in lengths for kind in ("single", "multi")] + ["seconds"]
    lines = [_line(head), _line(["---"] * len(head))]
    good = [r for r in rows if "reason" not in r]
    for row in rows:
        if "reason" in row:
            # A bar would end the cell.
            reason = row["reason"].replace("|", "/")
            lines.append(_line([row["variant"], reason, *[BLANK] * (len(head) - 2)]))
            continue
        loss = BLANK if row["align_loss"] is None else row["align_loss"]
        cells = [row["variant"], row["fa_heads"], row["kv_heads"]]
        cells += [f"{row['parameters'] / 1e6:.1f} M", loss, *_text(row)]
        cells += [*_needles(row["needles"], lengths), round(sum(row["seconds"].values()))]
        lines.append(_line(cells))
    if good:
        cells = ["teacher", *[BLANK] * 4, 0, 1, 0, 1]
        cells += [*_needles(good[0]["teacher_needles"], lengths), BLANK]
        lines.append(_line(cells))
        lines.append(f"\n{good[0]['tokens']:,} tokens each, seed {good[0]['settings']['seed']}. "
                     f"{LOWER}; {HIGHER}.")  # fmt: skip
    return "\n".join(lines)
