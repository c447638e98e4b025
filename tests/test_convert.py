"""The converter: every source to every target and back, what it reports, and what it refuses."""

import fcntl
import json
import os
import re
from dataclasses import replace
from pathlib import Path

import hydra_mlx
from hydra_mlx import converter, reference
from hydra_mlx.config import HydraArgs
from hydra_mlx.convert import build_parser as parser
from hydra_mlx.convert import main, make_job
from hydra_mlx.forms import fuse_layer, migrate_layer
from hydra_mlx.manifest import MANIFEST, check_files, file_digest
from hydra_mlx.model import FLOAT32_NAMES, Model, is_protected
from hydra_mlx.quantise import MODES, RECIPES
from hydra_mlx.registry import SHIM, SHIM_NAME
from hydra_mlx.shards import read_headers

import mlx.core as mx
import numpy as np
import pytest

from .checkpoints import (
    BASE,
    DTYPES,
    HEAD_MAP,
    SPEC,
    write_base,
    write_checkpoint,
    write_gguf,
    write_spec,
)
from .test_forms import map_layers
from .tolerance import LOGITS_FLOAT32, assert_close, rel_rms

TOKENS = mx.array(np.random.RandomState(5).randint(0, 71, (2, 20)))


def convert(*argv, code: int = 0):
    """Run the program in this process and check its exit code."""
    found = main([str(a) for a in argv])
    assert found == code, argv


def read(folder: Path) -> dict:
    """Every tensor of a folder as {name: mx.array}."""
    out = {}
    for file in sorted(folder.glob("model*.safetensors")):
        out.update(mx.load(str(file)))
    return out


def logits(folder: Path) -> mx.array:
    return hydra_mlx.load_model(folder)(TOKENS)


ORACLE: dict = {}  # by the config and a few weights, which the seed decides


def oracle(config: dict, weights: dict) -> np.ndarray:
    """Reference logits of weights in spec layout."""
    key = json.dumps([config, weights["model.embed_tokens.weight"][0, :4].tolist()])
    if key not in ORACLE:
        ORACLE[key] = _oracle(config, weights)
    return ORACLE[key]


def _oracle(config: dict, weights: dict) -> np.ndarray:
    weights = {n: np.array(x.astype(mx.float32)) for n, x in weights.items()}
    return reference.forward(HydraArgs.from_dict(config), weights, np.array(TOKENS))


def same_arrays(a: dict, b: dict, where: str = ""):
    assert set(a) == set(b), where
    for name in a:
        assert a[name].dtype == b[name].dtype, f"{where} {name}"
        assert mx.array_equal(a[name], b[name]).item(), f"{where} {name}"


def job_of(*argv):
    return make_job(parser().parse_args([str(a) for a in argv]))[0]


def leftovers(folder: Path) -> list:
    return sorted(p.name for p in folder.iterdir() if p.name.startswith("."))


@pytest.fixture(scope="module")
def spec(tmp_path_factory) -> tuple:
    """(folder, config, weights) of a float32 HydraHead checkpoint with a tokenizer."""
    return write_spec(tmp_path_factory.mktemp("spec") / "source", tokenizer=True)


@pytest.fixture(scope="module")
def fused(spec, tmp_path_factory) -> Path:
    """The same model, fused, not quantised."""
    out = tmp_path_factory.mktemp("fused") / "model"
    convert("--hf-path", spec[0], "--mlx-path", out, "--quiet")
    return out


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
    low, high = RECIPES[recipe] or (4, 8)
    assert set(used.values()) == {low, high} and used["lm_head"] == high
    assert used["model.embed_tokens"] == (8 if recipe == "embed_8" else low)

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


def test_report_of_every_key(tmp_path, capsys):
    source, config, weights, model = write_base(tmp_path / "s", tie_word_embeddings=True)
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": mx.ones(8),
        "model.layers.1.self_attn.rotary_emb.inv_freq": mx.ones(8),
        "lm_head.weight": weights["model.embed_tokens.weight"],
    }
    write_checkpoint(source, config, {**weights, **extra})
    flags = ("--hf-path", source, "--mlx-path", tmp_path / "o", "--head-map", "identity")
    report = job_of(*flags).source.report
    assert sorted(n for n, _ in report.mapped) == sorted(weights)
    assert sorted(report.dropped) == sorted(extra) and not report.missing + report.unexpected
    convert(*flags)
    err = capsys.readouterr().err
    assert f"{len(weights)} tensors mapped, 3 dropped, 0 missing, 0 unexpected" in err
    assert all(f"dropped: {n}" in err for n in extra)
    keys = json.loads((tmp_path / "o" / MANIFEST).read_text())["keys"]
    assert keys["mapped"] == len(weights) and sorted(keys["dropped"]) == sorted(extra)
    assert_close(logits(tmp_path / "o"), model(TOKENS), 1e-5)

    lost = "model.layers.1.mlp.up_proj.weight"
    for change, word in (({lost: None}, "misses"), ({"model.extra.weight": 1}, "unexpected")):
        both = {**weights, **{n: mx.ones(3) for n in change}}
        both = {n: x for n, x in both.items() if change.get(n, 0) is not None}
        write_checkpoint(source, config, both)
        convert(*flags, "--overwrite", code=2)
        err = capsys.readouterr().err
        assert word in err and next(iter(change)) in err and "1 " + word[:4] in err


TARGETS = [
    ("spec", []),
    ("spec", ["--no-fuse"]),
    ("spec", ["-q"]),
    ("spec", ["-q", "--q-mode", "mxfp4"]),
    ("spec", ["-q", "--recipe", "mixed_3_6", "--dtype", "bfloat16"]),
    ("spec", ["--dtype", "float16"]),
    ("half", []),
    ("half", ["-q", "--protect", "lm_head"]),
    ("packed", []),
    ("packed", ["--dtype", "bfloat16"]),
    ("packed", ["-q", "--q-bits", "3"]),
    ("fused", ["--to-hf"]),
    ("fused", ["--to-hf", "--dtype", "float16"]),
    ("llama", ["--head-map", "identity"]),
    ("llama", ["--head-map", "heads", "-q", "--q-group-size", "32"]),
    ("gguf", ["--head-map", "identity"]),
    ("gguf", ["--head-map", "heads"]),
    ("gguf", ["--head-map", "heads", "--dtype", "bfloat16"]),
    ("gguf", ["--head-map", "identity", "-q", "--q-group-size", "32", "--q-bits", "8"]),
]


@pytest.fixture(scope="module")
def sources(spec, fused, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("sources")
    write_spec(folder / "half", dtype="float16")
    write_base(folder / "llama", dtype="bfloat16")
    gguf, *_ = write_gguf(folder / "m.gguf", quantised=True, vocab_size=258)
    convert("--hf-path", spec[0], "--mlx-path", folder / "packed", "-q", "--quiet")
    (folder / "heads.json").write_text(json.dumps(HEAD_MAP))
    names = {n: folder / n for n in ("half", "llama", "packed")}
    return {**names, "spec": spec[0], "fused": fused, "gguf": gguf, "heads": folder / "heads.json"}


@pytest.mark.parametrize("source, flags", TARGETS, ids=lambda x: "".join(x).replace("--", "+"))
def test_plan_says_what_is_written(source, flags, sources, tmp_path, capsys):
    flags = [sources["heads"] if f == "heads" else f for f in flags]
    if "--to-hf" in flags:
        at = flags.index("--to-hf") + 1
        argv = ["--mlx-path", sources[source], *flags[:at], tmp_path / "o", *flags[at:]]
    else:
        argv = ["--hf-path", sources[source], "--mlx-path", tmp_path / "o", *flags]
    convert(*argv, "--plan")
    out = capsys.readouterr().out
    assert "weights" in out and "memory" in out and "disk" in out
    assert not list(tmp_path.iterdir())
    said = converter.plan(job_of(*argv), tmp_path / "o")
    convert(*argv, "--quiet")
    headers = read_headers(tmp_path / "o")
    assert said.weights == sum(i.nbytes for i in headers.values())
    count = sum(x.size for x in read(tmp_path / "o").values() if x.dtype != mx.uint32)
    assert said.parameters >= count * 0.9
    assert hydra_mlx.load_model(tmp_path / "o")


def test_too_little_room_is_said_before(spec, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(converter, "memory_bytes", lambda: 10**6)
    for flag in ((), ("--plan",)):
        convert("--hf-path", spec[0], "--mlx-path", tmp_path / "o", "--quiet", *flag, code=2)
        assert "of memory" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("level", ["quick", "full"])
def test_verify_prints_figures(level, spec, tmp_path, capsys):
    flags = ("--hf-path", spec[0], "--verify", level)
    convert(*flags, "--mlx-path", tmp_path / "a")
    err = capsys.readouterr().err
    assert f"compared on {128 if level == 'quick' else 1024} tokens" in err
    assert "KL" in err and "100.0 %" in err and "perplexity" not in err
    convert(*flags, "--mlx-path", tmp_path / "b", "-q", "--q-bits", "8")
    ratio = re.search(r"perplexity [\d.]+ -> [\d.]+, ratio ([\d.]+)", capsys.readouterr().err)
    assert 0.9 < float(ratio[1]) < 1.1


def test_verify_without_tokenizer_has_no_perplexity(tmp_path, capsys):
    source, *_ = write_spec(tmp_path / "s")
    convert("--hf-path", source, "--mlx-path", tmp_path / "o", "-q", "--verify", "quick")
    err = capsys.readouterr().err
    assert "compared on 128 tokens" in err and "perplexity" not in err


def test_verify_that_fails_leaves_nothing(spec, tmp_path, monkeypatch, capsys):
    from hydra_mlx import verify

    def broken(tokens):
        return mx.full((*tokens.shape, 260), mx.nan)

    monkeypatch.setattr(verify, "load_model", lambda folder: broken)
    convert("--hf-path", spec[0], "--mlx-path", tmp_path / "o", "--verify", "quick", code=2)
    assert "NaN" in capsys.readouterr().err and not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------- what is written


def test_manifest_and_shim(spec, fused):
    config = json.loads((fused / "config.json").read_text())
    assert config["model_file"] == SHIM_NAME and (fused / SHIM_NAME).read_text() == SHIM
    assert config["eos_token_id"] == 257 and config["weights_form"] == "fused"
    data = json.loads((fused / MANIFEST).read_text())
    assert data["source"] == "source" and data["hydra_mlx_version"] == hydra_mlx.__version__
    assert set(data["files"]) == {p.name for p in fused.iterdir()} - {MANIFEST}
    for name, entry in data["files"].items():
        assert entry["bytes"] == (fused / name).stat().st_size
        assert entry["sha256"] == file_digest(fused / name)
    assert "tokenizer.json" in data["files"]
    check_files(fused)
    assert oct(fused.stat().st_mode)[-3:] == "755"


def test_manifest_notices_changes(spec, tmp_path):
    convert("--hf-path", spec[0], "--mlx-path", tmp_path / "o", "--quiet")
    file = tmp_path / "o" / "model.safetensors"
    raw = file.read_bytes()
    file.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    assert hydra_mlx.load_model(tmp_path / "o") is not None, "not checked unless asked for"
    with pytest.raises(hydra_mlx.errors.CheckpointError, match="content has changed"):
        hydra_mlx.load_model(tmp_path / "o", check=True)
    file.write_bytes(raw)
    hydra_mlx.load_model(tmp_path / "o", check=True)
    file.unlink()
    with pytest.raises(hydra_mlx.errors.CheckpointError, match="missing"):
        check_files(tmp_path / "o")
    (tmp_path / "o" / MANIFEST).unlink()
    with pytest.raises(hydra_mlx.errors.CheckpointError, match="has no hydra_manifest"):
        check_files(tmp_path / "o")


def test_existing_target(spec, tmp_path, capsys):
    out = tmp_path / "o"
    flags = ("--hf-path", spec[0], "--mlx-path", out, "--quiet")
    convert(*flags)
    (out / "mine.txt").write_text("x")
    before = (out / "model.safetensors").stat().st_ino
    convert(*flags, "-q", code=2)
    assert "--overwrite" in capsys.readouterr().err
    assert (out / "model.safetensors").stat().st_ino == before
    convert(*flags, "-q", "--overwrite")
    assert not (out / "mine.txt").exists() and any("scales" in n for n in read(out))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["o"]


def test_overwrite_deletes_models_only(spec, tmp_path, capsys):
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "thesis.txt").write_text("x")
    (tmp_path / "file").write_text("x")
    for name in ("papers", "file"):
        flags = ("--mlx-path", tmp_path / name, "--overwrite")
        convert("--hf-path", spec[0], *flags, code=2)
        assert "not a model folder" in capsys.readouterr().err
    assert (tmp_path / "papers" / "thesis.txt").is_file() and (tmp_path / "file").is_file()
    (tmp_path / "empty").mkdir()
    convert("--hf-path", spec[0], "--mlx-path", tmp_path / "empty", "--overwrite", "--quiet")


def test_source_is_never_the_target(tmp_path, capsys, monkeypatch):
    source, *_ = write_spec(tmp_path / "outer" / "s")
    (tmp_path / "outer" / "config.json").write_text("{}")
    (tmp_path / "link").symlink_to(source)
    monkeypatch.chdir(source)
    before = {p.name: p.read_bytes() for p in source.iterdir()}
    for target in (source, tmp_path / "link", source / ".." / "s", ".", tmp_path / "outer"):
        for flag in ((), ("--overwrite",)):
            convert("--hf-path", source, "--mlx-path", target, *flag, code=2)
            err = capsys.readouterr().err
            assert "same" in err or "lies inside" in err, target
    convert("--hf-path", source, "--mlx-path", tmp_path / "o", "--quiet")
    convert("--mlx-path", tmp_path / "o", "--to-hf", tmp_path / "o", "--overwrite", code=2)
    assert {p.name: p.read_bytes() for p in source.iterdir()} == before


def test_target_through_a_link(spec, tmp_path):
    convert("--hf-path", spec[0], "--mlx-path", tmp_path / "o", "--quiet")
    (tmp_path / "link").symlink_to(tmp_path / "o")
    flags = ("--mlx-path", tmp_path / "link", "-q", "--overwrite", "--quiet")
    convert("--hf-path", spec[0], *flags)
    assert (tmp_path / "link").is_symlink() and any("scales" in n for n in read(tmp_path / "o"))
    assert not leftovers(tmp_path)


USELESS = [
    ["--q-bits", "4"],
    ["--q-group-size", "64"],
    ["--q-mode", "affine"],
    ["--recipe", "mixed_3_6"],
    ["--protect", "lm_head"],
    ["--seed", "1"],
    ["--head-map", "identity"],
    ["-q", "--protect", "no_such_module"],
    ["-q", "--protect", "["],
    ["-q", "--q-mode", "mxfp4", "--q-bits", "8"],
    ["-q", "--q-mode", "mxfp4", "--recipe", "mixed_3_6"],
    ["-q", "--q-mode", "int4"],
    ["-q", "--q-bits", "7"],
    ["-q", "--q-group-size", "16"],
    ["-q", "--recipe", "mixed_9_9"],
    ["-q", "--protect", "."],
    ["--dtype", "float64"],
    ["--revision", "main"],
    ["--max-shard-size", "1"],
    ["--max-shard-size", "big"],
    ["--to-hf", "elsewhere"],
]


@pytest.mark.parametrize("flags", USELESS, ids=" ".join)
def test_flags_without_effect_are_errors(flags, spec, tmp_path, capsys):
    convert("--hf-path", spec[0], "--mlx-path", tmp_path / "o", *flags, code=2)
    err = capsys.readouterr().err.strip().splitlines()
    assert 1 <= len(err) <= 2 and err[0].startswith("error: ") and "not expected" not in err[-1]
    assert not list(tmp_path.iterdir())


WITH_TO_HF = [
    ["-q"],
    ["--no-fuse"],
    ["--head-map", "identity"],
    ["--hf-path", "x"],
    ["--seed", "1"],
]


@pytest.mark.parametrize("flags", WITH_TO_HF, ids=" ".join)
def test_to_hf_flags(flags, fused, tmp_path, capsys):
    convert("--mlx-path", fused, "--to-hf", tmp_path / "o", *flags, code=2)
    assert len(capsys.readouterr().err.splitlines()) <= 2 and not list(tmp_path.iterdir())


def test_fused_source_cannot_be_unfused_by_no_fuse(fused, tmp_path, capsys):
    convert("--hf-path", fused, "--mlx-path", tmp_path / "o", "--no-fuse", code=2)
    assert "--to-hf" in capsys.readouterr().err


# --------------------------------------------------------- damage, partial folders and the lock

NAMES = ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"]
NAMES += ["model.layers.2.self_attn.la.A_log", "model.layers.0.self_attn.la.b_proj.weight"]


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("flags", [[], ["-q"], ["-q", "--q-mode", "mxfp4"], ["--dtype", "float16"]])
def test_source_with_nan_is_refused(flags, value, tmp_path, capsys):
    source, config, weights = write_spec(tmp_path / "s")
    for name in NAMES:
        x = np.array(weights[name])
        x.flat[x.size // 2] = value
        write_checkpoint(source, config, {**weights, name: mx.array(x)})
        convert("--hf-path", source, "--mlx-path", tmp_path / "o", *flags, "--quiet", code=2)
        assert "NaN" in capsys.readouterr().err, name
        assert sorted(p.name for p in tmp_path.iterdir()) == ["s"], name


def test_float16_overflow_is_refused(tmp_path, capsys):
    source, config, weights = write_spec(tmp_path / "s")
    weights["lm_head.weight"] = weights["lm_head.weight"] * 1e6
    write_checkpoint(source, config, weights)
    flags = ("--mlx-path", tmp_path / "o", "--dtype", "float16")
    convert("--hf-path", source, *flags, code=2)
    assert "too large for float16" in capsys.readouterr().err
    assert not (tmp_path / "o").exists() and not leftovers(tmp_path)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, OSError(28, "No space left")])
def test_interruption_leaves_nothing(error, overwrite, spec, tmp_path, monkeypatch):
    out = tmp_path / "o"
    flags = ["--hf-path", spec[0], "--mlx-path", out, "--quiet"]
    if overwrite:
        convert(*flags)
        before = {p.name: p.read_bytes() for p in out.iterdir()}
        flags.append("--overwrite")

    def fail(folder):
        raise error

    monkeypatch.setattr(converter, "_sync", fail)
    convert(*flags, "-q", code=130 if error is KeyboardInterrupt else 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == (["o"] if overwrite else [])
    if overwrite:
        assert {p.name: p.read_bytes() for p in out.iterdir()} == before


def test_two_conversions_to_one_target(spec, tmp_path, capsys):
    out = tmp_path / "o"
    fd = os.open(tmp_path / ".o.lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(fd, fcntl.LOCK_EX)
    convert("--hf-path", spec[0], "--mlx-path", out, "--quiet", code=2)
    assert "Another conversion" in capsys.readouterr().err and not out.exists()
    assert (tmp_path / ".o.lock").exists()  # it is not ours to remove
    os.close(fd)
    convert("--hf-path", spec[0], "--mlx-path", out, "--quiet")
    assert not leftovers(tmp_path)


def test_a_second_conversion_while_one_runs(spec, tmp_path, capsys):
    job, codes = job_of("--hf-path", spec[0], "--mlx-path", tmp_path / "o"), []

    def progress(label, done, total):
        flags = ("--mlx-path", tmp_path / "o", "--overwrite", "--quiet")
        codes.append(main([str(a) for a in ("--hf-path", spec[0], *flags)]))

    converter.run(job, tmp_path / "o", False, progress)
    assert set(codes) == {2} and "Another conversion" in capsys.readouterr().err
    hydra_mlx.load_model(tmp_path / "o")


@pytest.mark.parametrize("name", ["model", "a [b] *?"])
def test_leftovers_of_a_killed_run_are_swept(name, spec, tmp_path):
    for left in (f".{name}.partial-abc", f".{name}.partial-xyz"):
        (tmp_path / left).mkdir()
        (tmp_path / left / "part-00000.safetensors").write_bytes(b"half")
    (tmp_path / f".{name}.lock").touch()
    (tmp_path / ".other.partial-abc").mkdir()
    convert("--hf-path", spec[0], "--mlx-path", tmp_path / name, "--quiet")
    assert leftovers(tmp_path) == [".other.partial-abc"]


def test_kill_between_the_renames_of_an_overwrite(spec, tmp_path, capsys):
    flags = ("--hf-path", spec[0], "--mlx-path", tmp_path / "o", "--quiet")
    convert(*flags)
    (tmp_path / "o").rename(tmp_path / ".o.replaced")
    convert(*flags, code=2)  # the old model has its name back, and is not overwritten
    assert "exists already" in capsys.readouterr().err and not leftovers(tmp_path)
    hydra_mlx.load_model(tmp_path / "o")
    (tmp_path / "o").rename(tmp_path / ".o.replaced")
    convert(*flags, "-q", "--overwrite")
    assert any("scales" in n for n in read(tmp_path / "o")) and not leftovers(tmp_path)


def test_seed_decides_the_new_tensors(tmp_path):
    source, *_ = write_base(tmp_path / "s")
    (tmp_path / "h.json").write_text(json.dumps(HEAD_MAP))
    for n, seed in (("a", 1), ("b", 1), ("c", 2)):
        flags = ("--head-map", tmp_path / "h.json", "--seed", seed, "--quiet")
        convert("--hf-path", source, "--mlx-path", tmp_path / n, *flags)
    same_arrays(read(tmp_path / "a"), read(tmp_path / "b"))
    a, c = read(tmp_path / "a"), read(tmp_path / "c")
    name = "model.layers.0.self_attn.A_log"
    assert not mx.array_equal(a[name], c[name]).item()


def test_spec_fixture_is_ragged():
    assert {len(h) for h in SPEC["full_attention_heads"]} == {0, 1, 3}
