"""tools/perplexity.py, side_by_side.py and model_card.py, on a tiny base and its student."""

import json
import math

import hydra_mlx
from hydra_mlx import convert, needle
from hydra_mlx.loading import load_tokenizer
from hydra_mlx.manifest import model_hash
from hydra_mlx.teacher import load_teacher, open_base
from hydra_mlx.tokens import Batches, read_documents
from hydra_mlx.training import evaluate

import pytest

from tools import model_card, perplexity, side_by_side

from .students import write_world
from .test_default_model import SECTIONS


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """students.write_world, and the converted `folder`s of the student and of the base itself."""
    w = write_world(tmp_path_factory.mktemp("world"))
    w.model, w.same = w.folder / "model", w.folder / "same"
    for source, target, more in ((w.student, w.model, []), (w.base, w.same, ["identity"])):
        argv = ["--hf-path", source, "--mlx-path", target, "--quiet"]
        argv += ["--head-map", *more] if more else []
        assert convert.main([str(a) for a in argv]) == 0
    return w


def measured(world, model, out, *flags) -> dict:
    """The result of tools/perplexity.py."""
    argv = [model, world.base, "--text", world.held_out, "--out", out, "--quiet", *flags]
    assert perplexity.main([str(a) for a in argv]) == 0
    return json.loads(out.read_text())


# ---------------------------------------------------------------------------------- perplexity


def test_perplexity(world, tmp_path, monkeypatch):
    monkeypatch.setattr(perplexity, "STEP", 7)  # uneven pieces must not matter
    found = measured(world, world.model, tmp_path / "p", "--lengths", "16,24", "--windows", "3")
    assert found["model"]["sha256"] == model_hash(world.model)
    assert str(tmp_path) not in json.dumps(found) and "held-out.txt" in found["command"]
    tokenizer = load_tokenizer(world.model)
    documents = read_documents([world.held_out], 260, lambda: tokenizer)
    base = load_teacher(open_base(world.base))
    both = [perplexity.Read(m) for m in (hydra_mlx.load_model(world.model), base)]
    for x in found["lengths"]:
        windows = Batches(documents, x["length"], 0).take(0, 3)
        # The student of training, without a cache and in one pass.
        wanted = evaluate.compare(hydra_mlx.load_model(world.student), base, windows, 64)
        for ours, theirs in (
            ("tokens", "tokens"), ("kl", "kl"), ("perplexity", "perplexity"),
            ("base_perplexity", "teacher_perplexity"), ("perplexity_ratio", "perplexity_ratio"),
        ):  # fmt: skip
            assert x[ours] == pytest.approx(wanted[theirs], rel=1e-4), ours
        rows = [perplexity.compare(*both, w) for w in windows]
        off = [a - b for a, b, *_ in rows]
        mean = sum(off) / 3
        spread = math.sqrt(sum((d - mean) ** 2 for d in off) / 2 / 3)
        assert x["log_ratio_standard_error"] == pytest.approx(spread, rel=1e-3)
        assert 0 <= x["same_top1"] < 1 and x["kl"] > 1e-3


def test_perplexity_of_the_same(world, tmp_path):
    found = measured(world, world.same, tmp_path / "p", "--lengths", "20", "--windows", "2")
    (x,) = found["lengths"]
    assert x["perplexity_ratio"] == pytest.approx(1, abs=1e-4) and abs(x["kl"]) < 1e-5
    assert x["same_top1"] == 1


def test_too_little_text(world, tmp_path, capsys):
    argv = [world.model, world.base, "--text", world.held_out, "--out", tmp_path / "p"]
    assert perplexity.main([str(a) for a in [*argv, "--lengths", "16", "--windows", "10000"]]) == 2
    assert "10000 were asked for" in capsys.readouterr().err


# ---------------------------------------------------------------------------------- side by side


def test_prompts():
    assert len(set(side_by_side.PROMPTS)) == 20


def beside(world, model, out, monkeypatch) -> dict:
    """The result of tools/side_by_side.py with two questions."""
    monkeypatch.setattr(side_by_side, "PROMPTS", side_by_side.PROMPTS[:2])
    argv = [model, world.base, "--max-tokens", "6", "--out", out, "--quiet"]
    assert side_by_side.main([str(a) for a in argv]) == 0
    return json.loads(out.read_text())


def test_side_by_side(world, tmp_path, monkeypatch):
    found = beside(world, world.same, tmp_path / "a", monkeypatch)
    assert len(found["answers"]) == 2 and found["model"]["sha256"] == model_hash(world.same)
    model, tokenizer = hydra_mlx.load(world.same)
    for x in found["answers"]:
        assert x["student"] == x["teacher"]  # the same model
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": x["prompt"]}], add_generation_prompt=True
        )
        assert x["student"]["text"] == hydra_mlx.generate(model, tokenizer, ids, 6)
    found = beside(world, world.model, tmp_path / "b", monkeypatch)
    assert any(x["student"] != x["teacher"] for x in found["answers"])


# ---------------------------------------------------------------------------------- the card


@pytest.fixture
def results(world, tmp_path, monkeypatch):
    """argv of tools/model_card.py with results of world.model."""
    measured(world, world.model, tmp_path / "p.json", "--lengths", "16,24", "--windows", "2")
    beside(world, world.model, tmp_path / "a.json", monkeypatch)
    for name, model in (("own", world.model), ("base", world.same)):
        flags = ["--lengths", "384", "--depths", "0,1", "--digits", "3", "--quiet"]
        argv = [model, *flags, "--out", tmp_path / f"{name}.json"]
        assert needle.main([str(a) for a in argv]) == 0
    step = {"stage": "distil", "step": 40, "loss": 0.5, "kl": 0.25, "lr": 1e-4, "tok_s": 98765}
    held = {"stage": "distil", "step": 40, "long": {"kl": 0.125}, "teacher": {"kl": 0.0625}}
    first = {"stage": "align", "step": 90, "loss": 0.75, "lr": 1e-4, "tok_s": 500, "seen": 900}
    lines = [json.dumps(x) for x in (first, {**step, "seen": 12_345_678}, held)]
    (tmp_path / "log.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "commands.txt").write_text("python -m something --steps 40\n")
    argv = [world.model, "--base-id", "owner/base", "--perplexity", tmp_path / "p.json"]
    argv += ["--needles", tmp_path / "own.json", tmp_path / "base.json"]
    argv += ["--answers", tmp_path / "a.json", "--log", tmp_path / "log.jsonl"]
    return [str(a) for a in [*argv, "--commands", tmp_path / "commands.txt"]]


def test_card(world, results, tmp_path):
    assert model_card.main(results) == 0
    text = (world.model / "README.md").read_text()
    titles = [line.lstrip("# ") for line in text.splitlines() if line.startswith("#")]
    assert set(SECTIONS) <= set(titles) and titles[-1] == "Licence"
    assert "license: apache-2.0\nbase_model: owner/base\n" in text
    for said in (
        "2 of its 8 attention heads", "python -m something --steps 40",
        "| align | 90 | 900 | 0.75 | - | - | - | 500 |",
        "| distil | 40 | 12,345,678 | 0.5 | 0.25 | 0.125 | 0.0625 | 98,765 |",
        "python tools/perplexity.py model base", "python tools/side_by_side.py model base",
        "hydra-mlx needle model --lengths 384 --depths 0.0,1.0 --keys 1 --trials 1 --digits 3",
        "hydra-mlx needle same --lengths", "of 2 needles",
    ):  # fmt: skip
        assert said in text, said
    found = json.loads((tmp_path / "p.json").read_text())["lengths"]
    assert all(f"{x['perplexity_ratio']:.4f}" in text for x in found)
    asked = json.loads((tmp_path / "a.json").read_text())["answers"]
    assert all(x["prompt"] in text and x["teacher"]["text"].strip() in text for x in asked)
    assert str(tmp_path) not in text


def test_card_refuses_what_does_not_belong(world, results, tmp_path, capsys):
    def said(argv):
        assert model_card.main(argv) == 2
        return capsys.readouterr().err

    assert "other weights" in said([str(world.same), *results[1:]])
    own, base = (tmp_path / n for n in ("own.json", "base.json"))
    before = json.loads(base.read_text())
    before["settings"]["seed"] = 7
    base.write_text(json.dumps(before))
    assert "differ in seed" in said(results)
    base.write_text(own.read_text().replace("needle accuracy", "something"))
    assert "'hydra_mlx needle accuracy' file" in said(results)
    base.write_text(own.read_text())
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n')
    assert "stage and step" in said(results)


def test_an_answer_cannot_end_its_block():
    lines = model_card.fenced("```python\nx\n```\n````")
    assert lines[0] == "`````text" and lines[-2] == "`````"
