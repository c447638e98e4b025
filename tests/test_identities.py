"""Spec section 6: what every implementation must satisfy, on random models and random splits."""

import copy
from dataclasses import replace

import hydra_mlx  # noqa: F401  (before mlx)
from hydra_mlx.cache import cache_bytes, kv_bytes_per_token, quantise_cache, state_bytes
from hydra_mlx.config import HydraArgs
from hydra_mlx.forms import fuse_layer
from hydra_mlx.model import Model
from hydra_mlx.reference import forward

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import (
    load_prompt_cache,
    save_prompt_cache,
)

from .golden import weights as gold
from .test_forms import map_layers
from .tolerance import LOGITS_FLOAT32, assert_close, to_numpy

BASE = {
    "model_type": "hydrahead",
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 61,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "full_attention_heads": [[0, 3, 4], [], [0, 1, 2, 3, 4, 5]],
    "fa_qk_norm": True,
    "la_qk_norm": True,
}
VARIANTS = {
    "default": {},
    "fused": {"weights_form": "fused"},
    "no conv": {"la_conv_kernel": 0},
    "fa rope": {"fa_rope": True, "fa_kv": "mha_own"},
    "all LA": {"full_attention_heads": [[], [], []]},
    "all FA": {"full_attention_heads": [[0, 1, 2, 3, 4, 5]] * 3},
}


def build(name: str, seed: int = 1) -> Model:
    config = {**BASE, **VARIANTS[name]}
    form = config.pop("weights_form", "spec")
    args = HydraArgs.from_dict(config)
    weights = {k: mx.array(v) for k, v in gold.make_weights(config, seed).items()}
    if form == "fused":
        weights = map_layers(args, weights, fuse_layer)
        args = replace(args, weights_form="fused")
    model = Model(args)
    model.load_weights(list(weights.items()), strict=True)
    return model


MODELS = {}


def model_of(name: str) -> Model:
    if name not in MODELS:
        MODELS[name] = build(name)
    return MODELS[name]


def tokens_of(B: int, T: int, seed: int = 0) -> mx.array:
    return mx.array(np.random.RandomState(seed).randint(0, BASE["vocab_size"], (B, T)))


def run_split(model, tokens, cuts, cache=None):
    """Logits of a prefill cut at the given positions, and the cache."""
    cache = model.make_cache() if cache is None else cache
    edges = [0, *sorted(cuts), tokens.shape[1]]
    parts = [
        model(tokens[:, a:b], cache=cache) for a, b in zip(edges, edges[1:], strict=False) if b > a
    ]
    return mx.concatenate(parts, axis=1), cache


def assert_same_cache(a: list, b: list, tolerance: float):
    """Every key, value, conv tail and state of two caches agree."""
    assert [type(c) for c in a] == [type(c) for c in b]
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        if hasattr(x, "offset"):
            assert x.offset == y.offset
            pairs = zip(x.keys_and_values(), y.keys_and_values(), strict=True)
        else:
            pairs = zip(x.cache, y.cache, strict=True)
        for u, v in pairs:
            assert u.shape == v.shape
            if u.size and np.abs(to_numpy(v)).max() > 0:
                assert_close(u, v, tolerance, f"cache entry {i}")


@pytest.mark.parametrize("name", VARIANTS)
@settings(max_examples=6, deadline=None)
@given(cuts=st.lists(st.integers(0, 75), max_size=6))
def test_split_prefill_equals_one_shot(name, cuts):
    model, tokens = model_of(name), tokens_of(1, 75)
    whole, cache = run_split(model, tokens, [])
    parts, split_cache = run_split(model, tokens, cuts)
    assert_close(parts, whole, LOGITS_FLOAT32, f"{name} {cuts}")
    assert_same_cache(split_cache, cache, LOGITS_FLOAT32)


@pytest.mark.parametrize("name", VARIANTS)
def test_token_by_token_equals_one_shot(name):
    model, tokens = model_of(name), tokens_of(2, 37)
    whole, cache = run_split(model, tokens, [])
    parts, token_cache = run_split(model, tokens, range(1, 37))
    assert_close(parts, whole, LOGITS_FLOAT32, name)
    assert_same_cache(token_cache, cache, LOGITS_FLOAT32)
    without = model(tokens)
    assert_close(without, whole, 1e-6, "no cache")


@pytest.mark.parametrize("name", VARIANTS)
def test_undo_equals_never_having_gone_on(name):
    """Keep the offsets and a copy of the state lists, go on, put them back."""
    model, tokens, other = model_of(name), tokens_of(1, 60), tokens_of(1, 20, 5)
    _, cache = run_split(model, tokens[:, :41], [])
    kept = [c.offset if hasattr(c, "offset") else list(c.cache) for c in cache]
    expected = run_split(model, tokens[:, 41:], [3], copy.deepcopy(cache))[0]
    run_split(model, other, [7, 8], cache)
    for c, k in zip(cache, kept, strict=True):
        if hasattr(c, "offset"):
            c.trim(c.offset - k)
        else:
            c.cache = list(k)
    again = run_split(model, tokens[:, 41:], [3], cache)[0]
    assert np.array_equal(np.array(again), np.array(expected))


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("bits", [None, 8])
def test_saved_and_reloaded_equals_never_saved(name, bits, tmp_path):
    model, tokens = model_of(name), tokens_of(1, 50)
    cache = model.make_cache()
    if bits:
        quantise_cache(cache, bits, 32)
    run_split(model, tokens[:, :33], [], cache)
    path = str(tmp_path / "cache.safetensors")
    save_prompt_cache(path, cache)
    loaded = load_prompt_cache(path)
    expected = run_split(model, tokens[:, 33:], [1], cache)[0]
    again = run_split(model, tokens[:, 33:], [1], loaded)[0]
    assert np.array_equal(np.array(again), np.array(expected))


@pytest.mark.parametrize("name", VARIANTS)
@settings(max_examples=3, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), min_size=2, max_size=4))
def test_ragged_batch_equals_single(name, lengths):
    """mlx-lm's batched prompt processing and decoding, row by row equal to one sequence alone."""
    from mlx_lm.generate import BatchGenerator

    model = model_of(name)
    prompts = [tokens_of(1, n, seed=n + i)[0].tolist() for i, n in enumerate(lengths)]

    def decode(rows, steps=5):
        gen = BatchGenerator(model, max_tokens=steps, prefill_step_size=16)
        uids = gen.insert(rows)
        out = {uid: [] for uid in uids}
        while any(len(v) < steps for v in out.values()):
            for response in gen.next_generated():
                out[response.uid].append((response.token, response.logprobs))
        gen.close()
        return [out[uid] for uid in uids]

    together = decode(prompts)
    for i, prompt in enumerate(prompts):
        alone = decode([prompt])[0]
        for (tok, lp), (tok1, lp1) in zip(together[i], alone, strict=True):
            assert tok == tok1
            assert_close(lp, lp1, LOGITS_FLOAT32, f"{name} {lengths} row {i}")


def test_long_left_padding_is_harmless():
    """A row far inside its left padding has very negative positions; nothing may become NaN."""
    from mlx_lm.models.cache import BatchKVCache

    model = model_of("default")
    pad, tokens = 700, tokens_of(1, 9)
    cache = [BatchKVCache([pad]) if hasattr(c, "offset") else c for c in model.make_cache()]
    for c in cache:
        if not hasattr(c, "offset"):
            c.left_padding = mx.array([pad])
    padded = mx.concatenate([mx.zeros((1, pad), tokens.dtype), tokens], axis=1)
    out = model(padded, cache=cache)[:, pad:]
    assert_close(out, model(tokens), LOGITS_FLOAT32)


@pytest.mark.parametrize("bits", [8, 4])
def test_kv_bits_takes_effect(bits):
    model, tokens = model_of("default"), tokens_of(1, 256)
    full, quantised = model.make_cache(), quantise_cache(model.make_cache(), bits, 32)
    exact = run_split(model, tokens, [], full)[0]
    approx = run_split(model, tokens, [], quantised)[0]
    error = np.linalg.norm(to_numpy(exact - approx)) / np.linalg.norm(to_numpy(exact))
    assert 0 < error < {8: 0.02, 4: 0.3}[bits]
    kv, state = cache_bytes(full)
    kv_q, state_q = cache_bytes(quantised)
    assert kv == 256 * kv_bytes_per_token(model.args, itemsize=4)
    # A float32 scale and bias for every 32 values.
    assert kv_q == kv * (bits + 2) // 32
    assert state == state_q == state_bytes(model.args, itemsize=4)


def test_head_order_in_storage_changes_nothing():
    """Fused form stores heads grouped by their key/value sharing; a ragged layer proves it."""
    config = {
        **BASE,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "full_attention_heads": [[0, 1, 2, 4], [3, 4, 5], [1, 2, 3]],
    }
    args = HydraArgs.from_dict(config)
    weights = gold.make_weights(config, 5)
    spec = Model(args)
    spec.load_weights([(k, mx.array(v)) for k, v in weights.items()])
    fused_args = replace(args, weights_form="fused")
    fused = Model(fused_args)
    arrays = {k: mx.array(v) for k, v in weights.items()}
    fused.load_weights(list(map_layers(args, arrays, fuse_layer).items()), strict=True)
    assert fused.layers[0].self_attn.heads.fa != spec.layers[0].self_attn.heads.fa
    tokens = tokens_of(2, 30)
    exact = forward(args, weights, np.array(tokens))
    assert_close(spec(tokens), exact, LOGITS_FLOAT32)
    assert_close(fused(tokens), exact, LOGITS_FLOAT32)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("form", ["spec", "fused"])
def test_every_head_full_attention_is_the_base_model(kind, groups, form):
    """Logit for logit mlx_lm's own Llama and Qwen3, on the same random weights."""
    import importlib

    from hydra_mlx.forms import migrate_layer
    from hydra_mlx.sources import IDENTITY

    from mlx.utils import tree_flatten

    module = importlib.import_module(f"mlx_lm.models.{kind}")
    H, kv = 6, 6 // groups
    common = {
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": H,
        "num_key_value_heads": kv,
        "head_dim": 16,
        "rms_norm_eps": 1e-5,
        "vocab_size": 61,
        "rope_theta": 5000.0,
        "tie_word_embeddings": groups == 2,
        "max_position_embeddings": 512,
    }
    base = module.Model(module.ModelArgs(model_type=kind, **common))
    mx.random.seed(groups)
    weights = {
        k: mx.random.normal(v.shape) * 0.2 + (1 if "norm" in k else 0)
        for k, v in tree_flatten(base.parameters())
    }
    base.load_weights(list(weights.items()))
    args = HydraArgs(
        **common,
        full_attention_heads=[list(range(H))] * 2,
        fa_qk_norm=kind == "qwen3",
        la_qk_norm=kind == "qwen3",
        **IDENTITY,
    )
    ours = map_layers(args, weights, migrate_layer)
    if form == "fused":
        ours = map_layers(args, ours, fuse_layer)
    model = Model(replace(args, weights_form=form))
    model.load_weights(list(ours.items()), strict=True)
    tokens = tokens_of(2, 40)
    expected = base(tokens)
    gap = mx.abs(model(tokens) - expected).max().item()
    assert gap <= 1e-5 * mx.abs(expected).max().item()
    cached = run_split(model, tokens, [11, 12])[0]
    assert_close(cached, expected, 1e-5)


def test_every_head_linear_is_a_gated_deltanet_stack():
    """Against mlx_lm's gated_delta_ops, put together by hand for one layer."""
    import mlx.nn as nn
    from mlx_lm.models.gated_delta import gated_delta_ops

    model = model_of("all LA")
    layer, args = model.layers[1], model.args
    mixer, D, H = layer.self_attn, args.head_dim, args.num_attention_heads
    x = mx.random.normal((1, 19, args.hidden_size), key=mx.random.key(0))
    la = mixer.la

    def conv(y, w):
        y = mx.pad(y, [(0, 0), (3, 0), (0, 0)])
        return nn.silu(mx.conv1d(y, w.swapaxes(1, 2), groups=w.shape[0]))

    q, k, v = (
        conv(la[f"{n}_proj"](x), la[f"{n}_conv1d"].weight).reshape(1, 19, H, D) for n in "qkv"
    )
    q, k = (
        mx.fast.rms_norm(y, la[f"{n}_norm"].weight, args.rms_norm_eps)
        for y, n in ((q, "q"), (k, "k"))
    )
    rope = nn.RoPE(D, traditional=False, base=args.rope_theta)
    q, k = (rope(y.swapaxes(1, 2)).swapaxes(1, 2) for y in (q, k))
    q = q / mx.sqrt((q * q).sum(-1, keepdims=True) + 1e-6) * D**-0.5
    k = k / mx.sqrt((k * k).sum(-1, keepdims=True) + 1e-6)
    g = mx.exp(-mx.exp(la.A_log) * nn.softplus(la.a_proj(x) + la.dt_bias))
    zeros = mx.zeros((1, H, D, D))
    o, _ = gated_delta_ops(q, k, v, g, mx.sigmoid(la.b_proj(x)), zeros)
    o = mx.fast.rms_norm(o, mixer.la_norm.weight, 1e-6)
    o = o * nn.silu(la.gate_proj(x).reshape(o.shape)) * mixer.head_scale[:, None]
    expected = mixer.o_proj(o.flatten(2))
    from hydra_mlx.step import Step

    assert_close(mixer(x, Step(0, None, None)), expected, 1e-5)
