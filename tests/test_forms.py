"""Fused weights compute what the spec form computes, and the way back is lossless."""

import json
from dataclasses import replace
from pathlib import Path

from hydra_mlx.config import HydraArgs
from hydra_mlx.forms import fuse_layer, migrate_layer, unfuse_layer
from hydra_mlx.model import Model

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from .golden import weights as gold
from .tolerance import REL_RMS, assert_close

CASES = json.loads((Path(__file__).parent / "golden" / "fixtures.json").read_text())["models"]
IDS = [c["name"] for c in CASES]


def layer_tensors(weights: dict, i: int) -> dict:
    p = f"model.layers.{i}."
    return {k[len(p) :]: v for k, v in weights.items() if k.startswith(p)}


def map_layers(args, weights, f) -> dict:
    """Apply f(args, i, layer tensors) to every layer; other tensors stay."""
    out = {k: v for k, v in weights.items() if not k.startswith("model.layers.")}
    for i in range(args.num_hidden_layers):
        for k, v in f(args, i, layer_tensors(weights, i)).items():
            out[f"model.layers.{i}.{k}"] = v
    return out


def load(args, weights) -> Model:
    model = Model(args)
    model.load_weights(list(weights.items()), strict=True)
    return model


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_fused_equals_unfused(case):
    args = HydraArgs.from_dict(case["config"])
    weights = {k: mx.array(v) for k, v in gold.make_weights(case["config"], case["seed"]).items()}
    tokens = mx.array(case["tokens"])[:, :40]
    expected = load(args, weights)(tokens)
    fused_args = replace(args, weights_form="fused")
    fused = map_layers(args, weights, fuse_layer)
    out = load(fused_args, fused)(tokens)
    assert_close(out, expected, REL_RMS["float32"], case["name"])


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_unfused_again_equals(case):
    args = HydraArgs.from_dict(case["config"])
    weights = {k: mx.array(v) for k, v in gold.make_weights(case["config"], case["seed"]).items()}
    fused = map_layers(args, weights, fuse_layer)
    back = map_layers(args, fused, unfuse_layer)
    assert set(back) == set(weights)
    for name, x in back.items():
        assert x.shape == weights[name].shape, name
        if "o_proj" not in name and "norm" not in name and "head_scale" not in name:
            assert np.array_equal(np.array(x), np.array(weights[name])), name
    # Fusing what was unfused must give the same fused tensors, bit for bit.
    again = map_layers(args, back, fuse_layer)
    for name, x in again.items():
        assert np.array_equal(np.array(x), np.array(fused[name])), name


def test_fused_form_has_few_matrices():
    case = CASES[IDS.index("defaults")]
    args = replace(HydraArgs.from_dict(case["config"]), weights_form="fused")
    names = [n for n, x in tree_flatten(Model(args).layers[0].parameters()) if x.ndim == 2]
    expected = {
        "self_attn.in_proj.weight",
        "self_attn.ab_proj.weight",
        "self_attn.conv_weight",
        "self_attn.o_proj.weight",
        "mlp.gate_up_proj.weight",
        "mlp.down_proj.weight",
    }
    assert set(names) == expected


def test_ragged_layer_needs_one_call_per_group_size():
    from hydra_mlx.config import layer_heads

    args = HydraArgs(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=12,
        num_key_value_heads=4,
        vocab_size=10,
        head_dim=8,
        full_attention_heads=[[0, 3, 4, 6, 9, 10]],
    )
    assert layer_heads(args, 0, "spec").runs == (
        (0, 1, 0, 1),
        (1, 2, 1, 1),
        (3, 1, 2, 1),
        (4, 2, 3, 1),
    )
    assert layer_heads(args, 0, "fused").runs == ((0, 2, 0, 2), (2, 4, 2, 2))


def base_layer(rng, E, H, Hk, D, hidden, qk_norm, bias) -> dict:
    shapes = {
        "input_layernorm.weight": (E,),
        "post_attention_layernorm.weight": (E,),
        "mlp.gate_proj.weight": (hidden, E),
        "mlp.up_proj.weight": (hidden, E),
        "mlp.down_proj.weight": (E, hidden),
        "self_attn.q_proj.weight": (H * D, E),
        "self_attn.k_proj.weight": (Hk * D, E),
        "self_attn.v_proj.weight": (Hk * D, E),
        "self_attn.o_proj.weight": (E, H * D),
    }
    if qk_norm:
        shapes.update({"self_attn.q_norm.weight": (D,), "self_attn.k_norm.weight": (D,)})
    if bias:
        for n, rows in (("q", H * D), ("k", Hk * D), ("v", Hk * D), ("o", E)):
            shapes[f"self_attn.{n}_proj.bias"] = (rows,)
    return {k: mx.array(rng.randn(*s).astype(np.float32) * 0.3) for k, s in shapes.items()}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("fa_kv", ["gqa_shared", "mha_own", "keep_all"])
def test_migrated_rows_are_the_base_rows(fa_kv, bias):
    E, H, Hk, D = 24, 6, 2, 8
    args = HydraArgs(
        hidden_size=E,
        intermediate_size=40,
        num_hidden_layers=1,
        num_attention_heads=H,
        num_key_value_heads=Hk,
        vocab_size=10,
        head_dim=D,
        full_attention_heads=[[1, 4, 5]],
        fa_kv=fa_kv,
        attention_bias=bias,
    )
    base = base_layer(np.random.RandomState(0), E, H, Hk, D, 40, True, bias)
    out = migrate_layer(args, 0, base, seed=3)
    assert {k: v.shape for k, v in out.items()} == {
        k: v.shape for k, v in tree_flatten(Model(args).layers[0].parameters())
    }

    def head(name, h):
        return np.array(base[f"self_attn.{name}"])[h * D : (h + 1) * D]

    kv_rows = {"gqa_shared": [0, 1], "mha_own": [0, 1, 1], "keep_all": [0, 1]}[fa_kv]
    for part in ("weight", "bias") if bias else ("weight",):
        for kind, q_rows, rows in (
            ("fa", [1, 4, 5], kv_rows),
            ("la", [0, 2, 3], [0, 0, 1]),
        ):
            for n, order in (("q", q_rows), ("k", rows), ("v", rows)):
                got = np.array(out[f"self_attn.{kind}.{n}_proj.{part}"])
                assert np.array_equal(
                    got, np.concatenate([head(f"{n}_proj.{part}", h) for h in order])
                )
    again = migrate_layer(args, 0, base, seed=3)
    assert all(np.array_equal(np.array(out[k]), np.array(again[k])) for k in out)
    other = migrate_layer(args, 0, base, seed=4)
    assert not np.array_equal(
        np.array(out["self_attn.la.A_log"]), np.array(other["self_attn.la.A_log"])
    )
