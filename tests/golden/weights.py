"""Names, shapes and frozen random values of a HydraHead checkpoint. NumPy only.

Axis letters: B batch, T tokens, E hidden size, H query heads, Hf full-attention (FA) heads and
Hl linear-attention (LA) heads of a layer, Hk key/value heads kept, D head dim, V vocabulary.
Tensor names are those of the Hugging Face layout, rows in sorted head order.
"""

import numpy as np

# Values allowed for the keys that only HydraHead has, the default first.
OPTIONS = {
    "fa_kv": ("gqa_shared", "mha_own", "keep_all"),
    "fa_rope": (False, True),
    "fa_gate": ("elementwise", "headwise", None),
    "fa_gate_position": ("pre_norm", "post_norm"),
    "la_conv_kernel": (4, 0),
    "la_rope": (True, False),
    "la_qk_norm": (True, False),
    "fa_qk_norm": (True, False),
    "la_output_gate": ("silu", "sigmoid", None),
    "la_allow_neg_eigval": (False, True),
    "fusion_norm": ("rms", "rms_no_weight", None),
    "fusion_scale": (True, False),
}
# Where no norm sets the size of q and k, small ones make the eps of their L2 norm visible.
TINY_WITHOUT_NORM = ("la.q_conv1d.weight", "la.k_conv1d.weight")
DEFAULT_LOGIT_SCALE = {"type": "log_length", "a": 500}


def complete_config(config):
    """Returns a copy of config with the defaults filled in; ValueError if it is not supported."""
    full = {key: values[0] for key, values in OPTIONS.items()}
    full["fa_logit_scale"] = DEFAULT_LOGIT_SCALE
    full["tie_word_embeddings"] = False
    full.update(config)
    for key, values in OPTIONS.items():
        if full[key] not in values:
            raise ValueError(f"{key} is {full[key]!r}, expected one of {values}")
    scale = full["fa_logit_scale"]
    if scale is not None and scale.get("type") != "log_length":
        raise ValueError(f"fa_logit_scale is {scale!r}, expected null or type log_length")
    if full.get("attention_bias") or full.get("rope_scaling"):
        raise ValueError("attention_bias and rope_scaling are not covered, expected false and null")
    if full.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act is {full['hidden_act']!r}, expected 'silu'")
    heads, kv_heads = full["num_attention_heads"], full["num_key_value_heads"]
    if heads % kv_heads:
        raise ValueError(f"{heads} attention heads do not divide over {kv_heads} key/value heads")
    head_map, layers = full["full_attention_heads"], full["num_hidden_layers"]
    if len(head_map) != layers:
        raise ValueError(f"full_attention_heads has {len(head_map)} lists, expected {layers}")
    for i, fa in enumerate(head_map):
        if fa != sorted(set(fa)) or not set(fa) <= set(range(heads)):
            raise ValueError(f"full_attention_heads[{i}] is {fa}, expected sorted heads < {heads}")
    return full


def split_heads(config, layer):
    """Returns (FA heads, LA heads) of a layer, two sorted lists of original indices."""
    fa = list(config["full_attention_heads"][layer])
    return fa, [h for h in range(config["num_attention_heads"]) if h not in fa]


def kv_blocks(config, layer):
    """Returns (Hk, blocks): blocks[j] is the k/v row block that the j-th FA head reads."""
    fa, _ = split_heads(config, layer)
    if config["fa_kv"] == "mha_own":
        return len(fa), list(range(len(fa)))
    group = config["num_attention_heads"] // config["num_key_value_heads"]
    kept = sorted({h // group for h in fa})
    if config["fa_kv"] == "keep_all":
        kept = list(range(config["num_key_value_heads"]))
    return len(kept), [kept.index(h // group) for h in fa]


def _attention_shapes(c, layer):
    """Returns {name below self_attn: shape} for one layer of the completed config c."""
    E, D, H = c["hidden_size"], c["head_dim"], c["num_attention_heads"]
    fa, la = split_heads(c, layer)
    Hf, Hl = len(fa), len(la)
    shapes = {"o_proj.weight": (E, H * D)}
    if c["fusion_scale"]:
        shapes["head_scale"] = (H,)
    for kind, count in (("fa", Hf), ("la", Hl)):
        if not count:
            continue
        if c["fusion_norm"] == "rms":
            shapes[f"{kind}_norm.weight"] = (D,)
        if c[f"{kind}_qk_norm"]:
            shapes[f"{kind}.q_norm.weight"] = shapes[f"{kind}.k_norm.weight"] = (D,)
    if Hf:
        Hk, _ = kv_blocks(c, layer)
        shapes["fa.q_proj.weight"] = (Hf * D, E)
        shapes["fa.k_proj.weight"] = shapes["fa.v_proj.weight"] = (Hk * D, E)
        if c["fa_gate"]:
            rows = Hf * D if c["fa_gate"] == "elementwise" else Hf
            shapes["fa.gate_proj.weight"], shapes["fa.gate_proj.bias"] = (rows, E), (rows,)
    if Hl:
        for x in "qkv":
            shapes[f"la.{x}_proj.weight"] = (Hl * D, E)
            if c["la_conv_kernel"]:
                shapes[f"la.{x}_conv1d.weight"] = (Hl * D, 1, c["la_conv_kernel"])
        shapes["la.a_proj.weight"] = shapes["la.b_proj.weight"] = (Hl, E)
        shapes["la.A_log"] = shapes["la.dt_bias"] = (Hl,)
        if c["la_output_gate"]:
            shapes["la.gate_proj.weight"] = (Hl * D, E)
    return shapes


def tensor_shapes(config):
    """Returns {tensor name: shape} of the whole checkpoint, in no particular order."""
    c = complete_config(config)
    E, F, V = c["hidden_size"], c["intermediate_size"], c["vocab_size"]
    shapes = {"model.embed_tokens.weight": (V, E), "model.norm.weight": (E,)}
    if not c["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (V, E)
    for i in range(c["num_hidden_layers"]):
        prefix = f"model.layers.{i}"
        shapes[f"{prefix}.input_layernorm.weight"] = (E,)
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (E,)
        shapes[f"{prefix}.mlp.gate_proj.weight"] = (F, E)
        shapes[f"{prefix}.mlp.up_proj.weight"] = (F, E)
        shapes[f"{prefix}.mlp.down_proj.weight"] = (E, F)
        for name, shape in _attention_shapes(c, i).items():
            shapes[f"{prefix}.self_attn.{name}"] = shape
    return shapes


def _draw(name, shape, rng):
    """Returns float64 values of one tensor, scaled so that leaving the tensor out would show."""
    if name.endswith("norm.weight"):
        return rng.uniform(0.8, 1.2, shape)
    if name.endswith("head_scale"):
        return rng.uniform(0.7, 1.3, shape)
    if name.endswith("gate_proj.bias"):
        return 1.0 + 0.2 * rng.standard_normal(shape)
    if name.endswith("A_log"):
        return np.log(rng.uniform(0.5, 16.0, shape))
    if name.endswith("dt_bias"):
        dt = np.exp(rng.uniform(np.log(1e-3), np.log(0.1), shape))
        return np.log(np.expm1(dt))  # softplus(dt_bias) = dt
    if name.endswith("embed_tokens.weight"):
        return 0.2 * rng.standard_normal(shape)  # keeps tied logits below 10
    values = rng.standard_normal(shape) / np.sqrt(shape[-1])
    # Larger q and k keep the softmax away from uniform where no q/k norm sets their size.
    return 1.5 * values if name.endswith(("q_proj.weight", "k_proj.weight")) else values


def make_weights(config, seed):
    """Returns {tensor name: float32 array}; one RandomState(seed) stream, in sorted name order."""
    rng = np.random.RandomState(seed)
    shapes = tensor_shapes(config)
    weights = {}
    for name in sorted(shapes):
        values = _draw(name, shapes[name], rng)
        if name.endswith(TINY_WITHOUT_NORM) and not complete_config(config)["la_qk_norm"]:
            values *= 0.01
        weights[name] = values.astype(np.float32)
    return weights


def make_tokens(config, seed, batch, length):
    """Returns int64 token ids [B, T]."""
    return np.random.RandomState(seed).randint(0, config["vocab_size"], (batch, length))


def make_operator_inputs(case):
    """Returns float32 q, k, v, g, beta, state for gated_delta_rule, from one RandomState stream.

    Shapes:
        q, k: [B, T, Hl, Dk], L2-normalised over Dk, q also times 1/sqrt(Dk)
        v: [B, T, Hl, Dv]
        g: [B, T, Hl], log decay (<= 0);  beta: [B, T, Hl], after the sigmoid
        state: [B, Hl, Dv, Dk]
    """
    B, T, H, Dk, Dv = (case[x] for x in ("B", "T", "Hl", "Dk", "Dv"))
    rng = np.random.RandomState(case["seed"])
    q, k = rng.standard_normal((2, B, T, H, Dk))
    q /= np.linalg.norm(q, axis=-1, keepdims=True) * np.sqrt(Dk)
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    v = rng.standard_normal((B, T, H, Dv))
    g = -np.exp(rng.uniform(np.log(1e-3), np.log(2.0), (B, T, H)))
    beta = rng.uniform(0.0, 2.0 if case["neg_eigval"] else 1.0, (B, T, H))
    state = rng.standard_normal((B, H, Dv, Dk))
    inputs = {"q": q, "k": k, "v": v, "g": g, "beta": beta, "state": state}
    return {name: x.astype(np.float32) for name, x in inputs.items()}
