"""A base model taken apart: the pieces of its forward pass that head scoring needs one by one.

Serves mlx-lm's Llama and Qwen3 models, plain or quantised, and HydraHead models whose heads are
all full attention with the base model's own mathematics (head map `identity`), with one set of
methods. Letters as in config.py; R is a batch of patched rows.
"""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .errors import ConfigError
from .model import Model

BLOCK = 256  # queries that attend at a time, so that scores take T * BLOCK numbers and not T * T
PLAIN = ("q_proj", "k_proj", "v_proj", "o_proj", "rope")


class Trunk:
    """The pieces of a model's forward pass.

    Args:
        model: From hydra_mlx.load_model, or open_base.

    Raises:
        ConfigError: The model is of another kind than the module docstring says.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.hydra = isinstance(model, Model)
        body = getattr(model, "model", None)
        self.blocks = list(getattr(body, "layers", []))
        if self.hydra:
            _require_identity(model.args)
            args = model.args
            self.H, self.Hk, self.D = (
                args.num_attention_heads,
                args.num_key_value_heads,
                args.head_dim,
            )
        else:
            kind = getattr(model, "model_type", type(model).__name__)
            if not self.blocks or not all(_is_plain(b) for b in self.blocks):
                raise ConfigError(
                    f"The heads of a {kind!r} model cannot be scored.",
                    "Plain Llama and Qwen3 models can, without sliding windows.",
                )
            attn = self.blocks[0].self_attn
            self.H, self.Hk = attn.n_heads, attn.n_kv_heads
            self.D = round(attn.scale**-2)
        self.L = len(self.blocks)
        self.tied = "lm_head" not in model
        self.vocab = body.embed_tokens.weight.shape[0]
        self._compare()

    def _compare(self):
        # Other architectures have the same names and another order of norms, or scaled embeddings.
        ids = mx.arange(8)[None] * 7 % self.vocab
        h = self.embed(ids)
        try:
            for layer in range(self.L):
                heads = self.attend(*self.qkv(layer, h))
                h = self.mlp(layer, h + self.output(layer, heads))
            ours, theirs = self.logits(h), self.model(ids)
            ours, theirs = ours.astype(mx.float32), theirs.astype(mx.float32)
            same = (mx.square(ours - theirs).sum() <= 1e-3 * mx.square(theirs).sum()).item()
        except (AttributeError, TypeError, ValueError):
            same = False
        if not same:
            kind = getattr(self.model, "model_type", type(self.model).__name__)
            raise ConfigError(
                f"The heads of a {kind!r} model cannot be scored: its layers differ from Llama's."
            )

    def embed(self, ids: mx.array) -> mx.array:
        """[B, T] -> [B, T, E]."""
        return self.model.model.embed_tokens(ids)

    def qkv(self, layer: int, h: mx.array, positions: mx.array | int = 0) -> tuple:
        """Queries, keys and values of the residual stream at the input of a layer, rotated.

        Args:
            h: [R, n, E]. positions: Of the first row, the others following; or [n] int32.

        Returns:
            [R, H, n, D], [R, Hk, n, D], [R, Hk, n, D].
        """
        block = self.blocks[layer]
        attn, x = block.self_attn, block.input_layernorm(h)
        R, n, _ = x.shape
        if self.hydra:
            p = attn.project(x)
            q, k, v = p.q_fa, p.k_fa, p.v_fa
            if attn.args.fa_qk_norm:
                eps = attn.args.rms_norm_eps
                q = mx.fast.rms_norm(q, attn.weight("fa_q_norm"), eps)
                k = mx.fast.rms_norm(k, attn.weight("fa_k_norm"), eps)
        else:
            q, k, v = (
                proj(x).reshape(R, n, -1, self.D)
                for proj in (attn.q_proj, attn.k_proj, attn.v_proj)
            )
            if "q_norm" in attn:
                q, k = attn.q_norm(q), attn.k_norm(k)
        q, k, v = (y.swapaxes(1, 2) for y in (q, k, v))
        return self._rotate(attn, q, positions), self._rotate(attn, k, positions), v

    def _rotate(self, attn: Any, x: mx.array, positions: mx.array | int) -> mx.array:
        if isinstance(positions, int):
            return attn.rope(x, offset=positions)
        # Positions with gaps: each becomes a batch entry with an offset of its own.
        R, N, n, D = x.shape
        y = attn.rope(x.transpose(2, 0, 1, 3).reshape(n, R * N, 1, D), offset=positions)
        return y.reshape(n, R, N, D).transpose(1, 2, 0, 3)

    def attend(self, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        """Causal attention; the queries are the last ones of the keys' positions.

        Args:
            q: [R, H, n, D]. k, v: [R, Hk, T, D], T >= n.

        Returns:
            The heads at the input of o_proj, [R, n, H, D].
        """
        n, before, out = q.shape[2], k.shape[2] - q.shape[2], []
        for start in range(0, n, BLOCK):  # keys after a block are never looked at
            end = min(start + BLOCK, n)
            seen = before + end
            out.append(
                mx.fast.scaled_dot_product_attention(
                    q[:, :, start:end],
                    k[:, :, :seen],
                    v[:, :, :seen],
                    scale=self.D**-0.5,
                    mask="causal",
                )
            )
        o = out[0] if len(out) == 1 else mx.concatenate(out, axis=2)
        return o.swapaxes(1, 2)

    def output(self, layer: int, heads: mx.array) -> mx.array:
        """o_proj: [R, n, H, D] -> [R, n, E]."""
        return self.blocks[layer].self_attn.o_proj(heads.flatten(2))

    def mlp(self, layer: int, h: mx.array) -> mx.array:
        """The residual stream after a layer's MLP, from that before it, [R, n, E]."""
        block = self.blocks[layer]
        return h + block.mlp(block.post_attention_layernorm(h))

    def norm(self, h: mx.array) -> mx.array:
        """The last norm."""
        return self.model.model.norm(h)

    def logits(self, h: mx.array) -> mx.array:
        """[..., E] residual stream after the last layer -> [..., V]."""
        x = self.norm(h)
        return self.model.model.embed_tokens.as_linear(x) if self.tied else self.model.lm_head(x)

    def unembedding(self, ids: mx.array) -> mx.array:
        """Rows of the output matrix, [n] -> [n, E] float32: logits of chosen tokens only."""
        if self.tied:
            return self.model.model.embed_tokens(ids).astype(mx.float32)
        head = self.model.lm_head
        if not isinstance(head, nn.QuantizedLinear):
            return head.weight[ids].astype(mx.float32)
        biases = head.get("biases")
        return mx.dequantize(
            head.weight[ids],
            head.scales[ids],
            None if biases is None else biases[ids],
            head.group_size,
            head.bits,
            head.mode,
        ).astype(mx.float32)


def _is_plain(block: Any) -> bool:
    attn = getattr(block, "self_attn", None)
    whole = attn is not None and all(hasattr(attn, n) for n in (*PLAIN, "n_heads", "n_kv_heads"))
    return whole and hasattr(block, "mlp") and not getattr(block, "use_sliding", False)


def _require_identity(args: Any):
    from .sources import IDENTITY

    every = list(range(args.num_attention_heads))
    if any(heads != every for heads in args.full_attention_heads):
        raise ConfigError(
            "This HydraHead model has linear-attention heads; only a base model can be scored.",
            "Give the Llama or Qwen3 model that it was made from.",
        )
    for key, value in IDENTITY.items():
        if getattr(args, key) != value:
            raise ConfigError(
                f"This HydraHead model has {key} {getattr(args, key)!r}, a base has {value!r}.",
                "Give the Llama or Qwen3 model that it was made from.",
            )


def open_base(path: Path, dtype: str | None = None) -> tuple:
    """Load what is to be scored: a model folder or a Llama-family GGUF.

    Args:
        dtype: As of load_model; None is float32, in which small effects are not rounded away.

    Returns:
        (model, tokenizer).

    Raises:
        HydraError: It cannot be read.
    """
    from . import loading

    if not path.is_file():
        # On a CPU "auto" is float32 too, and takes quantised weights apart, which is faster.
        dtype = dtype or ("auto" if loading.on_cpu() else "float32")
        return loading.load_model(path, dtype), loading.load_tokenizer(path)
    from .teacher import float_job, source_tokenizer
    from .teacher import open_base as open_plain
    from .verify import source_model

    source = open_plain(path)
    model = source_model(float_job(source))
    if dtype not in (None, "auto", "float32"):
        model.set_dtype(loading.DTYPES[dtype])
    mx.eval(model.parameters())
    return model, source_tokenizer(source)
