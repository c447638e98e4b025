"""HydraHead in plain PyTorch, written from the definition alone: slow, obvious, no cache.

It shares no code with the MLX model, so that a misreading in one of them shows as a difference.
Tokens start at position 0. Every step runs in the dtype asked for, float64 by default.

Axis letters: B batch, T tokens, E hidden size, H query heads, Hf full-attention (FA) heads and
Hl linear-attention (LA) heads of a layer, Hk key/value heads kept, D head dim (Dk, Dv where they
differ), V vocabulary. State layout [B, Hl, Dv, Dk].
"""

import math

import torch
from torch.nn import functional as F

from .weights import complete_config, kv_blocks, split_heads, tensor_shapes

FUSION_EPS = 1e-6
L2_EPS = 1e-6


def rms_norm(x, weight, eps):
    """Returns x / rms(x) over the last axis, times weight unless it is None. x: [..., D]"""
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return x if weight is None else x * weight


def l2_norm(x):
    """Returns x / |x| over the last axis, eps inside the root. x: [..., D]"""
    return x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + L2_EPS)


def apply_rope(x, theta):
    """Rotates the pairs (i, i + D/2) of x by position * theta^(-2i/D). x: [B, T, heads, D]"""
    T, D = x.shape[1], x.shape[-1]
    frequency = theta ** (-torch.arange(0, D, 2, dtype=x.dtype) / D)
    angle = torch.arange(T, dtype=x.dtype)[:, None] * frequency  # [T, D/2]
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]  # [T, 1, D/2], same for all heads
    a, b = x[..., : D // 2], x[..., D // 2 :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def causal_conv(x, weight):
    """Depthwise causal convolution, no bias; the last tap meets the current token.

    Shapes: x [B, T, channels], weight [channels, 1, taps], result [B, T, channels].
    """
    T, taps = x.shape[1], weight.shape[-1]
    padded = F.pad(x, (0, 0, taps - 1, 0))
    return sum(padded[:, j : j + T] * weight[:, 0, j] for j in range(taps))


def gated_delta_rule(q, k, v, g, beta, state=None):
    """Gated delta rule, one token after the other.

        S_t = alpha_t S_{t-1} + beta_t (v_t - alpha_t S_{t-1} k_t) k_t^T,   alpha_t = exp(g_t)
        o_t = S_t q_t

    q and k are used as given: the caller has normalised both and scaled q.

    Shapes:
        q, k: [B, T, Hl, Dk]
        v: [B, T, Hl, Dv]
        g: [B, T, Hl], log decay
        beta: [B, T, Hl], after the sigmoid
        state: [B, Hl, Dv, Dk], zeros if None
    Returns:
        o [B, T, Hl, Dv] and the last state [B, Hl, Dv, Dk].
    """
    B, T, H, Dk = k.shape
    S = v.new_zeros(B, H, v.shape[-1], Dk) if state is None else state
    outputs = []
    for t in range(T):
        S = g[:, t, :, None, None].exp() * S
        error = v[:, t] - torch.einsum("bhvk,bhk->bhv", S, k[:, t])
        S = S + torch.einsum("bh,bhv,bhk->bhvk", beta[:, t], error, k[:, t])
        outputs.append(torch.einsum("bhvk,bhk->bhv", S, q[:, t]))
    return torch.stack(outputs, dim=1), S


def log_length_scale(config, T, dtype):
    """Returns ln(t + a) / ln(a) for t = 0 .. T-1, or ones where the config has no scale. [T]"""
    scale = config["fa_logit_scale"]
    if scale is None:
        return torch.ones(T, dtype=dtype)
    return torch.log(torch.arange(T, dtype=dtype) + scale["a"]) / math.log(scale["a"])


def full_attention(config, layer, w, x):
    """Softmax heads up to the gate, which the caller applies. w: {name below self_attn: tensor}

    Shapes: x [B, T, E], result [B, T, Hf, D].
    """
    B, T, _ = x.shape
    D = config["head_dim"]
    _, blocks = kv_blocks(config, layer)
    q, k, v = ((x @ w[f"fa.{n}_proj.weight"].T).view(B, T, -1, D) for n in "qkv")
    if config["fa_qk_norm"]:
        q = rms_norm(q, w["fa.q_norm.weight"], config["rms_norm_eps"])
        k = rms_norm(k, w["fa.k_norm.weight"], config["rms_norm_eps"])
    if config["fa_rope"]:
        q, k = apply_rope(q, config["rope_theta"]), apply_rope(k, config["rope_theta"])
    q = q * log_length_scale(config, T, x.dtype)[:, None, None]
    k, v = k[:, :, blocks], v[:, :, blocks]  # [B, T, Hf, D], each FA head beside its own
    scores = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(D)
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    return torch.einsum("bhts,bshd->bthd", scores.masked_fill(future, -math.inf).softmax(-1), v)


def full_attention_gate(config, w, x):
    """Returns sigmoid(Wg x + b), [B, T, Hf, D] elementwise or [B, T, Hf, 1] headwise; 1 if none."""
    if config["fa_gate"] is None:
        return 1.0
    gate = torch.sigmoid(x @ w["fa.gate_proj.weight"].T + w["fa.gate_proj.bias"])
    columns = config["head_dim"] if config["fa_gate"] == "elementwise" else 1
    return gate.view(*x.shape[:2], -1, columns)


def linear_attention(config, w, x):
    """Gated DeltaNet heads before the fusion norm. Shapes: x [B, T, E], result [B, T, Hl, D]."""
    B, T, _ = x.shape
    D = config["head_dim"]
    mixed = []
    for n in "qkv":
        y = x @ w[f"la.{n}_proj.weight"].T
        if config["la_conv_kernel"]:
            y = F.silu(causal_conv(y, w[f"la.{n}_conv1d.weight"]))
        mixed.append(y.view(B, T, -1, D))
    q, k, v = mixed
    if config["la_qk_norm"]:
        q = rms_norm(q, w["la.q_norm.weight"], config["rms_norm_eps"])
        k = rms_norm(k, w["la.k_norm.weight"], config["rms_norm_eps"])
    if config["la_rope"]:
        q, k = apply_rope(q, config["rope_theta"]), apply_rope(k, config["rope_theta"])
    q, k = l2_norm(q) / math.sqrt(D), l2_norm(k)
    beta = torch.sigmoid(x @ w["la.b_proj.weight"].T)  # [B, T, Hl]
    if config["la_allow_neg_eigval"]:
        beta = 2.0 * beta
    g = -w["la.A_log"].exp() * F.softplus(x @ w["la.a_proj.weight"].T + w["la.dt_bias"])
    return gated_delta_rule(q, k, v, g, beta)[0]


def linear_attention_gate(config, w, x):
    """Returns the native output gate [B, T, Hl, D], 1 if there is none."""
    if config["la_output_gate"] is None:
        return 1.0
    z = (x @ w["la.gate_proj.weight"].T).view(*x.shape[:2], -1, config["head_dim"])
    return F.silu(z) if config["la_output_gate"] == "silu" else torch.sigmoid(z)


def fusion_norm(config, o, weight):
    """Returns o normalised over D as the config says. o: [B, T, heads, D]"""
    return o if config["fusion_norm"] is None else rms_norm(o, weight, FUSION_EPS)


def attention(config, layer, w, x):
    """Both head kinds, fused. w: {name below self_attn: tensor}, x and result: [B, T, E]"""
    B, T, _ = x.shape
    fa, la = split_heads(config, layer)
    heads = x.new_zeros(B, T, config["num_attention_heads"], config["head_dim"])
    if fa:
        o, gate = full_attention(config, layer, w, x), full_attention_gate(config, w, x)
        if config["fa_gate_position"] == "pre_norm":
            heads[:, :, fa] = fusion_norm(config, o * gate, w.get("fa_norm.weight"))
        else:
            heads[:, :, fa] = fusion_norm(config, o, w.get("fa_norm.weight")) * gate
    if la:
        n = fusion_norm(config, linear_attention(config, w, x), w.get("la_norm.weight"))
        heads[:, :, la] = n * linear_attention_gate(config, w, x)
    if config["fusion_scale"]:
        heads = heads * w["head_scale"][:, None]
    return heads.flatten(2) @ w["o_proj.weight"].T


def forward(config, weights, tokens, dtype=torch.float64):
    """Runs the whole model over a batch of sequences that start at position 0.

    Args:
        config (dict): The content of config.json.
        weights (dict[str, Tensor]): Checkpoint tensors under their Hugging Face names.
        tokens (LongTensor): Token ids [B, T].
        dtype (torch.dtype): torch.float64 or torch.float32, used for every step.

    Returns:
        Tensor: Logits [B, T, V].
    """
    config = complete_config(config)
    expected = {name: tuple(shape) for name, shape in tensor_shapes(config).items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if found != expected:
        wrong = sorted(n for n in {*found, *expected} if found.get(n) != expected.get(n))
        detail = [f"{n}: {found.get(n)}, expected {expected.get(n)}" for n in wrong]
        raise ValueError("weights do not fit the config: " + "; ".join(detail))
    weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
    eps = config["rms_norm_eps"]
    x = weights["model.embed_tokens.weight"][tokens]  # [B, T, E]
    for i in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{i}."
        w = {n[len(prefix) :]: y for n, y in weights.items() if n.startswith(prefix)}
        mixer = {n[len("self_attn.") :]: y for n, y in w.items() if n.startswith("self_attn.")}
        x = x + attention(config, i, mixer, rms_norm(x, w["input_layernorm.weight"], eps))
        y = rms_norm(x, w["post_attention_layernorm.weight"], eps)
        y = F.silu(y @ w["mlp.gate_proj.weight"].T) * (y @ w["mlp.up_proj.weight"].T)
        x = x + y @ w["mlp.down_proj.weight"].T
    x = rms_norm(x, weights["model.norm.weight"], eps)
    tied = config["tie_word_embeddings"]
    return x @ weights["model.embed_tokens.weight" if tied else "lm_head.weight"].T
