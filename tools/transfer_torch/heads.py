"""From head scores to the heads that keep full attention.

usage: python -m tools.transfer_torch.heads SCORES.json HEADS.json [--keep 68] [--floor 0]
           [--strategy scores|fixed|random]

SCORES.json is what `hydra-mlx score` writes: "score" and "raw_effect", layers x heads, the second
for ties. --floor reserves the best heads of every layer first (1 at 7:1). fixed spreads the same
count evenly, random draws it: for comparison.
"""

import argparse
import json
import random
from pathlib import Path


def choose(scores: list[list], keep: int, floor: int = 0) -> list[list[int]]:
    """The `keep` best heads, `floor` of each layer at least; ties by layer, then head."""
    places = [(i, h) for i, row in enumerate(scores) for h in range(len(row))]
    # A stable sort, so equal scores stay in order of layer and head.
    ranked = sorted(places, key=lambda p: scores[p[0]][p[1]], reverse=True)
    taken: list[tuple[int, int]] = []
    for i in range(len(scores)):
        taken += [p for p in ranked if p[0] == i][:floor]
    if len(taken) > keep:
        raise ValueError(f"a floor of {floor} takes {len(taken)} heads, more than the {keep} kept")
    taken += [p for p in ranked if p not in taken][: keep - len(taken)]
    return [sorted(h for layer, h in taken if layer == i) for i in range(len(scores))]


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("scores", type=Path)
    parser.add_argument("heads", type=Path)
    parser.add_argument("--keep", type=int, default=68)
    parser.add_argument("--floor", type=int, default=0)
    parser.add_argument("--strategy", choices=("scores", "fixed", "random"), default="scores")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    found = json.loads(args.scores.read_text())
    raw = found.get("raw_effect", found["score"])
    scores = [list(zip(s, r, strict=True)) for s, r in zip(found["score"], raw, strict=True)]
    if args.strategy == "random":
        draw = random.Random(args.seed)
        scores = [[draw.random() for _ in row] for row in scores]
    elif args.strategy == "fixed":
        # Every (1 / share)-th head in reading order, which walks over all slots.
        total = sum(map(len, scores))
        places = {n * total // args.keep for n in range(args.keep)}
        flat = iter(range(total))
        scores = [[float(next(flat) in places) for _ in row] for row in scores]
    heads = choose(scores, args.keep, args.floor)
    args.heads.write_text(json.dumps({"full_attention_heads": heads}) + "\n")
    print("heads per layer:", " ".join(str(len(h)) for h in heads))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
