"""Probes, fusion of effects, the journal, knockout, and `hydra-mlx score` as a program."""

import json
import random
import signal
import subprocess
import sys
import time

import hydra_mlx  # noqa: F401  (before mlx: it chooses the BLAS library)
from hydra_mlx import haystack, heatmap, knockout, probes, score_file, scoring
from hydra_mlx.errors import UsageError
from hydra_mlx.journal import Journal
from hydra_mlx.loading import load_tokenizer
from hydra_mlx.trunk import Trunk

import numpy as np
import pytest

from .checkpoints import write_base
from .conftest import write_tokenizer
from .planted import DECOY, RECEIVER, SENDER, planted_model, planted_pair

FLAGS = ["--length", "560", "--pairs", "2", "--sub-probes", "1", "--min-gap", "0"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    write_base(folder, "llama", seed=3, vocab_size=260, max_position_embeddings=1024)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(base):
    return load_tokenizer(base)


@pytest.fixture
def planted_probes(monkeypatch):
    """Scoring of planted texts of tokens; the tokenizer is not asked."""

    def make(tokenizer, rng, form, length, depth, keys, source):
        return planted_pair(np.random.RandomState(rng.randrange(2**31)), length, keys)

    monkeypatch.setattr(scoring, "make_pair", make)
    monkeypatch.setattr(knockout, "make_pair", make)


@pytest.mark.parametrize("form", probes.FORMS, ids=lambda f: f.fact[:12])
@pytest.mark.parametrize("keys", [1, 3])
def test_pairs(tokenizer, form, keys):
    for depth in (0.0, 0.4, 1.0):
        pair = probes.make_pair(tokenizer, random.Random(1), form, 700, depth, keys)
        assert 560 < len(pair.clean) <= 700 and len(pair.clean) == len(pair.corrupt)
        clean, corrupt = tokenizer.decode(pair.clean), tokenizer.decode(pair.corrupt)
        plus, minus = (tokenizer.decode(list(x)).split()[-1] for x in (pair.plus, pair.minus))
        assert len(pair.plus) == len(pair.minus) and clean.endswith(plus)
        assert clean.count(plus) == 2 and corrupt.count(plus) == 1  # in x' only as the reply
        changed = [i for i, (a, b) in enumerate(zip(pair.clean, pair.corrupt)) if a != b]  # noqa: B905
        assert changed[0] == pair.first_change and changed[-1] < pair.start - 1
        assert len(changed) <= len(pair.minus) and all(
            pair.corrupt[i] in pair.minus for i in changed
        )


def test_pairs_depend_on_their_seed_only(tokenizer):
    def make(seed, sub, index):
        rng = probes.pair_rng(seed, "single", sub, index)
        return probes.make_pair(tokenizer, rng, probes.FORMS[0], 400, 0.5)

    assert make(0, 0, 1) == make(0, 0, 1)
    assert len({make(s, b, i).clean for s in (0, 1) for b in (0, 1) for i in (0, 1)}) == 8


def test_filler_is_varied():
    stream = haystack.made_sentences(random.Random(0))
    made = [next(stream) for _ in range(500)]
    assert len(set(made)) > 490 and not any(c.isdigit() for s in made for c in s)
    keys = haystack.keys(random.Random(0), 64)
    assert len(set(keys)) == 64


def test_haystack_files(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("One is here.  Two\nis there! Three?")
    source = haystack.file_sentences([str(file)])
    assert source == ["One is here.", "Two is there!", "Three?"]
    stream = haystack.sentences(random.Random(0), source)
    assert {next(stream) for _ in range(3)} == set(source)
    file.write_text("  ")
    with pytest.raises(UsageError, match="no text"):
        haystack.file_sentences([str(file)])


def measured(tmp_path, settings, trunk=None, **options):
    journal = Journal(tmp_path / "journal", {"a": 1})
    trunk = trunk or Trunk(planted_model())
    values = scoring.measure(trunk, None, settings, None, journal, lambda *a: None)
    journal.close()
    return trunk, values


PLANTED = scoring.ScoreSettings(length=40, sub_probes=2, pairs=2, keys=3, min_gap=0.1)


def test_planted_heads_come_first(tmp_path, planted_probes):
    trunk, values = measured(tmp_path, PLANTED)
    found = scoring.result(values, PLANTED)
    assert {tuple(x) for x in found["ranking"][:2]} == {RECEIVER, SENDER}
    score = np.array(found["score"])
    assert score[RECEIVER] > 0.9 and score[SENDER] > 0.9 and score[DECOY] == 0
    assert found["summary"]["skipped_pairs"] == {"single": 0, "multi": 0}
    journal = Journal(tmp_path / "journal", {"a": 1})
    order = found["ranking"]
    curve = knockout.validate(
        trunk, None, PLANTED, None, order, "mean", 3, journal, lambda *a: None
    )
    assert curve["removed"] == [0, 1, 3]
    for c in PLANTED.capabilities:
        right = curve["accuracy"]["score"][c]
        assert right[0] == 1.0 and right[1] < 0.5 and right[2] < 0.5
        assert curve["accuracy"]["random"][c][0] == 1.0
    journal.close()


def test_a_model_that_solves_nothing(tmp_path, planted_probes):
    from hydra_mlx.errors import HydraError

    trunk = Trunk(planted_model())
    out = trunk.blocks[RECEIVER[0]].self_attn.o_proj
    out.weight = out.weight * 0
    with pytest.raises(HydraError, match="none of 8 probes"):
        measured(tmp_path, PLANTED, trunk)


def effects(*heads):
    """[2, 2] effects with the given values at heads (layer, head)."""
    x = np.zeros((2, 2))
    for i, h, v in heads:
        x[i, h] = v
    return x.tolist()


def test_fusion_by_hand():
    s = scoring.ScoreSettings(sub_probes=2, pairs=2, rounds=1)
    values = {f"senders 1/{c}/{b}/{p}": effects() for c, b, p in s.units}
    for c, b, p in s.units:
        values[f"receivers/{c}/{b}/{p}"] = effects((0, 0, 0.4), (1, 1, 0.2))
    values["receivers/multi/0/0"] = values["senders 1/multi/0/0"] = None
    for p in (0, 1):  # seen in one of two wordings
        values[f"senders 1/single/1/{p}"] = effects((0, 1, 0.8))
    f = scoring.fuse(values, s)
    single = f["capabilities"]["single"]
    assert single["raw"].tolist() == [[0.4, 0.4], [0.0, 0.2]]
    assert single["consistency"].tolist() == [[1, 0.5], [0, 1]]
    assert np.allclose(single["score"], [[1, 0.5], [0, 0.5]])
    assert np.allclose(f["capabilities"]["multi"]["score"], [[1, 0], [0, 0.5]])
    assert np.allclose(f["score"], [[1, 0.25], [0, 0.5]])
    assert score_file.ranking(f["score"], f["raw"]) == [[0, 0], [1, 1], [0, 1], [1, 0]]
    tied = np.array([[0.5, 0.5], [0.5, 0.0]])
    raw = np.array([[0.1, 0.1], [0.2, 0.0]])
    assert score_file.ranking(tied, raw) == [[1, 0], [0, 0], [0, 1], [1, 1]]


def test_promotion_by_hand():
    s = scoring.ScoreSettings(capabilities=("single",), sub_probes=1, pairs=2, rounds=1)
    values = {f"senders 1/single/0/{p}": effects((0, 1, 0.04 * p)) for p in (0, 1)}
    values["receivers/single/0/0"] = effects((1, 0, 0.021), (1, 1, 0.019))
    values["receivers/single/0/1"] = effects()
    assert scoring.promoted(values, s, "single", ["receivers"]) == [[], [0]]
    assert scoring.promoted(values, s, "single", ["receivers", "senders 1"]) == [[1], [0]]
    values["receivers/single/0/0"] = values["receivers/single/0/1"] = None
    assert scoring.promoted(values, s, "single", ["receivers"]) == []


def test_statistics():
    a = np.array([[0.0, 1.0], [2.0, 2.0]])
    assert scoring.spearman(a, a) == pytest.approx(1) and scoring.spearman(a, a * 0) is None
    assert scoring.spearman(a, -a) == pytest.approx(-1)
    assert scoring.gini(np.array([[0, 0, 0, 1.0], [1, 1, 1, 1]])) == {
        "mean": 0.375, "least": 0.0, "most": 0.75, "layers": 2
    }  # fmt: skip


def test_journal(tmp_path):
    path = tmp_path / "j"
    journal = Journal(path, {"x": (1, 2)})
    journal.add("a", [0.1, None])
    journal.close()
    whole = path.read_bytes()
    path.write_bytes(whole + b'["b", [0.')
    journal = Journal(path, {"x": (1, 2)})
    assert journal.values == {"a": [0.1, None]} and path.read_bytes() == whole
    journal.finish(tmp_path / "out.json", {"r": 1})
    assert not path.exists() and json.loads((tmp_path / "out.json").read_text()) == {"r": 1}
    Journal(path, {"x": 1}).close()
    with pytest.raises(UsageError, match="other settings"):
        Journal(path, {"x": 2})
    journal = Journal(path, {"x": 1})
    with pytest.raises(UsageError, match="Another run"):
        Journal(path, {"x": 1})
    journal.close()
    path.write_text("something else\n")
    with pytest.raises(UsageError, match="no journal"):
        Journal(path, {"x": 1})
    assert path.read_text() == "something else\n"


def test_text_map():
    values = [[0.0, 0.5, 1.0], [0.05, None, 2.0]]
    assert heatmap.text_map(values, "ab", [1, 2, 3], False) == "  1 2 3\na . 5 9\nb 0   9"
    coloured = heatmap.text_map(values, "ab", [1, 2, 3], True)
    assert coloured.count("\x1b[0m") == 5


def test_program(program, base, tmp_path):
    out, png = tmp_path / "s.json", tmp_path / "s.png"
    pictures = ["--png", png]
    try:
        heatmap.require_matplotlib()
    except UsageError:
        pictures = []
    args = ["score", base, "--out", out, *FLAGS]
    code, text, err = program(*args, "--validate", "--validate-texts", 1, *pictures, model=False)
    assert code == 0 and "best heads" in text and "\x1b" not in text and "wrote" in err
    data = json.loads(out.read_text())
    assert np.array(data["score"]).shape == (2, 4) and len(data["ranking"]) == 8
    assert data["model"]["layers"] == 2 and len(data["model"]["sha256"]) == 64
    assert data["knockout"]["ablation"] == "mean" and data["probes"]["seed"] == 0
    assert set(next(iter(data["capabilities"].values()))) == {
        "receiver", "sender", "raw", "consistency", "score"
    }  # fmt: skip
    assert not out.with_name("s.json.partial").exists()
    if pictures:
        assert png.read_bytes()[:4] == (tmp_path / "s-knockout.png").read_bytes()[:4] == b"\x89PNG"
    before = out.read_bytes()
    code, text, err = program(*args, model=False)
    assert code == 0 and "already" in err and out.read_bytes() == before
    code, _, err = program(*args, "--seed", 1, model=False)
    assert code == 2 and "--overwrite" in err and out.read_bytes() == before
    assert program(*args, "--quiet", "--overwrite", model=False) == (0, "", "")
    assert json.loads(out.read_text())["score"] == data["score"]


def test_killed_and_resumed_is_identical(program, base, tmp_path):
    whole, out = tmp_path / "a.json", tmp_path / "b.json"
    args = ["score", str(base), *FLAGS]
    assert program(*args, "--out", whole, "--quiet", model=False)[0] == 0
    command = [sys.executable, "-m", "hydra_mlx", *args, "--out", str(out), "--quiet"]
    partial = out.with_name("b.json.partial")
    process = subprocess.Popen(command)
    end = time.monotonic() + 60
    while time.monotonic() < end and process.poll() is None:
        if partial.exists() and partial.read_bytes().count(b"\n") >= 4:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.005)
    assert process.wait() == -signal.SIGKILL and not out.exists()
    partial.write_bytes(partial.read_bytes() + b'["receivers/mul')
    code, _, err = program(*args, "--out", out, model=False)
    assert code == 0 and "Going on with" in err
    assert out.read_bytes() == whole.read_bytes() and not partial.exists()


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--length", "50"], "too short"),
        (["--length", "5000"], "made for 1024"),
        (["--capabilities", "double"], "single,multi"),
        (["--capabilities", "single,single"], "single,multi"),
        (["--ablation", "zero"], "--validate"),
        (["--validate-texts", "3"], "--validate"),
        (["--out", "/nowhere/at/all.json"], "not a folder"),
        (["--out", "/tmp"], "is a folder"),
        (["--pairs", "0"], "--pairs"),
        (["--sub-probes", "9"], "from 1 to 5"),
        (["--haystack", "/nowhere.txt"], "cannot be read"),
        (["--frobnicate"], "--frobnicate"),
    ],
)
def test_wrong_flags(program, base, tmp_path, flags, words):
    out = [] if "--out" in flags else ["--out", tmp_path / "x.json"]
    code, text, err = program("score", base, *out, *flags, model=False)
    assert code == 2 and words in err and not text and len(err.strip().splitlines()) <= 2


def test_one_file_for_two_things_and_a_model_that_fails(program, base, tmp_path):
    out = tmp_path / "x.json"
    code, _, err = program("score", base, "--out", out, "--png", out, model=False)
    assert code == 2 and ("same file" in err or "matplotlib" in err)
    flags = [*FLAGS[:-1], "1e9", "--out", out]
    code, _, err = program("score", base, *flags, model=False)
    assert code == 2 and "none of" in err and not list(tmp_path.iterdir())


def test_wrong_models(program, tiny_model_dir, tmp_path):
    out = ["--out", tmp_path / "x.json"]
    code, _, err = program("score", tiny_model_dir, *out, model=False)
    assert code == 2 and "linear-attention" in err
    code, _, err = program("score", tmp_path / "none", *out, model=False)
    assert code == 2 and "does not exist" in err
    code, _, err = program("score", model=False)
    assert code == 2 and "MODEL" in err


def test_png_without_matplotlib(program, base, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = program("score", base, "--png", tmp_path / "x.png", model=False)
    assert code == 2 and "bench" in err
