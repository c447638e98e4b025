"""Whether counts fit probabilities."""

import numpy as np


def fits(counts, probabilities) -> bool:
    """Pearson's chi-squared test at p = 1e-4; counts where nothing is possible never fit."""
    n, p = np.asarray(counts, float), np.asarray(probabilities, float)
    if n[p == 0].any():
        return False
    expected = n.sum() * p / p.sum()
    n, expected = n[expected > 0], expected[expected > 0]
    # Cells that hardly ever come count as one.
    small = expected < 5
    if small.any():
        n = np.append(n[~small], n[small].sum())
        expected = np.append(expected[~small], expected[small].sum())
    k = len(n) - 1
    if k == 0:
        return True
    # Wilson and Hilferty's approximation of the quantile
    limit = k * (1 - 2 / (9 * k) + 3.72 * np.sqrt(2 / (9 * k))) ** 3
    return float(((n - expected) ** 2 / expected).sum()) < limit
