"""The forms of a layer's weights and the ways between them.

base  -> spec    migrate_layer: a pretrained Transformer layer gets HydraHead heads (section 4)
spec  -> fused   fuse_layer: what inference wants (section 1, last paragraph)
fused -> spec    unfuse_layer: the same function in the layout of section 2

A layer is a dict of names below `model.layers.{i}.` to weights (mx.array or Packed).
"""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from .config import HydraArgs, layer_heads
from .fused import fused_bias, fused_rows
from .tensors import concat_rows, take_row_blocks, to_float

ATTN = "self_attn."
COMMON = ("input_layernorm.weight", "post_attention_layernorm.weight", "mlp.down_proj.weight")


def _zeros(n: int, like: mx.array) -> mx.array:
    return mx.zeros((n,), like.dtype)


def _float_dtype(layer: dict) -> mx.Dtype:
    """Type of the unquantised weights of a layer."""
    return layer["input_layernorm.weight"].dtype


def _column_scale(args: HydraArgs, layer: int, w: dict) -> mx.array | None:
    """gamma_h * norm weight for every column of the output projection, original head order,
    [H*D] float32; None when every factor is absent."""
    H, D = args.num_attention_heads, args.head_dim
    heads = layer_heads(args, layer, "spec")
    if not args.fusion_scale and args.fusion_norm != "rms":
        return None
    scale = mx.ones((H, D))
    if args.fusion_norm == "rms":
        rows = {}
        for kind, members in (("fa", heads.fa), ("la", heads.la)):
            for h in members:
                rows[h] = to_float(w[f"{ATTN}{kind}_norm.weight"])
        scale = mx.stack([rows[h] for h in range(H)])
    if args.fusion_scale:
        scale = scale * to_float(w[ATTN + "head_scale"])[:, None]
    return scale.flatten()


def fuse_layer(args: HydraArgs, layer: int, w: dict) -> dict:
    """Spec form to fused form; equal up to rounding of the folded output projection.

    Args:
        w: Every tensor of the layer in spec layout.

    Returns:
        Every tensor of the layer in fused layout.
    """
    D = args.head_dim
    spec, fused = layer_heads(args, layer, "spec"), layer_heads(args, layer, "fused")
    fa_order = [spec.fa.index(h) for h in fused.fa]
    kv_order = list(range(len(spec.kv)))
    if args.fa_kv != "mha_own":
        kv_order = [spec.kv.index(k) for k in fused.kv]
    gate_rows = D if args.fa_gate == "elementwise" else 1
    # (source name, order of its head blocks, rows of a block), in the order of FusedRows.
    blocks = []
    if spec.la:
        la_order = range(len(spec.la))
        names = ["q", "k", "v"] + (["gate"] if args.la_output_gate is not None else [])
        blocks += [(f"la.{n}_proj", la_order, D) for n in names]
    if spec.fa:
        blocks += [("fa.q_proj", fa_order, D), ("fa.k_proj", kv_order, D)]
        blocks += [("fa.v_proj", kv_order, D)]
        if args.fa_gate is not None:
            blocks += [("fa.gate_proj", fa_order, gate_rows)]
    weights = [take_row_blocks(w[f"{ATTN}{n}.weight"], order, size) for n, order, size in blocks]
    out = {name: w[name] for name in COMMON}
    out["mlp.gate_up_proj.weight"] = concat_rows(
        [w["mlp.gate_proj.weight"], w["mlp.up_proj.weight"]]
    )
    out[ATTN + "in_proj.weight"] = concat_rows(weights)
    like = w["input_layernorm.weight"]
    if fused_bias(args, layer):
        parts = []
        for name, order, size in blocks:
            bias = w.get(f"{ATTN}{name}.bias")
            rows = size * len(list(order))
            parts.append(_zeros(rows, like) if bias is None else take_row_blocks(bias, order, size))
        out[ATTN + "in_proj.bias"] = mx.concatenate(parts)
    if spec.fa and args.fa_qk_norm:
        for n in "qk":
            out[f"{ATTN}fa_{n}_norm"] = w[f"{ATTN}fa.{n}_norm.weight"]
    if spec.la:
        _fuse_la_small(args, w, out)
    _fold_output(args, layer, w, out, [*fused.fa, *fused.la])
    return out


def _fuse_la_small(args: HydraArgs, w: dict, out: dict):
    ab = mx.concatenate([to_float(w[f"{ATTN}la.{n}_proj.weight"]) for n in "ab"])
    # a and b set the gates of the recurrence: float16 has too few digits near gate 1.
    dtype = _float_dtype(w)
    out[ATTN + "ab_proj.weight"] = ab if dtype == mx.float16 else ab.astype(dtype)
    for n in ("A_log", "dt_bias"):
        out[ATTN + n] = to_float(w[f"{ATTN}la.{n}"])
    if args.la_conv_kernel:
        out[ATTN + "conv_weight"] = mx.concatenate(
            [w[f"{ATTN}la.{n}_conv1d.weight"][:, 0] for n in "qkv"]
        )
    if args.la_qk_norm:
        for n in "qk":
            out[f"{ATTN}la_{n}_norm"] = w[f"{ATTN}la.{n}_norm.weight"]


def _fold_output(args: HydraArgs, layer: int, w: dict, out: dict, stored: list):
    H, D = args.num_attention_heads, args.head_dim
    weight = w[ATTN + "o_proj.weight"]
    scale = _column_scale(args, layer, w)
    if scale is not None or stored != list(range(H)):
        dtype = _float_dtype(w)
        columns = to_float(weight)
        if scale is not None:
            columns = columns * scale
        columns = columns.reshape(-1, H, D)[:, mx.array(stored)].reshape(-1, H * D)
        weight = columns.astype(dtype)
    out[ATTN + "o_proj.weight"] = weight
    if ATTN + "o_proj.bias" in w:
        out[ATTN + "o_proj.bias"] = w[ATTN + "o_proj.bias"]


def unfuse_layer(args: HydraArgs, layer: int, w: dict) -> dict:
    """Fused form to spec form: the same function, with gamma and fusion norm weights of one
    (they live on in the columns of o_proj).

    Args:
        w: Every tensor of the layer in fused layout, none packed.
    """
    H, D = args.num_attention_heads, args.head_dim
    spec, fused = layer_heads(args, layer, "spec"), layer_heads(args, layer, "fused")
    fa_order = [fused.fa.index(h) for h in spec.fa]
    kv_order = list(range(len(spec.kv)))
    if args.fa_kv != "mha_own":
        kv_order = [fused.kv.index(k) for k in spec.kv]
    gate_size = D if args.fa_gate == "elementwise" else 1
    dtype = _float_dtype(w)
    out = {name: w[name] for name in COMMON}
    out["mlp.gate_proj.weight"], out["mlp.up_proj.weight"] = mx.split(
        w["mlp.gate_up_proj.weight"], 2
    )
    ends = fused_rows(args, layer).ends
    bias = w.get(ATTN + "in_proj.bias")

    def cut(x):
        la_qkv, la_gate, q, k, v, gate = mx.split(x, ends)
        parts = dict(zip(("la.q", "la.k", "la.v"), mx.split(la_qkv, 3), strict=True))
        parts["la.gate"] = la_gate
        parts["fa.q"] = take_row_blocks(q, fa_order, D)
        parts["fa.k"] = take_row_blocks(k, kv_order, D)
        parts["fa.v"] = take_row_blocks(v, kv_order, D)
        parts["fa.gate"] = take_row_blocks(gate, fa_order, gate_size) if gate.size else gate
        return {n: p for n, p in parts.items() if p.shape[0]}

    for name, part in cut(w[ATTN + "in_proj.weight"]).items():
        out[f"{ATTN}{name}_proj.weight"] = part
    if bias is not None:
        for name, part in cut(bias).items():
            if name == "fa.gate" or (args.attention_bias and name != "la.gate"):
                out[f"{ATTN}{name}_proj.bias"] = part
    for kind, members in (("fa", spec.fa), ("la", spec.la)):
        if not members:
            continue
        if args.fusion_norm == "rms":
            out[f"{ATTN}{kind}_norm.weight"] = mx.ones((D,), dtype)
        if getattr(args, f"{kind}_qk_norm"):
            for n in "qk":
                out[f"{ATTN}{kind}.{n}_norm.weight"] = w[f"{ATTN}{kind}_{n}_norm"]
    if spec.la:
        a, b = mx.split(w[ATTN + "ab_proj.weight"], 2)
        out[ATTN + "la.a_proj.weight"], out[ATTN + "la.b_proj.weight"] = a, b
        for n in ("A_log", "dt_bias"):
            out[f"{ATTN}la.{n}"] = w[ATTN + n]
        if args.la_conv_kernel:
            for n, part in zip("qkv", mx.split(w[ATTN + "conv_weight"], 3), strict=True):
                out[f"{ATTN}la.{n}_conv1d.weight"] = part[:, None]
    if args.fusion_scale:
        out[ATTN + "head_scale"] = mx.ones((H,))
    stored = [*fused.fa, *fused.la]
    place = mx.array([stored.index(h) for h in range(H)])
    columns = w[ATTN + "o_proj.weight"].reshape(-1, H, D)[:, place]
    out[ATTN + "o_proj.weight"] = columns.reshape(-1, H * D)
    if ATTN + "o_proj.bias" in w:
        out[ATTN + "o_proj.bias"] = w[ATTN + "o_proj.bias"]
    return out


def migrate_layer(
    args: HydraArgs,
    layer: int,
    base: dict,
    seed: int | None = 0,
    gamma: Sequence | None = None,
    conv: str = "identity",
) -> dict:
    """A pretrained Transformer layer as an initialised HydraHead layer (spec section 4).

    FA heads take the base rows of q, k, v; LA heads their q rows and the k, v rows of their
    key/value head, repeated; new tensors follow the Gated DeltaNet initialisation. The result
    depends on the arguments only.

    Args:
        base: Tensors of a Llama or Qwen3 layer, names below `model.layers.{i}.`.
        seed: Of the new tensors; None leaves the large random ones zero.
        gamma: [H] head scales, or None for ones; without effect when args.fusion_scale is off.
        conv: "identity" starts filters as the present token alone, "random" as PyTorch would.
    """
    H, D, E = args.num_attention_heads, args.head_dim, args.hidden_size
    group = H // args.num_key_value_heads
    heads = layer_heads(args, layer, "spec")
    Hf, Hl = len(heads.fa), len(heads.la)
    dtype = _float_dtype(base)
    rng = np.random.RandomState(((seed or 0) * 1_000_003 + layer) % 2**32)

    def new(x) -> mx.array:
        return mx.array(np.asarray(x, np.float32)).astype(dtype)

    def small(*shape: int) -> mx.array:
        return mx.zeros(shape, dtype) if seed is None else new(rng.normal(0.0, 0.02, shape))

    def ones(n: int) -> mx.array:
        return mx.ones((n,), dtype)

    out = {n: base[n] for n in COMMON}
    for n in ("mlp.gate_proj.weight", "mlp.up_proj.weight", ATTN + "o_proj.weight"):
        out[n] = base[n]
    kinds = []
    if Hf:
        kinds.append(("fa", heads.fa, heads.kv))
    if Hl:
        kinds.append(("la", heads.la, [h // group for h in heads.la]))
    for kind, q_heads, kv_heads in kinds:
        for n, order in (("q", q_heads), ("k", kv_heads), ("v", kv_heads)):
            for part in ("weight", "bias") if args.attention_bias else ("weight",):
                x = base[f"{ATTN}{n}_proj.{part}"]
                out[f"{ATTN}{kind}.{n}_proj.{part}"] = take_row_blocks(x, order, D)
        if getattr(args, f"{kind}_qk_norm"):
            for n in "qk":
                weight = base.get(f"{ATTN}{n}_norm.weight")
                out[f"{ATTN}{kind}.{n}_norm.weight"] = ones(D) if weight is None else weight
        if args.fusion_norm == "rms":
            out[f"{ATTN}{kind}_norm.weight"] = ones(D)
    if args.attention_bias:
        out[ATTN + "o_proj.bias"] = base[ATTN + "o_proj.bias"]
    if Hf and args.fa_gate is not None:
        rows = Hf * (D if args.fa_gate == "elementwise" else 1)
        out[ATTN + "fa.gate_proj.weight"] = mx.zeros((rows, E), dtype)
        out[ATTN + "fa.gate_proj.bias"] = ones(rows)
    if Hl:
        if args.la_conv_kernel:
            tap = np.zeros((Hl * D, 1, args.la_conv_kernel), np.float32)
            tap[..., -1] = 1.0
            for n in "qkv":
                if conv == "random" and seed is not None:
                    bound = args.la_conv_kernel**-0.5
                    tap = rng.uniform(-bound, bound, tap.shape)
                out[f"{ATTN}la.{n}_conv1d.weight"] = new(tap)
        for n in "ab":
            out[f"{ATTN}la.{n}_proj.weight"] = small(Hl, E)
        A = rng.uniform(1e-3, 16.0, Hl)
        dt = np.exp(rng.uniform(np.log(1e-3), np.log(0.1), Hl))
        out[ATTN + "la.A_log"] = mx.array(np.log(A).astype(np.float32))
        out[ATTN + "la.dt_bias"] = mx.array((dt + np.log(-np.expm1(-dt))).astype(np.float32))
        if args.la_output_gate is not None:
            out[ATTN + "la.gate_proj.weight"] = small(Hl * D, E)
    if args.fusion_scale:
        out[ATTN + "head_scale"] = mx.ones((H,)) if gamma is None else mx.array(gamma, mx.float32)
    return out
