"""The base model, as the thing to learn from: every head full attention, logit for logit.

It is the same code as the student with the identity head map (spec section 6), so a Llama, a Qwen3
or a GGUF is a teacher without code of its own.
Axes: B batch, T tokens, E hidden size, H heads, D head dim, L layers.
"""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from .config import MODEL_TYPE
from .converter import Job, spec_layer
from .errors import UsageError
from .layouts import LAYER
from .loading import DTYPES, load_tokenizer, read_config
from .mixer import Step
from .model import HydraLayer, Model
from .sources import TOKEN_KEYS, Source, open_source
from .tensors import to_float

GIB = 1 << 30


def open_base(path: Path) -> Source:
    """Open a plain Llama, Mistral or Qwen3 checkpoint (folder or GGUF) as itself.

    Raises:
        UsageError: It is a HydraHead model. HydraError: See sources.open_source.
    """
    if not path.is_file() and read_config(path).get("model_type") == MODEL_TYPE:
        raise UsageError(
            f"{path} is a HydraHead model already, expected a plain one.",
            "Give the Llama, Mistral or Qwen3 model that it was made from.",
        )
    return open_source(path, "identity")


def float_job(source: Source) -> Job:
    """A conversion of the base into unpacked spec form, to read layers with."""
    return Job(source, "spec", None, None, 0, 2 * GIB, for_hf=True)


def load_teacher(source: Source, dtype: str = "float32") -> Model:
    """The base model in memory, frozen.

    Args:
        source: From open_base. dtype: Of its weights and its arithmetic.
    """
    job, kind = float_job(source), DTYPES[dtype]
    model = Model(job.args)
    weights = {n: source.get(n, False) for n in source.names("") if ".layers." not in n}
    for i in range(job.args.num_hidden_layers):
        prefix = LAYER.format(i=i)
        weights.update({prefix + n: x for n, x in spec_layer(job, i).items()})
    model.load_weights([(n, to_float(x, kind)) for n, x in weights.items()], strict=True)
    model.freeze()
    model.eval()
    mx.eval(model.parameters())
    return model


def source_tokenizer(source: Source) -> Any:
    """The tokenizer of a checkpoint, of a GGUF too.

    Raises:
        UsageError: It has none. CheckpointError: It is broken.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if not source.write_tokenizer(folder):
            raise UsageError(f"{source.path} has no tokenizer.", "Give packed tokens as text.")
        config = {k: source.config[k] for k in TOKEN_KEYS if k in source.config}
        (folder / "config.json").write_text(json.dumps(config), "utf-8")
        return load_tokenizer(folder)


def head_rms(
    source: Source, windows: np.ndarray, rows: int, progress: Callable[[str, int, int], None]
) -> np.ndarray:
    """RMS of every head's output in the base model, at the input of o_proj (spec section 4, gamma).

    One layer's weights are in memory at a time, and the hidden states of all the text.

    Args:
        source: From open_base. windows: [N, T] token ids. rows: Windows in one forward pass.
        progress: Called with (label, done, total) after each layer.

    Returns:
        [L, H] float64.
    """
    job = float_job(source)
    args = job.args
    embedding = source.get("model.embed_tokens.weight", False)
    cuts = [mx.array(windows[i : i + rows]) for i in range(0, len(windows), rows)]
    states = [embedding[tokens].astype(mx.float32) for tokens in cuts]
    mx.eval(states)
    del embedding
    layers, out = args.num_hidden_layers, []
    for i in range(layers):
        layer = HydraLayer(args, i)
        layer.load_weights([(n, to_float(x)) for n, x in spec_layer(job, i).items()])
        total = mx.zeros(args.num_attention_heads)
        for j, h in enumerate(states):
            step = Step(0, "causal" if h.shape[1] > 1 else None, None)
            attention = layer.self_attn
            heads = attention.full_attention(
                attention.project(layer.input_layernorm(h)), step, None
            )
            total = total + (heads * heads).sum(axis=(0, 1, 3))
            h = h + attention.output(heads, None)
            states[j] = h + layer.mlp(layer.post_attention_layernorm(h))
            mx.eval(states[j], total)
        out.append(np.sqrt(np.array(total, np.float64) / (windows.size * args.head_dim)))
        progress(f"layer {i}", i + 1, layers)
    return np.stack(out)
