"""The n-gram index against a search through the whole text."""

import time

from hydra_mlx.ngrams import LONGEST, Ngrams

import numpy as np
import pytest


def longest(text: list, least: int) -> tuple:
    """(place, length) by looking everywhere; the latest of the longest."""
    best = (-1, 0)
    for place in range(least, len(text)):
        n = 0
        while n < min(LONGEST, place) and text[place - 1 - n] == text[-1 - n]:
            n += 1
        if n >= max(least, best[1]):
            best = (place, n)
    return best


@pytest.mark.parametrize("least", [1, 2, 3])
@pytest.mark.parametrize("V", [2, 5, 40])
def test_finds_what_a_search_finds(least, V):
    rng = np.random.RandomState(V + least)
    text = rng.randint(0, V, 60).tolist()
    text += text[7:30] + rng.randint(0, V, 30).tolist() + text[10:50]
    # Short texts, so that no chain is longer than what is compared of it.
    for start in range(0, 120, 17):
        part, index = [], Ngrams((), least)
        for token in text[start : start + 24]:
            part.append(token)
            index.extend([token])
            assert index.find() == longest(part, least), part


def test_grown_at_once_or_token_by_token():
    text = np.random.RandomState(0).randint(0, 9, 500).tolist()
    one, other = Ngrams(text), Ngrams()
    for i in range(0, 500, 7):
        other.extend(text[i : i + 7])
    assert one.find() == other.find() and one.tokens == other.tokens


def test_a_draft_that_runs_over_the_end_repeats():
    index = Ngrams([9, 1, 2, 3, 1, 2, 3, 1, 2])
    place, length = index.find()
    assert (place, length) == (6, 5)
    assert index.follow(place, 8) == [3, 1, 2, 3, 1, 2, 3, 1]


def test_a_passage_is_followed_past_commoner_matches():
    """Once found, its next tokens are taken, though their ends occur often elsewhere."""
    passage = [50, 51, 52, 1, 2, 60, 1, 2, 61]
    index = Ngrams([*passage, *[1, 2, 70] * 100, 50, 51, 52])
    place, _ = index.find()
    assert index.follow(place, 2) == [1, 2]
    index.extend([1, 2])
    place, length = index.find()
    assert length == 5 and index.follow(place, 1) == [60]


def test_no_match():
    assert Ngrams([1, 2, 3, 4]).find() == (-1, 0)
    assert Ngrams().find() == (-1, 0) and Ngrams([1]).find() == (-1, 0)


def test_a_step_costs_the_same_in_a_long_text():
    """Periodic text has the longest chains there are."""

    def seconds(n: int) -> float:
        index = Ngrams(np.arange(n).tolist() + [5, 6] * (n // 4))
        start = time.perf_counter()
        for _ in range(200):
            place, _ = index.find()
            index.extend(index.follow(place, 1))
        return time.perf_counter() - start

    assert seconds(100_000) < 20 * min(seconds(1_000) for _ in range(3)) + 0.05
