"""Which checkpoints are kept: how many, how far apart, how many bytes."""

import random

import hydra_mlx  # noqa: F401  (before mlx)
from hydra_mlx.checkpoints import Checkpoints, checkpoint_bytes
from hydra_mlx.errors import UsageError
from hydra_mlx.thinning import Calls, Grid

import numpy as np
import pytest
from mlx_lm.models.cache import KVCache

from .sequences import model_of, some, start


def counted(grid: Grid, n: int) -> list:
    return [i for i in range(1, n + 1) if grid.keeps(i, n)]


@pytest.mark.parametrize("most", [2, 4, 6, 16, 24])
def test_thinning_keeps_its_bounds(most):
    grid, before = Grid(1, most), []
    for end in range(1, 400):
        kept = counted(grid, end)
        assert len(kept) <= most and set(kept) <= {*before, end}
        before = [*kept]
        for position in range(end + 1):
            gap = position - max((k for k in kept if k <= position), default=0)
            assert gap < grid.bound(position, end)


@pytest.mark.parametrize("most", [2, 8, 24])
def test_any_length_is_covered(most):
    """A million tokens: M checkpoints, and gaps as the formula says."""
    N, end = 512, 1 << 20
    grid = Grid(N, most)
    kept = counted(grid, end // N)
    assert len(kept) <= most
    gaps = np.diff([0, *kept, end // N]) * N
    assert gaps.max() <= 4 * end / most and grid.bound(0, end) <= 4 * end / most
    if most == 24:  # near the end replays are short, and grow with the distance
        near = [grid.bound(end - d, end) for d in (0, 512, 4096, 1 << 15)]
        assert near == [512, 512, 4096, 1 << 15]


def test_calls_off_the_grid_keep_the_bound():
    for seed in range(30):
        rng = random.Random(seed)
        points, counter = Checkpoints(every=8, most=rng.choice([2, 4, 8]), marks=0), KVCache()
        while counter.offset < 300:
            counter.offset += rng.randint(1, 8)
            points.note([counter])
            for position in range(counter.offset + 1):
                point = points.nearest(position)
                gap = position - (point.position if point else 0)
                assert gap < points.bound(position, call=8)


def test_decoding_takes_no_room():
    calls = Calls()
    for n in [512] * 9 + [100] + [1] * 5000:
        calls.add(n)
    assert len(calls._runs) == 3 and len(list(calls.between(0, calls.end))) == 5010
    assert list(calls.between(512 * 9, 512 * 9 + 102))[-2:] == [(4708, 4709), (4709, 4710)]


# -------------------------------------------------------------------------------------- budget


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_byte_budget_is_kept(dtype):
    args = model_of("mixed").args
    one, full = checkpoint_bytes(args, dtype, 4), checkpoint_bytes(args, "float32", 4)
    assert full == 2 * (4 * 16 * 16 + 3 * 3 * 16 * 4)  # one LA head in each of two layers
    assert one == (full if dtype == "float32" else full - 2 * 2 * 16 * 16)
    budget = full + 14 * one + 5
    run = start("mixed", every=8, most=2)
    run.points = Checkpoints.within(args, budget, 10**6, 8, dtype, itemsize=4)
    assert (run.points.grid.most, run.points.marks, run.points.grid.every) == (10, 3, 8)
    for i in range(40):
        run.append(some(9, i), 8, mark=i % 3 == 0)
        held = len(run.points.positions)
        assert run.points.nbytes == full + held * one <= budget
    assert held >= 10


def test_the_distance_follows_the_budget():
    args = model_of("mixed").args
    one = checkpoint_bytes(args)
    near = Checkpoints.within(args, 65 * one, 4096)
    assert (near.grid.every, near.grid.most, near.marks) == (256, 56, 8)
    assert near.bound(0) == 256
    assert Checkpoints.within(args, 65 * one, 10**6).grid.every == 512
    with pytest.raises(UsageError, match="for checkpoints, but one takes"):
        Checkpoints.within(args, 2 * one, 4096)
    assert Checkpoints.within(model_of("all FA").args, 0, 4096).grid.every == 256
