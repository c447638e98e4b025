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


def chained_ms(
    f: Callable, x: mx.array, others: list, calls: tuple = (8, 40), runs: int = 5
) -> float:
    """Milliseconds of one y = f(x, other) on the device.

    A chain of calls, each on the result of the one before, is one mx.eval, so the host prepares a
    call while the device works; the slope between two lengths leaves out what an eval costs.

    Args:
        f: One step; its result can be its x. others: Taken in turn, together more than the
            device's caches hold. calls: Short and long chain. runs: The least time of as many.

    Raises:
        ArithmeticError: The long chain took no longer than the short one.
    """
    times = []
    for n in calls:
        best = float("inf")
        for _ in range(runs + 1):  # the first builds kernels
            y = x
            for i in range(n):
                y = f(y, others[i % len(others)])
            start = time.perf_counter()
            mx.eval(y)
            best = min(best, time.perf_counter() - start)
        times.append(best)
    if times[1] <= times[0]:
        raise ArithmeticError("a longer chain takes no longer: too short to measure")
    return 1000 * (times[1] - times[0]) / (calls[1] - calls[0])
