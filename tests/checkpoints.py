"""Writes tiny checkpoints of every kind the converter reads; random weights, no downloads."""

import json
from pathlib import Path

import hydra_mlx  # noqa: F401  (before mlx: it chooses the BLAS library)
from hydra_mlx import score_file

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from .conftest import write_tokenizer
from .golden import weights as gold
from .test_gguf import gguf_bytes

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
# Ragged: layers with some, all and no full-attention heads, and key/value heads nobody reads.
# 128 and 192 wide, so that every group size divides every row length.
SPEC = {
    "model_type": "hydrahead",
    "architectures": ["HydraHeadForCausalLM"],
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 260,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "max_position_embeddings": 512,
    "full_attention_heads": [[1], [0, 2, 3], []],
    "eos_token_id": 257,
}
BASE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 71,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "max_position_embeddings": 512,
    "hidden_act": "silu",
    "attention_bias": False,
}
HEAD_MAP = [[1], [0, 2, 3]]  # a ragged one for BASE


def write_checkpoint(
    folder: Path, config: dict, weights: dict, shards: int = 1, index: bool | None = None
) -> Path:
    """Write config.json and the weights in `shards` files.

    Args:
        weights: {name: mx.array}. index: Write a shard index; None does when there are many.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names, weight_map = sorted(weights), {}
    for i in range(shards):
        one = "model.safetensors"
        file = one if shards == 1 else f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {n: weights[n] for n in names[i::shards]}
        mx.save_safetensors(str(folder / file), part, {"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    if index if index is not None else shards > 1:
        total = sum(x.nbytes for x in weights.values())
        data = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(data))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def spec_weights(config: dict, seed: int = 0, dtype: str = "float32") -> dict:
    """Random weights of a HydraHead config in spec layout, as {name: mx.array}."""
    return {
        n: mx.array(x).astype(DTYPES[dtype]) for n, x in gold.make_weights(config, seed).items()
    }


def write_spec(
    folder: Path,
    seed: int = 0,
    dtype: str = "float32",
    shards: int = 1,
    tokenizer: bool = False,
    index: bool | None = None,
    **changes,
) -> tuple:
    """A HydraHead checkpoint in spec layout; `changes` are config keys.

    Returns:
        (folder, config, {name: mx.array}).
    """
    config = {**SPEC, "torch_dtype": dtype, **changes}
    weights = spec_weights(config, seed, dtype)
    write_checkpoint(folder, config, weights, shards, index)
    if tokenizer:
        write_tokenizer(folder)
    return folder, config, weights


def write_scores(path: Path, table, raw=None, sha256: str = "0" * 64, **changes) -> Path:
    """A score file as `hydra-mlx score` writes it; `changes` are keys of it, or of its "model"."""
    score = np.array(table, float)
    layers, heads = score.shape
    model = {"sha256": sha256, "layers": layers, "heads": heads}
    model.update({k: changes.pop(k) for k in ("layers", "heads") if k in changes})
    raw = score if raw is None else np.array(raw, float)
    data = {**score_file.header(model, {}, {}), **score_file.tables(score, raw), **changes}
    path.write_text(json.dumps(data))
    return path


def base_model(config: dict):
    """mlx-lm's own model for a plain Llama or Qwen3 config."""
    import importlib

    module = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
    return module.Model(module.ModelArgs.from_dict(config))


def write_base(
    folder: Path, kind: str = "llama", seed: int = 0, shards: int = 1, dtype="float32", **changes
) -> tuple:
    """A plain Llama or Qwen3 checkpoint whose values leave no tensor without effect.

    Returns:
        (folder, config, {name: mx.array}, mlx-lm's model with these weights).
    """
    config = {"model_type": kind, **BASE, **changes}
    model = base_model(config)
    rng = np.random.RandomState(seed)
    weights = {}
    for name, x in sorted(tree_flatten(model.parameters())):
        values = rng.standard_normal(x.shape)
        if name.endswith("norm.weight"):
            values = 1 + 0.2 * values
        elif x.ndim == 2:
            values = values * (1.5 / x.shape[-1] ** 0.5)
        weights[name] = mx.array(values.astype(np.float32)).astype(DTYPES[dtype])
    model.load_weights(list(weights.items()))
    write_checkpoint(folder, config, weights, shards)
    return folder, config, weights, model


def permute_rows(w: np.ndarray, heads: int) -> np.ndarray:
    """q or k rows from Hugging Face's half-split order to GGUF's interleaved one."""
    half = w.shape[0] // heads // 2
    return w.reshape(heads, 2, half, -1).swapaxes(1, 2).reshape(w.shape)


GGUF_LAYER = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip


def _q8_0(w: np.ndarray) -> bytes:
    blocks = w.reshape(-1, 32)
    scale = (np.abs(blocks).max(1, keepdims=True) / 127).astype("<f2")
    q = np.round(blocks / np.maximum(scale.astype(np.float32), 1e-9)).clip(-127, 127)
    return np.concatenate([scale.view(np.uint8), q.astype(np.int8).view(np.uint8)], 1).tobytes()


def gguf_content(config: dict, weights: dict, quantised: bool, permute: bool = True) -> tuple:
    """(metadata, tensors) for gguf_bytes; matrices as Q8_0 where `quantised`, else F32."""
    n = config["num_attention_heads"], config["num_key_value_heads"]
    meta = {
        "general.architecture": "llama",
        "llama.block_count": config["num_hidden_layers"],
        "llama.context_length": config["max_position_embeddings"],
        "llama.embedding_length": config["hidden_size"],
        "llama.feed_forward_length": config["intermediate_size"],
        "llama.attention.head_count": n[0],
        "llama.attention.head_count_kv": n[1],
        "llama.attention.key_length": config["head_dim"],
        "llama.rope.freq_base": config["rope_theta"],
        "llama.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
    }
    names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        names.update({f"blk.{i}.{k}": layer + v for k, v in GGUF_LAYER.items()})
    tensors = {}
    for theirs, ours in names.items():
        if f"{ours}.weight" not in weights:
            continue  # tied
        w = np.array(weights[f"{ours}.weight"].astype(mx.float32))
        if permute and theirs.endswith(("attn_q", "attn_k")):
            w = permute_rows(w, n[theirs.endswith("attn_k")])
        if quantised and w.ndim == 2:
            tensors[f"{theirs}.weight"] = (w.shape, "Q8_0", _q8_0(w))
        else:
            tensors[f"{theirs}.weight"] = (w.shape, "F32", w.astype("<f4").tobytes())
    return meta, tensors


def gguf_tokenizer() -> dict:
    """Tokenizer metadata of a GGUF: one token for each byte, an end and "ab"; 258 in all."""
    from tokenizers import pre_tokenizers

    tokens = ["<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] + [1] * (len(tokens) - 1),
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 0,
    }


def write_gguf(
    path: Path,
    seed: int = 0,
    quantised: bool = False,
    permute: bool = True,
    tokenizer: bool = True,
    **changes,
) -> tuple:
    """A tiny Llama as GGUF, and the same model in mlx-lm.

    Returns:
        (path, config, {name: mx.array}, model) as of write_base, unrounded.
    """
    folder = path.with_suffix(".base")
    _, config, weights, model = write_base(folder, "llama", seed, **changes)
    meta, tensors = gguf_content(config, weights, quantised, permute)
    if tokenizer:
        meta.update(gguf_tokenizer())
    path.write_bytes(gguf_bytes(meta, tensors))
    return path, config, weights, model
