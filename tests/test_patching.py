"""Head effects by activation patching: against literal re-runs, and on planted circuits."""

import hydra_mlx  # noqa: F401  (before mlx: it chooses the BLAS library)
from hydra_mlx import patching
from hydra_mlx.errors import ConfigError
from hydra_mlx.loading import load_model
from hydra_mlx.probes import Pair
from hydra_mlx.trunk import Trunk, open_base

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from .checkpoints import write_base, write_gguf
from .planted import DECOY, KEY_MOVER, RECEIVER, SENDER, planted_model, planted_pair
from .tolerance import LOGITS_FLOAT32, assert_close

SMALL = {"num_hidden_layers": 4, "vocab_size": 71}


def random_pair(seed: int, T: int = 19, A: int = 3, at: int = 4) -> Pair:
    rng = np.random.RandomState(seed)
    clean = rng.randint(0, 71, T).tolist()
    corrupt, plus = list(clean), clean[-A:]
    corrupt[at : at + A] = [(i + 7) % 71 for i in clean[at : at + A]]
    return Pair(tuple(clean), tuple(corrupt), T - A, tuple((i + 11) % 71 for i in plus))


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def trunk(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    write_base(folder, request.param, seed=3, **SMALL)
    return Trunk(load_model(folder))


def literal(trunk, ids, patch=None, frozen=None, live=None):
    """One whole forward.

    Args:
        patch: {layer: {head: [T, D]}}, put in at all positions. frozen: L attention outputs that
            replace the computed ones after the first patched layer. live: {layer: heads} that are
            computed anew although their layer is frozen; needs frozen heads [L][T, H, D].

    Returns:
        (residual stream after the last layer, heads of each layer, attention outputs of each).
    """
    h, heads, outs = trunk.embed(mx.array([ids])), [], []
    start = min(patch) if patch else trunk.L
    for layer in range(trunk.L):
        y = trunk.attend(*trunk.qkv(layer, h))
        if frozen is not None and layer >= start:
            keep = (live or {}).get(layer, [])
            y = mx.stack(
                [y[0, :, i] if i in keep else frozen[layer][:, i] for i in range(trunk.H)], 1
            )[None]
        for head, value in (patch or {}).get(layer, {}).items():
            y[0, :, head] = value
        out = trunk.output(layer, y)
        heads.append(y[0])
        outs.append(out[0])
        h = trunk.mlp(layer, h + out)
    return h, heads, outs


def m(trunk, h, pair):
    """The read-out from whole logits, by its formula."""
    z = np.array(trunk.logits(h)[0], np.float64)
    w = 0.9 ** np.arange(len(pair.minus))
    rows = z[pair.reads]
    plus = rows[np.arange(len(w)), list(pair.plus)]
    return float((w * (plus - rows[np.arange(len(w)), list(pair.minus)])).sum() / w.sum())


def test_the_trunk_is_the_model(trunk):
    ids = random_pair(0).clean
    assert_close(trunk.logits(literal(trunk, ids)[0]), trunk.model(mx.array([ids])), LOGITS_FLOAT32)
    rows = trunk.unembedding(mx.array([5, 70]))
    h = literal(trunk, ids)[0]
    assert_close(trunk.norm(h)[0] @ rows.T, trunk.logits(h)[0][:, mx.array([5, 70])], 1e-5)


@pytest.mark.parametrize("A", [1, 3])
def test_receivers_equal_the_literal_method(trunk, A):
    pair = random_pair(1, A=A)
    t = patching.trace(trunk, pair, pair.reads)
    h, clean, _ = literal(trunk, pair.clean)
    h2, corrupt, _ = literal(trunk, pair.corrupt)
    assert t.m_clean == pytest.approx(m(trunk, h, pair), abs=1e-4)
    assert t.m_corrupt == pytest.approx(m(trunk, h2, pair), abs=1e-4)
    got = np.array(patching.receiver_drops(trunk, t, pair))
    want = np.zeros_like(got)
    for layer in range(trunk.L):
        for head in range(trunk.H):
            patch = {layer: {head: corrupt[layer][:, head]}}
            patched = literal(trunk, pair.clean, patch, clean)[0]
            want[layer, head] = m(trunk, h, pair) - m(trunk, patched, pair)
    assert np.abs(got - want).max() <= 1e-4 and np.abs(want).max() > 0.01
    ie = np.array(patching.effects(mx.array(got), t.gap))
    assert np.abs(ie - np.clip(want / (m(trunk, h, pair) - m(trunk, h2, pair)), 0, 1)).max() <= 1e-4


@pytest.mark.parametrize("at", [0, 4])
def test_senders_equal_the_literal_method(trunk, at):
    pair, receivers = random_pair(2, at=at), [[], [0, 3], [], [1, 2]]
    start = pair.first_change
    assert start == at
    t = patching.trace(trunk, pair, list(range(start, len(pair.clean))), (1, 3))
    got = np.array(patching.sender_drops(trunk, t, pair, receivers))
    h, clean, _ = literal(trunk, pair.clean)
    corrupt = literal(trunk, pair.corrupt)[1]
    live = dict(enumerate(receivers))
    want = np.zeros_like(got)
    for layer in range(3):
        for head in range(trunk.H):
            patch = {layer: {head: corrupt[layer][:, head]}}
            first = {i: r for i, r in live.items() if i > layer}
            heads = literal(trunk, pair.clean, patch, clean, first)[1]
            carried = {i: {r: heads[i][:, r] for r in rs} for i, rs in first.items() if rs}
            patched = literal(trunk, pair.clean, carried, clean)[0]
            want[layer, head] = m(trunk, h, pair) - m(trunk, patched, pair)
    assert np.abs(got - want).max() <= 1e-4 and np.abs(want).max() > 0.01
    assert not got[3].any()


def test_few_positions_come_near(trunk):
    pair, receivers = random_pair(2, T=40), [[], [0, 3], [], [1, 2]]
    whole = np.array(patching.sender_effects(trunk, pair, receivers, -100, 0))
    most = np.array(patching.sender_effects(trunk, pair, receivers, -100, 35))
    same = np.array(patching.sender_effects(trunk, pair, receivers, -100, 100))
    assert (whole == same).all() and np.abs(whole - most).max() < 0.2


def test_null_patch_is_zero(trunk):
    pair = random_pair(1)
    null = Pair(pair.clean, pair.clean, pair.start, pair.minus)
    t = patching.trace(trunk, null, null.reads)
    assert (
        abs(t.gap) < 1e-6 and np.abs(np.array(patching.receiver_drops(trunk, t, null))).max() < 1e-5
    )
    t = patching.trace(trunk, null, list(range(len(pair.clean))), (1, 2))
    drops = patching.sender_drops(trunk, t, null, [[], [0], [1], []])
    assert np.abs(np.array(drops)).max() < 1e-5
    assert patching.receiver_effects(trunk, null, 0.1) is None
    assert patching.sender_effects(trunk, null, [[], [0], [], []], 0.1, 0) is None


@pytest.mark.parametrize("facts", [1, 3])
def test_planted_heads_are_found(facts):
    trunk = Trunk(planted_model())
    receiver, sender = np.zeros((4, 4)), np.zeros((4, 4))
    for seed in range(3):
        pair = planted_pair(np.random.RandomState(seed), facts=facts)
        answer = trunk.logits(literal(trunk, pair.clean)[0])[0, pair.reads[0]].argmax().item()
        assert answer == pair.plus[0]
        receiver += np.array(patching.receiver_effects(trunk, pair, 0.1)) / 3
        rs = [[], [], [RECEIVER[1]], []]
        sender += np.array(patching.sender_effects(trunk, pair, rs, 0.1, 0)) / 3
    assert receiver[RECEIVER] > 0.9
    receiver[RECEIVER] = 0
    assert receiver.max() < 0.01  # the decoy too
    assert sender[SENDER] > 0.9 and sender[DECOY] < 0.01 and sender[KEY_MOVER] < 0.01
    sender[SENDER] = 0
    assert sender.max() < 0.01


def test_the_decoy_reads_the_needle():
    trunk, pair = Trunk(planted_model()), planted_pair(np.random.RandomState(0))
    heads = literal(trunk, pair.clean)[1]
    for layer, head in (DECOY, RECEIVER):
        assert heads[layer][pair.reads[0], head].argmax().item() == pair.plus[0]


def test_sources_agree(tmp_path):
    path, _, _, model = write_gguf(tmp_path / "m.gguf", seed=5, vocab_size=258)
    read, tokenizer = open_base(path)
    ids = mx.array([tokenizer.encode("some text")])
    assert_close(Trunk(read).model(ids), model(ids), LOGITS_FLOAT32)


@pytest.mark.parametrize("tied", [False, True])
def test_quantised_models(tmp_path, tied):
    *_, model = write_base(tmp_path, "qwen3", seed=1, tie_word_embeddings=tied)
    nn.quantize(model, 32, 4)
    trunk, ids = Trunk(model), mx.array([[3, 1, 2]])
    assert trunk.tied is tied
    h = trunk.embed(ids)
    rows = trunk.unembedding(mx.array([5, 70]))
    assert_close(trunk.norm(h)[0] @ rows.T, trunk.logits(h)[0][:, mx.array([5, 70])], 1e-5)


def test_other_models_are_refused(tiny):
    with pytest.raises(ConfigError, match="linear-attention"):
        Trunk(tiny[0])
    with pytest.raises(ConfigError, match="Llama and Qwen3"):
        Trunk(nn.Linear(2, 2))
    from mlx_lm.models import gemma

    args = gemma.ModelArgs(
        model_type="gemma", hidden_size=32, num_hidden_layers=2, intermediate_size=48,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, rms_norm_eps=1e-6,
        vocab_size=64, rope_theta=1e4,
    )  # fmt: skip
    with pytest.raises(ConfigError, match="differ from Llama"):
        Trunk(gemma.Model(args))
