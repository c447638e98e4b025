"""From a base model to an answer: score, migrate, align, distil, long, convert, generate, needle.

The base has retrieval heads put in by hand; its probes are made of its own 32 tokens. All else is
what a user types.
"""

import json

import hydra_mlx
from hydra_mlx import scoring
from hydra_mlx.tokens import write_packed
from hydra_mlx.training.state import read_log
from hydra_mlx.training.steps import Trainer

import mlx.core as mx
import numpy as np
import pytest

from .conversions import read, same_arrays
from .planted import DECOY, RECEIVER, SENDER, planted_pair, planted_text, write_planted

STEPS = {"align": 12, "distil": 15, "long": 12}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with the planted base and packed texts of it, to train on and held out."""
    folder = tmp_path_factory.mktemp("pipeline")
    write_planted(folder / "base")
    for seed, (name, n) in enumerate((("text", 400), ("held-out", 10))):
        (folder / name).mkdir()
        rng = np.random.RandomState(seed)
        write_packed(folder / name, [planted_text(rng) for _ in range(n)])
    return folder


class Killed(BaseException):
    """What a kill does to a process, as near as one process can come to it."""


def killed(monkeypatch, program, owner, name: str, at: int, argv: list):
    """Run a command whose `owner.name` dies at its call number `at`."""
    real, calls = getattr(owner, name), []

    def dying(*args):
        calls.append(1)
        if len(calls) == at:
            raise Killed
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, dying)
        with pytest.raises(Killed):
            program(*argv, model=False)


def test_from_a_base_model_to_an_answer(world, program, monkeypatch):
    def hydra(*argv):
        code, out, err = program(*argv, model=False)
        assert code == 0, err
        return out

    def make_pair(tokenizer, rng, form, length, depth, keys, source):
        return planted_pair(np.random.RandomState(rng.randrange(2**31)), length, keys)

    monkeypatch.setattr(scoring, "make_pair", make_pair)
    base, scores = world / "base", world / "scores.json"
    argv = ["score", base, "--length", 40, "--sub-probes", 2, "--pairs", 2, "--min-gap", 0.1]
    hydra(*argv, "--out", world / "whole.json", "--quiet")
    argv += ["--out", scores, "--quiet"]
    killed(monkeypatch, program, scoring.patching, "receiver_effects", 4, argv)
    assert (world / "scores.json.partial").exists() and not scores.exists()
    hydra(*argv)
    assert scores.read_bytes() == (world / "whole.json").read_bytes()

    student = world / "student"
    text = ["--text", world / "text"]
    flags = ["--ratio", "7:1", "--floor", 0, "--gamma", "rms", "--length", 32, "--quiet"]
    hydra("migrate", base, "--scores", scores, *flags, *text, "--out", student)
    heads = json.loads((student / "heads.json").read_text())["full_attention_heads"]
    assert {(i, h) for i, found in enumerate(heads) for h in found} == {SENDER, RECEIVER}
    assert DECOY not in {(i, h) for i, found in enumerate(heads) for h in found}

    held_out = {}
    for stage, n in STEPS.items():
        argv = ["transfer", "--stage", stage, "--student", student, "--teacher", base, *text]
        argv += ["--eval-text", world / "held-out", "--steps", n, "--batch", 8, "--length", 32]
        argv += ["--lr", 1e-3, "--log-every", 3, "--save-every", 6, "--no-compile", "--quiet"]
        hydra(*argv, "--out", world / f"{stage}-whole")
        argv += ["--out", world / stage]
        killed(monkeypatch, program, Trainer, "advance", 8, argv)
        hydra(*argv)
        same_arrays(read(world / stage), read(world / f"{stage}-whole"))
        logs = [read_log(world / f"{s}.run/losses.jsonl") for s in (stage, f"{stage}-whole")]
        losses, whole = ([r["loss"] for r in log if "loss" in r] for log in logs)
        assert losses == whole and len(losses) == n // 3
        held_out[stage] = [r["eval"] for r in logs[0] if "eval" in r]
        student = world / stage
    print({s: [(e["kl"], e["perplexity"]) for e in x] for s, x in held_out.items()})
    # Batches of so short a run differ more than it teaches; these windows are always the same.
    for stage, name in (("align", "kl"), ("distil", "kl"), ("long", "perplexity")):
        assert held_out[stage][-1][name] < held_out[stage][0][name]

    small = world / "small"
    hydra(
        "convert", "--hf-path", student, "--mlx-path", small, "-q", "--q-group-size", 32, "--quiet"
    )
    reply = hydra("generate", "--model", small, "w1 w2 w3", "-m", 6, "--ignore-chat-template")
    assert len(reply.split()) == 6 and all(w[0] == "w" for w in reply.split())
    assert mx.isfinite(hydra_mlx.load_model(small)(mx.arange(12)[None])).all().item()
