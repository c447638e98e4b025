"""hydra-mlx migrate: which heads are chosen, where the base's rows land, and what gamma is."""

import json
from fractions import Fraction

import hydra_mlx
from hydra_mlx import reference, score_file, selection
from hydra_mlx.errors import ConfigError, UsageError
from hydra_mlx.manifest import model_hash
from hydra_mlx.migrate import main
from hydra_mlx.sources import IDENTITY
from hydra_mlx.tokens import write_packed

import mlx.core as mx
import numpy as np
import pytest

from .checkpoints import BASE, base_model, write_base, write_checkpoint, write_gguf, write_scores
from .conversions import TOKENS, read, same_arrays
from .conversions import convert as hydra_convert

L, H, D = 2, 4, 16
GROUP = 2


def migrate(*argv, code: int = 0):
    assert main([str(a) for a in (*argv, "--quiet")]) == code, argv


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """(folder, config, weights, mlx-lm's model) of a plain Qwen3."""
    return write_base(tmp_path_factory.mktemp("base") / "qwen3", "qwen3")


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Packed tokens for the base: 40 documents of 30 ids below 71."""
    rng = np.random.RandomState(3)
    return write_packed(tmp_path_factory.mktemp("packed"), rng.randint(0, 71, (40, 30)))


# Selection


@pytest.mark.parametrize(
    "text, share", [("3:1", Fraction(1, 4)), ("7:1", Fraction(1, 8)), ("0:1", 1), ("5:3", 0.375)]
)
def test_ratio(text, share):
    assert selection.parse_ratio(text) == share


@pytest.mark.parametrize("text", ["3", "a:b", "3:1:1", "-1:2", "0:0", ""])
def test_bad_ratio(text):
    with pytest.raises(UsageError, match="ratio"):
        selection.parse_ratio(text)


def test_how_many_heads():
    """270 heads at 3:1 are 67.5: a half counts up. The floor's default follows spec section 3."""
    assert selection.count_heads(Fraction(1, 4), 30, 9, 0) == 68
    assert selection.count_heads(Fraction(1, 8), 28, 16, 1) == 56
    assert selection.default_floor(Fraction(1, 4)) == 0
    assert selection.default_floor(Fraction(1, 8)) == 1
    with pytest.raises(UsageError, match="30 full-attention heads, but there are 27"):
        selection.count_heads(Fraction(1, 10), 30, 9, 1)
    with pytest.raises(UsageError, match="9 heads"):
        selection.count_heads(Fraction(1, 1), 30, 9, 10)


def test_the_best_heads_globally_and_with_a_floor():
    scores = np.array([[0.9, 0.8, 0.7, 0.6], [0.1, 0.2, 0.0, 0.0], [0.0, 0.0, 0.0, 0.5]])
    assert selection.top_heads(scores, scores, 3, 0) == [[0, 1, 2], [], []]
    assert selection.top_heads(scores, scores, 4, 1) == [[0, 1], [1], [3]]
    for strategy in selection.STRATEGIES:
        with pytest.raises(UsageError, match="6 full-attention heads, but there are 4"):
            selection.select_heads(strategy, 3, 4, 4, 2, 0, score_file.Scores(scores, scores, ""))


def test_ties_go_by_score_raw_layer_head():
    scores = np.zeros((2, 3))
    raw = np.array([[0.0, 0.0, 0.1], [0.0, 0.2, 0.0]])
    assert selection.top_heads(scores, raw, 2, 0) == [[2], [1]]
    assert selection.top_heads(scores, raw, 3, 0) == [[0, 2], [1]]
    assert selection.top_heads(scores, 0 * raw, 4, 0) == [[0, 1, 2], [0]]


def test_fixed_slots_are_even():
    heads = selection.fixed_heads(30, 9, 68, 1)
    assert sum(map(len, heads)) == 68 and {len(h) for h in heads} == {2, 3}
    assert [0, 4] in heads and [0, 3, 6] in heads
    with pytest.raises(UsageError, match="floor"):
        selection.fixed_heads(4, 4, 3, 1)


def test_random_depends_on_the_seed_and_keeps_the_floor():
    def pick(seed):
        return selection.select_heads("random", 6, 8, 12, 1, seed)

    assert pick(1) == pick(1) != pick(2)
    assert sum(map(len, pick(1))) == 12 and min(map(len, pick(1))) >= 1


@pytest.mark.parametrize(
    "change, words",
    [
        ({"layers": 3}, "layers = 3"),
        ({"heads": 2}, "heads = 2"),
        ({"heads": None}, "heads = None"),
        ({"model": "m"}, "layers = None"),
        ({"score": [[1, 2], [3, 4]]}, "2 lists of 4"),
        ({"score": [[float("nan")] * 4] * 2}, "NaN"),
        ({"raw_effect": "many"}, "2 lists of 4"),
        ({"format": "something"}, "not a score file"),
        ({"format_version": 2}, "version 2"),
    ],
)
def test_scores_that_do_not_fit(tmp_path, change, words):
    path = write_scores(tmp_path / "s.json", [[0.0] * 4] * 2, **change)
    with pytest.raises(ConfigError, match=words):
        score_file.read_scores(path, 2, 4)


def test_scores_of_another_model(base, tmp_path, capsys):
    path = write_scores(tmp_path / "s.json", np.eye(2, 4))
    migrate(base[0], "--scores", path, "--out", tmp_path / "o", code=2)
    assert "other weights" in capsys.readouterr().err and not (tmp_path / "o").exists()
    migrate(base[0], "--scores", path, "--foreign-scores", "--out", tmp_path / "o")


# The checkpoint


def test_rows_land_where_the_spec_says(base, tmp_path):
    folder, _, weights, _ = base
    table = [[0, 3, 0, 0], [0, 0, 2, 0]]
    scores = write_scores(tmp_path / "s.json", table, sha256=model_hash(folder))
    migrate(folder, "--scores", scores, "--ratio", "3:1", "--out", tmp_path / "out")
    maps = json.loads((tmp_path / "out" / "heads.json").read_text())
    assert maps == {"full_attention_heads": [[1], [2]]}
    found = {n: np.array(x) for n, x in read(tmp_path / "out").items()}
    for i, fa in enumerate(maps["full_attention_heads"]):
        prefix = f"model.layers.{i}.self_attn."
        theirs = {n: np.array(weights[f"{prefix}{n}_proj.weight"]) for n in "qkvo"}
        la = [h for h in range(H) if h not in fa]
        kept = sorted({h // GROUP for h in fa})
        for n, fa_rows, la_rows in (
            ("q", fa, la),
            ("k", kept, [h // GROUP for h in la]),
            ("v", kept, [h // GROUP for h in la]),
        ):
            blocks = theirs[n].reshape(-1, D, theirs[n].shape[1])
            for kind, rows in (("fa", fa_rows), ("la", la_rows)):
                want = np.concatenate([blocks[r] for r in rows])
                assert np.array_equal(found[f"{prefix}{kind}.{n}_proj.weight"], want), (i, kind, n)
        for kind in ("fa", "la"):
            for n in "qk":
                ours = found[f"{prefix}{kind}.{n}_norm.weight"]
                assert np.array_equal(ours, np.array(weights[f"{prefix}{n}_norm.weight"]))
        assert np.array_equal(found[prefix + "o_proj.weight"], theirs["o"])
        tap = found[prefix + "la.k_conv1d.weight"]
        assert np.array_equal(tap, np.eye(4)[3] * np.ones((len(la) * D, 1, 1)))
        assert np.abs(found[prefix + "fa.gate_proj.weight"]).max() < 1e-6
        assert (found[prefix + "fa.gate_proj.bias"] == 1).all()
        assert (found[prefix + "head_scale"] == 1).all()
        A = np.exp(found[prefix + "la.A_log"])
        dt = np.log1p(np.exp(found[prefix + "la.dt_bias"]))
        assert ((A > 0) & (A < 16)).all() and ((dt > 9e-4) & (dt < 0.11)).all()


def test_it_is_what_the_converter_makes(base, tmp_path):
    """The mapping it writes gives the same model through `convert --head-map`."""
    out = tmp_path / "out"
    migrate(base[0], "--select", "fixed", "--ratio", "1:1", "--seed", 4, "--out", out)
    flags = ("--head-map", out / "heads.json", "--seed", 4, "--no-fuse", "--quiet")
    hydra_convert("--hf-path", base[0], "--mlx-path", tmp_path / "again", *flags)
    same_arrays(read(out), read(tmp_path / "again"))


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_all_full_attention_with_identity_settings_is_the_base(kind, tmp_path):
    folder, _, _, model = write_base(tmp_path / kind, kind, 7)
    keys = [f"--set={k}={json.dumps(v)}" for k, v in IDENTITY.items()]
    flags = ("--select", "fixed", "--ratio", "0:1", *keys)
    migrate(folder, *flags, "--out", tmp_path / "out")
    ours = hydra_mlx.load_model(tmp_path / "out")(TOKENS)
    assert mx.abs(ours - model(TOKENS)).max().item() < 2e-5


def test_from_a_gguf(tmp_path):
    path, config, weights, _ = write_gguf(tmp_path / "m.gguf", vocab_size=258)
    migrate(path, "--select", "random", "--ratio", "1:1", "--out", tmp_path / "out")
    found = read(tmp_path / "out")
    name = "model.layers.1.self_attn.o_proj.weight"
    assert mx.array_equal(found[name], weights[name]).item()
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_random_convolutions_and_dtype(base, tmp_path):
    flags = ("--select", "fixed", "--conv", "random", "--dtype", "bfloat16")
    migrate(base[0], *flags, "--out", tmp_path / "out")
    tap = read(tmp_path / "out")["model.layers.0.self_attn.la.q_conv1d.weight"]
    assert tap.dtype == mx.bfloat16
    assert 0.2 < mx.abs(tap.astype(mx.float32)).max().item() <= 0.5


def head_outputs(model, tokens):
    """Outputs of mlx-lm's own Qwen3 heads before o_proj, layer by layer, [B, T, H*D] each."""
    seen = []

    class Spy:
        def __init__(self, inner):
            self.inner = inner

        def __call__(self, x):
            seen.append(x)
            return self.inner(x)

    for layer in model.layers:
        layer.self_attn.o_proj = Spy(layer.self_attn.o_proj)
    model(tokens)
    return seen


def test_gamma_is_the_rms_of_the_bases_heads(base, packed, tmp_path):
    folder, config, weights, _ = base
    flags = ("--select", "fixed", "--gamma", "rms", "--text", packed, "--length", 29)
    migrate(folder, *flags, "--tokens", 290, "--seed", 5, "--out", tmp_path / "out")
    from hydra_mlx.tokens import Batches, read_documents

    windows = Batches(read_documents([packed], 71, None), 29, 5).take(0, 10)[:, :29]
    fresh = base_model(config)
    fresh.load_weights(list(weights.items()))
    found = read(tmp_path / "out")
    for i, o in enumerate(head_outputs(fresh, mx.array(windows))):
        o = np.array(o, np.float64).reshape(10, 29, H, D)
        want = np.sqrt((o * o).mean(axis=(0, 1, 3)))
        gamma = np.array(found[f"model.layers.{i}.self_attn.head_scale"])
        assert np.abs(gamma / want - 1).max() < 1e-4


def test_gamma_restores_the_scale(base, packed, tmp_path):
    """Where the base's heads are quiet, the normed student is as quiet with gamma rms only."""
    _, config, weights, _ = base
    quiet = {n: x * 0.1 if "v_proj" in n else x for n, x in weights.items()}
    folder = write_checkpoint(tmp_path / "quiet", config, quiet)
    keys = {"fa_rope": True, "fa_gate": None, "fa_logit_scale": None}
    flags = ["--select", "fixed", "--ratio", "0:1"]
    flags += [f"--set={k}={json.dumps(v)}" for k, v in keys.items()]
    rms = ("--gamma", "rms", "--text", packed, "--length", 20)
    migrate(folder, *flags, *rms, "--out", tmp_path / "rms")
    migrate(folder, *flags, "--out", tmp_path / "one")
    want = hydra_mlx.load_model(folder)(TOKENS)
    gap = {}
    for name in ("rms", "one"):
        gap[name] = mx.square(hydra_mlx.load_model(tmp_path / name)(TOKENS) - want).mean().item()
    assert gap["rms"] < 0.1 * gap["one"]


@pytest.mark.parametrize(
    "flags, words",
    [
        ((), "needs --scores"),
        (("--select", "fixed", "--scores", "x"), "no effect"),
        (("--select", "fixed", "--gamma", "rms"), "needs --text"),
        (("--select", "fixed", "--text", "x"), "without --gamma"),
        (("--select", "fixed", "--ratio", "31:1", "--floor", "1"), "--floor 1 in 2 layers"),
        (("--select", "fixed", "--set", "fa_gate"), "KEY=JSON"),
        (("--select", "fixed", "--set", "fa_gaet=null"), "fa_gaet"),
        (("--select", "fixed", "--dtype", "int8"), "int8"),
        (("--scores", "nowhere.json"), "cannot be read"),
        (("--select", "fixed", "--foreign-scores"), "no effect"),
        (("--select", "fixed", "--ratio", "3"), "3:1"),
    ],
)
def test_errors(base, tmp_path, capsys, flags, words):
    migrate(base[0], *flags, "--out", tmp_path / "out", code=2)
    err = capsys.readouterr().err
    assert words in err and "Traceback" not in err and len(err.splitlines()) <= 2
    assert not (tmp_path / "out").exists()


def test_a_hydrahead_checkpoint_is_no_base(make_model_dir, tmp_path, capsys):
    migrate(make_model_dir(), "--select", "fixed", "--out", tmp_path / "out", code=2)
    assert "HydraHead" in capsys.readouterr().err


def test_the_migrated_model_equals_the_reference(base, tmp_path):
    migrate(base[0], "--select", "random", "--ratio", "1:1", "--out", tmp_path / "out")
    from hydra_mlx.config import HydraArgs

    config = json.loads((tmp_path / "out" / "config.json").read_text())
    weights = {n: np.array(x) for n, x in read(tmp_path / "out").items()}
    want = reference.forward(HydraArgs.from_dict(config), weights, np.array(TOKENS))
    got = np.array(hydra_mlx.load_model(tmp_path / "out")(TOKENS))
    assert np.abs(got - want).max() < 1e-3 * np.abs(want).max()
    assert config["num_hidden_layers"] == BASE["num_hidden_layers"] and "weights_form" not in config
