"""hydra-mlx transfer: the program, resuming after kill -9, and the way from scores to an answer."""

import contextlib
import fcntl
import importlib.util
import json
import os
import random
import signal
import time
from types import SimpleNamespace

from hydra_mlx.__main__ import main
from hydra_mlx.training import evaluate as training_evaluate
from hydra_mlx.training import steps
from hydra_mlx.training.state import read_log

import mlx.core as mx
import pytest

from . import students
from .conversions import read, same_arrays
from .forking import ForkServer

# A child that has imported everything but has not touched MLX's threads forks one trainer for each
# line it reads. Steps are slowed down so that a kill can fall between any two of them.
SERVER = """
import os, sys, time
import hydra_mlx, mlx_lm.models.base
from hydra_mlx import transfer
from hydra_mlx.training import loop, steps, student
advance = steps.Trainer.advance
def slow(self, tokens):
    time.sleep(0.01)
    return advance(self, tokens)
steps.Trainer.advance = slow
print("ready", flush=True)
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        os._exit(transfer.main(line.split()))
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return students.write_world(tmp_path_factory.mktemp("world"))


def flags(world, stage, out, **changes) -> list:
    """Flags of a short stage; None leaves a flag out, True gives it no value."""
    values = {
        "stage": stage, "student": world.student, "teacher": world.base, "text": world.texts,
        "out": out, "steps": 12, "batch": 4, "length": 32, "lr": 3e-3, "log-every": 3,
        "save-every": 4, "no-compile": True, "quiet": True,
    }  # fmt: skip
    argv = []
    for name, value in {**values, **changes}.items():
        if value is not None:
            argv += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return argv


def transfer(world, stage, out, code=0, **changes):
    assert main(["transfer", *flags(world, stage, out, **changes)]) == code
    return out


@pytest.mark.parametrize("stage", ["align", "distil", "long"])
def test_a_stage(world, tmp_path, stage):
    extra = {"eval-text": world.held_out, "steps": 30, "keep": 1}
    plots = importlib.util.find_spec("matplotlib") is not None
    if plots:
        extra["plot"] = tmp_path / "p.png"
    if stage == "long":
        extra["teacher"] = None
    out = transfer(world, stage, tmp_path / "out", **extra)
    records = read_log(tmp_path / "out.run" / "losses.jsonl")
    rows = [r for r in records if "loss" in r]
    tests = [r for r in records if "eval" in r]
    assert [r["step"] for r in rows] == list(range(3, 31, 3))
    assert rows[-1]["loss"] < 0.95 * rows[0]["loss"]
    assert all(r["tokens"] == r["step"] * 128 and r["tokens_per_s"] > 0 for r in rows)
    assert all(r["peak_memory"] > 0 and r["grad_norm"] > 0 and r["lr"] >= 0 for r in rows)
    assert [r["step"] for r in tests] == [0, 30]
    key = "perplexity" if stage == "long" else "kl"
    if stage != "align":
        assert tests[1]["eval"][key] < tests[0]["eval"][key]
    assert not plots or (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in (tmp_path / "out.run").glob("step-*")] == ["step-00000030"]
    before, after = read(world.student), read(out)
    assert {n: x.shape for n, x in before.items()} == {n: x.shape for n, x in after.items()}
    same = {n for n in before if mx.array_equal(before[n], after[n]).item()}
    trained = {n for n in before if ".self_attn." in n or stage != "align"}
    assert same >= set(before) - trained and len(same & trained) < 0.1 * len(trained)
    assert (out / "heads.json").is_file() and (out / "tokenizer.json").is_file()


def test_save_dtype_and_log_scale(world, tmp_path):
    out = transfer(world, "long", tmp_path / "o", steps=1, **{"save-dtype": "bfloat16"})
    kinds = {x.dtype for n, x in read(out).items() if n.endswith("proj.weight")}
    config = json.loads((out / "config.json").read_text())
    assert kinds == {mx.bfloat16} and config["torch_dtype"] == "bfloat16"
    assert config["fa_logit_scale"] == {"type": "log_length", "a": 500}


def test_tokens_instead_of_steps(world, tmp_path):
    transfer(world, "long", tmp_path / "o", steps=None, tokens="640")
    assert read_log(tmp_path / "o.run" / "losses.jsonl")[-1]["step"] == 5


@pytest.fixture(scope="module")
def trainers():
    server = ForkServer(SERVER)
    yield server
    server.close()


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("stage", ["align", "distil", "long"])
def test_killed_at_random_and_resumed_is_never_killed(world, tmp_path, trainers, stage):
    seed = random.SystemRandom().randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    settings = {"steps": 14, "save-every": 2, "log-every": 1, "accumulate": 2, "text": world.texts}
    argv = {n: flags(world, stage, tmp_path / n, **settings) for n in ("whole", "killed")}
    assert (trainers.start(*argv["whole"]), trainers.wait())[1] == 0
    run, kills = tmp_path / "killed.run", 0
    while not (tmp_path / "killed").exists():
        pid = trainers.start(*argv["killed"])
        # The log tells how far it is; kill it some time after a step, never after the last state.
        begin = read_log(run / "losses.jsonl")[-1:] or [{"step": 0}]
        goal = begin[0]["step"] + rng.randrange(1, 6)
        deadline = time.time() + 60
        while kills < 3 and time.time() < deadline:
            now = read_log(run / "losses.jsonl")[-1:]
            if now and now[0]["step"] >= goal:
                time.sleep(rng.random() * 0.03)
                with contextlib.suppress(ProcessLookupError):  # it may have ended just now
                    os.kill(pid, signal.SIGKILL)
                    kills += 1
                break
            if not alive(pid):
                break
            time.sleep(0.002)
        code = trainers.wait()
        assert code in (0, -signal.SIGKILL), code
    assert kills >= 1
    same_arrays(read(tmp_path / "whole"), read(tmp_path / "killed"))
    rows = {n: read_log(tmp_path / f"{n}.run" / "losses.jsonl") for n in argv}
    for one, other in zip(rows["whole"], rows["killed"], strict=True):
        assert (one["step"], one["loss"], one["lr"]) == (other["step"], other["loss"], other["lr"])
    last = {n: tmp_path / f"{n}.run" / "step-00000014" / "state.safetensors" for n in argv}
    same_arrays(*(mx.load(str(f)) for f in last.values()))
    assert not list(run.glob(".partial-*"))


def test_ctrl_c_saves_and_goes_on(world, tmp_path, monkeypatch, capsys):
    advance, seen = steps.Trainer.advance, []

    def interrupted(self, tokens):
        seen.append(1)
        if len(seen) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return advance(self, tokens)

    monkeypatch.setattr(steps.Trainer, "advance", interrupted)
    transfer(world, "long", tmp_path / "o", 130, quiet=None)
    assert "same command goes on" in capsys.readouterr().err and not (tmp_path / "o").exists()
    assert (tmp_path / "o.run" / "step-00000005").is_dir()
    transfer(world, "long", tmp_path / "o")
    assert len(seen) == 12
    monkeypatch.setattr(steps.Trainer, "advance", advance)
    same_arrays(read(transfer(world, "long", tmp_path / "again")), read(tmp_path / "o"))


def test_another_recipe_does_not_continue(world, tmp_path, capsys):
    transfer(world, "long", tmp_path / "o")
    transfer(world, "long", tmp_path / "o", 2)
    assert "exists already" in capsys.readouterr().err
    transfer(world, "long", tmp_path / "o", 2, overwrite=True, lr=1e-4, text=world.held_out)
    assert "another lr, text" in capsys.readouterr().err
    transfer(world, "long", tmp_path / "o", overwrite=True, lr=1e-4, restart=True)


def test_two_runs_at_once(world, tmp_path, capsys):
    (tmp_path / "o.run").mkdir()
    with (tmp_path / "o.run" / ".lock").open("w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        transfer(world, "long", tmp_path / "o", 2)
    assert "Another run" in capsys.readouterr().err
    transfer(world, "long", tmp_path / "o")


def test_a_damaged_state_is_refused(world, tmp_path, capsys):
    transfer(world, "long", tmp_path / "o")
    state = tmp_path / "o.run" / "step-00000012" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-100])
    transfer(world, "long", tmp_path / "o", 2, overwrite=True)
    assert "state.safetensors" in capsys.readouterr().err


@pytest.mark.parametrize(
    "stage, changes, words",
    [
        ("align", {"teacher": None}, "needs --teacher"),
        ("long", {"teacher": None, "kl": 1.0}, "needs --teacher"),
        ("align", {"kl": 1.0}, "no effect in align"),
        ("distil", {"kl": 0.0}, "nothing to learn"),
        ("long", {"steps": None}, "--steps or --tokens"),
        ("long", {"tokens": "9"}, "--steps or --tokens"),
        ("long", {"accumulate": 3}, "not divisible"),
        ("distil", {"length": 1024}, "reads 512 tokens"),
        ("long", {"length": 99999, "teacher": None}, "one sequence needs 100,000"),
        ("long", {"text": "nowhere"}, "does not exist"),
        ("long", {"eval-needle": 64}, "too short"),
        ("long", {"lr": "inf"}, "number"),
        ("long", {"student": "base"}, "no HydraHead model"),
        ("align", {"teacher": "student"}, "HydraHead model already"),
        ("long", {"plot": "/nowhere/p.png"}, "mkdir -p /nowhere"),
        ("long", {"out": "texts", "overwrite": True}, "not a model folder"),
        ("long", {"out": "student", "overwrite": True}, "the same"),
        ("long", {"lr": "fast"}, "number"),
    ],
)
def test_errors(world, tmp_path, capsys, stage, changes, words):
    for name in ("student", "teacher", "out"):
        if isinstance(changes.get(name), str):
            changes = {**changes, name: world.folder / changes[name]}
    transfer(world, stage, changes.pop("out", tmp_path / "o"), 2, **changes)
    err = capsys.readouterr().err
    assert words in err and "Traceback" not in err and len(err.splitlines()) <= 2
    assert not (tmp_path / "o").exists()


def test_a_fused_student_and_a_foreign_teacher(world, tmp_path, capsys):
    assert (
        main(["convert", "--hf-path", str(world.student), "--mlx-path", str(tmp_path / "f")]) == 0
    )
    transfer(world, "long", tmp_path / "o", 2, student=tmp_path / "f")
    assert "fused" in capsys.readouterr().err
    other = students.write_base(tmp_path / "b", "llama", **{**students.SIZES, "vocab_size": 300})[0]
    transfer(world, "distil", tmp_path / "o", 2, teacher=other)
    assert "vocab_size is 260 in the student and 300" in capsys.readouterr().err


def test_no_matplotlib_is_said_at_the_start(world, tmp_path, monkeypatch, capsys):
    find = importlib.util.find_spec
    gone = lambda name, *rest: None if name == "matplotlib" else find(name, *rest)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", gone)
    transfer(world, "long", tmp_path / "o", 2, plot="p.png")
    assert "hydra_mlx[bench]" in capsys.readouterr().err


def test_a_broken_loss_stops(world, tmp_path, capsys):
    transfer(world, "long", tmp_path / "o", 2, lr=1e30, warmup=0)
    assert "smaller --lr" in capsys.readouterr().err and not (tmp_path / "o").exists()


def test_out_of_memory_names_the_flags_that_help(world, tmp_path, monkeypatch, capsys):
    def fail(self, tokens):
        raise RuntimeError("[malloc] Unable to allocate 9 bytes.")

    monkeypatch.setattr(steps.Trainer, "advance", fail)
    transfer(world, "long", tmp_path / "o", 2)
    assert "--grad-checkpoint" in capsys.readouterr().err


def test_needles_are_evaluated_by_hydra_mlx_needles(world, tmp_path, monkeypatch):
    """Through three names of it, so that this test needs no more than those."""
    asked = []

    def evaluate(model, tokenizer, settings):
        ids = mx.array([tokenizer.encode("the sea")])
        asked.append((settings.lengths, settings.trials, settings.seed, model(ids).shape))
        return ["cells"]

    fake = SimpleNamespace(
        NeedleSettings=SimpleNamespace, evaluate=evaluate, accuracy=lambda cells, keys, n: n / 100
    )
    monkeypatch.setattr(training_evaluate, "needles", fake)
    transfer(world, "long", tmp_path / "o", **{"eval-needle": 400, "needles": 3, "seed": 7})
    rows = [r for r in read_log(tmp_path / "o.run" / "losses.jsonl") if "eval" in r]
    assert [r["eval"] for r in rows] == [{"needle_400": 4.0}] * 2
    assert asked == [((400,), 3, 7, (1, 7, 260))] * 2
