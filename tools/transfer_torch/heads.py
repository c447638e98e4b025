"""From head scores to the heads that keep full attention: hydra_mlx.selection without a base model.

usage: python -m tools.transfer_torch.heads SCORES.json HEADS.json [--keep 68] [--floor 0]
           [--strategy scores|fixed|random]

SCORES.json is what `hydra-mlx score` writes. --floor reserves the best heads of every layer first
(1 at 7:1). fixed spreads the same count evenly, random draws it: for comparison.
"""

import argparse
from pathlib import Path

from hydra_mlx import cli
from hydra_mlx.files import write_json
from hydra_mlx.score_file import read_scores
from hydra_mlx.selection import STRATEGIES, select_heads


def work(args: argparse.Namespace) -> int:
    """Write HEADS.json; returns the exit code."""
    scores = read_scores(args.scores)
    layers, heads = scores.score.shape
    chosen = select_heads(args.strategy, layers, heads, args.keep, args.floor, args.seed, scores)
    write_json(args.heads, {"full_attention_heads": chosen})
    print("heads per layer:", " ".join(str(len(h)) for h in chosen))
    return 0


def main(argv=None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("scores", type=Path)
    parser.add_argument("heads", type=Path)
    parser.add_argument("--keep", type=int, default=68)
    parser.add_argument("--floor", type=int, default=0)
    parser.add_argument("--strategy", choices=STRATEGIES, default="scores")
    parser.add_argument("--seed", type=int, default=0)
    return cli.run(parser, work, argv)


if __name__ == "__main__":
    raise SystemExit(main())
