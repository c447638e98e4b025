"""The HydraHead configuration: every key of config.json, checked when it is read.

Axis letters, used in the whole project: B batch, T tokens, E hidden size, H query heads, Hf
full-attention (FA) heads of a layer, Hl linear-attention (LA) heads of a layer (Hf + Hl = H),
Hk key/value heads a layer keeps, D head dim (Dk, Dv where they differ), C chunk, L layers,
V vocabulary.
"""

import difflib
import warnings
from dataclasses import dataclass, field, fields
from typing import Any

from .errors import ConfigError

MODEL_TYPE = "hydrahead"
ARCHITECTURE = "HydraHeadForCausalLM"
FUSION_EPS = 1e-6  # spec section 1: the fusion norm; q/k norms use rms_norm_eps
L2_EPS = 1e-6  # spec section 1: inside the root of the L2 norm of q and k

CHOICES = {
    "fa_kv": ("gqa_shared", "mha_own", "keep_all"),
    "fa_gate": ("elementwise", "headwise", None),
    "fa_gate_position": ("pre_norm", "post_norm"),
    "la_conv_kernel": (4, 0),
    "la_output_gate": ("silu", "sigmoid", None),
    "fusion_norm": ("rms", "rms_no_weight", None),
    "hidden_act": ("silu",),
    "weights_form": ("spec", "fused"),
}

# rope_scaling: type -> what it cannot do without; and which of its keys are numbers.
ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor",),
    "yarn": ("factor",),
    "longrope": ("original_max_position_embeddings", "short_factor", "long_factor"),
}
ROPE_NUMBERS = (
    "factor low_freq_factor high_freq_factor original_max_position_embeddings beta_fast beta_slow "
    "short_factor long_factor"
).split()

# Keys that Hugging Face or mlx-lm write and that change nothing in the forward pass.
IGNORED_KEYS = frozenset(
    """architectures bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id
    transformers_version torch_dtype dtype use_cache initializer_range attention_dropout
    quantization quantization_config model_file pretraining_tp rope_interleaved
    rope_parameters layer_types sliding_window use_sliding_window max_window_layers
    is_llama_config transformers.js_config _name_or_path name_or_path mlp_bias rope_traditional
    auto_map hydra_mlx_version hydra_source id2label label2id return_dict problem_type
    quantize_activations output_hidden_states output_attentions chunk_size_feed_forward
    is_encoder_decoder tokenizer_class task_specific_params""".split()
)


@dataclass
class HydraArgs:
    """Every key of a HydraHead config.json (spec section 2).

    `la_qk_norm` and `fa_qk_norm` have no default that fits all bases: they are true when the
    base model has q/k norms (Qwen3), false otherwise (Llama); here the default is true.
    `weights_form` is "spec" for the Hugging Face layout of section 2 and "fused" for the
    inference form that the converter writes.

    Raises:
        ConfigError: A value is missing, out of range, of the wrong type, or contradicts another.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    full_attention_heads: list
    head_dim: int | None = None
    rms_norm_eps: float = 1e-6
    rope_theta: float | None = None
    rope_scaling: dict | None = None
    rope_parameters: dict | None = None
    tie_word_embeddings: bool = False
    max_position_embeddings: int | None = None
    hidden_act: str = "silu"
    attention_bias: bool = False
    fa_kv: str = "gqa_shared"
    fa_rope: bool = False
    fa_logit_scale: dict | None = field(default_factory=lambda: {"type": "log_length", "a": 500})
    fa_gate: str | None = "elementwise"
    fa_gate_position: str = "pre_norm"
    fa_qk_norm: bool = True
    la_conv_kernel: int = 4
    la_rope: bool = True
    la_qk_norm: bool = True
    la_output_gate: str | None = "silu"
    la_allow_neg_eigval: bool = False
    fusion_norm: str | None = "rms"
    fusion_scale: bool = True
    weights_form: str = "spec"
    model_type: str = MODEL_TYPE

    def __post_init__(self):
        if self.model_type != MODEL_TYPE:
            raise ConfigError(
                f"model_type is {self.model_type!r}, expected {MODEL_TYPE!r}.",
                "A plain Llama or Qwen3 checkpoint becomes a HydraHead model with "
                "`hydra-mlx convert --hf-path DIR --head-map FILE`.",
            )
        self._check_numbers()
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ConfigError(
                    f"head_dim is missing and hidden_size {self.hidden_size} is not divisible by "
                    f"num_attention_heads {self.num_attention_heads}."
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        _require_int("head_dim", self.head_dim)
        if self.head_dim % 2 and (self.fa_rope or self.la_rope):
            raise ConfigError(f"head_dim is {self.head_dim}; rotary embedding needs an even one.")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_attention_heads {self.num_attention_heads} is not divisible by "
                f"num_key_value_heads {self.num_key_value_heads}."
            )
        rows = 8 * self.num_attention_heads * self.head_dim
        if rows >= 2**31:
            raise ConfigError(
                f"num_attention_heads {self.num_attention_heads} times head_dim {self.head_dim} "
                "is more than MLX can hold."
            )
        self._check_choices()
        self._check_rope()
        self._check_logit_scale()
        self._check_heads()

    def _check_numbers(self):
        for name in (
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "vocab_size",
        ):
            _require_int(name, getattr(self, name), 2**28)
        eps = self.rms_norm_eps
        if isinstance(eps, bool) or not isinstance(eps, (int, float)) or not 0 < eps < 1:
            raise ConfigError(f"rms_norm_eps is {eps!r}, expected a number between 0 and 1.")
        if self.max_position_embeddings is not None:
            _require_int("max_position_embeddings", self.max_position_embeddings)

    def _check_choices(self):
        for name, allowed in CHOICES.items():
            value = getattr(self, name)
            if not any(value is a or (type(value) is type(a) and value == a) for a in allowed):
                shown = ", ".join("null" if a is None else repr(a) for a in allowed)
                raise ConfigError(f"{name} is {value!r}, expected one of {shown}.")
        for f in fields(self):
            if f.type is bool and not isinstance(getattr(self, f.name), bool):
                raise ConfigError(f"{f.name} is {getattr(self, f.name)!r}, expected true or false.")

    def _check_rope(self):
        for name in ("rope_scaling", "rope_parameters"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, dict):
                raise ConfigError(f"{name} is {value!r}, expected an object or null.")
        params = self.rope_parameters or {}
        nested = params.get("rope_theta")
        if self.rope_theta is None:
            self.rope_theta = 10000.0 if nested is None else nested
        elif nested is not None and nested != self.rope_theta:
            raise ConfigError(
                f"rope_theta is {self.rope_theta} but rope_parameters says {nested}.",
                "Remove one of the two from config.json.",
            )
        theta = self.rope_theta
        if isinstance(theta, bool) or not isinstance(theta, (int, float)) or not 0 < theta < 1e12:
            raise ConfigError(f"rope_theta is {theta!r}, expected a positive number.")
        if self.rope_scaling is None and params.get("rope_type", "default") != "default":
            self.rope_scaling = params
        if self.rope_scaling is not None:
            self._check_rope_scaling(self.rope_scaling)

    def _check_rope_scaling(self, scaling: dict):
        kind = scaling.get("type")
        if kind is None:
            kind = scaling.get("rope_type", "default")
        if not isinstance(kind, str) or kind not in ROPE_KEYS:
            raise ConfigError(
                f"rope_scaling has the type {kind!r}, expected one of {', '.join(ROPE_KEYS)}."
            )
        for name in ROPE_KEYS[kind]:
            if name not in scaling:
                raise ConfigError(f"rope_scaling of type {kind!r} lacks {name!r}.")
        for name, value in scaling.items():
            values = value if name in ("short_factor", "long_factor") else [value]
            if name in ROPE_NUMBERS and not (
                isinstance(values, list) and all(_is_number(v) and 0 < v < 1e12 for v in values)
            ):
                raise ConfigError(f"rope_scaling.{name} is {value!r}, expected positive numbers.")
        if kind == "longrope":
            for name in ("short_factor", "long_factor"):
                if len(scaling[name]) != self.head_dim // 2:
                    raise ConfigError(
                        f"rope_scaling.{name} has {len(scaling[name])} numbers, expected "
                        f"{self.head_dim // 2}, half of head_dim."
                    )
        if kind in ("dynamic", "longrope") and self.max_position_embeddings is None:
            raise ConfigError(
                f"rope_scaling of type {kind!r} needs max_position_embeddings in config.json."
            )

    def _check_logit_scale(self):
        scale = self.fa_logit_scale
        if scale is None:
            return
        if not isinstance(scale, dict) or scale.get("type") != "log_length":
            raise ConfigError(
                f'fa_logit_scale is {scale!r}, expected {{"type": "log_length", "a": 500}} or null.'
            )
        unknown = sorted(set(scale) - {"type", "a"})
        if unknown:
            raise ConfigError(f"fa_logit_scale has the unknown key {unknown[0]!r}.")
        a = scale.get("a", 500)
        if isinstance(a, bool) or not isinstance(a, (int, float)) or not 1 < a < 1e12:
            raise ConfigError(f"fa_logit_scale.a is {a!r}, expected a number above 1.")

    def _check_heads(self):
        heads = self.full_attention_heads
        check_head_map(heads, self.num_hidden_layers, self.num_attention_heads)

    @property
    def logit_scale_a(self) -> float | None:
        """The constant a of s_t = ln(t + a) / ln(a), or None when the scale is off."""
        return None if self.fa_logit_scale is None else float(self.fa_logit_scale.get("a", 500))

    @property
    def has_fa(self) -> bool:
        """Whether any layer has a full-attention head."""
        return any(self.full_attention_heads)

    @classmethod
    def from_dict(cls, params: dict) -> "HydraArgs":
        """Read a config.json object; unknown keys are reported, never swallowed.

        A key that looks like a misspelt one of ours is an error; any other unknown key warns.

        Raises:
            ConfigError: A required key is missing, a value is wrong, or a key is misspelt.
        """
        if not isinstance(params, dict):
            raise ConfigError(f"config.json holds {type(params).__name__}, expected an object.")
        known = {f.name for f in fields(cls)}
        stray = []
        for key in params:
            if key in known or key in IGNORED_KEYS:
                continue
            near = difflib.get_close_matches(key, known, 1, 0.85)
            if near or key.startswith(("fa_", "la_", "fusion_", "full_attention")):
                near = near or difflib.get_close_matches(key, known, 1, 0.3)
                hint = f"Did you mean {near[0]!r}?" if near else ""
                raise ConfigError(f"config.json has the unknown key {key!r}.", hint)
            stray.append(key)
        if stray:
            warnings.warn(
                "config.json has keys that hydra_mlx does not know and ignores: "
                + ", ".join(sorted(stray)),
                stacklevel=2,
            )
        for name in ("mlp_bias", "rope_traditional"):
            if params.get(name):
                raise ConfigError(f"{name} is {params[name]!r}; hydra_mlx supports only false.")
        missing = [
            name
            for name in (
                "hidden_size",
                "intermediate_size",
                "num_hidden_layers",
                "num_attention_heads",
                "num_key_value_heads",
                "vocab_size",
                "full_attention_heads",
            )
            if name not in params
        ]
        if missing:
            raise ConfigError(f"config.json lacks the required key {missing[0]!r}.")
        for a, b in (("torch_dtype", "dtype"), ("quantization", "quantization_config")):
            if params.get(a) and params.get(b) and params[a] != params[b]:
                raise ConfigError(f"config.json gives {a} and {b} different values.")
        return cls(**{k: v for k, v in params.items() if k in known})


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _require_int(name: str, value: Any, limit: int = 2**31):
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < limit:
        raise ConfigError(f"{name} is {value!r}, expected a positive whole number.")


def check_head_map(heads: Any, layers: int, num_heads: int):
    """Check a list of full-attention heads: one sorted list without repeats for each layer.

    Args:
        heads: What config.json or a head-map file gives under "full_attention_heads".
        layers: L. num_heads: H, query heads of a layer.

    Raises:
        ConfigError: Length, range, order or duplicates are wrong.
    """
    if not isinstance(heads, list):
        raise ConfigError(
            f"full_attention_heads is {type(heads).__name__}, expected a list of {layers} lists."
        )
    if len(heads) != layers:
        raise ConfigError(
            f"full_attention_heads has {len(heads)} lists, but num_hidden_layers is {layers}."
        )
    for i, layer in enumerate(heads):
        where = f"full_attention_heads[{i}]"
        if not isinstance(layer, list) or any(type(h) is not int for h in layer):
            raise ConfigError(f"{where} is {layer!r}, expected a list of head numbers.")
        for h in layer:
            if not 0 <= h < num_heads:
                raise ConfigError(f"{where} names head {h}; heads go from 0 to {num_heads - 1}.")
        if len(set(layer)) != len(layer):
            raise ConfigError(f"{where} names a head twice: {layer}.")
        if layer != sorted(layer):
            raise ConfigError(f"{where} is not sorted: {layer}.")


@dataclass(frozen=True)
class LayerHeads:
    """Which heads of one layer are full attention, and which key/value head each of them reads.

    Attributes:
        fa: Hf head indices in row order of the FA tensors.
        la: Hl head indices in row order of the LA tensors.
        kv: Hk base key/value heads kept, in row order of fa.k_proj and fa.v_proj. With
            fa_kv "mha_own" entry j is the base key/value head that FA head fa[j] came from.
        kv_of_fa: For each FA head, the row block of `kv` that it reads.
    """

    fa: tuple
    la: tuple
    kv: tuple
    kv_of_fa: tuple

    @property
    def runs(self) -> tuple:
        """Runs (q_start, n_q, kv_start, n_kv) of neighbours that share one grouping ratio.

        Attention with grouped keys needs the same number of queries on each key/value head;
        a ragged layer is a few such runs. Key/value heads nobody reads are in no run.
        """
        runs = []
        for kv in range(len(self.kv)):
            rows = [i for i, j in enumerate(self.kv_of_fa) if j == kv]
            if not rows:
                continue
            last = runs[-1] if runs else None
            if last and last[2] + last[3] == kv and last[1] == last[3] * len(rows):
                runs[-1] = (last[0], last[1] + len(rows), last[2], last[3] + 1)
            else:
                runs.append((rows[0], len(rows), kv, 1))
        return tuple(runs)


def layer_heads(args: HydraArgs, layer: int, order: str | None = None) -> LayerHeads:
    """Head lists of one layer in spec order, or in the order the fused form stores them.

    Fused order puts key/value heads with the same number of readers next to each other, so
    that ragged grouping needs one attention call per distinct number and no copy.

    Args:
        order: "spec" or "fused"; None takes args.weights_form.
    """
    H = args.num_attention_heads
    group = H // args.num_key_value_heads
    fa = list(args.full_attention_heads[layer])
    la = tuple(h for h in range(H) if h not in fa)
    if args.fa_kv == "mha_own":
        return LayerHeads(tuple(fa), la, tuple(h // group for h in fa), tuple(range(len(fa))))
    kept = sorted({h // group for h in fa})
    if args.fa_kv == "keep_all" and fa:
        kept = list(range(args.num_key_value_heads))
    if (order or args.weights_form) == "fused":
        readers = {k: sum(h // group == k for h in fa) for k in kept}
        kept.sort(key=lambda k: (readers[k], k))
        fa.sort(key=lambda h: (kept.index(h // group), h))
    return LayerHeads(tuple(fa), la, tuple(kept), tuple(kept.index(h // group) for h in fa))


def is_hydra(model: Any) -> bool:
    """Whether a model is a HydraHead, whose layers can read our own cache classes."""
    return isinstance(getattr(model, "args", None), HydraArgs)
