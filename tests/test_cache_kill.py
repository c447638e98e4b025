"""kill -9 at any moment of reading, thinning and saving leaves a whole file or none."""

import os
import random
import signal
import time

import hydra_mlx  # noqa: F401  (before mlx)
from hydra_mlx.prompt_cache import load_cache
from hydra_mlx.rollback import rollback

import mlx.core as mx
import pytest

from .forking import ForkServer
from .sequences import Run, difference, model_of, new_cache, some

# Each program goes on from the file it finds and saves after every call. Tokens and calls are the
# same in every program, so that whoever finds a file knows what must be in it.
SERVER = """
import os, sys
import hydra_mlx, mlx_lm.models.base
from pathlib import Path
from hydra_mlx.checkpoints import Checkpoints
from hydra_mlx.prompt_cache import StoredCache, fingerprint, load_cache, save_cache
from tests import sequences
def program(path, most):
    path, model = Path(path), sequences.model_of("mixed")
    run, mark = sequences.start("mixed", every=8, most=4, marks=0), fingerprint(model)
    if path.exists():
        found = load_cache(path, model)
        run.cache, run.points, run.calls = found.cache, found.checkpoints, [found.tokens]
    ids = sequences.some(int(most))
    for a in range(run.points.calls.end, len(ids), 8):
        run.append(ids[a : a + 8], 8)
        stored = StoredCache(run.cache, ids[: a + 8], "", 0, None, mark, checkpoints=run.points)
        save_cache(path, stored)
    return 0
print("ready", flush=True)
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        os._exit(program(*line.split()))
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""
KILLS, MOST = 50, 4000


@pytest.fixture
def programs(monkeypatch):
    root = os.path.dirname(os.path.dirname(__file__))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]))
    server = ForkServer(SERVER)
    yield server
    server.close()


def test_kill_at_random_moments(programs, tmp_path):
    path, rng = tmp_path / "cache", random.Random(0)
    started = time.perf_counter()
    programs.start(path, 8)
    assert programs.wait() == 0
    duration = time.perf_counter() - started  # to the first save
    path.unlink()
    absent = longer = partial = 0
    held, fresh = 0, Run("mixed", new_cache("mixed"), None, [])
    model = model_of("mixed")
    for i in range(KILLS):
        pid = programs.start(path, MOST)
        time.sleep(duration * rng.uniform(0.4, 1.6) if i else 0)
        os.kill(pid, signal.SIGKILL)
        assert programs.wait() == -signal.SIGKILL
        partial += any(p.name.endswith(".part") for p in tmp_path.iterdir())
        if not path.exists():
            absent += 1
            continue
        found = load_cache(path, model)
        n = len(found.tokens)
        assert n % 8 == 0 and n >= held and found.tokens == some(MOST)[:n]
        for a in range(held, n, 8):
            model(mx.array([found.tokens[a : a + 8]]), cache=fresh.cache)
        longer, held = longer + (n > held), n
        assert difference(found.cache, fresh.cache) == 0
        rollback(model, found.cache, found.checkpoints, found.tokens, n - 8)
        model(mx.array([found.tokens[n - 8 :]]), cache=found.cache)
        assert difference(found.cache, fresh.cache) == 0
    found = (absent, longer, partial)
    assert 0 < absent < KILLS // 2 and longer >= KILLS // 5 and partial >= 3, found
    # A program that is not killed sweeps up.
    programs.start(path, held + 8)
    assert programs.wait() == 0
    assert os.listdir(tmp_path) == [path.name] and len(load_cache(path).tokens) == held + 8
