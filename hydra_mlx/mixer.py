"""The token mixer of one layer: full-attention and linear-attention heads side by side.

Two forms of the same layer share one forward. `SpecMixer` has the tensors of spec section 2, one
module each; it is what checkpoints hold and what training changes. `FusedMixer` is the inference
form: all quantisable projections in one matrix, a and b in another that stays in full precision,
gamma, norm weights and head order folded into the output projection.
"""

import math
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.rope_utils import initialize_rope

from . import ops
from .cache import CONV, STATE, append_rows
from .config import HydraArgs, layer_heads
from .fused import fused_bias, fused_rows
from .layer_kernels import LayerKernels
from .step import Projected, Step

# Queries whose attention scores exist at a time in training; memory is this times T a head.
TRAIN_BLOCK = 1024


class Mixer(nn.Module):
    """Both kinds of head of one layer, from the normed input [B, T, E] to [B, T, E]."""

    def __init__(self, args: HydraArgs, layer: int):
        super().__init__()
        self.args = args
        self.heads = layer_heads(args, layer)
        self.rope = initialize_rope(
            args.head_dim,
            args.rope_theta,
            False,
            args.rope_scaling,
            args.max_position_embeddings,
        )
        self.kernels = LayerKernels()

    def __call__(self, x: mx.array, step: Step, kv: Any = None, arrays: Any = None) -> mx.array:
        p = self.project(x)
        if step.kept is not None and self.heads.la:
            step.kept.append((self, arrays, p))
        y_fa = self.full_attention(p, step, kv) if self.heads.fa else None
        y_la = self.linear_attention(p, step, arrays) if self.heads.la else None
        return self.output(y_fa, y_la)

    def advance(self, p: Projected, n: int, step: Step, arrays: Any):
        """Move conv tail and state by the first n tokens of a pass.

        Args:
            p: What step.kept got. step: Of that pass. arrays: The entry, as before the pass.
        """
        self.linear_attention(p.first(n), step, arrays)

    def full_attention(self, p: Projected, step: Step, kv: Any) -> mx.array:
        """FA heads up to and with the fusion norm; [B, T, Hf, D] in stored head order."""
        args = self.args
        q, k = p.q_fa, p.k_fa
        if args.fa_qk_norm:
            q = mx.fast.rms_norm(q, self.weight("fa_q_norm"), args.rms_norm_eps)
            k = mx.fast.rms_norm(k, self.weight("fa_k_norm"), args.rms_norm_eps)
        q, k, v = (x.swapaxes(1, 2) for x in (q, k, p.v_fa))
        if args.fa_rope:
            q, k = self.rope(q, offset=step.offset), self.rope(k, offset=step.offset)
        if kv is not None:
            k, v = append_rows(kv, k, v)
        o = None
        if step.backend is not None and kv is not None:
            o, fused = self.kernels.attention(self, q.swapaxes(1, 2), p, step, kv)
            if fused:
                return o
        if o is None:
            o = self.softmax(q, k, v, step, kv)
        return ops.fa_fusion(
            o, p.gate_fa, args.fa_gate_position, args.fusion_norm, self.weight("fa_norm")
        )

    def softmax(self, q: mx.array, k: Any, v: Any, step: Step, kv: Any) -> mx.array:
        """Attention of q [B, Hf, T, D] over k and v, [B, T, Hf, D], by operations."""
        args = self.args
        if args.logit_scale_a is not None:
            s = ops.log_length_scale(step.offset, q.shape[2], args.logit_scale_a)
            s = s[:, None] if s.ndim == 2 else s
            q = (q.astype(mx.float32) * s[..., None]).astype(q.dtype)
        scale, block = 1 / math.sqrt(args.head_dim), TRAIN_BLOCK if self.training else None
        o = ops.ragged_attention(q, k, v, self.heads.runs, scale, step.fa_mask, kv, block)
        return o.swapaxes(1, 2)

    def linear_attention(self, p: Projected, step: Step, arrays: Any) -> mx.array:
        """LA heads up to and with norm and output gate; [B, T, Hl, D] in stored head order."""
        args, D, Hl = self.args, self.args.head_dim, len(self.heads.la)
        x = p.qkv_la
        B, T, _ = x.shape
        lengths = None if arrays is None else arrays.lengths
        if args.la_conv_kernel:
            tail = None if arrays is None else arrays[CONV]
            x, tail = ops.short_conv(x, self.conv(), tail, step.la_mask, lengths)
        else:
            tail = mx.zeros((B, 0, x.shape[-1]), x.dtype)
        q, k, v = (y.reshape(B, T, Hl, D) for y in mx.split(x, 3, axis=-1))
        if args.la_qk_norm:
            q = mx.fast.rms_norm(q, self.weight("la_q_norm"), args.rms_norm_eps)
            k = mx.fast.rms_norm(k, self.weight("la_k_norm"), args.rms_norm_eps)
        if args.la_rope:
            q, k = (self.rope(y.swapaxes(1, 2), offset=step.offset).swapaxes(1, 2) for y in (q, k))
        q, k = ops.l2_normalise(q, D**-0.5), ops.l2_normalise(k)
        beta = mx.sigmoid(p.b.astype(mx.float32)) * (2.0 if args.la_allow_neg_eigval else 1.0)
        dt = nn.softplus(p.a.astype(mx.float32) + self.weight("dt_bias").astype(mx.float32))
        g = -mx.exp(self.weight("A_log").astype(mx.float32)) * dt
        state = None if arrays is None else arrays[STATE]
        done = None
        if step.backend is not None:
            done = self.kernels.gated_delta(q, k, v, g, beta, state, step.la_mask, step.backend)
        o, state = done or ops.gated_delta(q, k, v, g, beta, state, step.la_mask)
        if arrays is not None:
            arrays[CONV], arrays[STATE] = tail, state
            arrays.advance(T)
        return ops.la_fusion(
            o, p.gate_la, args.la_output_gate, args.fusion_norm, self.weight("la_norm")
        )


class Scope(nn.Module):
    """A named group of parameters, such as self_attn.fa; holds modules and does nothing."""


class Weight(nn.Module):
    """One tensor called `weight`, for names of the layout that belong to no MLX layer."""

    def __init__(self, value: mx.array):
        super().__init__()
        self.weight = value


class SpecMixer(Mixer):
    """The layer with the tensors of spec section 2."""

    def __init__(self, args: HydraArgs, layer: int):
        super().__init__(args, layer)
        E, D, H = args.hidden_size, args.head_dim, args.num_attention_heads
        Hf, Hl, Hk = len(self.heads.fa), len(self.heads.la), len(self.heads.kv)
        bias = args.attention_bias
        weighted = args.fusion_norm == "rms"
        if Hf:
            fa = self.fa = Scope()
            fa.q_proj = nn.Linear(E, Hf * D, bias=bias)
            fa.k_proj = nn.Linear(E, Hk * D, bias=bias)
            fa.v_proj = nn.Linear(E, Hk * D, bias=bias)
            if args.fa_qk_norm:
                fa.q_norm, fa.k_norm = Weight(mx.ones(D)), Weight(mx.ones(D))
            if args.fa_gate is not None:
                fa.gate_proj = nn.Linear(E, Hf * (D if args.fa_gate == "elementwise" else 1))
            if weighted:
                self.fa_norm = Weight(mx.ones(D))
        if Hl:
            la = self.la = Scope()
            for name in "qkv":
                la[f"{name}_proj"] = nn.Linear(E, Hl * D, bias=bias)
                if args.la_conv_kernel:
                    tap = mx.zeros((Hl * D, 1, args.la_conv_kernel))
                    tap[..., -1] = 1.0
                    la[f"{name}_conv1d"] = Weight(tap)
            if args.la_qk_norm:
                la.q_norm, la.k_norm = Weight(mx.ones(D)), Weight(mx.ones(D))
            la.a_proj = nn.Linear(E, Hl, bias=False)
            la.b_proj = nn.Linear(E, Hl, bias=False)
            la.A_log, la.dt_bias = mx.zeros(Hl), mx.zeros(Hl)
            if args.la_output_gate is not None:
                la.gate_proj = nn.Linear(E, Hl * D, bias=False)
            if weighted:
                self.la_norm = Weight(mx.ones(D))
        if args.fusion_scale:
            self.head_scale = mx.ones(H)
        self.o_proj = nn.Linear(H * D, E, bias=bias)
        # Where original head h stands among [FA rows, LA rows].
        stored = [*self.heads.fa, *self.heads.la]
        self._place = mx.array([stored.index(h) for h in range(H)])

    def weight(self, name: str) -> mx.array | None:
        """A small tensor by its short name; None where the config has none."""
        if name in ("fa_norm", "la_norm"):
            return self[name].weight if name in self else None
        scope, rest = (
            (self.la, name) if name in ("A_log", "dt_bias") else (self[name[:2]], name[3:])
        )
        return scope[rest] if isinstance(scope[rest], mx.array) else scope[rest].weight

    def conv(self) -> mx.array:
        """Filters of q, k and v, [3*Hl*D, K]."""
        return mx.concatenate([self.la[f"{n}_conv1d"].weight[:, 0] for n in "qkv"])

    def project(self, x: mx.array) -> Projected:
        """All input projections of the layer."""
        B, T, _ = x.shape
        D, p = self.args.head_dim, Projected()
        if self.heads.fa:
            fa = self.fa
            p.q_fa = fa.q_proj(x).reshape(B, T, -1, D)
            p.k_fa = fa.k_proj(x).reshape(B, T, -1, D)
            p.v_fa = fa.v_proj(x).reshape(B, T, -1, D)
            if "gate_proj" in fa:
                p.gate_fa = fa.gate_proj(x).reshape(B, T, len(self.heads.fa), -1)
        if self.heads.la:
            la = self.la
            p.qkv_la = mx.concatenate([la[f"{n}_proj"](x) for n in "qkv"], axis=-1)
            p.a, p.b = la.a_proj(x), la.b_proj(x)
            if "gate_proj" in la:
                p.gate_la = la.gate_proj(x).reshape(B, T, -1, D)
        return p

    def output(self, y_fa: mx.array | None, y_la: mx.array | None) -> mx.array:
        """Heads back to their original order, gamma, output projection."""
        y = mx.concatenate([y for y in (y_fa, y_la) if y is not None], axis=2)
        if y_fa is not None and y_la is not None:
            y = mx.take(y, self._place, axis=2)
        if "head_scale" in self:
            y = y * self.head_scale[:, None].astype(y.dtype)
        return self.o_proj(y.flatten(2))


class FusedMixer(Mixer):
    """The inference form of the layer (spec section 1, last paragraph)."""

    def __init__(self, args: HydraArgs, layer: int):
        super().__init__(args, layer)
        E, D, H = args.hidden_size, args.head_dim, args.num_attention_heads
        Hl = len(self.heads.la)
        self.rows = fused_rows(args, layer)
        self.in_proj = nn.Linear(E, self.rows.total, bias=fused_bias(args, layer))
        if Hl:
            self.ab_proj = nn.Linear(E, 2 * Hl, bias=False)
            self.A_log, self.dt_bias = mx.zeros(Hl), mx.zeros(Hl)
            if args.la_conv_kernel:
                self.conv_weight = mx.zeros((3 * Hl * D, args.la_conv_kernel))
            if args.la_qk_norm:
                self.la_q_norm, self.la_k_norm = mx.ones(D), mx.ones(D)
        if self.heads.fa and args.fa_qk_norm:
            self.fa_q_norm, self.fa_k_norm = mx.ones(D), mx.ones(D)
        self.o_proj = nn.Linear(H * D, E, bias=args.attention_bias)

    def weight(self, name: str) -> mx.array | None:
        """A small tensor by its short name; norm weights are folded away and give None."""
        return self[name] if name in self else None

    def conv(self) -> mx.array:
        """Filters of q, k and v, [3*Hl*D, K]."""
        return self.conv_weight

    def __call__(self, x: mx.array, step: Step, kv: Any = None, arrays: Any = None) -> mx.array:
        rows, ab = self.in_proj(x), self.ab_proj(x) if self.heads.la else None
        if step.kept is not None and self.heads.la:
            step.kept.append((self, arrays, (rows, ab)))
        y = None
        if step.backend is not None and self.heads.fa and self.heads.la:
            y = self.kernels.both(self, rows, ab, step, kv, arrays)
        if y is None:
            y = self.by_kind(rows, ab, step, kv, arrays)
        return self.o_proj(y)

    def advance(self, p: tuple, n: int, step: Step, arrays: Any):
        """As Mixer.advance; p is (rows [B, T, W], ab [B, T, 2*Hl])."""
        rows, ab = (mx.contiguous(x[:, :n]) for x in p)
        if step.backend is None or self.kernels.linear_step(self, rows, ab, step, arrays) is None:
            self.linear_attention(self.split(rows, ab), step, arrays)

    def by_kind(
        self, rows: mx.array, ab: mx.array | None, step: Step, kv: Any, arrays: Any
    ) -> mx.array:
        """All heads of a step, one kind after the other: input of o_proj, [B, T, H*D].

        Args:
            rows: [B, T, W], output of in_proj. ab: [B, T, 2*Hl], of ab_proj.
        """
        p, y = self.split(rows, ab), []
        if self.heads.fa:
            y.append(self.full_attention(p, step, kv))
        if self.heads.la:
            y_la = None
            if step.backend is not None:
                y_la = self.kernels.linear_step(self, rows, ab, step, arrays)
            y.append(self.linear_attention(p, step, arrays) if y_la is None else y_la)
        y = [i.flatten(2) for i in y]
        return y[0] if len(y) == 1 else mx.concatenate(y, axis=-1)

    def split(self, rows: mx.array, ab: mx.array | None) -> Projected:
        """The outputs of the two projections by meaning."""
        B, T, _ = rows.shape
        D, Hf = self.args.head_dim, len(self.heads.fa)
        la_qkv, la_gate, q, k, v, gate = mx.split(rows, self.rows.ends, axis=-1)
        p = Projected()
        if Hf:
            p.q_fa, p.k_fa, p.v_fa = (y.reshape(B, T, -1, D) for y in (q, k, v))
            if self.rows.fa_gate:
                p.gate_fa = gate.reshape(B, T, Hf, -1)
        if self.heads.la:
            p.qkv_la = la_qkv
            p.a, p.b = mx.split(ab, 2, axis=-1)
            if self.rows.la_gate:
                p.gate_la = la_gate.reshape(B, T, -1, D)
        return p
