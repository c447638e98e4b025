"""The HydraHead model in the shape that mlx-lm expects of a model file.

`Model` and `ModelArgs` are what mlx_lm.utils.load_model looks for; see registry.py for how the
stock programs find this module.
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.activations import swiglu
from mlx_lm.models.base import create_attention_mask, create_ssm_mask

from .cache import cache_layout, make_cache, tick
from .config import HydraArgs
from .kernels.dispatch import backend
from .mixer import FusedMixer, SpecMixer
from .protected import FLOAT32_NAMES, is_protected
from .step import Step

ModelArgs = HydraArgs

# On a GPU MLX prepares a whole forward pass before the first layers are done, and holds what every
# layer needs in between. Over many tokens that is gigabytes, so a long step waits now and then.
LAYERS_AHEAD = 4
LONG_STEP = 256  # tokens; shorter steps hold little and would feel the wait


class SpecMLP(nn.Module):
    """SwiGLU with the three matrices of the checkpoint."""

    def __init__(self, E: int, hidden: int):
        super().__init__()
        self.gate_proj = nn.Linear(E, hidden, bias=False)
        self.up_proj = nn.Linear(E, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, E, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class FusedMLP(nn.Module):
    """SwiGLU with gate and up in one matrix, gate rows first."""

    def __init__(self, E: int, hidden: int):
        super().__init__()
        self.gate_up_proj = nn.Linear(E, 2 * hidden, bias=False)
        self.down_proj = nn.Linear(hidden, E, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        gate, up = mx.split(self.gate_up_proj(x), 2, axis=-1)
        return self.down_proj(swiglu(gate, up))


class HydraLayer(nn.Module):
    """One pre-norm decoder layer."""

    def __init__(self, args: HydraArgs, layer: int):
        super().__init__()
        fused = args.weights_form == "fused"
        self.self_attn = (FusedMixer if fused else SpecMixer)(args, layer)
        self.mlp = (FusedMLP if fused else SpecMLP)(args.hidden_size, args.intermediate_size)
        self.input_layernorm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)

    def __call__(self, x: mx.array, step: Step, kv: Any = None, arrays: Any = None) -> mx.array:
        """[B, T, E] -> [B, T, E]."""
        x = x + self.self_attn(self.input_layernorm(x), step, kv, arrays)
        return x + self.mlp(self.post_attention_layernorm(x))


class HydraModel(nn.Module):
    """Embedding, layers and last norm: tokens [B, T] -> hidden states [B, T, E]."""

    def __init__(self, args: HydraArgs):
        super().__init__()
        self.args = args
        self.embed_tokens = nn.Embedding(args.vocab_size, args.hidden_size)
        self.layers = [HydraLayer(args, i) for i in range(args.num_hidden_layers)]
        self.norm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self.layout = cache_layout(args)

    def __call__(
        self,
        inputs: mx.array,
        cache: list | None = None,
        input_embeddings: mx.array | None = None,
        kept: list | None = None,
    ) -> mx.array:
        h = self.embed_tokens(inputs) if input_embeddings is None else input_embeddings
        layout = self.layout
        if cache is None:
            cache = [None] * layout.length
        counter = cache[layout.position]
        # Read before any update: a batch's offset is an array that += changes in place.
        offset = 0 if counter is None else counter.offset + 0
        arrays = next((cache[i] for i in layout.arrays if i is not None), None)
        step = Step(
            offset,
            create_attention_mask(h, counter),
            create_ssm_mask(h, arrays),
            None if self.training else backend(),
            kept,
        )
        wait = step.backend is not None and h.shape[1] >= LONG_STEP
        for i, (layer, kv, ar) in enumerate(zip(self.layers, layout.kv, layout.arrays)):  # noqa: B905
            if wait and i and i % LAYERS_AHEAD == 0:
                mx.eval(h)
            h = layer(
                h,
                step,
                None if kv is None else cache[kv],
                None if ar is None else cache[ar],
            )
        if counter is not None and not self.args.has_fa:
            tick(counter, h.shape[0], h.shape[1], self.args.head_dim, h.dtype)
        return self.norm(h)


class Model(nn.Module):
    """A HydraHead language model.

    logits = model(tokens[B, T], cache=None)     # [B, T, V], dtype of the weights
    cache = model.make_cache()                   # flat list, see cache.py
    """

    def __init__(self, args: HydraArgs) -> None:
        super().__init__()
        self.args = args
        self.model_type = args.model_type
        self.model = HydraModel(args)
        if not args.tie_word_embeddings:
            self.lm_head = nn.Linear(args.hidden_size, args.vocab_size, bias=False)

    def __call__(
        self,
        inputs: mx.array,
        cache: list | None = None,
        input_embeddings: mx.array | None = None,
    ) -> mx.array:
        """Logits for every position.

        Args:
            inputs: [B, T] token ids. cache: from make_cache, updated in place, or None.
            input_embeddings: [B, T, E] to use instead of the embedding table.

        Returns:
            [B, T, V].
        """
        return self.head(self.model(inputs, cache, input_embeddings))

    def head(self, h: mx.array) -> mx.array:
        """Logits [B, T, V] of hidden states [B, T, E]; give it the last token's when only its
        are wanted, MLX computes a whole product for a slice of it."""
        if self.args.tie_word_embeddings:
            return self.model.embed_tokens.as_linear(h)
        return self.lm_head(h)

    @property
    def layers(self) -> list:
        """The decoder layers."""
        return self.model.layers

    def make_cache(self) -> list:
        """An empty cache for one sequence; see cache.py for the layout."""
        return make_cache(self.args)

    def sanitize(self, weights: dict) -> dict:
        """Drop what the forward pass never reads; safe to call twice."""
        drop = {k for k in weights if k.endswith("rotary_emb.inv_freq")}
        if self.args.tie_word_embeddings:
            drop |= {k for k in weights if k.startswith("lm_head.")}
        return {k: v for k, v in weights.items() if k not in drop}

    @property
    def quant_predicate(self) -> Callable[[str, nn.Module], bool]:
        """What may be quantised: path, module -> bool or parameters (mlx-lm's protocol)."""
        return lambda path, module: not is_protected(path)

    @property
    def cast_predicate(self) -> Callable[[str], bool]:
        """What may be cast to a smaller float type: parameter path -> bool."""
        return lambda path: path.rsplit(".", 1)[-1] not in FLOAT32_NAMES
