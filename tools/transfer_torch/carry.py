"""Packs a trained model into parts of 15 MiB and back (see checkpoint.py).

usage: python -m tools.transfer_torch.carry pack MODEL PARTS --base BASE.gguf [--levels 127]
       python -m tools.transfer_torch.carry unpack PARTS MODEL --base BASE.gguf
"""

import argparse
import json
from pathlib import Path

from . import checkpoint
from .migrate import migrate

SEED = 0  # of the migration that differences are taken from; nothing to do with training's
NAME = "model"


def main(argv=None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("action", choices=("pack", "unpack"))
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--levels", type=int, default=127, help="31 is a quarter smaller")
    args = parser.parse_args(argv)
    _, base = checkpoint.load_base(args.base)
    config = json.loads((args.source / "config.json").read_text())
    start = migrate(base, config, None, SEED)
    if args.action == "pack":
        _, tensors = checkpoint.load_model(args.source)
        data = checkpoint.pack(tensors, start, args.levels)
        files = checkpoint.write_parts(args.target, NAME, data)
        (args.target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        back = checkpoint.unpack(checkpoint.read_parts(args.target, NAME), start)
        worst = max(
            ((back[n] - t).norm() / t.norm().clamp(min=1e-12)).item() for n, t in tensors.items()
        )
        print(f"{len(files)} parts, {sum(f.stat().st_size for f in files) / 2**20:.1f} MiB; "
              f"largest relative error of a tensor {worst:.1e}")  # fmt: skip
    else:
        tensors = checkpoint.unpack(checkpoint.read_parts(args.source, NAME), start)
        checkpoint.save_model(args.target, config, tensors)
        print(f"{args.target}: {len(tensors)} tensors")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
