"""The halves of a decoder layer as pure functions of tensors.

One compiled form then serves all layers of equal shape; head maps enter as index tensors. Weights
stay float32 and are rounded to `dtype` where used; the residual stream is float32.

Letters: B batch, T tokens, E hidden size, H heads, Hf and Hl full-attention (FA) and
linear-attention (LA) heads of a layer, Hk kept key/value heads, D head dim.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from . import delta

FUSION_EPS = 1e-6
L2_EPS = 1e-6
# Rows of the one input projection of a student layer, in order.
PROJECTIONS = [f"fa.{n}_proj.weight" for n in ("q", "k", "v", "gate")] + [
    f"la.{n}_proj.weight" for n in ("q", "k", "v", "gate", "a", "b")
]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) over the last axis, times weight; in float32."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.float()


def rope_tables(T: int, D: int, theta: float, device) -> tuple[Tensor, Tensor]:
    """cos and sin [T, D / 2] in float32."""
    frequency = theta ** (-torch.arange(0, D, 2, device=device, dtype=torch.float64) / D)
    angle = torch.arange(T, device=device, dtype=torch.float64)[:, None] * frequency
    return angle.cos().float(), angle.sin().float()


def log_length_scale(T: int, a: float, device) -> Tensor:
    """ln(t + a) / ln(a), [T]"""
    return torch.log(torch.arange(T, device=device, dtype=torch.float32) + a) / math.log(a)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, half-split. x: [B, T, heads, D]"""
    a, b = x.chunk(2, -1)
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def mlp_block(x: Tensor, norm: Tensor, gate: Tensor, up: Tensor, down: Tensor, eps: float, dtype):
    """x + MLP(norm(x)), SwiGLU. x: [B, T, E]"""
    h = rms_norm(x, norm, eps).to(dtype)
    y = F.linear(h, torch.cat([gate.to(dtype), up.to(dtype)]))
    gate_y, up_y = y.chunk(2, -1)
    y = (F.silu(gate_y.float()) * up_y.float()).to(dtype)
    return x + F.linear(y, down.to(dtype)).to(x.dtype)


def teacher_heads(x: Tensor, w: tuple, cos: Tensor, sin: Tensor, D: int, eps: float) -> Tensor:
    """Head outputs [B, T, H, D] of the base attention; w: norm, q, k, v weights."""
    norm, q, k, v = w
    B, T, _ = x.shape
    h = rms_norm(x, norm, eps).to(q.dtype)
    y = F.linear(h, torch.cat([q, k, v])).view(B, T, -1, D)
    Hq, Hk = q.shape[0] // D, k.shape[0] // D
    q, k, v = y.split([Hq, Hk, Hk], 2)
    q, k = (rotate(t.float(), cos, sin).to(v.dtype) for t in (q, k))
    k, v = (t.repeat_interleave(Hq // Hk, 2) for t in (k, v))
    return _softmax_heads(q, k, v)


def teacher_attention(x, w, o_proj, cos, sin, D: int, eps: float) -> Tensor:
    """Output of the base attention after o_proj, [B, T, E]."""
    return F.linear(teacher_heads(x, w, cos, sin, D, eps).flatten(2), o_proj)


def _softmax_heads(q, k, v):
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def _fusion_norm(o: Tensor, w: dict, name: str) -> Tensor:
    """Head outputs [B, T, heads, D] normalised, in float32; as they are if w has no such norm."""
    return rms_norm(o, w[name], FUSION_EPS) if name in w else o.float()


def _conv_silu(x: Tensor, weight: Tensor) -> Tensor:
    """Causal depthwise convolution, then SiLU. x: [B, T, channels], weight [channels, 1, K]."""
    T, K = x.shape[1], weight.shape[-1]
    padded = F.pad(x, (0, 0, K - 1, 0)).to(weight.dtype)
    return F.silu(sum(padded[:, j : j + T] * weight[:, 0, j] for j in range(K)))


def student_heads(h, w: dict, blocks, cos, sin, scale, D: int) -> Tensor:
    """Head outputs [B, T, H, D] of one layer, FA heads first, from the normed input h [B, T, E].

    w, blocks and scale as in student_attention. Gamma is not in it, gates and fusion norm are.
    """
    B, T, _ = h.shape
    dtype, names = h.dtype, [n for n in PROJECTIONS if n in w]
    y = F.linear(h, torch.cat([w[n].to(dtype) for n in names]))
    p = dict(zip(names, y.split([w[n].shape[0] for n in names], -1), strict=True))
    kinds = []
    if "fa.q_proj.weight" in w:
        q, k, v = (p[f"fa.{n}_proj.weight"].reshape(B, T, -1, D) for n in "qkv")
        if scale is not None:
            q = (q.float() * scale[:, None, None]).to(dtype)
        o = _softmax_heads(q, k.index_select(2, blocks), v.index_select(2, blocks))
        gate = p["fa.gate_proj.weight"].float() + w["fa.gate_proj.bias"]
        o = o.to(gate.dtype) * torch.sigmoid(gate).view(B, T, -1, D)
        kinds.append(_fusion_norm(o, w, "fa_norm.weight").to(dtype))
    if "la.q_proj.weight" in w:
        q, k, v = (
            _conv_silu(p[f"la.{n}_proj.weight"], w[f"la.{n}_conv1d.weight"]).view(B, T, -1, D)
            for n in "qkv"
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        q, k = (t * torch.rsqrt(t.square().sum(-1, keepdim=True) + L2_EPS) for t in (q, k))
        beta = torch.sigmoid(p["la.b_proj.weight"].float())
        dt = F.softplus(p["la.a_proj.weight"].float() + w["la.dt_bias"])
        g = -w["la.A_log"].exp() * dt
        o = delta.delta_rule((q * D**-0.5).to(dtype), k.to(dtype), v.to(dtype), g, beta)
        o = _fusion_norm(o, w, "la_norm.weight")
        gate = F.silu(p["la.gate_proj.weight"].float()).view(B, T, -1, D)
        kinds.append((o * gate).to(dtype))
    return torch.cat(kinds, 2) if len(kinds) > 1 else kinds[0]


def student_attention(h, w: dict, order, blocks, cos, sin, scale, D: int) -> Tensor:
    """Both kinds of head of one layer, from the normed input h [B, T, E] to [B, T, E].

    w holds the tensors below self_attn by name; order [H] says which original head each of
    [FA, LA] is; blocks [Hf] which kept key/value head an FA head reads; scale [T] or None.
    """
    heads = student_heads(h, w, blocks, cos, sin, scale, D)
    # Gamma and the order of heads go into the output projection: smaller than the activations.
    o_proj = w["o_proj.weight"].view(h.shape[-1], -1, D) * w["head_scale"][:, None]
    return F.linear(heads.flatten(2), o_proj[:, order].flatten(1).to(h.dtype))


def student_block(x, norm, w, order, blocks, cos, sin, scale, D: int, eps: float, dtype):
    """Attention of the normed x. x: [B, T, E]"""
    h = rms_norm(x, norm, eps).to(dtype)
    return student_attention(h, w, order, blocks, cos, sin, scale, D)


def compile_block(function, compiled: bool):
    """torch.compile, one form per shape; or the function as it is."""
    return torch.compile(function, dynamic=False) if compiled else function
