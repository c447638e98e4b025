"""Hundreds of damaged checkpoints, configs, head maps and paths, for the converter and the loader.

Each must end in a HydraError (exit code 2, one or two lines), write nothing and leave its source
as it was. A case is a set of files to write over those of a good folder; all are made from fixed
seeds, and all must fail.
"""

import functools
import json
import math
import os
import random
import struct
from dataclasses import dataclass, field
from pathlib import Path

import hydra_mlx
from hydra_mlx.convert import main
from hydra_mlx.errors import HydraError

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from .checkpoints import BASE, SPEC, base_model, gguf_content, spec_weights, write_base
from .test_gguf import gguf_bytes

CONFIG = {
    **SPEC,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 20,
    "full_attention_heads": [[1], [0, 2]],
}
del CONFIG["eos_token_id"]
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclass
class Case:
    """One bad input.

    Attributes:
        name: For the message of a failure. files: {name: bytes, or None to remove it} over those
            of the good folder. flags: Of the converter. loader: Whether the loader must fail too.
    """

    name: str
    files: dict
    flags: list = field(default_factory=list)
    loader: bool = True


def as_json(data) -> bytes:
    return json.dumps(data).encode()


def safetensors(entries: list, pad: int = 0) -> bytes:
    """A file of (name, dtype, shape, raw bytes) entries; names may repeat."""
    parts, at = [], 0
    for name, dtype, shape, raw in entries:
        entry = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + len(raw)]}
        parts.append(f"{json.dumps(name)}:{json.dumps(entry, separators=(',', ':'))}")
        at += len(raw)
    header = "{" + ",".join(parts) + "}"
    return (
        struct.pack("<Q", len(header)) + header.encode() + b"".join(e[3] for e in entries)
    ) + bytes(pad)


@functools.cache
def entries() -> tuple:
    """The good model as safetensors entries."""
    weights = spec_weights(CONFIG)
    return tuple((n, "F32", x.shape, np.array(x).tobytes()) for n, x in sorted(weights.items()))


@functools.cache
def good() -> dict:
    """Files of the good folder."""
    return {"config.json": as_json(CONFIG), WEIGHTS: safetensors(entries())}


def replaced(name: str, *entry) -> dict:
    """Files with one tensor's (dtype, shape, raw) replaced."""
    return {WEIGHTS: safetensors([(name, *entry) if e[0] == name else e for e in entries()])}


def header_size() -> int:
    return 8 + struct.unpack("<Q", good()[WEIGHTS][:8])[0]


# ------------------------------------------------------------------------------------ the cases


def truncated() -> list:
    raw, head, rng = good()[WEIGHTS], header_size(), random.Random(0)
    cuts = {0, 1, 7, 8, 9, head - 1, head, head + 1, len(raw) - 4, len(raw) - 1}
    cuts |= {rng.randrange(8, head) for _ in range(12)}
    cuts |= {rng.randrange(head, len(raw)) for _ in range(12)}
    out = [Case(f"cut to {n} bytes", {WEIGHTS: raw[:n]}) for n in sorted(cuts)]
    out += [Case(f"{n} bytes too many", {WEIGHTS: raw + bytes(n)}) for n in (1, 4096)]
    out.append(Case("all zero", {WEIGHTS: bytes(len(raw))}))
    noise = np.random.RandomState(0).bytes(5000)
    return [*out, Case("noise", {WEIGHTS: noise}), Case("text", {WEIGHTS: b"not a model\n" * 9})]


def flipped_headers() -> list:
    rng, out = random.Random(1), []
    for i in range(60):
        raw = bytearray(good()[WEIGHTS])
        at, bit = rng.randrange(8 if i < 12 else header_size()), rng.randrange(8)
        raw[at] ^= 1 << bit
        out.append(Case(f"byte {at} bit {bit} of the header", {WEIGHTS: bytes(raw)}))
    return out


def flipped_data() -> list:
    """Flips that turn a finite number into NaN or infinity; only the converter reads them all."""
    rng, out = random.Random(2), []
    flags = [[], ["-q", "--q-group-size", "32"], ["-q", "--q-mode", "mxfp4"], ["--no-fuse"]]
    for i, (name, dtype, shape, raw) in enumerate(entries()):
        if i % 2:
            continue
        data = bytearray(raw)
        at = rng.randrange(math.prod(shape)) * 4
        data[at + 3] |= 0x7F
        data[at + 2] |= 0x80
        files = replaced(name, dtype, shape, bytes(data))
        out.append(Case(f"{name} at {at}", files, flags[i // 2 % 4], loader=False))
    return out


def wrong_tensors() -> list:
    out = []
    names = [
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.0.self_attn.head_scale",
        "model.layers.0.self_attn.o_proj.weight",
        "model.layers.1.self_attn.fa.q_proj.weight",
        "model.layers.1.self_attn.fa.gate_proj.bias",
        "model.layers.1.self_attn.fa_norm.weight",
        "model.layers.1.self_attn.la.A_log",
        "model.layers.1.self_attn.la.a_proj.weight",
        "model.layers.1.self_attn.la.k_conv1d.weight",
    ]
    table = {e[0]: e for e in entries()}
    for i, name in enumerate(names):
        _, _, shape, raw = table[name]
        rest = [e for e in entries() if e[0] != name]
        (n, *more), row = shape, len(raw) // shape[0]
        flat = (math.prod(shape),) if more else (1, n)
        wrong = {
            "missing": safetensors(rest),
            "renamed": safetensors([*rest, (f"x{name}", "F32", shape, raw)]),
            "a row short": safetensors([*rest, (name, "F32", (n - 1, *more), raw[row:])]),
            "a row more": safetensors([*rest, (name, "F32", (n + 1, *more), raw + raw[:row])]),
            "another rank": safetensors([*rest, (name, "F32", flat, raw)]),
            "twice": safetensors([*entries(), table[name]]),
            "empty": safetensors([*rest, (name, "F32", (0,), b"")]),
        }
        dtype, size = [("I32", 4), ("U32", 4), ("I64", 8), ("BOOL", 1), ("U8", 1), ("I8", 1)][i % 6]
        wrong[dtype] = safetensors([*rest, (name, dtype, shape, bytes(size * math.prod(shape)))])
        wrong["XX"] = safetensors([*rest, (name, "XX", shape, raw)])
        out += [Case(f"{name} {what}", {WEIGHTS: data}) for what, data in wrong.items()]
    x = np.ones(4, np.float32).tobytes()
    for name in ("model.layers.0.self_attn.o_proj.bias", "model.layers.9.mlp.up_proj.weight", ""):
        raw = safetensors([*entries(), (name, "F32", (4,), x)])
        out.append(Case(f"extra {name!r}", {WEIGHTS: raw}))
    entry = entries()[0][0]
    for what, text in (
        ("negative shape", f'{{"{entry}":{{"dtype":"F32","shape":[-1,4],"data_offsets":[0,16]}}}}'),
        (
            "huge shape",
            f'{{"{entry}":{{"dtype":"F32","shape":[{2**62}],"data_offsets":[0,16]}}}}',
        ),
        ("float shape", f'{{"{entry}":{{"dtype":"F32","shape":[4.0],"data_offsets":[0,16]}}}}'),
        ("no offsets", f'{{"{entry}":{{"dtype":"F32","shape":[4]}}}}'),
        ("offsets swapped", f'{{"{entry}":{{"dtype":"F32","shape":[4],"data_offsets":[16,0]}}}}'),
        ("entry null", f'{{"{entry}":null}}'),
        ("dtype list", f'{{"{entry}":{{"dtype":[],"shape":[4],"data_offsets":[0,16]}}}}'),
        ("a list", "[]"),
        ("empty", "{}"),
        ("deep", "[" * 5000),
    ):
        out.append(Case(what, {WEIGHTS: struct.pack("<Q", len(text)) + text.encode() + x}))
    return out


REQUIRED = (
    "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
    "vocab_size full_attention_heads"
).split()
NOT_SIZES = [None, 0, -1, 2**31, 10**30, 1.5, "8", True, [], {}, float("nan"), float("inf")]
NOT_BOOLS = [None, 0, 1, "true", [], {}]
NOT_OBJECTS = [1, "x", [], True]
BAD_VALUES = {
    **{k: NOT_SIZES for k in REQUIRED[:-1]},
    "head_dim": [v for v in NOT_SIZES if v is not None] + [7, 2**30],
    "max_position_embeddings": [v for v in NOT_SIZES if v is not None],
    "rms_norm_eps": [None, 0, -1e-6, 1, 2, "1e-6", True, [], float("nan"), float("inf")],
    "rope_theta": [0, -1, "1e4", True, [], {}, float("nan"), float("inf"), 1e300],
    "rope_scaling": [
        *NOT_OBJECTS,
        {"type": "unknown"},
        {"type": []},
        {"type": "linear"},
        {"type": "linear", "factor": 0},
        {"type": "linear", "factor": "2"},
        {"type": "linear", "factor": None},
        {"rope_type": "llama3"},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 0},
        {"type": "yarn", "factor": -1},
        {"type": "longrope", "original_max_position_embeddings": 64},
        {
            "type": "longrope",
            "original_max_position_embeddings": 64,
            "short_factor": [1.0],
            "long_factor": [1.0],
        },
        {"type": "mrope"},
    ],
    "rope_parameters": [*NOT_OBJECTS, {"rope_type": "linear"}, {"rope_theta": 5.0}],
    "tie_word_embeddings": NOT_BOOLS,
    "attention_bias": NOT_BOOLS,
    "hidden_act": [None, "gelu", 1, []],
    "full_attention_heads": [
        None,
        1,
        "x",
        {},
        [],
        [[1]],
        [[1], [0, 2], []],
        [[1], 2],
        [[1], None],
        [[1], ["0"]],
        [[1], [0.0]],
        [[1], [True]],
        [[1], [2, 0]],
        [[1], [0, 0]],
        [[1], [0, 4]],
        [[1], [-1]],
        [[1], [0, 10**30]],
        [[0, 1], [0, 2]],  # whole in itself, but other than the weights
    ],
    "fa_kv": [None, "gqa", 1, []],
    "fa_rope": NOT_BOOLS,
    "fa_logit_scale": [
        *NOT_OBJECTS,
        {},
        {"type": "linear"},
        {"type": "log_length", "a": 1},
        {"type": "log_length", "a": "500"},
        {"type": "log_length", "a": None},
        {"type": "log_length", "a": True},
        {"type": "log_length", "a": float("nan")},
        {"type": "log_length", "b": 5},
    ],
    "fa_gate": ["", "scalar", 0, False, []],
    "fa_gate_position": [None, "after", 1],
    "la_conv_kernel": [None, 3, 5, -4, 4.0, "4", True, False],
    "la_rope": NOT_BOOLS,
    "la_qk_norm": NOT_BOOLS,
    "fa_qk_norm": NOT_BOOLS,
    "la_output_gate": ["tanh", 0, False],
    "la_allow_neg_eigval": NOT_BOOLS,
    "fusion_norm": ["layer", 0, False],
    "fusion_scale": NOT_BOOLS,
    "weights_form": [None, "packed", 1],
    "model_type": [None, "", "llama", "gpt2", 3, []],
}


def wrong_configs() -> list:
    out = []
    for key in REQUIRED:
        config = {k: v for k, v in CONFIG.items() if k != key}
        out.append(Case(f"no {key}", {"config.json": as_json(config)}))
    for key, values in BAD_VALUES.items():
        for value in values:
            name = f"{key} = {json.dumps(value)}"
            out.append(Case(name, {"config.json": as_json({**CONFIG, key: value})}))
    return out


def conflicting_configs() -> list:
    """Keys that are fine one by one, but not together or not with these weights."""
    changes = [
        {"hidden_size": 64},
        {"intermediate_size": 64},
        {"vocab_size": 21},
        {"num_hidden_layers": 3, "full_attention_heads": [[1], [0, 2], []]},
        {"num_hidden_layers": 1, "full_attention_heads": [[1]]},
        {"num_attention_heads": 6},
        {"num_attention_heads": 8, "full_attention_heads": [[1], [7]]},
        {"num_key_value_heads": 3},
        {"head_dim": 16},
        {"head_dim": None, "hidden_size": 34},
        {"head_dim": 2**26, "num_attention_heads": 4},
        {"tie_word_embeddings": True, "weights_form": "fused"},
        {"attention_bias": True},
        {"mlp_bias": True},
        {"rope_traditional": True},
        {"fa_kv": "keep_all"},
        {"fa_gate": None},
        {"fa_gate": "headwise"},
        {"la_conv_kernel": 0},
        {"la_qk_norm": False},
        {"fa_qk_norm": False},
        {"la_output_gate": None},
        {"fusion_norm": None},
        {"fusion_norm": "rms_no_weight"},
        {"fusion_scale": False},
        {"weights_form": "fused"},
        {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6}},
        {"torch_dtype": "float32", "dtype": "bfloat16"},
        {"quantization": {"bits": 4, "group_size": 64}, "quantization_config": {"bits": 8}},
        {"fa_ropes": True},
        {"la_gate": "silu"},
        {"fusion_scales": 1},
        {"full_attention_head": []},
        {"num_attention_head": 4},
        {"rope_thetas": 1.0},
    ]
    out = [Case(json.dumps(c), {"config.json": as_json({**CONFIG, **c})}) for c in changes]
    for what, raw in (
        ("gone", None),
        ("empty", b""),
        ("text", b"hidden_size: 32"),
        ("cut", as_json(CONFIG)[:-20]),
        ("list", b"[]"),
        ("null", b"null"),
        ("number", b"3"),
        ("binary", bytes(range(256))),
        ("utf-16", json.dumps(CONFIG).encode("utf-16")),
        ("deep", b"[" * 100_000),
    ):
        out.append(Case(f"config.json {what}", {"config.json": raw}))
    return out


def wrong_indexes() -> list:
    half = len(entries()) // 2
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    parts = dict(zip(names, (entries()[:half], entries()[half:]), strict=True))
    files = {WEIGHTS: None, **{n: safetensors(list(p)) for n, p in parts.items()}}
    where = {e[0]: n for n, p in parts.items() for e in p}
    first, *_ = where

    def case(what: str, index, **more) -> Case:
        raw = index if isinstance(index, bytes) else as_json(index)
        return Case(what, {**files, INDEX: raw, **more})

    out = [
        case(f"index holds {raw[:12]!r}", raw)
        for raw in (b"", b"{", b"[]", b"null", b"{}", b'{"weight_map": []}', b'{"weight_map": 3}')
    ]
    out += [case("binary index", bytes(range(256))), case("deep index", b"[" * 100_000)]
    out.append(case("empty map", {"weight_map": {}}))
    for name in (
        *("../model.safetensors", "/etc/passwd", "/dev/zero", "..", ".", "", "a/b.safetensors"),
        *("..\\x.safetensors", "config.json", "model\0.safetensors", "x" * 300 + ".safetensors"),
        *("gone.safetensors", "dir.safetensors"),
    ):
        out.append(case(f"shard {name[:20]!r}", {"weight_map": {**where, first: name}}))
    for value in (None, 3, [], {}, True):
        out.append(case(f"shard {value!r}", {"weight_map": {**where, first: value}}))
    out.append(case("unknown tensor", {"weight_map": {**where, "model.x.weight": names[0]}}))
    whole = {"weight_map": where}
    for n in names:
        out.append(case(f"no {n}", whole, **{n: None}))
        out.append(case(f"cut {n}", whole, **{n: files[n][: len(files[n]) // 2]}))
    both = safetensors([*parts[names[1]], parts[names[0]][0]])
    out.append(case("a tensor in two shards", whole, **{names[1]: both}))
    out.append(Case("no index, a tensor in two files", {**files, names[1]: both}))
    out.append(Case("no index, one file gone", {**files, names[1]: None}))
    out.append(Case("no weights", {WEIGHTS: None}))
    return out


GROUPS = [truncated, flipped_headers, flipped_data, wrong_tensors, wrong_configs]
GROUPS += [conflicting_configs, wrong_indexes]

# --------------------------------------------------------------------------------- the checking


class Checker:
    """Runs bad inputs; `check` fails with the name of the first that gets through."""

    def __init__(self, folder: Path, capsys):
        self.capsys, self.folder = capsys, folder
        self.out = folder / "out"
        self.out.mkdir()

    def converter(self, name: str, *argv, target: Path | None = None):
        """The converter must refuse these arguments and write nothing."""
        before = snapshot(self.folder)
        target = self.out / "model" if target is None else target
        code = main(["--mlx-path", str(target), "--quiet", *map(str, argv)])
        out, err = self.capsys.readouterr()
        lines = err.strip().splitlines()
        assert code == 2, f"{name}: exit code {code}"
        assert not out and 1 <= len(lines) <= 2 and lines[0].startswith("error: "), f"{name}: {err}"
        assert "Traceback" not in err and "not expected" not in err, f"{name}: {err}"
        assert snapshot(self.folder) == before, f"{name}: files have changed"

    def loader(self, name: str, folder: Path):
        """load_model must raise a HydraError of one or two lines."""
        before = snapshot(self.folder)
        try:
            hydra_mlx.load_model(folder)
        except HydraError as e:
            assert 1 <= len(str(e).splitlines()) <= 2, f"{name}: {e}"
        except Exception as e:
            raise AssertionError(f"{name}: the loader raised {type(e).__name__}: {e}") from e
        else:
            raise AssertionError(f"{name}: was loaded")
        assert snapshot(self.folder) == before, f"{name}: files have changed"


def snapshot(folder: Path) -> dict:
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
        for p in folder.rglob("*")
    }


@pytest.fixture
def checker(tmp_path, capsys) -> Checker:
    return Checker(tmp_path, capsys)


def write(folder: Path, files: dict) -> Path:
    folder.mkdir(exist_ok=True)
    for p in folder.iterdir():
        p.unlink()
    for name, raw in files.items():
        if raw is not None:
            (folder / name).write_bytes(raw)
    return folder


def test_the_good_folder_is_good(tmp_path):
    folder = write(tmp_path / "model", good())
    hydra_mlx.load_model(folder)
    assert main(["--hf-path", str(folder), "--mlx-path", str(tmp_path / "o"), "--quiet"]) == 0


@pytest.mark.filterwarnings("ignore:config.json has keys")
@pytest.mark.parametrize("group", GROUPS, ids=lambda g: g.__name__)
def test_folders(group, checker, tmp_path):
    for case in group():
        folder = write(tmp_path / "model", {**good(), **case.files})
        checker.converter(case.name, "--hf-path", folder, *case.flags)
        if case.loader:
            checker.loader(case.name, folder)


def packed_cases() -> list:
    """Changes to a quantised folder: (name, {config key: value}, {tensor: array or None})."""
    q = {"bits": 4, "group_size": 32, "mode": "affine"}
    bad = [None, [], 3, "x", {}, {"bits": 4}, {"group_size": 32}]
    bad += [{**q, "bits": b} for b in (8, 3, 0, -4, 7, None, "4", 10**9)]
    bad += [{**q, "group_size": g} for g in (64, 16, 0, -32, None, "32")]
    bad += [{**q, "mode": m} for m in ("mxfp4", "nvfp4", "", None, [])]
    out = [(f"quantization {x}", {"quantization": x, "quantization_config": x}, {}) for x in bad]
    own = {**q, "lm_head": {"bits": 8, "group_size": 32}}
    out.append(("lm_head 8 bit", {"quantization": own, "quantization_config": own}, {}))
    for part in ("weight", "scales", "biases"):
        name = f"lm_head.{part}"
        for what, f in {
            "missing": lambda x: None,
            "half": lambda x: x[: x.shape[0] // 2],
            "narrow": lambda x: x[:, :1] if x.shape[1] > 1 else mx.concatenate([x, x], 1),
            "flat": lambda x: x.flatten(),
            "int8": lambda x: x.astype(mx.int8),
        }.items():
            out.append((f"{name} {what}", {}, {name: f}))
    return out


def test_quantised_folders(checker, tmp_path):
    source = write(tmp_path / "model", good())
    made = tmp_path / "made"
    argv = ["--hf-path", source, "--mlx-path", made, "-q", "--q-group-size", "32", "--quiet"]
    assert main([str(a) for a in argv]) == 0
    config = json.loads((made / "config.json").read_text())
    arrays = mx.load(str(made / WEIGHTS))
    for name, keys, changes in packed_cases():
        tensors = {n: changes.get(n, lambda x: x)(x) for n, x in arrays.items()}
        tensors = {n: x for n, x in tensors.items() if x is not None}
        write(source, {"config.json": as_json({**config, **keys})})
        mx.save_safetensors(str(source / WEIGHTS), tensors)
        checker.loader(name, source)
        checker.converter(name, "--hf-path", source)
        checker.converter(name, "--hf-path", source, "--dtype", "float32")


def head_maps() -> list:
    """(name, bytes of the file) for a base model of 2 layers and 4 heads."""
    fine = {"full_attention_heads": [[1], [0, 2]]}
    bad = [None, 3, "x", {}, [], [[]], [[], [], []], [[1], 2], [[2, 1], []], [[1, 1], []]]
    bad += [[[4], []], [[-1], []], [["1"], []], [[1.0], []], [[True], []], [[None], []]]
    bad += [{"full_attention_heads": x} for x in bad]
    changes = [
        *(
            {"heads": []},
            {"hidden_size": 64},
            {"num_attention_heads": 2},
            {"weights_form": "fused"},
        ),
        *({"fa_kv": "x"}, {"fa_rope": 1}, {"la_conv_kernel": 3}, {"fusion_norm": 0}, {"": 1}),
        *({"fa_logit_scale": {"type": "log_length", "a": 0}}, {"model_type": "hydrahead"}),
        *({"fa_qk_norm": None}, {"la_output_gate": "tanh"}, {"rope_theta": 5}, {"fa_gates": None}),
    ]
    out = [(json.dumps(x)[:60], as_json(x)) for x in [*bad, *({**fine, **c} for c in changes)]]
    out += [("empty", b""), ("cut", as_json(fine)[:-3]), ("binary", bytes(range(256)))]
    out += [("text", b"0: 1 2"), ("deep", b"[" * 100_000), ("utf-16", as_json(fine)[:9] + b"\xff")]
    return out


def test_head_maps(checker, tmp_path):
    source, *_ = write_base(tmp_path / "base")
    heads = tmp_path / "heads.json"
    for name, raw in head_maps():
        heads.write_bytes(raw)
        checker.converter(f"head map {name}", "--hf-path", source, "--head-map", heads)
    for path in (tmp_path / "gone.json", tmp_path, "", "Identity", "a\0b", "x" * 5000):
        checker.converter(f"head map at {path}", "--hf-path", source, "--head-map", path)


def base_cases() -> list:
    """Changes to a plain Llama's config that keep it from being migrated."""
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    changes = [{k: v} for k in sizes for v in (None, 0, -1, 2**40, "4", 1.5, [], True)]
    changes += [{"model_type": x} for x in (None, "gpt2", "qwen2", 3, [], "qwen3")]
    changes += [{"mlp_bias": True}, {"attention_bias": True}, {"head_dim": 8}, {"head_dim": 17}]
    changes += [{"tie_word_embeddings": "x"}, {"hidden_act": "gelu"}, {"rope_scaling": "linear"}]
    changes += [{"model_type": "mistral", "sliding_window": 64}, {"rms_norm_eps": 0}]
    changes += [{"rope_scaling": {"rope_type": "llama3"}}, {"intermediate_size": 100}]
    return changes


def test_base_models(checker, tmp_path):
    source, config, *_ = write_base(tmp_path / "base")
    for change in base_cases():
        (source / "config.json").write_bytes(as_json({**config, **change}))
        checker.converter(f"base {change}", "--hf-path", source, "--head-map", "identity")
    (source / "config.json").write_bytes(as_json(config))
    checker.converter("no head map", "--hf-path", source)


def ggufs() -> list:
    """(name, bytes) of damaged GGUF files, all of which must fail."""
    rng = random.Random(3)
    model = base_model({"model_type": "llama", **BASE})
    meta, tensors = gguf_content(BASE, dict(tree_flatten(model.parameters())), False)
    whole = gguf_bytes(meta, tensors)
    cuts = [0, 4, 8, 23, 24, 200, len(whole) - 33, *(rng.randrange(len(whole)) for _ in range(20))]
    out = [(f"cut to {n}", whole[:n]) for n in cuts]
    out += [("magic", b"GGML" + whole[4:]), ("version", whole[:4] + b"\x09" + whole[5:])]
    out += [("text", b"GGUF is what this is not" * 9), ("zero", bytes(1000))]
    for key in sorted(meta):
        values = [0, "x"] if key in HARMLESS else [0, "x", 3, 2**31]
        values = ["mamba", 5] if isinstance(meta[key], str) else values
        out += [(f"{key} = {v}", gguf_bytes({**meta, key: v}, tensors)) for v in values]
    for name in ("blk.1.ffn_up.weight", "token_embd.weight", "blk.0.attn_norm.weight"):
        rest = {n: t for n, t in tensors.items() if n != name}
        (rows, *more), kind, raw = tensors[name]
        out.append((f"no {name}", gguf_bytes(meta, rest)))
        out.append((f"{name} renamed", gguf_bytes(meta, {**rest, f"x{name}": tensors[name]})))
        row = len(raw) // rows
        short = ((rows - 1, *more), kind, raw[row:])
        if name != "token_embd.weight":  # that one decides the vocabulary's size
            out.append((f"{name} short", gguf_bytes(meta, {**rest, name: short})))
        nan = np.frombuffer(raw, "<f4").copy()
        nan[3] = np.nan
        out.append(
            (f"{name} NaN", gguf_bytes(meta, {**rest, name: ((rows, *more), kind, nan.tobytes())}))
        )
    return out


# Values that some keys of a GGUF may have: they change the model, and do not contradict it.
HARMLESS = {
    "llama.context_length",
    "llama.rope.freq_base",
    "llama.attention.layer_norm_rms_epsilon",
}


def test_ggufs(checker, tmp_path):
    path = tmp_path / "model.gguf"
    for name, raw in ggufs():
        path.write_bytes(raw)
        checker.converter(f"gguf {name}", "--hf-path", path, "--head-map", "identity")


def test_paths(checker, tmp_path):
    source = write(tmp_path / "model", good())
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    bad = [
        "gone",
        "gone/deeper",
        "file",
        "empty",
        "file/below",
        "loop",
        "dangling",
        "a\0b",
        "y" * 300,
    ]
    for name in bad:
        path = tmp_path / name
        checker.converter(f"source {name}", "--hf-path", path)
        if name != "file":
            checker.loader(f"source {name}", path)
    checker.converter("no source")
    checker.converter("an empty source", "--hf-path", "")
    for name in ("file", "file/below", "file/below/more", "loop/x", "z" * 300, "a\0b"):
        path = tmp_path / name
        checker.converter(f"target {name}", "--hf-path", source, target=path)
        checker.converter(f"target {name}, plan", "--hf-path", path, "--plan", target=path)
    (source / WEIGHTS).unlink()
    (source / WEIGHTS).mkdir()
    checker.converter("weights are a folder", "--hf-path", source)
    checker.loader("weights are a folder", source)
    (source / WEIGHTS).rmdir()
    (source / "config.json").unlink()
    (source / "config.json").mkdir()
    checker.converter("config.json is a folder", "--hf-path", source)
    checker.loader("config.json is a folder", source)


def test_unreadable(checker, tmp_path):
    source = write(tmp_path / "model", good())
    uid = os.geteuid()
    for name, mode in (("config.json", 0), (WEIGHTS, 0), (".", 0o100)):
        kept = (source / name).stat().st_mode
        (source / name).chmod(mode)
        try:
            (source / name).read_bytes() if name != "." else list(source.iterdir())
        except OSError:
            checker.loader(f"unreadable {name}", source)
        else:
            assert uid == 0  # root reads everything
        finally:
            (source / name).chmod(kept)


def test_there_are_hundreds():
    counts = {g.__name__: len(g()) for g in GROUPS}
    counts.update(packed=len(packed_cases()), heads=len(head_maps()), base=len(base_cases()))
    counts.update(gguf=len(ggufs()))
    print(sum(counts.values()), "bad inputs:", counts)
    assert sum(counts.values()) >= 300, counts
