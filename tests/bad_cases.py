"""Damaged checkpoints: each case is a set of files to write over those of a good folder."""

import functools
import json
import math
import random
import struct
from dataclasses import dataclass, field

import numpy as np

from .checkpoints import SPEC, spec_weights

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
