"""The teacher (Llama) and the HydraHead student in PyTorch, for training only: no cache.

Weights are a dict under exactly the names and shapes of the HydraHead checkpoint layout, so that
a checkpoint is the dict itself. Letters as in blocks.py.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from . import blocks

FUSION_NORMS = ("rms", None)
# What this twin can do: the defaults of the layout, without q/k norms (the base has none).
SUPPORTED = {
    "fa_kv": "gqa_shared", "fa_rope": False, "fa_gate": "elementwise",
    "fa_gate_position": "pre_norm", "la_conv_kernel": 4, "la_rope": True, "la_qk_norm": False,
    "fa_qk_norm": False, "la_output_gate": "silu", "la_allow_neg_eigval": False,
    "fusion_scale": True, "tie_word_embeddings": True,
    "attention_bias": False, "rope_scaling": None, "hidden_act": "silu",
}  # fmt: skip


def check_config(config: dict) -> None:
    """Raises ValueError if the config asks for what this twin lacks."""
    for key, value in SUPPORTED.items():
        if config.get(key, value) != value:
            raise ValueError(f"{key} is {config[key]!r}; this program only has {value!r}")
    if config.get("fusion_norm", "rms") not in FUSION_NORMS:
        raise ValueError(
            f"fusion_norm is {config['fusion_norm']!r}; this program only has 'rms' and None"
        )


def layer_heads(config: dict, layer: int) -> tuple[list[int], list[int], list[int]]:
    """FA heads, LA heads and kept key/value heads of a layer, sorted."""
    H = config["num_attention_heads"]
    group = H // config["num_key_value_heads"]
    fa = list(config["full_attention_heads"][layer])
    return fa, [h for h in range(H) if h not in fa], sorted({h // group for h in fa})


def attention_shapes(config: dict, layer: int) -> dict[str, tuple[int, ...]]:
    """{name below self_attn: shape} of one layer."""
    E, D, H = config["hidden_size"], config["head_dim"], config["num_attention_heads"]
    fa, la, kv = layer_heads(config, layer)
    f, n, k = len(fa) * D, len(la) * D, len(kv) * D
    shapes = {"o_proj.weight": (E, H * D), "head_scale": (H,)}
    if fa:
        shapes |= {"fa.q_proj.weight": (f, E), "fa.k_proj.weight": (k, E),
                   "fa.v_proj.weight": (k, E), "fa.gate_proj.weight": (f, E),
                   "fa.gate_proj.bias": (f,), "fa_norm.weight": (D,)}  # fmt: skip
    if la:
        for c in "qkv":
            shapes |= {f"la.{c}_proj.weight": (n, E), f"la.{c}_conv1d.weight": (n, 1, 4)}
        shapes |= {"la.a_proj.weight": (len(la), E), "la.b_proj.weight": (len(la), E),
                   "la.A_log": (len(la),), "la.dt_bias": (len(la),),
                   "la.gate_proj.weight": (n, E), "la_norm.weight": (D,)}  # fmt: skip
    if config.get("fusion_norm", "rms") is None:
        shapes = {n: s for n, s in shapes.items() if n not in ("fa_norm.weight", "la_norm.weight")}
    return shapes


def tensor_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """{name: shape} of the whole HydraHead checkpoint."""
    E, F_, V = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    shapes = {"model.embed_tokens.weight": (V, E), "model.norm.weight": (E,)}
    for i in range(config["num_hidden_layers"]):
        p = f"model.layers.{i}."
        shapes |= {f"{p}input_layernorm.weight": (E,), f"{p}post_attention_layernorm.weight": (E,)}
        shapes |= {f"{p}mlp.{n}_proj.weight": (F_, E) for n in ("gate", "up")}
        shapes[f"{p}mlp.down_proj.weight"] = (E, F_)
        shapes |= {f"{p}self_attn.{n}": s for n, s in attention_shapes(config, i).items()}
    return shapes


def layer_tensors(tensors: dict[str, Tensor], i: int, part: str) -> dict[str, Tensor]:
    """The tensors below model.layers.{i}.{part}, by the rest of their name."""
    prefix = f"model.layers.{i}.{part}."
    return {n[len(prefix) :]: t for n, t in tensors.items() if n.startswith(prefix)}


class Decoder:
    """What teacher and student share: embedding, MLPs, final norm; attention is theirs."""

    def __init__(
        self, config: dict, tensors: dict[str, Tensor], dtype: torch.dtype, compiled: bool
    ):
        self.config, self.tensors, self.dtype = config, tensors, dtype
        self.compiled = compiled
        self.D, self.eps = config["head_dim"], config["rms_norm_eps"]
        self.embed = tensors["model.embed_tokens.weight"]
        self.norms, self.mlps, self.attn = [], [], []
        for i in range(config["num_hidden_layers"]):
            p = f"model.layers.{i}."
            self.norms.append(tensors[f"{p}input_layernorm.weight"])
            mlp = [tensors[f"{p}mlp.{n}_proj.weight"] for n in ("gate", "up", "down")]
            self.mlps.append((tensors[f"{p}post_attention_layernorm.weight"], *mlp))
            self.attn.append(layer_tensors(tensors, i, "self_attn"))
        self.mlp_block = blocks.compile_block(blocks.mlp_block, compiled)
        self.tables: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def layers(self) -> int:
        """How many there are."""
        return len(self.mlps)

    def rope(self, T: int) -> tuple[Tensor, Tensor]:
        """cos and sin for T tokens, kept."""
        if T not in self.tables:
            theta = self.config["rope_theta"]
            self.tables[T] = blocks.rope_tables(T, self.D, theta, self.embed.device)
        return self.tables[T]

    def start(self, tokens: Tensor) -> Tensor:
        """The residual stream before the first layer, [B, T, E] float32."""
        return F.embedding(tokens, self.embed).float()

    def attention(self, i: int, x: Tensor) -> Tensor:
        """What layer i adds to the stream after o_proj: normed [B, T, E] -> [B, T, E]."""
        """What attention adds to x in layer i, norm included. x: [B, T, E]"""
        raise NotImplementedError

    def mlp(self, i: int, x: Tensor) -> Tensor:
        """x and what the second half of layer i adds to it."""
        return self.mlp_block(x, *self.mlps[i], self.eps, self.dtype)

    def layer(self, i: int, x: Tensor) -> Tensor:
        """x after layer i."""
        return self.mlp(i, x + self.attention(i, x))

    def hidden(self, tokens: Tensor) -> Tensor:
        """The normed last hidden state [B, T, E] in `dtype`; logits are its product with embed."""
        x = self.start(tokens)
        for i in range(self.layers):
            x = self.layer(i, x)
        norm = self.tensors["model.norm.weight"]
        return blocks.rms_norm(x, norm, self.eps).to(self.dtype)


class Teacher(Decoder):
    """A plain Llama, its weights rounded to dtype once."""

    def __init__(
        self, config: dict, tensors: dict[str, Tensor], dtype: torch.dtype, compiled: bool
    ):
        tensors = {n: t.to(dtype) for n, t in tensors.items()}
        super().__init__(config, tensors, dtype, compiled)
        self.block = blocks.compile_block(blocks.teacher_attention, compiled)

    def projections(self, i: int) -> tuple[Tensor, ...]:
        """Weights of the norm, q, k and v of layer i."""
        return self.norms[i], *(self.attn[i][f"{n}_proj.weight"] for n in "qkv")

    def attention(self, i: int, x: Tensor) -> Tensor:
        """What layer i adds to the stream after o_proj: normed [B, T, E] -> [B, T, E]."""
        o_proj = self.attn[i]["o_proj.weight"]
        cos, sin = self.rope(x.shape[1])
        return self.block(x, self.projections(i), o_proj, cos, sin, self.D, self.eps)

    def heads(self, i: int, x: Tensor) -> Tensor:
        """Head outputs [B, T, H, D] of layer i before o_proj."""
        return blocks.teacher_heads(
            x, self.projections(i), *self.rope(x.shape[1]), self.D, self.eps
        )


class Student(Decoder):
    """HydraHead: FA and LA heads side by side. The tensors given are the ones that are trained.

    Attributes:
        scaled: Whether FA queries get the log-length scale; off in training as in the ancestor.
    """

    def __init__(
        self, config: dict, tensors: dict[str, Tensor], dtype: torch.dtype, compiled: bool
    ):
        check_config(config)
        expected = tensor_shapes(config)
        found = {n: tuple(t.shape) for n, t in tensors.items()}
        if found != expected:
            wrong = sorted(n for n in {*found, *expected} if found.get(n) != expected.get(n))
            raise ValueError(f"weights do not fit the config: {', '.join(wrong[:8])}")
        super().__init__(config, tensors, dtype, compiled)
        self.scaled, self.maps = False, []
        group = config["num_attention_heads"] // config["num_key_value_heads"]
        for i in range(self.layers):
            fa, la, kv = layer_heads(config, i)
            order, kept = [*fa, *la], [kv.index(h // group) for h in fa]
            self.maps.append([torch.tensor(x, device=self.embed.device) for x in (order, kept)])
        self.block = blocks.compile_block(blocks.student_block, compiled)

    def parameters(self, part: str = "") -> list[Tensor]:
        """All tensors whose name holds `part`, sorted by name: a file keeps no other order."""
        return [self.tensors[n] for n in sorted(self.tensors) if part in n]

    def heads(self, i: int, x: Tensor) -> Tensor:
        """Head outputs [B, T, H, D] of layer i in original order, before gamma and o_proj."""
        (order, kept), tables = self.maps[i], self.rope(x.shape[1])
        h = blocks.rms_norm(x, self.norms[i], self.eps).to(self.dtype)
        stored = blocks.student_heads(h, self.attn[i], kept, *tables, None, self.D)
        return stored[:, :, order.argsort()]

    def attention(self, i: int, x: Tensor) -> Tensor:
        """What layer i adds to the stream after o_proj: normed [B, T, E] -> [B, T, E]."""
        scale, T = None, x.shape[1]
        form = self.config.get("fa_logit_scale", {"type": "log_length", "a": 500})
        if self.scaled and form:
            scale = blocks.log_length_scale(T, form["a"], x.device)
        return self.block(
            x, self.norms[i], self.attn[i], *self.maps[i], *self.rope(T), scale, self.D, self.eps,
            self.dtype,
        )  # fmt: skip
