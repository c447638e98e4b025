"""kill -9 at any moment of a conversion leaves no half model, and the next run mends the rest."""

import os
import random
import signal
import time
from pathlib import Path

import hydra_mlx
from hydra_mlx.convert import main
from hydra_mlx.manifest import check_files

import mlx.core as mx
import pytest

from .checkpoints import write_spec
from .forking import ForkServer

# A child that has imported everything but has not touched MLX's threads forks one converter for
# each line it reads, so that a converter starts in milliseconds and each is a process of its own.
SERVER = """
import os, sys, time
import hydra_mlx, mlx_lm.models.base
from hydra_mlx import converter, verify, convert
slow = float(sys.argv[1])
write = converter.ShardWriter.add
def add(self, tensors):
    time.sleep(slow)
    write(self, tensors)
converter.ShardWriter.add = add
print("ready", flush=True)
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        os._exit(convert.main(line.split()))
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""
KILLS = {"new": 20, "overwrite": 20}
SLOW = 0.006  # seconds before each tensor: a run takes about half a second


@pytest.fixture(scope="module")
def converters():
    c = ForkServer(SERVER, SLOW)
    yield c
    c.close()


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("kill") / "source"
    heads = [[1], [0, 2, 3], [], [2]]
    return write_spec(folder, num_hidden_layers=4, full_attention_heads=heads)[0]


def content(folder: Path) -> dict:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize("kind", KILLS)
def test_kill_at_random_moments(kind, converters, source, tmp_path):
    overwrite, kills = kind == "overwrite", KILLS[kind]
    old, target = tmp_path / "old", tmp_path / "model"
    flags = ["--hf-path", source, "--mlx-path", target, "--max-shard-size", "1MB", "--quiet"]
    assert main([str(a) for a in (*flags[:2], "--mlx-path", old, "-q", "--quiet")]) == 0
    before = content(old)
    flags += ["--overwrite"] if overwrite else []

    def prepare():
        """The state before a run: no target, or the old model."""
        if target.exists():
            target.rename(tmp_path / f"used-{time.monotonic_ns()}")
        if overwrite:
            target.mkdir()
            for name, data in before.items():
                (target / name).write_bytes(data)

    prepare()
    started = time.perf_counter()
    converters.start(*flags)
    assert converters.wait() == 0
    duration = time.perf_counter() - started
    expected = content(target)
    assert "model.safetensors" not in expected and expected != before

    rng = random.Random(int(overwrite))
    killed, finished, partial = 0, 0, 0
    for n in range(kills):
        prepare()
        # One in each twentieth of the run, and a few after the last tensor.
        delay = duration * (n + rng.random()) / kills * 1.05
        pid = converters.start(*flags)
        time.sleep(delay)
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        code = converters.wait()
        assert code in (0, -signal.SIGKILL), code
        killed += code != 0
        partial += any(p.name.startswith(".model.partial") for p in tmp_path.iterdir())
        replaced = tmp_path / ".model.replaced"
        case = f"killed after {delay:.3f} of {duration:.3f} s"
        if target.exists() and content(target) != before:
            finished += 1
            assert content(target) == expected, case
            check_files(target)
            assert hydra_mlx.load_model(target)(mx.array([[1, 2, 3]])).shape == (1, 3, 260), case
        elif overwrite:
            # Between two renames the old model is there, whole, under its reserve name.
            assert content(target if target.exists() else replaced) == before, case
        else:
            assert not target.exists() and code != 0, case
        if n % 4 == 3:  # a following run succeeds and sweeps up
            again = flags if overwrite else [*flags, "--overwrite"]
            assert main([str(a) for a in again]) == 0, case
            assert content(target) == expected, case
            hidden = [p.name for p in tmp_path.iterdir() if p.name.startswith(".")]
            assert not hidden, (case, hidden)
    assert killed >= kills // 2 and partial >= kills // 4, (killed, finished, partial)
