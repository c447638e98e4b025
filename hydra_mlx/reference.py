"""The HydraHead layer in float64 numpy, token by token: the oracle of every test.

Written to be read beside spec section 1, not to be fast. Nothing here imports MLX.
Axes: B batch, T tokens, E hidden, H heads, Hf FA heads, Hl LA heads, D head dim, V vocabulary.
"""

import math

import numpy as np

from .config import FUSION_EPS, L2_EPS, HydraArgs, layer_heads


def sigmoid(x):
    """Logistic function, any shape, float64."""
    return 1.0 / (1.0 + np.exp(-x))


def silu(x):
    """x * sigmoid(x), any shape."""
    return x * sigmoid(x)


def softplus(x):
    """log(1 + exp(x)), any shape, without overflow."""
    return np.logaddexp(0.0, x)


def rms_norm(x, weight, eps):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis; weight None means ones."""
    y = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)
    return y if weight is None else y * weight


def rope(x, positions, theta):
    """Rotary embedding in the half-split (Llama, Qwen) form.

    Args:
        x: [B, T, H, D]. positions: [B, T], absolute, 0-based. theta: base.
    """
    half = x.shape[-1] // 2
    inv_freq = theta ** (-np.arange(half) / half)
    angle = positions[..., None, None] * inv_freq  # [B, T, 1, D/2]
    a, b = x[..., :half], x[..., half:]
    return np.concatenate(
        [a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], axis=-1
    )


def log_length_scale(positions, a):
    """s_t = ln(t + a) / ln(a) for absolute 0-based positions t (spec section 1)."""
    return np.log(positions + a) / math.log(a)


def short_conv(x, weight, tail=None):
    """Causal depthwise convolution, one filter per channel, no bias, no activation.

    Args:
        x: [B, T, N]. weight: [N, K], the last tap is the present token. tail: [B, K-1, N], the
            inputs before x, or None for zeros.

    Returns:
        y [B, T, N] and the new tail [B, K-1, N].
    """
    B, T, N = x.shape
    K = weight.shape[1]
    padded = np.concatenate([np.zeros((B, K - 1, N)) if tail is None else tail, x], axis=1)
    y = np.zeros((B, T, N))
    for t in range(T):
        for j in range(K):
            y[:, t] += padded[:, t + j] * weight[:, j]
    return y, padded[:, T:]


def gated_delta(q, k, v, g, beta, state=None, mask=None):
    """The gated delta rule, one token after the other (spec section 1).

    S_t = exp(g_t) S_{t-1} + beta_t (v_t - exp(g_t) S_{t-1} k_t) k_t^T,  o_t = S_t q_t

    Args:
        q, k: [B, T, Hl, Dk], already normalised and scaled. v: [B, T, Hl, Dv].
        g: [B, T, Hl], log of the decay, -inf allowed. beta: [B, T, Hl].
        state: [B, Hl, Dv, Dk] or None for zeros. mask: [B, T] bool; a False token reads the
            state but does not move it.

    Returns:
        o [B, T, Hl, Dv] and the last state [B, Hl, Dv, Dk].
    """
    q, k, v, g, beta = (np.asarray(x, np.float64) for x in (q, k, v, g, beta))
    B, T, Hl, Dk = q.shape
    Dv = v.shape[-1]
    S = np.zeros((B, Hl, Dv, Dk)) if state is None else np.array(state, np.float64)
    out = np.zeros((B, T, Hl, Dv))
    for b in range(B):
        for t in range(T):
            for h in range(Hl):
                if mask is None or mask[b, t]:
                    decayed = np.exp(g[b, t, h]) * S[b, h]
                    error = v[b, t, h] - decayed @ k[b, t, h]
                    S[b, h] = decayed + beta[b, t, h] * np.outer(error, k[b, t, h])
                out[b, t, h] = S[b, h] @ q[b, t, h]
    return out, S


def causal_attention(q, k, v, kv_of_fa, offset=0):
    """Softmax attention, query by query; query i of T is at key position offset + i.

    Args:
        q: [B, T, Hf, D]. k, v: [B, S, Hk, D] with S = offset + T. kv_of_fa: key/value row of
            each FA head, any grouping.

    Returns:
        [B, T, Hf, D].
    """
    B, T, Hf, D = q.shape
    out = np.zeros((B, T, Hf, v.shape[-1]))
    for b in range(B):
        for h in range(Hf):
            keys, values = k[b, :, kv_of_fa[h]], v[b, :, kv_of_fa[h]]
            for t in range(T):
                n = offset + t + 1
                z = keys[:n] @ q[b, t, h] / math.sqrt(D)
                p = np.exp(z - z.max())
                out[b, t, h] = (p / p.sum()) @ values[:n]
    return out


def full_attention_heads(args: HydraArgs, w: dict, heads, x, positions):
    """Outputs of the FA heads before the fusion norm, and their gate.

    Returns:
        o [B, T, Hf, D] and sigmoid(gate) [B, T, Hf, D or 1], or None without a gate.
    """
    B, T, _ = x.shape
    D, Hf, Hk = args.head_dim, len(heads.fa), len(heads.kv)
    q = linear(w, "fa.q_proj", x).reshape(B, T, Hf, D)
    k = linear(w, "fa.k_proj", x).reshape(B, T, Hk, D)
    v = linear(w, "fa.v_proj", x).reshape(B, T, Hk, D)
    if args.fa_qk_norm:
        q = rms_norm(q, w["fa.q_norm.weight"], args.rms_norm_eps)
        k = rms_norm(k, w["fa.k_norm.weight"], args.rms_norm_eps)
    if args.fa_rope:
        q, k = rope(q, positions, args.rope_theta), rope(k, positions, args.rope_theta)
    if args.logit_scale_a is not None:
        q = q * log_length_scale(positions, args.logit_scale_a)[..., None, None]
    o = causal_attention(q, k, v, heads.kv_of_fa)
    gate = None
    if args.fa_gate is not None:
        gate = sigmoid(linear(w, "fa.gate_proj", x)).reshape(B, T, Hf, -1)
    return o, gate


def linear_attention_heads(args: HydraArgs, w: dict, heads, x, positions):
    """Outputs of the LA heads before the fusion norm, and their raw output gate (or None).

    Returns:
        o [B, T, Hl, D] and gate [B, T, Hl, D] before its activation, or None.
    """
    B, T, _ = x.shape
    D, Hl = args.head_dim, len(heads.la)
    qkv = []
    for name in "qkv":
        y = linear(w, f"la.{name}_proj", x)
        if args.la_conv_kernel:
            y = silu(short_conv(y, w[f"la.{name}_conv1d.weight"][:, 0])[0])
        qkv.append(y.reshape(B, T, Hl, D))
    q, k, v = qkv
    if args.la_qk_norm:
        q = rms_norm(q, w["la.q_norm.weight"], args.rms_norm_eps)
        k = rms_norm(k, w["la.k_norm.weight"], args.rms_norm_eps)
    if args.la_rope:
        q, k = rope(q, positions, args.rope_theta), rope(k, positions, args.rope_theta)
    q = q / np.sqrt((q * q).sum(-1, keepdims=True) + L2_EPS) / math.sqrt(D)
    k = k / np.sqrt((k * k).sum(-1, keepdims=True) + L2_EPS)
    beta = sigmoid(linear(w, "la.b_proj", x)) * (2.0 if args.la_allow_neg_eigval else 1.0)
    g = -np.exp(w["la.A_log"]) * softplus(linear(w, "la.a_proj", x) + w["la.dt_bias"])
    o, _ = gated_delta(q, k, v, g, beta)
    gate = None
    if args.la_output_gate is not None:
        gate = linear(w, "la.gate_proj", x).reshape(B, T, Hl, D)
    return o, gate


def linear(w: dict, name: str, x):
    """x @ weight.T + bias; the bias is optional."""
    y = x @ w[f"{name}.weight"].T
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def attention(args: HydraArgs, layer: int, w: dict, x, positions):
    """The token mixer of one layer: both kinds of head, fused (spec section 1).

    Args:
        w: Tensors of self_attn in float64, names without the prefix. x: [B, T, E], after the
            input norm. positions: [B, T].

    Returns:
        [B, T, E].
    """
    B, T, _ = x.shape
    heads = layer_heads(args, layer, "spec")
    y = np.zeros((B, T, args.num_attention_heads, args.head_dim))

    def norm(o, kind):
        if args.fusion_norm is None:
            return o
        weight = w[f"{kind}_norm.weight"] if args.fusion_norm == "rms" else None
        return rms_norm(o, weight, FUSION_EPS)

    if heads.fa:
        o, gate = full_attention_heads(args, w, heads, x, positions)
        if gate is None:
            n = norm(o, "fa")
        elif args.fa_gate_position == "pre_norm":
            n = norm(o * gate, "fa")
        else:
            n = norm(o, "fa") * gate
        y[:, :, list(heads.fa)] = n
    if heads.la:
        o, gate = linear_attention_heads(args, w, heads, x, positions)
        n = norm(o, "la")
        if gate is not None:
            n = n * (silu(gate) if args.la_output_gate == "silu" else sigmoid(gate))
        y[:, :, list(heads.la)] = n
    if args.fusion_scale:
        y = y * w["head_scale"][:, None]
    return linear(w, "o_proj", y.reshape(B, T, -1))


def forward(args: HydraArgs, weights: dict, tokens):
    """Logits of a HydraHead model (spec section 2 layout), in float64.

    Args:
        weights: Spec tensor names to arrays of any float type. tokens: [B, T] integers.

    Returns:
        [B, T, V].

    Raises:
        KeyError: A tensor of the layout is missing.
        ValueError: rope_scaling is set; the oracle knows plain rotary embedding only.
    """
    if args.rope_scaling is not None:
        raise ValueError("reference.forward knows no rope_scaling")
    w = {k: np.asarray(v, np.float64) for k, v in weights.items()}
    tokens = np.asarray(tokens)
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape).astype(np.float64)
    h = w["model.embed_tokens.weight"][tokens]
    eps = args.rms_norm_eps
    for i in range(args.num_hidden_layers):
        p = f"model.layers.{i}."
        attn = {k[len(p) + 10 :]: x for k, x in w.items() if k.startswith(p + "self_attn.")}
        x = rms_norm(h, w[p + "input_layernorm.weight"], eps)
        h = h + attention(args, i, attn, x, positions)
        x = rms_norm(h, w[p + "post_attention_layernorm.weight"], eps)
        gate, up = x @ w[p + "mlp.gate_proj.weight"].T, x @ w[p + "mlp.up_proj.weight"].T
        h = h + (silu(gate) * up) @ w[p + "mlp.down_proj.weight"].T
    h = rms_norm(h, w["model.norm.weight"], eps)
    head = "model.embed_tokens.weight" if args.tie_word_embeddings else "lm_head.weight"
    return h @ w[head].T
