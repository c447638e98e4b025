"""Does the ranking matter? Heads are taken out, best first or at random, and answers counted."""

import random
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from .journal import Journal
from .patching import readout
from .probes import FORMS, Pair, make_pair, pair_rng
from .scoring import ScoreSettings
from .trunk import Trunk

SHARES = (0.0, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16)  # of all heads
MEAN_TEXTS = 4  # that the mean outputs are taken from


def counts(heads: int) -> list:
    """Numbers of heads to remove."""
    return sorted({round(share * heads) for share in SHARES} | {1})


def answers(trunk: Trunk, pair: Pair, removed: list, fill: list) -> tuple:
    """Whether the model answers a text rightly without some heads.

    Right means that every token of the answer is the likeliest one after those before it, which is
    what greedy decoding of the whole answer amounts to.

    Args:
        removed: L lists of heads. fill: L arrays [H, D] to put in their place at every position.

    Returns:
        (right, read-out m).
    """
    h = trunk.embed(mx.array([pair.clean]))
    for layer in range(trunk.L):
        heads = trunk.attend(*trunk.qkv(layer, h))
        if removed[layer]:
            at = mx.array(removed[layer])
            heads[:, :, at] = fill[layer][at].astype(heads.dtype)
        h = trunk.mlp(layer, h + trunk.output(layer, heads))
        mx.eval(h)
    h = h[:, mx.array(pair.reads)]
    right = (trunk.logits(h)[0].argmax(-1) == mx.array(pair.plus)).all().item()
    return right, readout(trunk, h, pair).item()


def fills(trunk: Trunk, pairs: Sequence, kind: str) -> list:
    """What removed heads give: L arrays [H, D], zeros or each head's mean over clean texts."""
    zeros = mx.zeros((trunk.H, trunk.D))
    if kind == "zero":
        return [zeros] * trunk.L
    sums, n = [zeros] * trunk.L, 0
    for pair in pairs[:MEAN_TEXTS]:
        h = trunk.embed(mx.array([pair.clean]))
        n += len(pair.clean)
        for layer in range(trunk.L):
            heads = trunk.attend(*trunk.qkv(layer, h))
            sums[layer] = sums[layer] + heads[0].astype(mx.float32).sum(0)
            h = trunk.mlp(layer, h + trunk.output(layer, heads))
            mx.eval(h, sums[layer])
    return [x / n for x in sums]


def fresh_pairs(
    tokenizer: Any, settings: ScoreSettings, capability: str, texts: int, source: Sequence | None
) -> list:
    """Pairs that scoring has not seen, over all wordings and depths."""
    out, keys = [], settings.keys if capability == "multi" else 1
    for i in range(texts):
        sub = i % settings.sub_probes
        rng = pair_rng(settings.seed, f"validate {capability}", sub, i)
        depth = (i + rng.random()) / texts
        out.append(make_pair(tokenizer, rng, FORMS[sub], settings.length, depth, keys, source))
    return out


def validate(
    trunk: Trunk,
    tokenizer: Any,
    settings: ScoreSettings,
    source: Sequence | None,
    order: list,
    kind: str,
    texts: int,
    journal: Journal,
    progress: Callable[[str, int, int], None],
) -> dict:
    """Retrieval accuracy against the number of heads removed, by score and at random.

    Args:
        order: [layer, head] best first. kind: "mean" or "zero". texts: Fresh ones of each
            capability, over all wordings.

    Returns:
        {"ablation", "texts", "removed": counts, "accuracy": {order: {capability: list}},
        "readout": the same with mean m}.
    """
    shuffled = list(order)
    random.Random(f"{settings.seed}/knockout").shuffle(shuffled)
    orders = {"score": order, "random": shuffled}
    pairs = {c: fresh_pairs(tokenizer, settings, c, texts, source) for c in settings.capabilities}
    mixed = [pairs[c][i] for i in range(texts) for c in settings.capabilities]
    fill = fills(trunk, mixed, kind)
    steps, prefix = counts(len(order)), f"knockout/{kind}/{texts}"
    units = [
        (name, n, c, i)
        for name in orders
        for n in steps
        for c in settings.capabilities
        for i in range(texts)
    ]
    for done, (name, n, c, i) in enumerate(units):
        key = f"{prefix}/{name}/{n}/{c}/{i}"
        same = f"{prefix}/score/{n}/{c}/{i}"
        if key in journal.values:
            continue
        progress("knockout", done, len(units))
        if n == 0 and name != "score":
            journal.add(key, journal.values[same])  # nothing removed: the same run
        else:
            removed: list = [[] for _ in range(trunk.L)]
            for layer, head in orders[name][:n]:
                removed[layer].append(head)
            journal.add(key, list(answers(trunk, pairs[c][i], removed, fill)))
        progress("knockout", done + 1, len(units))

    def curve(name: str, c: str, part: int) -> list:
        found = [
            [journal.values[f"{prefix}/{name}/{n}/{c}/{i}"] for i in range(texts)] for n in steps
        ]
        return [sum(float(v[part]) for v in step) / texts for step in found]

    return {
        "ablation": kind,
        "texts": texts,
        "removed": steps,
        **{
            label: {o: {c: curve(o, c, part) for c in settings.capabilities} for o in orders}
            for part, label in enumerate(("accuracy", "readout"))
        },
    }
