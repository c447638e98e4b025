"""The LA heads of a layer over at most 8 tokens, in one dispatch: metal/la_decode.metal.

Covers what Mixer.linear_attention does, from the output of the fused projection to the input of the
output projection. One threadgroup does one head of one sequence: the output norm needs a whole
head, and slices of one would need a second dispatch to meet.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .cost import Cost
from .loader import Kernel, Launch, absent, execute, few

MAX_TOKENS = 8
HEAD_DIMS = (64, 128)
DTYPES = (mx.float32, mx.float16, mx.bfloat16)
# SIMD-groups of a threadgroup by head dim. 16 leave a lane 32 floats of state at D = 128, about 80
# registers in all: under what both Metal (104 at 512 threads) and CUDA (128) give such a
# threadgroup. 32 would need a bound of 64 registers; 8 halve the warps that hide latency.
SIMDGROUPS = {64: 16, 128: 16}

NORMS = {None: 0, "rms_no_weight": 1, "rms": 2}
GATES = {None: 0, "silu": 1, "sigmoid": 2}

KERNEL = Kernel(
    "la_decode",
    (
        "x", "ab", "tail", "state", "A_log", "dt_bias", "conv_weight", "q_norm", "k_norm",
        "out_norm", "inv_freq", "offset", "floats", "T", "Hl", "R", "qkv_row", "gate_row",
    ),
    ("y", "state_out", "tail_out"),
    scalars=("T", "Hl", "R", "qkv_row", "gate_row"),
    headers=("la_decode.h",),
)  # fmt: skip


def rope_frequencies(rope: Any, D: int) -> tuple:
    """A rotary embedding as numbers: angle = position * inv_freq, input times factor.

    Args:
        rope: What mlx_lm's initialize_rope returns. D: Head dim.

    Returns:
        inv_freq [D/2] float32 numpy, factor, and "" or why it cannot be said so (then None first).
    """
    from mlx_lm.models import rope_utils  # `hydra-mlx info` asks eligible() without mlx_lm

    kind = type(rope).__name__
    factor = 1.0
    if getattr(rope, "traditional", False):
        return None, factor, "interleaved rotary embedding"
    if isinstance(rope, nn.RoPE):
        exponents = -np.arange(D // 2) / (D // 2)
        dims, inv_freq = rope.dims, float(rope.base) ** exponents * rope.scale
    elif isinstance(rope, rope_utils.SuScaledRoPE):
        dims, factor, inv_freq = rope.dim, rope._scale, 1.0 / np.array(rope._freqs)
    elif isinstance(rope, rope_utils.YarnRoPE):
        dims, factor, inv_freq = rope.dims, rope.mscale, 1.0 / np.array(rope._freqs)
    elif isinstance(rope, (rope_utils.Llama3RoPE, rope_utils.ProportionalRoPE)):
        dims, inv_freq = rope.dims, 1.0 / np.array(rope._freqs)
    else:
        return None, factor, f"{kind} has no fixed frequencies"
    if dims != D or inv_freq.shape != (D // 2,):
        return None, factor, f"{kind} turns {dims} of {D} dimensions"
    return inv_freq.astype(np.float32), float(factor), ""


@dataclass(frozen=True)
class LaLayer:
    """What la_decode needs of one layer, gathered once.

    Attributes:
        heads: Hl. D: Head dim. R: Columns of the fused projection's output. qkv_row, gate_row:
            Where in them q|k|v and the output gate begin (gate_row 0 without a gate).
        A_log, dt_bias: [Hl]. conv_weight: [3*Hl*D, 4]. q_norm, k_norm, out_norm: [D].
        inv_freq: [D/2] float32. floats: [eps of the q/k norm, factor of RoPE's input].
            Absent ones are None.
        norm, gate: fusion_norm and la_output_gate of the config. neg: la_allow_neg_eigval.
        why_not: "" or why no kernel can do this layer.
    """

    heads: int
    D: int
    R: int
    qkv_row: int
    gate_row: int
    A_log: mx.array
    dt_bias: mx.array
    conv_weight: mx.array | None
    q_norm: mx.array | None
    k_norm: mx.array | None
    out_norm: mx.array | None
    inv_freq: mx.array | None
    floats: mx.array
    norm: str | None
    gate: str | None
    neg: bool
    why_not: str = ""

    @classmethod
    def of(cls, mixer: Any) -> "LaLayer":
        """Gather from a FusedMixer that has LA heads."""
        args, rows = mixer.args, mixer.rows
        inv_freq, factor, why_not = None, 1.0, ""
        if args.la_rope:
            inv_freq, factor, why_not = rope_frequencies(mixer.rope, args.head_dim)
        out_norm = mixer.weight("la_norm")
        norm = args.fusion_norm
        if norm == "rms" and out_norm is None:  # folded into the output projection
            norm = "rms_no_weight"
        return cls(
            heads=len(mixer.heads.la),
            D=args.head_dim,
            R=rows.total,
            qkv_row=0,
            gate_row=rows.la_qkv if rows.la_gate else 0,
            A_log=mixer.weight("A_log"),
            dt_bias=mixer.weight("dt_bias"),
            conv_weight=mixer.conv() if args.la_conv_kernel else None,
            q_norm=mixer.weight("la_q_norm") if args.la_qk_norm else None,
            k_norm=mixer.weight("la_k_norm") if args.la_qk_norm else None,
            out_norm=out_norm,
            inv_freq=None if inv_freq is None else mx.array(inv_freq),
            floats=few([args.rms_norm_eps, factor], mx.float32),
            norm=norm,
            gate=args.la_output_gate,
            neg=args.la_allow_neg_eigval,
            why_not=why_not,
        )

    @property
    def taps(self) -> int:
        """Width of the convolution, 0 without."""
        return 0 if self.conv_weight is None else self.conv_weight.shape[1]


def eligible(
    layer: LaLayer,
    x: mx.array,
    ab: mx.array,
    mask: mx.array | None = None,
    lengths: mx.array | None = None,
) -> tuple:
    """Whether the kernel can do this step: (ok, reason).

    Args:
        layer: The layer. x: [B, T, R], output of the fused projection. ab: [B, T, 2*Hl].
        mask: Step.la_mask. lengths: ArraysCache.lengths.
    """
    B, T, R = x.shape
    if layer.why_not:
        return False, layer.why_not
    if T > MAX_TOKENS:
        return False, f"{T} tokens, at most {MAX_TOKENS}"
    if layer.D not in HEAD_DIMS:
        return False, f"head dim {layer.D}, expected 64 or 128"
    if not 1 <= layer.heads <= 32:
        return False, f"{layer.heads} LA heads, expected 1 to 32"
    if mask is not None:
        return False, "masked tokens"
    if lengths is not None:
        return False, "rows of different lengths"
    if x.dtype not in DTYPES or ab.dtype not in DTYPES:
        return False, f"activations are {x.dtype} and {ab.dtype}"
    if layer.taps not in (0, 4):
        return False, f"convolution of width {layer.taps}, expected 4 or none"
    if max(B * T * R, B * layer.heads * layer.D**2) >= 2**31:
        return False, "more than 2^31 elements"
    return True, f"T <= {MAX_TOKENS}"


@lru_cache(maxsize=4)
def _offset_array(offset: int) -> mx.array:
    """[1] int32; layers of one step share it."""
    return few([offset])


def offset_array(offset: Any) -> mx.array:
    """Positions of token 0 as the kernels take them: int32 [1] or [B]."""
    if isinstance(offset, mx.array):
        return offset.astype(mx.int32).reshape(-1)
    return _offset_array(int(offset))


def la_template(layer: LaLayer, x: mx.array, ab: mx.array, offset: mx.array) -> tuple:
    """The template entries that la_decode and hydra_decode share."""

    def dtype(a):
        return mx.float32 if a is None else a.dtype

    return (
        ("X", x.dtype),
        ("AB", ab.dtype),
        ("AL", layer.A_log.dtype),
        ("DT", layer.dt_bias.dtype),
        ("CW", dtype(layer.conv_weight)),
        ("QN", dtype(layer.q_norm)),
        ("KN", dtype(layer.k_norm)),
        ("ON", dtype(layer.out_norm)),
        ("D", layer.D),
        ("TAPS", layer.taps),
        ("TM", 1 if x.shape[1] == 1 else MAX_TOKENS),
        ("QK_NORM", int(layer.q_norm is not None)),
        ("ROPE", int(layer.inv_freq is not None)),
        ("NORM", NORMS[layer.norm]),
        ("GATE", GATES[layer.gate]),
        ("NEG", int(layer.neg)),
        ("ROWS", int(offset.size > 1)),
    )


def la_weights(layer: LaLayer, inv_freq: mx.array | None) -> tuple:
    """A_log to inv_freq of the input list, float32 zeros for absent ones."""
    small = (layer.conv_weight, layer.q_norm, layer.k_norm, layer.out_norm, inv_freq)
    return (layer.A_log, layer.dt_bias, *(absent(mx.float32) if a is None else a for a in small))


def la_outputs(layer: LaLayer, B: int, T: int, dtype: mx.Dtype) -> tuple:
    """Shapes and dtypes of y, state_out and tail_out."""
    Hl, D, taps = layer.heads, layer.D, layer.taps
    tail = (B, taps - 1, 3 * Hl * D) if taps else (1,)
    return ((B, T, Hl, D), (B, Hl, D, D), tail), (dtype, mx.float32, dtype)


def launch(
    layer: LaLayer,
    x: mx.array,
    ab: mx.array,
    offset: Any,
    tail: mx.array | None,
    state: mx.array,
    simdgroups: int | None = None,
) -> Launch:
    """The launch for one step.

    Args:
        layer: The layer. x: [B, T, R]. ab: [B, T, 2*Hl]. offset: Position of the first token, int
            or [B]. tail: [B, K-1, 3*Hl*D] in the dtype of x, any without convolution.
        state: [B, Hl, D, D] float32.
        simdgroups: SIMD-groups of a threadgroup, 1 to 32; None takes the table's.
    """
    B, T, R = x.shape
    offset = offset_array(offset)
    groups = simdgroups or SIMDGROUPS[layer.D]
    shapes, dtypes = la_outputs(layer, B, T, x.dtype)
    return Launch(
        kernel=KERNEL,
        inputs=(
            x, ab, tail if layer.taps else x, state, *la_weights(layer, layer.inv_freq),
            offset, layer.floats, T, layer.heads, R, layer.qkv_row, layer.gate_row,
        ),
        template=(*la_template(layer, x, ab, offset), ("SG", groups)),
        grid=(32 * groups * B * layer.heads, 1, 1),
        threadgroup=(32 * groups, 1, 1),
        output_shapes=shapes,
        output_dtypes=dtypes,
    )  # fmt: skip


def fresh(layer: LaLayer, B: int, dtype: mx.Dtype, tail: Any, state: Any) -> tuple:
    """Tail and state of a cache, zeros where it is still empty."""
    Hl, D = layer.heads, layer.D
    if layer.taps and tail is None:
        tail = mx.zeros((B, layer.taps - 1, 3 * Hl * D), dtype)
    if state is None:
        state = mx.zeros((B, Hl, D, D), mx.float32)
    if tail is not None and tail.dtype != dtype:
        tail = tail.astype(dtype)
    return tail, state if state.dtype == mx.float32 else state.astype(mx.float32)


def run(
    layer: LaLayer,
    x: mx.array,
    ab: mx.array,
    offset: Any,
    tail: mx.array | None,
    state: mx.array | None,
    route: str = "metal",
    executor: Callable | None = None,
    simdgroups: int | None = None,
) -> tuple:
    """One step of all LA heads of a layer.

    Args:
        layer to state, simdgroups: As in launch; tail and state None mean zeros.
        route: "metal" or "cuda". executor: Runs a Launch instead of the GPU.

    Returns:
        y [B, T, Hl, D], state [B, Hl, D, D] float32, tail [B, K-1, 3*Hl*D] ([B, 0, ...] without
        convolution).
    """
    B = x.shape[0]
    tail, state = fresh(layer, B, x.dtype, tail, state)
    step = launch(layer, x, ab, offset, tail, state, simdgroups)
    y, state, tail = (executor or (lambda a: execute(a, route)))(step)
    return y, state, tail if layer.taps else empty_tail(layer, B, x.dtype)


def empty_tail(layer: LaLayer, B: int, dtype: mx.Dtype) -> mx.array:
    """The tail of a layer without convolution, as the operations store it."""
    return mx.zeros((B, 0, 3 * layer.heads * layer.D), dtype)


def cost(layer: LaLayer, B: int, T: int, x: mx.Dtype, ab: mx.Dtype = mx.float32) -> Cost:
    """Work of one launch, as logical traffic of all lanes.

    The terms of a head: state in and out, 8 D^2; inputs and tail that the convolution reads,
    3 D T K elements (each input K times, from a cache but the first time), and its filters; shift
    of the tail; small vectors. Flops of the state step: decay 1, S k 2, update 2, S q 2 per
    element and token.
    """
    D, K, item = layer.D, layer.taps, x.size
    n = B * layer.heads

    def bytes_of(a):
        return 0 if a is None else a.dtype.size

    read = 4 * D * D + 3 * D * T * (max(K, 1) * item + K * bytes_of(layer.conv_weight))
    read += 3 * D * max(K - 1, 0) * item
    read += D * T * (bytes_of(layer.q_norm) + bytes_of(layer.k_norm))
    read += D * T * (4 if layer.inv_freq is not None else 0)  # D/2 for q, as many for k
    read += D * T * (bytes_of(layer.out_norm) * (layer.norm == "rms") + item * bool(layer.gate))
    small = (layer.A_log, layer.dt_bias)
    read += T * (2 * ab.size + sum(bytes_of(a) for a in small))
    written = 4 * D * D + D * T * item + 3 * D * max(K - 1, 0) * item
    flops = T * (7 * D * D + 3 * D * (2 * K + 4 * bool(K)) + 2 * D * (4 + 4 + 6) + 10 * D)
    tm = 1 if T == 1 else MAX_TOKENS
    return Cost(n * read, n * written, n * flops, 4 * (4 * tm * D) + 4 * 2 * tm, 1)


def composed_cost(layer: LaLayer, B: int, T: int, x: mx.Dtype, ab: mx.Dtype = mx.float32) -> Cost:
    """Work of Mixer.linear_attention as MLX runs it today, each operation reading its operands and
    writing its result; views cost nothing.

    Above 4 tokens MLX takes the chunked form, whose products are counted as dense ones.
    """
    D, K, item, Hl = layer.D, layer.taps, x.size, layer.heads
    N = B * T * Hl * D  # elements of q, k, v or gate
    S = B * Hl * D * D
    h = B * T * Hl
    total = [0, 0, 0, 0]

    def op(read, written, flops=0, times=1):
        for i, v in enumerate((read, written, flops, 1)):
            total[i] += v * times

    if K:
        rows = 3 * B * Hl * D
        padded = rows * (T + K - 1) * item
        op(padded, padded, times=1)
        total[3] += 1  # a concatenation is one copy for each part
        op(3 * N * item, 3 * N * item, 3 * N, K)  # products
        op(6 * N * item, 3 * N * item, 3 * N, K - 1)  # sums
        op(rows * (K - 1) * item, rows * (K - 1) * item)
        op(3 * N * item, 3 * N * item, 9 * N)
        op(6 * N * item, 3 * N * item, 3 * N)
    each = 2 * (layer.q_norm is not None) + 2 * (layer.inv_freq is not None) + 4
    op(N * item, N * item, 4 * N, each)  # q/k norms, RoPE, L2 norm and its factor
    op(h * 4, h * 4, h, 2 if layer.neg else 1)
    op(h * 4, h * 4, h, 6 if ab == mx.float32 else 8)  # gates
    if T <= 4:
        n, s = N // T, S
        for _ in range(T):
            op(n * item, n * 4, 0, 0 if x == mx.float32 else 3)
            op(0, 0)  # exp(g)
            op(4 * s, 4 * s, s)  # decay
            op(4 * s + 4 * n, 4 * s, s)  # S k ...
            op(4 * s, 4 * n, s)  # ... summed
            op(8 * n, 4 * n, n, 2)  # error, beta
            op(8 * n, 4 * s, s)  # outer product
            op(8 * s, 4 * s, s)
            op(4 * s + 4 * n, 4 * s, s)  # S q
            op(4 * s, 4 * n, s)
        op(4 * N, 4 * N)
        total[3] += T - 1
    else:
        C = 8
        c, m = B * Hl * C * D, B * Hl * C * C
        op(N * item, 4 * c, 0, 3)
        op(h * 4, 4 * m, 0, 8)  # segments, decays, masks
        op(8 * c, 4 * m, 2 * m * D, 2)  # K K^T, Q K^T
        op(8 * m, 4 * m, m, 4)
        op(8 * m, 4 * m, 2 * m * C, 9)  # inverse of I + A by block merging
        op(4 * S + 4 * c, 4 * c, 2 * c * D, 2)  # K S^T, Q S^T
        op(8 * c, 4 * c, c, 5)
        op(4 * m + 4 * c, 4 * c, 2 * m * D, 2)
        op(8 * c, 4 * S, 2 * c * D)  # K^T P
        op(4 * S, 4 * S, S)
        op(8 * S, 4 * S, S)
    op(4 * N, item * N, 0, 0 if x == mx.float32 else 1)
    norm = layer.norm is not None
    op(N * item, N * item, 4 * N, int(norm))
    if layer.gate:
        op(N * item, N * item, 4 * N)
        op(2 * N * item, N * item, N, 2 if layer.gate == "silu" else 1)
    return Cost(total[0], total[1], total[2], 0, total[3])
