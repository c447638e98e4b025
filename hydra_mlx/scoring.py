"""Importance of every head of a base model (spec section 3): all pairs, all rounds, fused."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import patching, score_file
from .errors import HydraError
from .journal import Journal
from .probes import FORMS, Pair, make_pair, pair_rng
from .trunk import Trunk

THRESHOLD = 0.01  # spec section 3: "share of sub-probes above 0.01"
SENDER_WORK = 4  # a sender round takes about as long as so many receiver passes


@dataclass(frozen=True)
class ScoreSettings:
    """What decides the result besides the model.

    Attributes:
        length: Tokens of a probe. capabilities: Of "single" and "multi". sub_probes: Wordings.
        pairs: Of each wording. keys: Facts in a multi-key text. seed: Of all texts.
        rounds: Sender rounds. positions: See patching.busiest. min_gap: Pairs with
            m(x) - m(x') up to this, in logits, are skipped.
    """

    length: int = 4096
    capabilities: tuple = ("single", "multi")
    sub_probes: int = len(FORMS)
    pairs: int = 8
    keys: int = 4
    seed: int = 0
    rounds: int = 2
    positions: int = 64
    min_gap: float = 0.5

    @property
    def units(self) -> list:
        """(capability, sub-probe, pair) of every pair."""
        return [
            (c, s, p)
            for c in self.capabilities
            for s in range(self.sub_probes)
            for p in range(self.pairs)
        ]

    @property
    def work(self) -> int:
        """Steps in all, for progress."""
        return len(self.units) * (1 + SENDER_WORK * self.rounds)


def probe(tokenizer: Any, settings: ScoreSettings, unit: tuple, source: Sequence | None) -> Pair:
    """The pair of one unit; depths spread evenly over the pairs of a wording."""
    capability, sub, index = unit
    rng = pair_rng(settings.seed, capability, sub, index)
    depth = (index + rng.random()) / settings.pairs
    keys = settings.keys if capability == "multi" else 1
    return make_pair(tokenizer, rng, FORMS[sub], settings.length, depth, keys, source)


def measure(
    trunk: Trunk,
    tokenizer: Any,
    settings: ScoreSettings,
    source: Sequence | None,
    journal: Journal,
    progress: Callable[[str, int, int], None],
) -> dict:
    """All effects; what the journal holds already is not measured again.

    Args:
        source: Haystack sentences, or None for made ones. progress: (label, done, total).

    Returns:
        {"phase/capability/sub-probe/pair": L lists of H effects, or None for a skipped pair}.

    Raises:
        HydraError: The model solves none of the probes.
    """
    done, total = 0, settings.work
    for capability, sub, index in settings.units:
        if index == 0:  # too short a length shows now and not after hours
            probe(tokenizer, settings, (capability, sub, index), source)

    def run(phase: str, unit: tuple, step: int, effect: Callable):
        nonlocal done
        key = "/".join(map(str, (phase, *unit)))
        if key in journal.values:
            done += step
            return
        progress(phase, done, total)  # before too: what was kept says nothing about speed
        journal.add(key, effect(probe(tokenizer, settings, unit, source)))
        done += step
        progress(phase, done, total)

    def receive(pair: Pair):
        return patching.receiver_effects(trunk, pair, settings.min_gap)

    for unit in settings.units:
        run("receivers", unit, 1, receive)
    values = journal.values
    if all(values[f"receivers/{c}/{s}/{p}"] is None for c, s, p in settings.units):
        journal.discard()
        raise HydraError(
            f"The model tells right from wrong answers in none of {len(settings.units)} probes "
            f"of {settings.length} tokens.",
            "Ask for a smaller --length or --min-gap.",
        )
    for round_ in range(1, settings.rounds + 1):
        phases = ["receivers", *(f"senders {i}" for i in range(1, round_))]
        for capability in settings.capabilities:
            heads = promoted(values, settings, capability, phases)

            def send(pair: Pair, heads: list = heads):
                args = (settings.min_gap, settings.positions)
                return patching.sender_effects(trunk, pair, heads, *args)

            for unit in settings.units:
                if unit[0] == capability:
                    run(f"senders {round_}", unit, SENDER_WORK, send)
    return values


def promoted(values: dict, settings: ScoreSettings, capability: str, phases: list) -> list:
    """The current receivers: heads whose mean effect in any of the phases is above THRESHOLD.

    Returns:
        L lists of heads; empty where every pair was skipped.
    """
    best = None
    for phase in phases:
        mean = _mean(_stack(values, settings, capability, phase))
        if mean is not None:
            best = mean if best is None else np.maximum(best, mean)
    if best is None:
        return []
    return [np.flatnonzero(row > THRESHOLD).tolist() for row in best]


def _stack(values: dict, settings: ScoreSettings, capability: str, phase: str) -> list:
    """For each sub-probe a list of its pairs' effects, [L, H] arrays or None."""
    return [
        [_array(values[f"{phase}/{capability}/{s}/{p}"]) for p in range(settings.pairs)]
        for s in range(settings.sub_probes)
    ]


def _array(value: list | None) -> np.ndarray | None:
    return None if value is None else np.array(value)


def _mean(stack: list) -> np.ndarray | None:
    found = [x for sub in stack for x in sub if x is not None]
    return np.mean(found, axis=0) if found else None


def capability_scores(
    values: dict, settings: ScoreSettings, capability: str, part: int | None = None
) -> dict | None:
    """Scores of one capability before and after scaling (spec section 3).

    Args:
        part: 0 or 1 takes every other pair only.

    Returns:
        Arrays [L, H] receiver, sender, raw (the larger), consistency, score (min-max scaled);
        None where every pair was skipped.
    """

    def pick(phase: str) -> list:
        return [
            sub if part is None else sub[part::2]
            for sub in _stack(values, settings, capability, phase)
        ]

    receivers = pick("receivers")
    receiver = _mean(receivers)
    if receiver is None:
        return None
    senders = [pick(f"senders {i}") for i in range(1, settings.rounds + 1)]
    sender = np.max([np.zeros_like(receiver), *(_mean(s) for s in senders)], axis=0)
    above, n = np.zeros_like(receiver), 0
    for s in range(settings.sub_probes):
        means = [_mean([stack[s]]) for stack in (receivers, *senders)]
        if means[0] is not None:
            above, n = above + (np.max(means, axis=0) > THRESHOLD), n + 1
    raw, consistency = np.maximum(receiver, sender), above / n
    score = raw * consistency
    span = score.max() - score.min()
    scaled = (score - score.min()) / span if span > 0 else np.zeros_like(score)
    return {
        "receiver": receiver,
        "sender": sender,
        "raw": raw,
        "consistency": consistency,
        "score": scaled,
    }


def fuse(values: dict, settings: ScoreSettings, part: int | None = None) -> dict | None:
    """Mean over the capabilities; those whose every pair was skipped do not count.

    Returns:
        {"score": [L, H], "raw": [L, H], "capabilities": {name: capability_scores}}, or None.
    """
    found = {c: capability_scores(values, settings, c, part) for c in settings.capabilities}
    found = {c: s for c, s in found.items() if s is not None}
    if not found:
        return None
    mean = {k: np.mean([s[k] for s in found.values()], axis=0) for k in ("score", "raw")}
    return {**mean, "capabilities": found}


def result(values: dict, settings: ScoreSettings) -> dict:
    """What the score file says about heads: lists [L][H], the ranking and a summary."""
    fused = fuse(values, settings)
    halves = [fuse(values, settings, part) for part in (0, 1)] if settings.pairs > 1 else [None]
    capabilities = {
        c: {k: x.tolist() for k, x in s.items()} for c, s in fused["capabilities"].items()
    }
    skipped = dict.fromkeys(settings.capabilities, 0)
    for c, s, p in settings.units:
        skipped[c] += values[f"receivers/{c}/{s}/{p}"] is None
    summary = {
        "heads": int(fused["score"].size),
        "pairs": len(settings.units),
        "skipped_pairs": skipped,
        "share_raw_above": {str(x): float((fused["raw"] > x).mean()) for x in (0.01, 0.05, 0.1)},
        "gini": gini(fused["score"]),
        "half_spearman": None,
        "half_top_quarter_overlap": None,
    }
    if all(h is not None for h in halves):
        a, b = (h["score"] for h in halves)
        summary["half_spearman"] = spearman(a, b)
        n = max(a.size // 4, 1)
        tops = [{tuple(x) for x in score_file.ranking(h["score"], h["raw"])[:n]} for h in halves]
        summary["half_top_quarter_overlap"] = len(tops[0] & tops[1]) / n
    return {
        **score_file.tables(fused["score"], fused["raw"]),
        "capabilities": capabilities,
        "summary": summary,
    }


def spearman(a: np.ndarray, b: np.ndarray) -> float | None:
    """Rank correlation, equal values with their mean rank; None where one has no order."""
    ra, rb = _ranks(a.ravel()), _ranks(b.ravel())
    if ra.std() == 0 or rb.std() == 0:
        return None
    return float(np.corrcoef(ra, rb)[0, 1])


def _ranks(x: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def gini(score: np.ndarray) -> dict:
    """Gini coefficient of the scores in each layer (0 equal, near 1 one head has all)."""
    found = []
    for row in np.sort(score, axis=1):
        if row.sum() > 0:
            n = row.size
            found.append(float((2 * np.arange(1, n + 1) - n - 1) @ row / (n * row.sum())))
    if not found:
        return {"mean": 0.0, "least": 0.0, "most": 0.0, "layers": 0}
    return {
        "mean": float(np.mean(found)),
        "least": min(found),
        "most": max(found),
        "layers": len(found),
    }
