"""The GGUF reader against files written here, byte by byte from ggml's block definitions."""

import json
import struct

from hydra_mlx import gguf as G
from hydra_mlx import gguf_llama as L
from hydra_mlx.errors import CheckpointError
from hydra_mlx.gguf_tokenizer import write_tokenizer

import mlx.core as mx
import numpy as np
import pytest

IDS = {name: kind for kind, (name, _, _) in G.TYPES.items()}
SIZES = {name: (block, size) for name, block, size in G.TYPES.values()}


# ------------------------------------------------------------------------- a tiny writer


def text(s):
    raw = s.encode()
    return struct.pack("<Q", len(raw)) + raw


def value(v):
    """Type id and payload of one metadata value."""
    if isinstance(v, bool):
        return struct.pack("<I?", 7, v)
    if isinstance(v, int):
        return struct.pack("<II", 4, v)
    if isinstance(v, float):
        return struct.pack("<If", 6, v)
    if isinstance(v, str):
        return struct.pack("<I", 8) + text(v)
    if isinstance(v[0], str):
        return struct.pack("<IIQ", 9, 8, len(v)) + b"".join(map(text, v))
    return struct.pack("<IIQ", 9, 5, len(v)) + np.array(v, "<i4").tobytes()


def gguf_bytes(meta, tensors, version=3):
    """tensors: {name: (shape in numpy order, type name, raw bytes)}."""
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(meta))
    head += b"".join(text(k) + value(v) for k, v in meta.items())
    body = b""
    for name, (shape, kind, raw) in tensors.items():
        head += (
            text(name)
            + struct.pack("<I", len(shape))
            + struct.pack(f"<{len(shape)}Q", *shape[::-1])
        )
        head += struct.pack("<IQ", IDS[kind], len(body))
        body += raw + b"\0" * (-len(raw) % 32)
    return head + b"\0" * (-len(head) % 32) + body


def save(path, meta, tensors, version=3):
    path.write_bytes(gguf_bytes(meta, tensors, version))
    return G.GGUFFile.open(path)


# ---------------------------------------------- dequantisation, one weight at a time, float64


def half(b, at):
    return float(np.frombuffer(bytes(b[at : at + 2]), "<f2")[0])


def six_bit(s, j):
    """Scale and minimum j of Q4_K and Q5_K (ggml: get_scale_min_k4)."""
    if j < 4:
        return s[j] & 63, s[j + 4] & 63
    return (s[j + 4] & 15) | (s[j - 4] >> 6 << 4), (s[j + 4] >> 4) | (s[j] >> 6 << 4)


def weight(kind, b, i):
    """Weight i of the block b (a list of bytes)."""
    if kind in ("Q4_0", "Q4_1", "Q5_0", "Q5_1"):
        five, has_min = kind[1] == "5", kind[3] == "1"
        q = b[len(b) - 16 + i % 16] >> (4 if i >= 16 else 0) & 15
        at = 4 if has_min else 2
        if five:
            q |= (int.from_bytes(bytes(b[at : at + 4]), "little") >> i & 1) << 4
        return half(b, 0) * q + half(b, 2) if has_min else half(b, 0) * (q - (16 if five else 8))
    if kind == "Q8_0":
        return half(b, 0) * (b[2 + i] - 256 * (b[2 + i] > 127))
    part, j, l = i // 128, i % 128 // 32, i % 32  # noqa: E741, the letters of ggml
    if kind in ("Q2_K", "Q3_K"):
        q = b[(16 if kind == "Q2_K" else 32) + 32 * part + l] >> (2 * j) & 3
        if kind == "Q2_K":
            return half(b, 80) * (b[i // 16] & 15) * q - half(b, 82) * (b[i // 16] >> 4)
        k = i // 16
        low = b[96 + k % 8] >> (4 if k >= 8 else 0) & 15
        scale = (low | (b[104 + k % 4] >> (2 * (k // 4)) & 3) << 4) - 32
        return half(b, 108) * scale * (q - (0 if b[l] >> (4 * part + j) & 1 else 4))
    if kind in ("Q4_K", "Q5_K"):
        sub = i // 32
        scale, minimum = six_bit(b[4:16], sub)
        q = b[len(b) - 128 + 32 * (sub // 2) + l] >> (4 * (sub % 2)) & 15
        if kind == "Q5_K":
            q |= (b[16 + l] >> sub & 1) << 4
        return half(b, 0) * scale * q - half(b, 2) * minimum
    low = b[64 * part + 32 * (j % 2) + l] >> (4 if j >= 2 else 0) & 15  # Q6_K
    q = (low | (b[128 + 32 * part + l] >> (2 * j) & 3) << 4) - 32
    scale = b[192 + i // 16]
    return half(b, 208) * (scale - 256 * (scale > 127)) * q


HALVES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}


def random_blocks(kind, n, seed=0):
    """(n, bytes) of random bits whose float16 fields are ordinary numbers of both signs."""
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (n, SIZES[kind][1]), dtype=np.uint8)
    for at in HALVES.get(kind, (0, 2) if kind.endswith("_1") else (0,)):
        d = rng.normal(size=n).astype("<f2")
        raw[:, at : at + 2] = d.view(np.uint8).reshape(n, 2)
    return raw


PACKED = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]


@pytest.mark.parametrize("kind", PACKED)
def test_dequantisation(tmp_path, kind):
    block, _ = SIZES[kind]
    raw = random_blocks(kind, 6)
    f = save(tmp_path / "a.gguf", {}, {"w": ((3, 2 * block), kind, raw.tobytes())})
    found = f.read_float("w")
    wanted = np.array([[weight(kind, b, i) for i in range(block)] for b in raw.tolist()])
    assert f.tensors["w"].type == kind and found.shape == (3, 2 * block)
    # float64 holds each product exactly; only Q6_K's two-step product rounds twice in float32.
    if kind == "Q6_K":
        np.testing.assert_allclose(found.ravel(), wanted.ravel(), rtol=2**-23)
    else:
        np.testing.assert_array_equal(found.ravel(), wanted.ravel().astype(np.float32))


@pytest.mark.parametrize("kind", PACKED)
def test_affine_is_bit_exact(tmp_path, kind):
    cols = 2 * max(SIZES[kind][0], 64)
    raw = random_blocks(kind, 6 * cols // SIZES[kind][0], seed=1)
    f = save(tmp_path / "a.gguf", {}, {"w": ((6, cols), kind, raw.tobytes())})
    a = f.read_affine("w")
    if kind in ("Q2_K", "Q3_K", "Q6_K"):  # 16 weights share a scale: MLX has no such group
        assert a is None
        return
    assert a.weight.shape == (6, cols * a.bits // 32) and a.scales.shape == (6, cols // 32)
    parts = [mx.array(x) for x in (a.weight, a.scales, a.biases)]
    w = np.array(mx.dequantize(*parts, group_size=a.group_size, bits=a.bits))
    assert w.dtype == np.float32
    np.testing.assert_array_equal(w.view(np.uint32), f.read_float("w").view(np.uint32))


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_plain_types(tmp_path, kind):
    x = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    if kind == "F16":
        x, raw = x.astype("<f2").astype(np.float32), x.astype("<f2").tobytes()
    elif kind == "BF16":
        top = (x.view(np.uint32) >> 16).astype("<u2")
        x, raw = (top.astype(np.uint32) << 16).view(np.float32), top.tobytes()
    else:
        raw = x.tobytes()
    f = save(tmp_path / "a.gguf", {}, {"w": ((3, 5), kind, raw)}, version=2)
    np.testing.assert_array_equal(f.read_float("w"), x)
    assert f.read_float("w").dtype == np.float32 and f.read_affine("w") is None


def test_metadata(tmp_path):
    meta = {"a": True, "b": 7, "c": 0.5, "d": "é", "e": ["x", "yz", ""], "f": [1, -2]}
    assert save(tmp_path / "a.gguf", meta, {}).metadata == meta


# ------------------------------------------------------------------------------ a tiny Llama

LLAMA = {
    "general.architecture": "llama",
    "llama.block_count": 1,
    "llama.context_length": 128,
    "llama.embedding_length": 32,
    "llama.feed_forward_length": 64,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.rope.freq_base": 5e4,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "tokenizer.ggml.eos_token_id": 2,
}
SHAPES = {
    "token_embd": (48, 32), "output_norm": (32,), "blk.0.attn_norm": (32,),
    "blk.0.attn_q": (32, 32), "blk.0.attn_k": (16, 32), "blk.0.attn_v": (16, 32),
    "blk.0.attn_output": (32, 32), "blk.0.ffn_norm": (32,), "blk.0.ffn_gate": (64, 32),
    "blk.0.ffn_up": (64, 32), "blk.0.ffn_down": (32, 64),
}  # fmt: skip


def llama_tensors():
    out = {}
    for i, (name, shape) in enumerate(SHAPES.items()):
        if len(shape) == 2:
            raw = random_blocks("Q4_1", int(np.prod(shape)) // 32, seed=i)
            out[f"{name}.weight"] = (shape, "Q4_1", raw.tobytes())
        else:
            out[f"{name}.weight"] = (shape, "F32", np.ones(shape, "<f4").tobytes())
    return out


def test_unpermute_undoes_the_converter():
    rng = np.random.default_rng(0)
    w = rng.normal(size=(3 * 8, 5))
    # llama.cpp's converter: the two halves of each head are dealt out in turn.
    stored = np.empty_like(w)
    for head in range(3):
        for i in range(4):
            stored[8 * head + 2 * i] = w[8 * head + i]
            stored[8 * head + 2 * i + 1] = w[8 * head + 4 + i]
    np.testing.assert_array_equal(L.unpermute_rows(stored, 3), w)
    np.testing.assert_array_equal(L.unpermute_rows(stored[:, 0], 3), w[:, 0])
    with pytest.raises(CheckpointError):
        L.unpermute_rows(w, 5)


def test_llama(tmp_path):
    f = save(tmp_path / "a.gguf", LLAMA, llama_tensors())
    config = L.config_from_gguf(f.metadata, f.tensors)
    assert config["model_type"] == "llama" and config["rms_norm_eps"] == 1e-5
    assert (config["head_dim"], config["vocab_size"], config["rope_theta"]) == (8, 48, 5e4)
    assert config["tie_word_embeddings"] and config["eos_token_id"] == 2
    floats = dict(L.iter_llama_tensors(f, affine=False))
    assert len(floats) == len(SHAPES) and "model.layers.0.mlp.down_proj.weight" in floats
    for name, n in (("q", 4), ("k", 2)):
        found = floats[f"model.layers.0.self_attn.{name}_proj.weight"]
        stored = f.read_float(f"blk.0.attn_{name}.weight")
        assert not np.array_equal(found, stored)
        np.testing.assert_array_equal(found, L.unpermute_rows(stored, n))
    for name, t in L.iter_llama_tensors(f):
        if isinstance(t, G.AffineTensor):
            parts = [mx.array(x) for x in (t.weight, t.scales, t.biases)]
            t = np.array(mx.dequantize(*parts, group_size=32, bits=t.bits))
        np.testing.assert_array_equal(t, floats[name])


@pytest.mark.parametrize(
    "change, words",
    [
        ({"general.architecture": "mamba"}, "'mamba'"),
        ({"llama.expert_count": 8}, "experts"),
        ({"llama.block_count": 2}, "2 layers lacks blk.1"),
        ({"llama.embedding_length": 64}, "expected"),
        ({"llama.attention.head_count": 0}, "above 0"),
        ({"llama.rope.dimension_count": 4}, "rotated"),
        ({"llama.rope.scaling.type": "longrope"}, "longrope"),
        ({"llama.context_length": "long"}, "expected a number"),
    ],
)
def test_llama_errors(tmp_path, change, words):
    f = save(tmp_path / "a.gguf", {**LLAMA, **change}, llama_tensors())
    with pytest.raises(CheckpointError, match=words):
        list(L.iter_llama_tensors(f))


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_rope_scaling(kind):
    scaling = {"type": kind, "factor": 4.0, "original_context_length": 32}
    meta = {**LLAMA, **{f"llama.rope.scaling.{k}": v for k, v in scaling.items()}}
    embed = {"token_embd.weight": G.GGUFTensor("token_embd.weight", (48, 32), "F32", 0, 6144)}
    found = L.config_from_gguf(meta, embed)["rope_scaling"]
    assert found["rope_type"] == kind and found["factor"] == 4.0
    assert ("original_max_position_embeddings" in found) == (kind == "yarn")


# --------------------------------------------------------------------------- damaged files


def read_all(path):
    f = G.GGUFFile.open(path)
    for name in f.tensors:
        f.read_float(name)
        f.read_affine(name)
    list(L.iter_llama_tensors(f))


def test_damaged_files_never_crash(tmp_path):
    rng = np.random.default_rng(0)
    meta = {**LLAMA, "tokenizer.ggml.tokens": ["a", "b"], "tokenizer.ggml.token_type": [1, 1]}
    whole = gguf_bytes(meta, llama_tensors())
    header = whole.index(b"blk.0.ffn_down") + 100
    path, refused = tmp_path / "a.gguf", 0
    for i in range(400):
        raw = bytearray(whole)
        if i % 4 == 0:
            raw = raw[: rng.integers(0, len(raw))]
        elif i % 4 == 1:  # a wrong length or count: whole bytes set
            raw[rng.integers(4, header)] = 0xFF
        else:
            for _ in range(rng.integers(1, 4)):
                raw[rng.integers(0, header)] ^= 1 << rng.integers(0, 8)
        path.write_bytes(raw)
        try:
            read_all(path)
            assert i % 4, f"a file cut to {len(raw)} of {len(whole)} bytes was read in full"
        except CheckpointError as e:
            refused += 1
            assert len(str(e).splitlines()) <= 2 and e.hint
    assert refused > 200


@pytest.mark.parametrize("name", ["missing.gguf", "folder"])
def test_unreadable_paths(tmp_path, name):
    (tmp_path / "folder").mkdir()
    with pytest.raises(CheckpointError):
        G.GGUFFile.open(tmp_path / name)


def test_unsupported_type_names_the_supported_ones(tmp_path):
    f = save(tmp_path / "a.gguf", {}, {"w": ((1, 256), "IQ4_XS", bytes(136))})
    with pytest.raises(CheckpointError, match="IQ4_XS.*\n.*Q4_K"):
        f.read_float("w")


# ------------------------------------------------------------------------------- tokenizer


def byte_alphabet():
    """GPT-2's 256 printable stand-ins for bytes."""
    keep = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in keep]
    return [chr(b) for b in keep] + [chr(256 + i) for i in range(len(rest))]


TOKENS = ["<|end|>", "<|start|>", "<tool>", *byte_alphabet(), "he", "hel", "Ġt", "12", "123"]
VOCAB = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [3, 3, 4] + [1] * (len(TOKENS) - 3),
    "tokenizer.ggml.merges": ["h e", "he l", "Ġ t", "1 2", "12 3"],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 0,
    "tokenizer.chat_template": "{% for m in messages %}<|start|>{{ m['content'] }}{% endfor %}",
}
TEXTS = [
    "hello  the 1234\n\n",
    "naïve café Ελλ 日本",
    "🦙👩\u200d👧",
    "def f(x):\n\treturn x**2\r\n",
    "I'll  ",
]


@pytest.fixture
def load(tmp_path):
    """load(**changes to the metadata) -> the tokenizer as transformers reads it back."""
    from transformers import AutoTokenizer

    def go(**changes):
        write_tokenizer(
            {**VOCAB, **{f"tokenizer.ggml.{k}": v for k, v in changes.items()}}, tmp_path
        )
        return AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)

    return go


@pytest.mark.parametrize("pre", ["smollm", "llama-bpe", "qwen2", "gpt-2", "default"])
def test_tokenizer_round_trip(load, pre):
    tok = load(pre=pre)
    for s in TEXTS:
        assert tok.decode(tok.encode(s)) == s
    pieces = tok.convert_ids_to_tokens(tok.encode("123"))
    assert pieces == (["1", "2", "3"] if pre in ("smollm", "qwen2") else ["123"])
    assert tok.encode("<|start|>hel<tool><|end|>") == [1, TOKENS.index("hel"), 2, 0]
    assert tok.decode([1, 2, 0], skip_special_tokens=True) == "<tool>"
    assert (tok.bos_token, tok.eos_token, tok.pad_token) == ("<|start|>", "<|end|>", "<|end|>")


def test_tokenizer_template_and_bos(load, tmp_path):
    from mlx_lm.tokenizer_utils import load as mlx_load

    assert load(add_bos_token=True).encode("he") == [1, TOKENS.index("he")]
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["add_bos_token"]
    tok = load()
    assert tok.encode("he") == [TOKENS.index("he")]
    turn = [{"role": "user", "content": "hi"}]
    assert tok.apply_chat_template(turn, tokenize=False) == "<|start|>hi"
    assert mlx_load(tmp_path).eos_token_ids == {0}


@pytest.mark.parametrize(
    "change, words",
    [
        ({"model": "llama"}, "'llama'"),
        ({"pre": "tekken"}, "smollm"),
        ({"tokens": []}, "list of texts"),
        ({"tokens": ["a", "a"]}, "twice"),
        ({"merges": ["h zz"]}, "merges"),
        ({"merges": ["h"]}, "merges"),
        ({"token_type": [1]}, "length"),
        ({"bos_token_id": 9999}, "9999"),
    ],
)
def test_tokenizer_errors(tmp_path, change, words):
    meta = {**VOCAB, **{f"tokenizer.ggml.{k}": v for k, v in change.items()}}
    with pytest.raises(CheckpointError, match=words):
        write_tokenizer(meta, tmp_path)
