"""Name tables: which tensors each source layout has, as data.

A table maps a source tensor name (with {i} for the layer) to the name this project uses for it,
or to None for a tensor that is dropped on purpose. A published layout with other names needs a new
table here and no new code. Axis letters in shapes: E, H, Hk, D, V, F (MLP hidden size).
"""

from dataclasses import dataclass, field

from .config import HydraArgs, layer_heads
from .errors import CheckpointError
from .fused import fused_bias, fused_rows
from .shards import TensorInfo

LAYER = "model.layers.{i}."

# Plain Llama and Qwen3 checkpoints: name -> (our name, shape letters, when it must be there).
BASE_LAYER = {
    "input_layernorm.weight": ("E", None),
    "post_attention_layernorm.weight": ("E", None),
    "mlp.gate_proj.weight": ("FE", None),
    "mlp.up_proj.weight": ("FE", None),
    "mlp.down_proj.weight": ("EF", None),
    "self_attn.q_proj.weight": ("QE", None),
    "self_attn.k_proj.weight": ("KE", None),
    "self_attn.v_proj.weight": ("KE", None),
    "self_attn.o_proj.weight": ("EQ", None),
    "self_attn.q_norm.weight": ("D", "qk_norm"),
    "self_attn.k_norm.weight": ("D", "qk_norm"),
    "self_attn.q_proj.bias": ("Q", "attention_bias"),
    "self_attn.k_proj.bias": ("K", "attention_bias"),
    "self_attn.v_proj.bias": ("K", "attention_bias"),
    "self_attn.o_proj.bias": ("E", "attention_bias"),
}
TOP = {
    "model.embed_tokens.weight": ("VE", None),
    "model.norm.weight": ("E", None),
    "lm_head.weight": ("VE", "untied"),
}
# Kept by some exporters, read by nobody.
DROPPED = ("rotary_emb.inv_freq", "self_attn.masked_bias")


@dataclass
class KeyReport:
    """What became of every key of a source.

    Attributes:
        mapped: (source name, target name). dropped: Source names left out on purpose.
        missing: Names that should be there. unexpected: Names nobody knows.
    """

    mapped: list = field(default_factory=list)
    dropped: list = field(default_factory=list)
    missing: list = field(default_factory=list)
    unexpected: list = field(default_factory=list)

    def summary(self) -> str:
        """One line of counts."""
        return (
            f"{len(self.mapped)} tensors mapped, {len(self.dropped)} dropped, "
            f"{len(self.missing)} missing, {len(self.unexpected)} unexpected"
        )

    def require_whole(self, where: str):
        """Raise unless every key is mapped or deliberately dropped.

        Raises:
            CheckpointError: Names the first missing or unexpected key.
        """
        for problem, names in (("misses", self.missing), ("has unexpected", self.unexpected)):
            if names:
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                raise CheckpointError(f"{where} {problem} tensor {names[0]}{more}.", self.summary())


def base_shapes(args: HydraArgs, qk_norm: bool) -> dict:
    """{name: shape} that a plain Llama or Qwen3 checkpoint of these sizes must have.

    Args:
        qk_norm: Whether the base model has q/k norms; the migrated one may differ.
    """
    D = args.head_dim
    sizes = {
        "E": args.hidden_size,
        "F": args.intermediate_size,
        "V": args.vocab_size,
        "D": D,
        "Q": args.num_attention_heads * D,
        "K": args.num_key_value_heads * D,
    }
    present = {
        None: True,
        "qk_norm": qk_norm,
        "attention_bias": args.attention_bias,
        "untied": not args.tie_word_embeddings,
    }
    out = {n: s for n, (s, when) in TOP.items() if present[when]}
    for i in range(args.num_hidden_layers):
        for n, (s, when) in BASE_LAYER.items():
            if present[when]:
                out[LAYER.format(i=i) + n] = s
    return {n: tuple(sizes[c] for c in s) for n, s in out.items()}


def model_shapes(args: HydraArgs) -> dict:
    """{name: shape} of the HydraHead layout that args.weights_form names."""
    E, F, V = args.hidden_size, args.intermediate_size, args.vocab_size
    out = {"model.embed_tokens.weight": (V, E), "model.norm.weight": (E,)}
    if not args.tie_word_embeddings:
        out["lm_head.weight"] = (V, E)
    fused = args.weights_form == "fused"
    if fused:
        mlp = {"gate_up_proj": (2 * F, E), "down_proj": (E, F)}
    else:
        mlp = {"gate_proj": (F, E), "up_proj": (F, E), "down_proj": (E, F)}
    for i in range(args.num_hidden_layers):
        layer = {f"mlp.{n}.weight": s for n, s in mlp.items()}
        layer |= {f"{n}_layernorm.weight": (E,) for n in ("input", "post_attention")}
        mixer = _fused_mixer(args, i) if fused else _spec_mixer(args, i)
        layer |= {f"self_attn.{n}": s for n, s in mixer.items()}
        out |= {LAYER.format(i=i) + n: s for n, s in layer.items()}
    return out


def _linear(name: str, rows: int, columns: int, bias: bool = False) -> dict:
    out = {f"{name}.weight": (rows, columns)}
    return {**out, f"{name}.bias": (rows,)} if bias else out


def _spec_mixer(args: HydraArgs, layer: int) -> dict:
    """Tensors of self_attn as the spec has them."""
    heads, bias = layer_heads(args, layer, "spec"), args.attention_bias
    E, D, H = args.hidden_size, args.head_dim, args.num_attention_heads
    Hf, Hl, Hk = len(heads.fa), len(heads.la), len(heads.kv)
    out = _linear("o_proj", E, H * D, bias)
    if args.fusion_scale:
        out["head_scale"] = (H,)
    for kind, n, qk_norm in (("fa", Hf, args.fa_qk_norm), ("la", Hl, args.la_qk_norm)):
        if n and qk_norm:
            out |= {f"{kind}.{x}_norm.weight": (D,) for x in "qk"}
        if n and args.fusion_norm == "rms":
            out[f"{kind}_norm.weight"] = (D,)
    if Hf:
        for x, rows in (("q", Hf), ("k", Hk), ("v", Hk)):
            out |= _linear(f"fa.{x}_proj", rows * D, E, bias)
        if args.fa_gate is not None:
            rows = Hf * D if args.fa_gate == "elementwise" else Hf
            out |= _linear("fa.gate_proj", rows, E, True)
    if Hl:
        for x in "qkv":
            out |= _linear(f"la.{x}_proj", Hl * D, E, bias)
            if args.la_conv_kernel:
                out[f"la.{x}_conv1d.weight"] = (Hl * D, 1, args.la_conv_kernel)
        out |= {"la.A_log": (Hl,), "la.dt_bias": (Hl,)}
        out |= {f"la.{x}_proj.weight": (Hl, E) for x in "ab"}
        if args.la_output_gate is not None:
            out["la.gate_proj.weight"] = (Hl * D, E)
    return out


def _fused_mixer(args: HydraArgs, layer: int) -> dict:
    """Tensors of self_attn as the converter writes them."""
    heads = layer_heads(args, layer, "fused")
    E, D, H, Hl = args.hidden_size, args.head_dim, args.num_attention_heads, len(heads.la)
    out = _linear("o_proj", E, H * D, args.attention_bias)
    out |= _linear("in_proj", fused_rows(args, layer).total, E, fused_bias(args, layer))
    if heads.fa and args.fa_qk_norm:
        out |= {"fa_q_norm": (D,), "fa_k_norm": (D,)}
    if Hl:
        out |= {"ab_proj.weight": (2 * Hl, E), "A_log": (Hl,), "dt_bias": (Hl,)}
        if args.la_conv_kernel:
            out["conv_weight"] = (3 * Hl * D, args.la_conv_kernel)
        if args.la_qk_norm:
            out |= {"la_q_norm": (D,), "la_k_norm": (D,)}
    return out


def is_dropped(name: str, tied: bool) -> bool:
    """Whether a tensor is left out on purpose."""
    return name.endswith(DROPPED) or (tied and name.startswith("lm_head."))


def check_keys(found: dict, expected: dict, tied: bool) -> KeyReport:
    """Compare a source's tensors with a layout.

    Args:
        found: {name: TensorInfo}. expected: {name: shape}. tied: args.tie_word_embeddings.

    Raises:
        CheckpointError: A tensor has another shape than the config asks for, or is no float.
    """
    report = KeyReport()
    for name, info in found.items():
        if name in expected:
            _check_shape(info, expected[name])
            report.mapped.append((name, name))
        elif is_dropped(name, tied):
            report.dropped.append(name)
        else:
            report.unexpected.append(name)
    report.missing = [n for n in expected if n not in found]
    return report


def _check_shape(info: TensorInfo, want: tuple):
    if tuple(info.shape) != tuple(want):
        raise CheckpointError(
            f"{info.file.name}: {info.name} has shape {list(info.shape)}, the config asks for "
            f"{list(want)}."
        )
