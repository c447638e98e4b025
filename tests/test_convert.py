"""The converter: every source to every target and back."""

import json
import re
from dataclasses import replace
from pathlib import Path

import hydra_mlx
from hydra_mlx import reference
from hydra_mlx.config import HydraArgs
from hydra_mlx.forms import fuse_layer, migrate_layer
from hydra_mlx.model import FLOAT32_NAMES, Model, is_protected
from hydra_mlx.quantise import EMBED, MIXED, MODES, RECIPES
from hydra_mlx.shards import read_headers

import mlx.core as mx
import numpy as np
import pytest

from .checkpoints import (
    BASE,
    DTYPES,
    HEAD_MAP,
    write_base,
    write_gguf,
    write_spec,
)
from .conversions import (  # noqa: F401  (spec and fused are fixtures)
    TOKENS,
    _oracle,
    convert,
    fused,
    job_of,
    leftovers,
    logits,
    oracle,
    read,
    same_arrays,
    spec,
)
from .test_forms import map_layers
from .tolerance import LOGITS_FLOAT32, assert_close, rel_rms

# ------------------------------------------------------------------------------ round trips

VARIANTS = {
    "defaults": {},
    "mha_own": {"fa_kv": "mha_own"},
    "keep_all": {"fa_kv": "keep_all"},
    "tied": {"tie_word_embeddings": True},
    "headwise": {"fa_gate": "headwise", "fa_gate_position": "post_norm"},
    "bare": {
        "fa_gate": None,
        "la_output_gate": None,
        "la_conv_kernel": 0,
        "fusion_norm": None,
        "fusion_scale": False,
        "fa_qk_norm": False,
        "la_qk_norm": False,
    },
    "no_weight": {"fusion_norm": "rms_no_weight"},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_round_trip(name, tmp_path):
    source, config, weights = write_spec(tmp_path / "source", seed=3, **VARIANTS[name])
    expected = oracle(config, weights)
    assert_close(logits(source), expected, LOGITS_FLOAT32, "source")
    convert("--hf-path", source, "--mlx-path", tmp_path / "one", "--quiet")
    convert("--mlx-path", tmp_path / "one", "--to-hf", tmp_path / "back", "--quiet")
    convert("--hf-path", tmp_path / "back", "--mlx-path", tmp_path / "two", "--quiet")
    for step in ("one", "back", "two"):
        assert_close(logits(tmp_path / step), expected, LOGITS_FLOAT32, step)
    back = read(tmp_path / "back")
    assert set(back) == set(weights)
    folded = ("o_proj.weight", ".fa_norm.weight", ".la_norm.weight", "head_scale")
    for n, x in back.items():
        if not n.endswith(folded):
            assert mx.array_equal(x, weights[n]).item(), n
    same_arrays(read(tmp_path / "one"), read(tmp_path / "two"), "fused again")
    found = json.loads((tmp_path / "back" / "config.json").read_text())
    assert "model_file" not in found and "weights_form" not in found
    assert found["torch_dtype"] == "float32" and found["eos_token_id"] == 257
    assert HydraArgs.from_dict(found) == HydraArgs.from_dict(config)
    with open(tmp_path / "back" / "model.safetensors", "rb") as f:
        assert b'"format":"pt"' in f.read(4096).replace(b" ", b"")


@pytest.mark.parametrize("dtype", DTYPES)
def test_source_types_and_shards(dtype, tmp_path, fused):
    """One file, many files with an index, many without: the same bytes come out."""
    made = []
    for n, (shards, index) in enumerate([(1, False), (4, True), (3, False), (1, True)]):
        source, config, weights = write_spec(
            tmp_path / f"s{n}", dtype=dtype, shards=shards, index=index
        )
        out = tmp_path / f"o{n}"
        convert("--hf-path", source, "--mlx-path", out, "--quiet")
        made.append(read(out))
        same_arrays(made[0], made[-1], f"{shards} shards, index {index}")
    for name, x in made[0].items():
        exact = name.rsplit(".", 1)[-1] in FLOAT32_NAMES
        exact = exact or (dtype == "float16" and "ab_proj" in name)
        assert x.dtype == (mx.float32 if exact else DTYPES[dtype]), name
    # The folded output projection is rounded once more.
    tolerance = {"float32": LOGITS_FLOAT32, "float16": 1e-3, "bfloat16": 1e-2}[dtype]
    assert_close(logits(tmp_path / "o0"), oracle(config, weights), tolerance, dtype)


def test_many_output_shards(tmp_path):
    source, *_ = write_spec(tmp_path / "s")
    convert("--hf-path", source, "--mlx-path", tmp_path / "one", "--quiet")
    flags = ("--max-shard-size", "1MB", "--quiet")
    convert("--hf-path", source, "--mlx-path", tmp_path / "many", *flags)
    files = sorted(p.name for p in (tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert all((tmp_path / "many" / f).stat().st_size < 1.1e6 for f in files)
    same_arrays(read(tmp_path / "one"), read(tmp_path / "many"))
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    found = {n: i.file.name for n, i in read_headers(tmp_path / "many").items()}
    assert index["weight_map"] == found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["fused", "no_fuse", "quantised"])
def test_dtype(dtype, form, spec, tmp_path):
    flags = {"fused": [], "no_fuse": ["--no-fuse"], "quantised": ["-q", "--q-bits", "8"]}[form]
    convert("--hf-path", spec[0], "--mlx-path", tmp_path / "o", "--dtype", dtype, *flags)
    for name, x in read(tmp_path / "o").items():
        small = ("ab_proj", "a_proj", "b_proj") if dtype == "float16" else ()
        if name.rsplit(".", 1)[-1] in FLOAT32_NAMES or any(f".{s}." in name for s in small):
            assert x.dtype == mx.float32, name
        elif x.dtype != mx.uint32:
            assert x.dtype == DTYPES[dtype], name
    tolerance = {"float32": LOGITS_FLOAT32, "float16": 2e-3, "bfloat16": 2e-2}[dtype]
    tolerance += 0.05 if form == "quantised" else 0
    assert_close(logits(tmp_path / "o"), oracle(*spec[1:]), tolerance, dtype)


def test_no_fuse_keeps_the_tensors(spec, tmp_path):
    convert("--hf-path", spec[0], "--mlx-path", tmp_path / "o", "--no-fuse", "--quiet")
    same_arrays(read(tmp_path / "o"), spec[2])
    assert_close(logits(tmp_path / "o"), oracle(*spec[1:]), LOGITS_FLOAT32)
    convert("--hf-path", tmp_path / "o", "--mlx-path", tmp_path / "p", "--quiet")  # and fuse later
    assert_close(logits(tmp_path / "p"), oracle(*spec[1:]), LOGITS_FLOAT32)


# ----------------------------------------------------------------------------- quantisation

FORMATS = [("affine", b, g) for b in MODES["affine"][0] for g in MODES["affine"][1]]
FORMATS += [("mxfp4", 4, 32), ("nvfp4", 4, 16), ("mxfp8", 8, 32)]


def by_hand(spec: tuple, params, form: str = "fused") -> mx.array:
    """Logits of the float model with mx.quantize and mx.dequantize applied to its matrices.

    Args:
        params: path, matrix -> keywords of mx.quantize, or None.
    """
    args = replace(HydraArgs.from_dict(spec[1]), weights_form=form)
    weights = map_layers(args, spec[2], fuse_layer) if form == "fused" else dict(spec[2])
    for name, x in weights.items():
        stem = name.removesuffix(".weight")
        kw = params(stem, x) if x.ndim == 2 and not is_protected(stem) and stem != name else None
        if kw:
            weights[name] = mx.dequantize(*mx.quantize(x, **kw), **kw).astype(mx.float32)
    model = Model(args)
    model.load_weights(list(weights.items()), strict=True)
    return model(TOKENS)


def check_protected(folder: Path):
    names = set(read_headers(folder))
    assert any(n.endswith(".scales") for n in names)
    for n in names:
        if n.endswith(".scales"):
            stem = n.removesuffix(".scales")
            assert not re.search(r"norm|ab_proj|a_proj|b_proj|conv|A_log|dt_bias", stem), n


@pytest.mark.parametrize("mode, bits, group", FORMATS)
def test_quantised(mode, bits, group, spec, tmp_path):
    out = tmp_path / "o"
    flags = ["-q", "--q-mode", mode, "--q-bits", bits, "--q-group-size", group, "--quiet"]
    convert("--hf-path", spec[0], "--mlx-path", out, *flags)
    check_protected(out)
    q = json.loads((out / "config.json").read_text())["quantization"]
    assert (q["mode"], q["bits"], q["group_size"]) == (mode, bits, group)
    kw = {"mode": mode, "bits": bits, "group_size": group}
    assert_close(logits(out), by_hand(spec, lambda path, x: kw), LOGITS_FLOAT32, str(kw))
    error = rel_rms(logits(out), oracle(*spec[1:]))
    limit = {2: 1.5, 3: 1.2, 4: 0.7, 5: 0.4, 6: 0.2, 8: 0.2}[bits]  # random weights: coarse
    assert 1e-4 < error < limit, (kw, error)


@pytest.mark.parametrize("form", ["fused", "spec"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes(recipe, form, spec, tmp_path):
    out = tmp_path / "o"
    flags = ["--no-fuse"] if form == "spec" else []
    convert("--hf-path", spec[0], "--mlx-path", out, "-q", "--recipe", recipe, "--quiet", *flags)
    check_protected(out)
    config = json.loads((out / "config.json").read_text())
    q, used = config["quantization"], {}
    for name in read_headers(out):
        if name.endswith(".scales"):
            stem = name.removesuffix(".scales")
            used[stem] = q.get(stem, q)["bits"]
    low, high = MIXED.get(recipe) or (4, EMBED[recipe])
    assert set(used.values()) == {low, high} and used["lm_head"] == high
    assert used["model.embed_tokens"] == (high if recipe in EMBED else low)

    def params(path, x):
        return {"mode": "affine", "group_size": 64, "bits": used[path]}

    assert_close(logits(out), by_hand(spec, params, form), LOGITS_FLOAT32, recipe)


def test_protect(spec, tmp_path):
    flags = ["-q", "--protect", "lm_head", "--protect", r"layers\.1\..*down_proj", "--quiet"]
    convert("--hf-path", spec[0], "--mlx-path", tmp_path / "o", *flags)
    names = {n for n in read_headers(tmp_path / "o") if n.endswith(".scales")}
    assert "lm_head.scales" not in names and "model.layers.1.mlp.down_proj.scales" not in names
    assert "model.layers.0.mlp.down_proj.scales" in names
    kw = {"mode": "affine", "group_size": 64, "bits": 4}
    kept = ("lm_head", "model.layers.1.mlp.down_proj")
    expected = by_hand(spec, lambda path, x: None if path in kept else kw)
    assert_close(logits(tmp_path / "o"), expected, LOGITS_FLOAT32)


def test_widths_that_no_group_divides_stay_float(tmp_path):
    source, config, weights = write_spec(tmp_path / "s", hidden_size=96, intermediate_size=128)
    convert("--hf-path", source, "--mlx-path", tmp_path / "o", "-q", "--quiet")
    names = {n for n in read_headers(tmp_path / "o") if n.endswith(".scales")}
    wide = ("self_attn.o_proj", "mlp.down_proj")
    assert names == {f"model.layers.{i}.{m}.scales" for i in range(3) for m in wide}
    kw = {"mode": "affine", "group_size": 64, "bits": 4}
    expected = by_hand((source, config, weights), lambda p, x: None if x.shape[1] % 64 else kw)
    assert_close(logits(tmp_path / "o"), expected, LOGITS_FLOAT32)


def test_quantised_again(spec, tmp_path):
    """A quantised source passes through bit for bit, or is quantised anew, or unpacked."""
    one, same, fewer, plain = (tmp_path / n for n in ("one", "same", "fewer", "plain"))
    convert("--hf-path", spec[0], "--mlx-path", one, "-q", "--q-bits", "8", "--quiet")
    convert("--hf-path", one, "--mlx-path", same, "--quiet")
    same_arrays(read(one), read(same))
    convert("--hf-path", one, "--mlx-path", fewer, "-q", "--quiet")
    assert_close(logits(fewer), logits(one), 0.7)
    assert json.loads((fewer / "config.json").read_text())["quantization"]["bits"] == 4
    convert("--hf-path", one, "--mlx-path", plain, "--dtype", "float32", "--quiet")
    assert "quantization" not in json.loads((plain / "config.json").read_text())
    assert_close(logits(plain), logits(one), LOGITS_FLOAT32)
    convert("--mlx-path", one, "--to-hf", tmp_path / "hf", code=2)


# -------------------------------------------------------------------------- plain base models

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
BASES = {
    "llama": ("llama", {}),
    "llama_tied": ("llama", {"tie_word_embeddings": True}),
    "llama_bias": ("llama", {"attention_bias": True}),
    "llama_mha": ("llama", {"num_key_value_heads": 4}),
    "llama_mqa": ("llama", {"num_key_value_heads": 1}),
    "llama_llama3": ("llama", {"rope_scaling": LLAMA3}),
    "llama_linear": ("llama", {"rope_scaling": {"type": "linear", "factor": 4.0}}),
    "qwen3": ("qwen3", {}),
    "qwen3_tied": ("qwen3", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "qwen3_linear": ("qwen3", {"rope_scaling": {"type": "linear", "factor": 4.0}}),
}


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("form", ["fused", "spec"])
def test_identity_is_the_base_model(name, form, tmp_path):
    kind, changes = BASES[name]
    source, _, _, model = write_base(tmp_path / "s", kind, **changes)
    flags = ["--no-fuse"] if form == "spec" else []
    flags += ["--head-map", "identity", "--quiet"]
    convert("--hf-path", source, "--mlx-path", tmp_path / "o", *flags)
    assert_close(logits(tmp_path / "o"), model(TOKENS), 1e-5, name)


@pytest.mark.parametrize("quantised", [False, True], ids=["f32", "q8_0"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_identity_of_a_gguf(quantised, tied, tmp_path):
    source, _, _, model = write_gguf(
        tmp_path / "m.gguf", quantised=quantised, vocab_size=258, tie_word_embeddings=tied
    )
    flags = ("--mlx-path", tmp_path / "o", "--head-map", "identity", "--quiet")
    convert("--hf-path", source, *flags)
    expected = model(TOKENS)
    assert_close(logits(tmp_path / "o"), expected, 0.05 if quantised else 1e-5)
    assert hydra_mlx.load(tmp_path / "o")[1].encode("ab") == [257]
    # Packed matrices pass through, in q and k too: nothing was rounded again.
    assert any(n.endswith(".scales") for n in read(tmp_path / "o")) == quantised
    # Rows left in the file's order would give another model.
    wrong, *_ = write_gguf(
        tmp_path / "w.gguf",
        quantised=quantised,
        permute=False,
        vocab_size=258,
        tie_word_embeddings=tied,
    )
    convert("--hf-path", wrong, "--mlx-path", tmp_path / "w", *flags[2:])
    assert rel_rms(logits(tmp_path / "w"), expected) > 0.1


def migrated(config: dict, weights: dict, heads: dict, seed: int) -> tuple:
    """(HydraHead config, spec tensors), made by the functions whose own tests are elsewhere."""
    qk = config["model_type"] == "qwen3"
    keep = {k: config[k] for k in BASE}
    args = HydraArgs(**{**keep, "fa_qk_norm": qk, "la_qk_norm": qk, **heads})
    return args, map_layers(args, weights, lambda a, i, w: migrate_layer(a, i, w, seed))


MIGRATIONS = {
    "llama": ("llama", {}, {}),
    "llama_bias": ("llama", {"attention_bias": True}, {}),
    "llama_bias_own": ("llama", {"attention_bias": True}, {"fa_kv": "mha_own", "fa_gate": None}),
    "llama_norms": ("llama", {}, {"fa_qk_norm": True, "la_qk_norm": True}),
    "qwen3": ("qwen3", {}, {"fa_kv": "keep_all"}),
    "qwen3_tied": ("qwen3", {"tie_word_embeddings": True}, {"fa_kv": "mha_own"}),
    "qwen3_la_norms": ("qwen3", {}, {"fa_qk_norm": False, "fa_logit_scale": None}),
    "qwen3_no_norms": ("qwen3", {}, {"fa_qk_norm": False, "la_qk_norm": False}),
    "gguf": ("gguf", {"vocab_size": 258}, {}),
}


@pytest.mark.parametrize("name", MIGRATIONS)
@pytest.mark.parametrize("form", ["fused", "spec"])
def test_migrate(name, form, tmp_path):
    kind, changes, keys = MIGRATIONS[name]
    heads = {"full_attention_heads": HEAD_MAP, **keys}
    (tmp_path / "heads.json").write_text(json.dumps(heads))
    if kind == "gguf":
        source, config, weights, _ = write_gguf(tmp_path / "m.gguf", **changes)
    else:
        source, config, weights, _ = write_base(tmp_path / "s", kind, **changes)
    flags = ["--no-fuse"] if form == "spec" else []
    flags += ["--head-map", tmp_path / "heads.json", "--seed", 7, "--quiet"]
    convert("--hf-path", source, "--mlx-path", tmp_path / "o", *flags)
    args, tensors = migrated(config, weights, heads, 7)
    numbers = {n: np.array(x) for n, x in tensors.items()}
    expected = reference.forward(args, numbers, np.array(TOKENS))
    assert_close(logits(tmp_path / "o"), expected, LOGITS_FLOAT32, name)
    if form == "spec":
        same_arrays(read(tmp_path / "o"), tensors)


def test_head_map_may_be_a_bare_list(tmp_path):
    source, *_ = write_base(tmp_path / "s")
    (tmp_path / "a.json").write_text(json.dumps(HEAD_MAP))
    (tmp_path / "b.json").write_text(json.dumps({"full_attention_heads": HEAD_MAP}))
    for n in "ab":
        flags = ("--head-map", tmp_path / f"{n}.json", "--quiet")
        convert("--hf-path", source, "--mlx-path", tmp_path / n, *flags)
    same_arrays(read(tmp_path / "a"), read(tmp_path / "b"))


# --------------------------------------------------------------------- what is said and planned
