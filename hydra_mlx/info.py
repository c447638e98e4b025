"""hydra-mlx info: what a model is and what it needs, from its config and headers alone.

hydra-mlx info my-model
hydra-mlx info Qwen/Qwen3-1.7B --json
hydra-mlx info my-model --png heads.png

MODEL is a HydraHead or mlx-lm model folder, a .gguf file, or a hub id in the hub's cache.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import cli, text

MACHINES = (8, 16, 24, 32, 64, 128)  # GB
KV_BITS = (None, 8, 4)
FA_COLOUR, LA_COLOUR = 209, 24  # of 256
FORMS = {
    "spec": "the layout of training; convert it to run it fast",
    "fused": "converted",
    "plain": "a plain Transformer",
}


def build_parser() -> cli.Parser:
    """Flags of `hydra-mlx info`."""
    p = cli.parser("info", __doc__)
    p.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="model folder, .gguf file or cached hub id (default: the small one in this package)",
    )
    p.add_argument("--png", metavar="FILE", type=Path, help="draw the head map into a picture")
    p.add_argument("--json", action="store_true", help="every figure as one JSON line")
    p.add_argument("--debug", action="store_true", help="show tracebacks")
    return p


def head_map(facts: Any) -> list | None:
    """For each layer its FA heads; None where only mlx-lm knows the heads."""
    return None if facts.args is None else facts.args.full_attention_heads


def picture(heads: Sequence, H: int, kv_heads: Sequence, Hk: int, colour: bool, width: int) -> list:
    """Lines: a row for each run of equal layers, a cell for each head.

    Args:
        heads: FA heads of each layer. H: Heads of a layer. kv_heads: Key/value heads kept, of Hk.
        colour: Write colours, else # and dots. width: Columns of the terminal.
    """
    runs: list = []
    for i, fa in enumerate(heads):
        if runs and heads[runs[-1][0]] == fa:
            runs[-1][1] = i
        else:
            runs.append([i, i])
    names = [ranges(range(a, b + 1)) for a, b in runs]
    label = max(map(len, names))
    tails = [
        f"  {len(heads[a])} FA on {kv_heads[a]} of {Hk} key/value heads" if heads[a] else "  0 FA"
        for a, _ in runs
    ]
    room = width - label - 1
    fits = [room >= c * H + max(map(len, tails)) for c in (2, 1)]
    cell = 2 if fits[0] or (2 * H <= room and not fits[1]) else 1
    per_line = max(min(H, room // cell), 1)
    lines = []
    for name, (a, _), tail in zip(names, runs, tails, strict=True):
        cells = [_cell(h in heads[a], cell, colour) for h in range(H)]
        rows = ["".join(cells[s : s + per_line]) for s in range(0, H, per_line)]
        lines.append(f"{name:>{label}} {rows[0]}" + (tail if any(fits) else ""))
        lines += [" " * (label + 1) + row for row in rows[1:]]
    return lines


def _cell(fa: bool, width: int, colour: bool) -> str:
    if colour:
        return f"\x1b[48;5;{FA_COLOUR if fa else LA_COLOUR}m{' ' * width}\x1b[0m"
    return ("#" if fa else ".").ljust(width)


def write_png(facts: Any, path: Path):
    """The head map as a PNG.

    Raises:
        UsageError: No matplotlib, or the file cannot be written.
    """
    from . import heatmap

    fig = heatmap.figure(
        2.0 + 0.25 * facts.args.num_attention_heads, 1.5 + 0.2 * len(facts.kv_heads)
    )
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    H = facts.args.num_attention_heads
    colours = ("#1f3a5f", "#ff875f")
    grid = [[int(h in fa) for h in range(H)] for fa in facts.args.full_attention_heads]
    ax = fig.add_subplot()
    ax.pcolormesh(grid, cmap=ListedColormap(colours), vmin=0, vmax=1, edgecolors="w", linewidth=0.5)
    ax.invert_yaxis()
    for axis, n in ((ax.xaxis, H), (ax.yaxis, len(grid))):
        every = max(1, n // 16)
        axis.set_ticks([i + 0.5 for i in range(0, n, every)], [str(i) for i in range(0, n, every)])
    ax.set(xlabel="head", ylabel="layer", title=f"{facts.path.name}: heads")
    names = ("linear attention", "full attention")
    boxes = [Patch(color=c, label=n) for c, n in zip(colours, names, strict=True)]
    fig.legend(handles=boxes, loc="outside lower center", ncols=2, fontsize=7)
    heatmap.save(fig, path)


def paths(facts: Any, kv_bits: int | None) -> list:
    """For each layer of a HydraHead model its kernel paths (here, or on Metal without a GPU)."""
    from .kernel_paths import layer_paths
    from .kernels import dispatch

    way = dispatch.route()[0]
    way = "metal" if way == "ops" else way
    group = None if kv_bits is None else 64 if facts.head_dim % 64 == 0 else 32
    return [
        layer_paths(facts.args, i, way, facts.dtype, kv_bits, group)
        for i in range(facts.args.num_hidden_layers)
    ]


def ranges(numbers: Sequence) -> str:
    """ "0-3, 7" for 0, 1, 2, 3, 7."""
    out: list = []
    for n in numbers:
        if out and n == out[-1][1] + 1:
            out[-1][1] = n
        else:
            out.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in out)


def path_lines(facts: Any) -> list:
    """The kernel paths in words, layers with the same ones together."""
    from .kernels import dispatch

    if facts.form == "plain":
        return ["kernels    mlx-lm's own layers run it; hydra_mlx has no kernels for it"]
    way, why = dispatch.route()
    lines = [f"kernels    {way} ({why}), once their first-use checks pass:"]
    if way == "ops":
        lines = [f"kernels    here operations ({why}); on Metal, by their predicates:"]
    found: dict = {}
    caches = {None: "plain cache", 4: "4-bit cache"}
    caches = {b: name for b, name in caches.items() if facts.kv_bytes(b) is not None}
    for bits in caches:
        for i, layer in enumerate(paths(facts, bits)):
            for p in layer:
                places = found.setdefault((p.step, p.heads, p.runs, p.reason), {})
                places.setdefault(bits, []).append(i)
    for (step, which, runs, reason), places in sorted(found.items()):
        if len(places) == len(caches) and len({tuple(x) for x in places.values()}) == 1:
            places = {None: next(iter(places.values()))}
            said = {None: ""}
        else:
            said = {b: f"{name}, " for b, name in caches.items()}
        for bits, layers in places.items():
            where = f"{said[bits]}layer{'s' if len(layers) > 1 else ''} {ranges(layers)}"
            lines.append(f"  {step:7} {which:9} {runs}: {where} ({reason})")
    return lines


def tokens(n: int | None) -> str:
    """A number of tokens in few characters, rounded down."""
    if n is None:
        return "?"
    for unit, size in (("M", 1 << 20), ("K", 1 << 10)):
        if n >= size:
            return (
                f"{int(10 * n / size) / 10:.1f}{unit}" if n < 100 * size else f"{n // size}{unit}"
            )
    return str(n) if n else "-"


def fit_lines(facts: Any) -> list:
    """The table of tokens that fit, a row for each kind of cache."""
    if facts.kv_heads is None:
        return [f"memory     what a {facts.model_type!r} model caches is not known to hydra_mlx"]
    lines = ["tokens of one sequence that fit, by the machine's memory:"]
    lines.append(f"  {'--kv-bits':12}" + "".join(f"{f'{m} GB':>9}" for m in MACHINES))
    for bits in KV_BITS:
        if facts.kv_bytes(bits) is not None:
            row = "".join(f"{tokens(facts.fits(m, bits)):>9}" for m in MACHINES)
            lines.append(f"  {str(bits or 'none'):12}{row}")
    lines.append("  (in 2/3 of the memory up to 32 GB and 3/4 above, what macOS gives a GPU by")
    lines.append("  default; weights, states and 1 GiB of working memory taken off)")
    return lines


def lines_of(facts: Any, colour: bool, width: int) -> list:
    """Everything for people."""
    kept = ", ".join(f"{text.size(n)} {kind}" for kind, n in facts.dtypes.items())
    lines = [
        f"model      {text.printable(facts.path.name)}, {facts.model_type} ({FORMS[facts.form]})",
        f"weights    {facts.parameters:,} parameters, {text.size(facts.nbytes)} "
        f"({facts.bits_per_weight:.2f} bits each): {kept}",
    ]
    for what, n in facts.bits.items():
        lines.append(f"           {n:,} {'matrix' if n == 1 else 'matrices'} of {what}")
    if facts.positions is not None:
        lines.append(f"positions  {facts.positions:,} in the config (max_position_embeddings)")
    if facts.args is not None:
        H, L = facts.args.num_attention_heads, facts.args.num_hidden_layers
        fa = sum(map(len, facts.args.full_attention_heads))
        share = f"{fa} full attention ({100 * fa / (L * H):.0f} %), {L * H - fa} linear"
        lines.append(f"heads      {L} layers of {H}, {facts.head_dim} wide: {share}")
        lines.append(f"  {_cell(True, 2, colour)}full attention, {_cell(False, 2, colour)}linear:")
        lines += picture(
            facts.args.full_attention_heads, H, facts.kv_heads,
            facts.args.num_key_value_heads, colour, width,
        )  # fmt: skip
    if facts.kv_heads is not None:
        sizes = [(b, facts.kv_bytes(b)) for b in KV_BITS]
        said = [f"{s:,.0f} B" + (f" at {b} bits" if b else "") for b, s in sizes if s is not None]
        lines.append(f"a token    adds {', '.join(said)} of keys and values")
        lines.append(f"a sequence has {text.size(facts.state_bytes)} of state, whatever its length")
    lines += fit_lines(facts)
    lines += path_lines(facts)
    return lines + [f"note       {text.printable(n)}" for n in facts.notes]


def as_dict(facts: Any) -> dict:
    """Everything for scripts."""
    from .kernels import dispatch

    way, why = dispatch.route()
    hydra = facts.form != "plain"
    return {
        "model": facts.path.name,
        "model_type": facts.model_type,
        "form": facts.form,
        "parameters": facts.parameters,
        "weight_bytes": facts.nbytes,
        "bits_per_weight": round(facts.bits_per_weight, 4),
        "dtypes": facts.dtypes,
        "quantised": facts.bits,
        "max_position_embeddings": facts.positions,
        "head_dim": facts.head_dim,
        "heads": None if facts.args is None else facts.args.num_attention_heads,
        "full_attention_heads": head_map(facts),
        "kv_heads": facts.kv_heads,
        "kv_bytes_per_token": {str(b or "none"): facts.kv_bytes(b) for b in KV_BITS},
        "state_bytes": facts.state_bytes,
        "fits_tokens": {
            str(b or "none"): {str(m): facts.fits(m, b) for m in MACHINES} for b in KV_BITS
        },
        "kernels": {"route": way, "reason": why, "paths_on": "metal" if way == "ops" else way},
        "kernel_paths": {
            str(b or "none"): [[asdict(p) for p in layer] for layer in paths(facts, b)]
            for b in (None, 4)
            if hydra and facts.kv_bytes(b) is not None
        },
        "notes": facts.notes,
    }


def work(args: argparse.Namespace) -> int:
    """Print what the flags ask for; returns the exit code."""
    from . import facts as reader
    from .errors import UsageError
    from .heatmap import require_matplotlib, wants_colour

    if args.png is not None:
        require_matplotlib()
        cli.check_target(args.png)
    facts = reader.read(reader.find(args.model))
    if args.png is not None:
        if facts.args is None:
            raise UsageError(f"--png: the heads of a {facts.model_type!r} model are not known.")
        write_png(facts, args.png.expanduser())
    if args.json:
        print(json.dumps(as_dict(facts)))
        return 0
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 100
    print("\n".join(lines_of(facts, wants_colour(sys.stdout), width)))
    return 0


def main(argv: Sequence | None = None) -> int:
    """Entry point of `hydra-mlx info`; returns the exit code."""
    return cli.run(build_parser(), work, argv)


if __name__ == "__main__":
    sys.exit(main())
