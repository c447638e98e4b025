"""The Llama family in GGUF: config, tensor names, and q and k rows in Hugging Face's order."""

from collections.abc import Iterator

import numpy as np

from .errors import CheckpointError
from .gguf import AGAIN, AffineTensor, GGUFFile, GGUFTensor

# {GGUF name: (Hugging Face name, shape)}. Names of a layer go without "blk.N." and
# "model.layers.N.", all without .weight or .bias; a bias has the first dimension only.
# Letters: V vocabulary, E hidden size, F feed-forward, Q and K all rows of the heads, D one head.
NAMES: dict[str, tuple[str, str]] = {
    "token_embd": ("model.embed_tokens", "VE"), "output_norm": ("model.norm", "E"),
    "output": ("lm_head", "VE"),
}  # fmt: skip
LAYER_NAMES: dict[str, tuple[str, str]] = {
    "attn_norm": ("input_layernorm", "E"), "ffn_norm": ("post_attention_layernorm", "E"),
    "attn_q": ("self_attn.q_proj", "QE"), "attn_k": ("self_attn.k_proj", "KE"),
    "attn_v": ("self_attn.v_proj", "KE"), "attn_output": ("self_attn.o_proj", "EQ"),
    "attn_q_norm": ("self_attn.q_norm", "D"), "attn_k_norm": ("self_attn.k_norm", "D"),
    "ffn_gate": ("mlp.gate_proj", "FE"), "ffn_up": ("mlp.up_proj", "FE"),
    "ffn_down": ("mlp.down_proj", "EF"),
}  # fmt: skip
OPTIONAL = ("output", "attn_q_norm", "attn_k_norm")
# {architecture: (class in Hugging Face, are q and k rows stored in interleaved order)}
ARCHITECTURES = {
    "llama": ("LlamaForCausalLM", True), "qwen2": ("Qwen2ForCausalLM", False),
    "qwen3": ("Qwen3ForCausalLM", False),
}  # fmt: skip


def _get(meta: dict, key: str, kind: type, default=None):
    """meta[key], checked; a default of None means that the key must be there."""
    found = meta.get(key, default)
    found = float(found) if kind is float and type(found) is int else found
    if type(found) is not kind or (kind is not str and not 0 < found < 1 << 40):
        what = "nothing" if found is None else repr(found)[:60]
        wanted = "a text" if kind is str else "a number above 0"
        raise CheckpointError(f"GGUF metadata: {key} holds {what}, expected {wanted}.", AGAIN)
    # float32 in the file: 9.99999975e-06 was written as 1e-05
    return float(str(np.float32(found))) if kind is float else found


def _rope_scaling(meta: dict, arch: str, tensors: dict[str, GGUFTensor]) -> dict | None:
    kind = meta.get(f"{arch}.rope.scaling.type", "none")
    if "rope_freqs.weight" in tensors or kind not in ("none", "linear", "yarn"):
        hint = "Convert the Hugging Face safetensors of this model instead."
        what = f"{kind!r}, or a table as in Llama 3.1"
        raise CheckpointError(f"This GGUF scales its rotary frequencies by {what}.", hint)
    if kind == "none":
        return None
    factor = _get(meta, f"{arch}.rope.scaling.factor", float)
    out = {"type": kind, "rope_type": kind, "factor": factor}
    if kind == "yarn":
        key = f"{arch}.rope.scaling.original_context_length"
        out["original_max_position_embeddings"] = _get(meta, key, int)
    return out


def config_from_gguf(meta: dict, tensors: dict[str, GGUFTensor]) -> dict:
    """The config.json of the Hugging Face model that this GGUF was made from.

    Raises:
        CheckpointError: another architecture, or metadata missing or contradicting itself.
    """
    arch = _get(meta, "general.architecture", str)
    if arch not in ARCHITECTURES or meta.get(f"{arch}.expert_count"):
        kind = f"{arch} with experts" if arch in ARCHITECTURES else arch[:40]
        hint = f"Dense models of these architectures can be read: {', '.join(ARCHITECTURES)}."
        raise CheckpointError(f"This GGUF holds a model of the architecture {kind!r}.", hint)
    hidden = _get(meta, f"{arch}.embedding_length", int)
    heads = _get(meta, f"{arch}.attention.head_count", int)
    kv_heads = _get(meta, f"{arch}.attention.head_count_kv", int, heads)
    head_dim = _get(meta, f"{arch}.attention.key_length", int, hidden // heads)
    rotated = _get(meta, f"{arch}.rope.dimension_count", int, head_dim)
    embed = tensors.get("token_embd.weight")
    if embed is None or len(embed.shape) != 2 or heads % kv_heads or rotated != head_dim:
        what = f"{heads}/{kv_heads} heads of {head_dim}, {rotated} rotated; embedding {embed}"
        raise CheckpointError(f"GGUF metadata contradicts itself: {what}.", AGAIN)
    config = {
        "architectures": [ARCHITECTURES[arch][0]],
        "model_type": arch,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": _get(meta, f"{arch}.feed_forward_length", int),
        "num_hidden_layers": _get(meta, f"{arch}.block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "rms_norm_eps": _get(meta, f"{arch}.attention.layer_norm_rms_epsilon", float),
        "rope_theta": _get(meta, f"{arch}.rope.freq_base", float, 10000.0),
        "vocab_size": embed.shape[0],
        "max_position_embeddings": _get(meta, f"{arch}.context_length", int),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in tensors,
    }
    if scaling := _rope_scaling(meta, arch, tensors):
        config["rope_scaling"] = scaling
    for key in ("bos_token_id", "eos_token_id"):
        if type(meta.get(f"tokenizer.ggml.{key}")) is int:
            config[key] = meta[f"tokenizer.ggml.{key}"]
    return config


def llama_names(config: dict, tensors: dict[str, GGUFTensor]) -> dict[str, str]:
    """{GGUF name: Hugging Face name} of every tensor; raises if one is unknown or misshapen."""
    sizes = {"V": config["vocab_size"], "E": config["hidden_size"], "D": config["head_dim"]}
    sizes["F"] = config["intermediate_size"]
    sizes["Q"] = config["num_attention_heads"] * config["head_dim"]
    sizes["K"] = config["num_key_value_heads"] * config["head_dim"]
    layers, table = config["num_hidden_layers"], dict(NAMES)
    for i in range(min(layers, len(tensors))):  # a damaged file may announce billions
        for name, (ours, dims) in LAYER_NAMES.items():
            table[f"blk.{i}.{name}"] = (f"model.layers.{i}.{ours}", dims)
    for name in table:
        if f"{name}.weight" not in tensors and name.split(".")[-1] not in OPTIONAL:
            raise CheckpointError(f"This GGUF of {layers} layers lacks {name}.weight.", AGAIN)
    out = {}
    for t in tensors.values():
        stem, _, ending = t.name.rpartition(".")
        if stem not in table or ending not in ("weight", "bias"):
            hint = f"The layer count is {layers}; known are the tensors of plain Llama and Qwen."
            raise CheckpointError(f"This GGUF has a tensor {t.name!r} of unknown use.", hint)
        ours, dims = table[stem]
        shape = tuple(sizes[d] for d in (dims if ending == "weight" else dims[0]))
        if t.shape != shape:
            raise CheckpointError(f"Tensor {t.name!r} is {t.shape}, expected {shape}.", AGAIN)
        out[t.name] = f"{ours}.{ending}"
    return out


def unpermute_rows(w: np.ndarray, n_heads: int) -> np.ndarray:
    """Rows of a q or k projection: from GGUF's interleaved rotary order to Hugging Face's halves.

    Only rows move, so it serves packed weights, scales, biases and float weights alike.

    Shapes:
        w: (n_heads * D, ...) -> the same
    """
    half = w.shape[0] // n_heads // 2
    if half * 2 * n_heads != w.shape[0]:
        raise CheckpointError(f"{w.shape[0]} rows cannot be {n_heads} heads of even size.", AGAIN)
    return w.reshape(n_heads, half, 2, -1).swapaxes(1, 2).reshape(w.shape)


def iter_llama_tensors(
    gguf: GGUFFile, affine: bool = True
) -> Iterator[tuple[str, np.ndarray | AffineTensor]]:
    """Yields (Hugging Face name ending in .weight or .bias, tensor), one at a time.

    Args:
        affine: Yield an AffineTensor where the type allows; else all in float32.

    Raises:
        CheckpointError: missing, unknown or misshapen tensors, before the first one is yielded;
            a type that cannot be expanded, when its turn comes.
    """
    config = config_from_gguf(gguf.metadata, gguf.tensors)
    for name, ours in llama_names(config, gguf.tensors).items():
        yield ours, read_llama_tensor(gguf, config, name, affine)


def read_llama_tensor(
    gguf: GGUFFile, config: dict, name: str, affine: bool = True
) -> np.ndarray | AffineTensor:
    """One tensor by its GGUF name, q and k rows in half-split rotary order.

    Args:
        config: From config_from_gguf. affine: An AffineTensor where the type allows; else float32.

    Raises:
        CheckpointError: no such tensor, or a type that cannot be expanded.
    """
    tensor = gguf.read_affine(name) if affine else None
    tensor = gguf.read_float(name) if tensor is None else tensor
    heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}
    part = name.split(".")[-2]
    if part not in heads or not ARCHITECTURES[config["model_type"]][1]:
        return tensor
    n = config[heads[part]]
    if isinstance(tensor, AffineTensor):
        rows = [unpermute_rows(a, n) for a in (tensor.weight, tensor.scales, tensor.biases)]
        return AffineTensor(*rows, tensor.bits)
    return unpermute_rows(tensor, n)
