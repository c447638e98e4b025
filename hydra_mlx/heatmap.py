"""Pictures of tables of numbers: coloured text for terminals, PNG with matplotlib."""

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import UsageError
from .files import write_whole

RAMP = (16, 17, 18, 54, 90, 126, 162, 203, 209, 215, 221, 229)  # of 256 colours, dark to light


def wants_colour(stream: Any) -> bool:
    """Whether colours may be written: a terminal, and NO_COLOR is not set."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def text_map(
    values: Sequence, rows: Sequence, columns: Sequence, colour: bool, top: float = 1.0
) -> str:
    """A table as cells of one colour each, or as digits 0 to 9.

    Args:
        values: Rows of numbers from 0 to `top`, None for an empty cell. rows, columns: Labels.
    """
    width = max(len(str(c)) for c in columns)
    label = max(len(str(r)) for r in rows)
    lines = [" " * label + " " + " ".join(f"{c:>{width}}" for c in columns)]
    for name, row in zip(rows, values, strict=True):
        cells = [_cell(v, width, colour, top) for v in row]
        lines.append(f"{name:>{label}} " + ("" if colour else " ").join(cells))
    return "\n".join(lines)


def _cell(value: float | None, width: int, colour: bool, top: float) -> str:
    if value is None:
        return " " * (width + colour)
    share = min(max(value / top if top else 0.0, 0.0), 1.0)
    if colour:
        shade = RAMP[min(int(share * len(RAMP)), len(RAMP) - 1)]
        return f"\x1b[48;5;{shade}m{' ' * (width + 1)}\x1b[0m"
    digit = str(min(int(share * 10), 9))
    return f"{digit if value > 0 else '.':>{width}}"


def figure(width: float, height: float) -> Any:
    """An empty matplotlib figure that needs no display.

    Raises:
        UsageError: matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def require_matplotlib(flag: str = "--png"):
    """Fail early, before hours of work, where no picture can be drawn.

    Raises:
        UsageError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError(
            "A PNG needs matplotlib, which is not installed.",
            f'Run `pip install "hydra_mlx[bench]"`, or leave {flag} out.',
        )


def save(fig: Any, path: Path):
    """Write a figure as PNG, whole or not at all.

    Raises:
        UsageError: It cannot be written.
    """
    write_whole(path, lambda beside: fig.savefig(beside, format="png", dpi=120))


def png_map(
    path: Path, values: Sequence, rows: Sequence, columns: Sequence, axes: tuple, title: str
):
    """A table of numbers from 0 to 1 as a heat map.

    Args:
        axes: (label of the columns, label of the rows).

    Raises:
        UsageError: No matplotlib, or the file cannot be written.
    """
    fig = figure(2.5 + 0.3 * len(columns), 1.5 + 0.22 * len(rows))
    ax = fig.add_subplot()
    nan = float("nan")
    grid = [[nan if v is None else v for v in row] for row in values]
    image = ax.imshow(grid, cmap="magma", vmin=0, vmax=1, aspect="auto")
    ax.set_xticks(range(len(columns)), [str(c) for c in columns])
    ax.set_yticks(range(len(rows)), [str(r) for r in rows])
    ax.set(xlabel=axes[0], ylabel=axes[1], title=title)
    ax.tick_params(labelsize=7)
    fig.colorbar(image, ax=ax)
    save(fig, path)


def png_curves(path: Path, x: Sequence, curves: dict, axes: tuple, title: str):
    """Lines over common x values.

    Args:
        curves: {label: y values}. axes: (label of x, label of y).

    Raises:
        UsageError: No matplotlib, or the file cannot be written.
    """
    fig = figure(6, 4)
    ax = fig.add_subplot()
    for label, y in curves.items():
        ax.plot(x, y, marker="o", markersize=3, label=label)
    ax.set(xlabel=axes[0], ylabel=axes[1], title=title, ylim=(-0.03, 1.03))
    ax.legend()
    save(fig, path)
