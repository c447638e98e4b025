"""What `hydra-mlx bench` prints and draws of its measurements."""

import statistics
from collections.abc import Sequence
from pathlib import Path

from . import text

FAR = 4  # predictions so many times above what was measured need a logarithmic axis


def spread(values: Sequence) -> dict:
    """Median, least and most."""
    figures = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {k: round(v, 3) for k, v in figures.items()}


def rows(cells: dict, speed: float, tflops: float | None) -> list:
    """One dict for every model and length that was measured, or why it was not."""
    out = []
    for (label, length), cell in cells.items():
        row: dict = {"model": label, "tokens": length, "runs": len(cell.samples)}
        if cell.error:
            row["error"] = cell.error
        if cell.samples:
            row["prefill_tps"] = spread([s.prefill for s in cell.samples])
            row["decode_tps"] = spread([s.decode for s in cell.samples])
            row["peak_bytes"] = max(s.peak for s in cell.samples)
            if cell.floor is not None:
                row["step_bytes"] = cell.floor.nbytes
                row["predicted_most_tps"] = round(1000 / cell.floor.milliseconds(speed, tflops), 3)
        if cell.samples or cell.error:
            out.append(row)
    return out


def _figure(s: dict) -> str:
    digits = 1 if s["median"] < 1000 else 0
    low, mid, high = (f"{s[k]:,.{digits}f}" for k in ("min", "median", "max"))
    return mid if low == high else f"{mid} ({low} to {high})"


def table(found: list) -> list:
    """Lines for people; models after the first with their ratio to it."""
    head = ["tokens", "model", "prefill tok/s", "decode tok/s", "most", "peak"]
    first = {r["tokens"]: r for r in reversed(found)}
    compared = len({r["model"] for r in found}) > 1
    lines = [[*head, "against the first"] if compared else head]
    for r in found:
        if "decode_tps" not in r:
            lines.append(
                [f"{r['tokens']:,}", r["model"], r["error"], "", "", "", ""][: len(lines[0])]
            )
            continue
        most = r.get("predicted_most_tps")
        share = (
            "-"
            if most is None
            else f"{100 * r['decode_tps']['median'] / most:.0f} % of {most:,.1f}"
        )
        line = [f"{r['tokens']:,}", r["model"], _figure(r["prefill_tps"]), _figure(r["decode_tps"])]
        line += [share, text.size(r["peak_bytes"])]
        if compared:
            line.append(_against(r, first[r["tokens"]]))
        lines.append(line)
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return ["  ".join(f"{x:<{w}}" for x, w in zip(x, widths, strict=True)).rstrip() for x in lines]


def _against(r: dict, first: dict) -> str:
    if r is first or "decode_tps" not in first:
        return ""
    prefill, decode = (r[k]["median"] / first[k]["median"] for k in ("prefill_tps", "decode_tps"))
    peak = r["peak_bytes"] / first["peak_bytes"]
    return f"prefill x{prefill:.2f}, decode x{decode:.2f}, peak x{peak:.2f}"


def plot(found: list, path: Path, title: str):
    """Prefill, decode and peak memory by context length as a PNG."""
    from . import heatmap

    fig = heatmap.figure(12, 3.8)
    panels = fig.subplots(1, 3)
    measured = [r for r in found if "decode_tps" in r]
    lengths = sorted({r["tokens"] for r in measured})
    for label in dict.fromkeys(r["model"] for r in measured):
        mine = [r for r in measured if r["model"] == label]
        x = [r["tokens"] for r in mine]
        for ax, key in zip(panels, ("prefill_tps", "decode_tps"), strict=False):
            y = [r[key]["median"] for r in mine]
            errors = [[r[key]["median"] - r[key]["min"] for r in mine]]
            errors.append([r[key]["max"] - r[key]["median"] for r in mine])
            (line, *_) = ax.errorbar(x, y, errors, marker="o", markersize=3, capsize=2, label=label)
        most = [(r["tokens"], r["predicted_most_tps"]) for r in mine if "predicted_most_tps" in r]
        if most:
            panels[1].plot(
                *zip(*most, strict=True), "--", color=line.get_color(), lw=0.8,
                label=f"{label}, predicted most",
            )  # fmt: skip
        panels[2].plot(x, [r["peak_bytes"] / 2**30 for r in mine], marker="o", markersize=3)
    names = ("prompt tok/s", "decode tok/s", "peak memory, GiB")
    for ax, name in zip(panels, names, strict=True):
        ax.set(xlabel="tokens in the context", ylabel=name, xscale="log")
        ax.minorticks_off()
        ax.set_xticks(lengths, [f"{n // 1024}K" if n % 1024 == 0 else str(n) for n in lengths])
        ax.grid(alpha=0.3)
    predicted = [r["predicted_most_tps"] for r in measured if "predicted_most_tps" in r]
    if predicted and max(predicted) > FAR * max(r["decode_tps"]["median"] for r in measured):
        panels[1].set_yscale("log")
    for ax in panels:
        if ax.get_yscale() == "linear":
            ax.set_ylim(bottom=0)
    panels[1].legend(fontsize=7, frameon=False)
    fig.suptitle(title, fontsize=9)
    heatmap.save(fig, path)
