"""hydra-mlx cost: predicted floor of a decode step on Apple's chips, HydraHead and full.

hydra-mlx cost                    every chip at 128K tokens, tokens per second
hydra-mlx cost --chip "M4 Pro"    every context length on one chip
"""

import argparse
import json
import sys

from . import cli
from .errors import UsageError


def build_parser() -> argparse.ArgumentParser:
    """Flags of `hydra-mlx cost`."""
    p = cli.parser("cost", __doc__)
    p.add_argument("--chip", help="one chip, every context length")
    p.add_argument("--context", default="128K", help="4K, 32K, 128K, 512K or 1M (default: 128K)")
    p.add_argument("--json", action="store_true", help="every figure as one JSON line")
    p.add_argument("--debug", action="store_true", help="show tracebacks")
    return p


def figures() -> list:
    """One dict for every chip, context, ratio and cache type."""
    from .predict import CACHES, CHIPS, CONTEXTS, RATIOS, floor, geometry

    rows = []
    for ratio in RATIOS:
        args = geometry(ratio)
        for context, tokens in CONTEXTS.items():
            for kind, size in CACHES.items():
                f = floor(args, tokens, size)
                for chip, (bandwidth, tflops) in CHIPS.items():
                    ms = f.milliseconds(bandwidth, tflops)
                    rows.append(
                        {
                            "chip": chip,
                            "context": context,
                            "ratio": ratio,
                            "cache": kind,
                            "gib": f.nbytes / 2**30,
                            "kv_gib": f.kv / 2**30,
                            "ms": ms,
                            "tokens_per_s": 1000 / ms,
                        }
                    )
    return rows


def table(rows: list, key: str, names: list) -> list:
    """Lines of a table: one row for each name, tokens per second of every ratio and cache."""
    columns = [(r, c) for r in ("3:1", "7:1", "full") for c in ("bf16", "4-bit")]
    lines = [f"{key:10s}" + "".join(f"{r + ' ' + c:>13s}" for r, c in columns)]
    for name in names:
        found = {(x["ratio"], x["cache"]): x for x in rows if x[key] == name}
        lines.append(f"{name:10s}" + "".join(f"{found[k]['tokens_per_s']:13,.1f}" for k in columns))
    return lines


def work(args: argparse.Namespace) -> int:
    """Print; returns the exit code."""
    from .predict import CHIPS, CONTEXTS

    rows = figures()
    if args.json:
        print(json.dumps(rows))
        return 0
    if args.chip is not None and args.chip not in CHIPS:
        raise UsageError(f"--chip is {args.chip!r}, expected one of {', '.join(CHIPS)}.")
    if args.context not in CONTEXTS:
        raise UsageError(f"--context is {args.context!r}, expected one of {', '.join(CONTEXTS)}.")
    print("Predicted most tokens per second (bytes that must move / bandwidth), not measured:")
    print("Qwen3-1.7B sizes, 4-bit weights, B=1; HydraHead 3:1 and 7:1, and full attention.")
    if args.chip:
        mine = [r for r in rows if r["chip"] == args.chip]
        print(f"{args.chip}, by tokens in the cache")
        lines = table(mine, "context", list(CONTEXTS))
    else:
        mine = [r for r in rows if r["context"] == args.context]
        print(f"{args.context} tokens in the cache")
        lines = table(mine, "chip", list(CHIPS))
    print("\n".join(lines))
    return 0


def main(argv: list | None = None) -> int:
    """Entry point of `hydra-mlx cost`; returns the exit code."""
    return cli.run(build_parser(), work, argv)


if __name__ == "__main__":
    sys.exit(main())
