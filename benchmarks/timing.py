"""Wall-clock times of MLX computations, for the benchmarks beside it."""

import statistics
import time
from collections.abc import Callable

import mlx.core as mx


def median_ms(f: Callable, runs: int = 20) -> float:
    """Median milliseconds of f() and its synchronisation, after three warm-ups."""
    times = []
    for i in range(runs + 3):
        start = time.perf_counter()
        mx.eval(f())
        if i >= 3:
            times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


def pipelined_ms(calls: list, runs: int = 5) -> float:
    """Least milliseconds of one of `calls`, all of them queued in one mx.eval.

    The host queues a call while the device works on those before, so that what counts is the
    device's time unless a call takes the host longer. Each should read another buffer, together
    more than the device's caches hold.
    """
    mx.eval([f() for f in calls])
    best = float("inf")
    for _ in range(runs):
        start = time.perf_counter()
        mx.eval([f() for f in calls])
        best = min(best, time.perf_counter() - start)
    return 1000 * best / len(calls)
