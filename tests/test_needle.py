"""Needle in a haystack, on a model that is known to see the last tokens only."""

import json
import re

import hydra_mlx  # noqa: F401  (before mlx: it chooses the BLAS library)
from hydra_mlx import needles
from hydra_mlx.errors import UsageError
from hydra_mlx.loading import load_tokenizer
from hydra_mlx.needles import NeedleSettings, accuracy, evaluate, is_right, table
from hydra_mlx.probes import make_needle

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models.cache import KVCache

from .conftest import SPECIAL

FACT = re.compile(r"secret number of the (\w+ \w+) is (\d+)\.")
ASKED = re.compile(r"secret number of the (\w+ \w+) is ?(\d*)$")


class Sighted(nn.Module):
    """Answers rightly if the fact stands in the last `window` tokens, else with zeros.

    Its cache holds the token ids themselves, in float32, so that it can read them back.
    """

    def __init__(self, tokenizer, window: int):
        super().__init__()
        self.tokenizer, self.window, self.layers = tokenizer, window, []

    def make_cache(self):
        return [KVCache()]

    def __call__(self, tokens, cache=None):
        ids = tokens.astype(mx.float32)[:, None, :, None]
        held = cache[0].update_and_fetch(ids, ids)[0].flatten().astype(mx.int32).tolist()
        text = self.tokenizer.decode(held[-self.window :])
        asked = ASKED.search(text)
        digit = "x"
        if asked:
            known = dict(FACT.findall(text)).get(asked[1], "0" * 7) + "."
            digit = known[len(asked[2])]
        (want,) = self.tokenizer.encode(digit, add_special_tokens=False)
        logits = mx.zeros((*tokens.shape, 256 + len(SPECIAL)))
        logits[..., want] = 1.0
        return logits


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir):
    return load_tokenizer(tiny_model_dir)


def test_exact_accuracies(tokenizer):
    settings = NeedleSettings(lengths=(600, 1200), depths=(0.0, 1.0), trials=2)
    seen = []
    cells = evaluate(
        Sighted(tokenizer, 700), tokenizer, settings, progress=lambda *a: seen.append(a)
    )
    right = {(c["length"], c["depth"]): c["right"] for c in cells}
    assert right == {(600, 0.0): 2, (600, 1.0): 2, (1200, 0.0): 0, (1200, 1.0): 2}
    assert accuracy(cells, 1, 600) == 1.0 and accuracy(cells, 1, 1200) == 0.5
    assert seen[0] == ("600 tokens", 0, 8) and seen[-1] == ("done", 8, 8)
    lost = next(c for c in cells if (c["length"], c["depth"]) == (1200, 0.0))
    assert [reply[:7] for _, reply in lost["wrong"]] == ["0000000"] * 2
    assert all(len(answer) == 7 for answer, _ in lost["wrong"])
    assert all(c["length"] - 120 < c["tokens"] < c["length"] for c in cells)
    shown = table(cells, settings, 1).splitlines()
    assert shown[2].split() == ["0.00", "2/2", "0/2"] and shown[-1].split()[1:] == [
        "100", "%", "50", "%"
    ]  # fmt: skip


def test_several_keys(tokenizer):
    settings = NeedleSettings(lengths=(900,), depths=(0.5,), keys=(1, 4), trials=3)
    cells = evaluate(Sighted(tokenizer, 10**6), tokenizer, settings)
    assert [(c["keys"], c["right"]) for c in cells] == [(1, 3), (4, 3)]


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_the_text(tokenizer, depth):
    import random

    n = make_needle(tokenizer, random.Random(3), 1000, depth, keys=3, digits=5)
    facts = FACT.findall(n.body)
    asked = ASKED.search(n.body)
    assert len(facts) == 3 and dict(facts)[asked[1]] == n.answer and len(n.answer) == 5
    at = n.body.index(n.answer) / len(n.body)
    assert abs(at - depth) < 0.3 and 880 < n.tokens <= 1000


@pytest.mark.parametrize(
    "reply, right",
    [(" 123.", True), ("It is 123", True), ("1234", False), ("12 3", False), ("none", False)],
)
def test_is_right(reply, right):
    assert is_right(reply, "123") is right


def test_program(program, tiny_model_dir, tmp_path):
    out = tmp_path / "n.json"
    args = ["needle", tiny_model_dir, "--lengths", "400,500", "--depths", "0,1", "--keys", "1,2"]
    code, text, err = program(*args, "--out", out, model=False)
    assert code == 0 and text.count("right answers") == 2 and "wrote" in err
    data = json.loads(out.read_text())
    assert len(data["cells"]) == 8 and data["accuracy"] == {
        k: {"400": 0.0, "500": 0.0} for k in "12"
    }
    assert data["settings"]["digits"] == 7 and len(data["model"]["sha256"]) == 64
    code, _, err = program(*args, "--out", out, model=False)
    assert code == 2 and "already" in err
    same = program(*args, "--out", out, "--overwrite", "--quiet", model=False)
    assert same == (0, "", "") and json.loads(out.read_text()) == data


def test_a_run_goes_on(program, tiny_model_dir, tmp_path, monkeypatch):
    out, asked = tmp_path / "n.json", []
    args = ["needle", tiny_model_dir, "--lengths", "400", "--out", out, "--quiet"]

    def ask(*rest):
        asked.append(rest)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return "1"

    monkeypatch.setattr(needles, "ask", ask)
    assert program(*args, model=False)[0] == 130 and not out.exists()
    assert program(*args, model=False)[0] == 0 and len(asked) == 6 and out.exists()


def test_chat_template(program, tiny_model_dir, make_model_dir, tmp_path):
    args = ["needle", "--chat", "--lengths", "400", "--depths", "1"]
    assert program(*args, tiny_model_dir, model=False)[0] == 0
    code, _, err = program(*args, make_model_dir(template=False), model=False)
    assert code == 2 and "no chat template" in err


def test_haystack_and_seed_change_the_text(tokenizer):
    import random

    source = ["Only this stands here.", "And that."]
    n = make_needle(tokenizer, random.Random(0), 500, 0.5, source=source)
    assert n.body.count("Only this stands here.") > 3
    a, b = (make_needle(tokenizer, random.Random(s), 500, 0.5).body for s in (0, 1))
    assert a != b
    with pytest.raises(UsageError, match="too short"):
        make_needle(tokenizer, random.Random(0), 60, 0.5)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--lengths", "4x"], "4x"),
        (["--lengths", "1K,1024"], "twice"),
        (["--lengths", "60"], "too short"),
        (["--depths", "2"], "from 0 to 1"),
        (["--keys", "0"], "1 to 64"),
        (["--trials", "0"], "--trials"),
        (["--overwrite"], "--out"),
        (["--out", "/nowhere/x.json"], "not a folder"),
        (["--haystack", "/nowhere.txt"], "cannot be read"),
    ],
)
def test_wrong_flags(program, tiny_model_dir, flags, words):
    code, text, err = program("needle", tiny_model_dir, *flags, model=False)
    assert code == 2 and words in err and not text and len(err.strip().splitlines()) <= 2
