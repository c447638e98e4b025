"""Every kernel against its twin, and a small whole model against the float64 reference.

For `hydra-mlx doctor`. The checks are those of first_use.py, asked for all the kinds of call that a
model makes: one and several tokens, plain and quantised caches, head dims, types.
"""

import contextlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map_with_path

from . import first_use, reference
from .config import HydraArgs
from .first_use import Small
from .kernel_paths import DTYPES, layer_paths
from .kernels import fa_decode, fa_shared
from .kernels.dispatch import Backend, relative_rms
from .kernels.hydra_decode import HydraLayer
from .kernels.la_decode import LaLayer
from .mixer import FusedMixer
from .model import Model

E = 64  # hidden size of the layers checked: kernels see only what comes after the projection
ARITHMETIC = "a small model against the float64 reference"
CACHES = {"plain cache": None, "8-bit cache": 8, "4-bit cache": 4}
NAMES = {DTYPES[n]: n for n in ("F32", "F16", "BF16")}
REFERENCE_LIMIT = 1e-4  # a small model in float32 against float64
GPU_LIMIT = 3e-3  # where float32 products may be TF32


@dataclass(frozen=True)
class Check:
    """One thing to try.

    Attributes:
        name: Kernel and kind of call. run: Does it: (largest relative error or None, "" or what is
            wrong).
    """

    name: str
    run: Callable[[], tuple]


def small_args(D: int, **changes: Any) -> HydraArgs:
    """Three layers of 4 heads: both kinds, LA heads only, FA heads only."""
    values = {
        "hidden_size": E,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 50,
        "full_attention_heads": [[0, 1, 3], [], [0, 1, 2, 3]],
        "head_dim": D,
        "rope_theta": 10000.0,
        "weights_form": "fused",
    }
    return HydraArgs(**{**values, **changes})


def _random(name: str, x: mx.array) -> mx.array:
    if name.endswith("A_log"):
        return mx.log(mx.random.uniform(0.5, 8.0, x.shape))
    if x.ndim == 1:
        return 1.0 + 0.2 * mx.random.normal(x.shape)
    return mx.random.normal(x.shape) * x.shape[-1] ** -0.5


def _mixer(args: HydraArgs, layer: int, dtype: mx.Dtype) -> FusedMixer:
    mixer = FusedMixer(args, layer)
    mixer.update(tree_map_with_path(_random, mixer.parameters()))
    mixer.set_dtype(dtype, lambda d: mx.issubdtype(d, mx.floating))
    for name in ("A_log", "dt_bias"):  # float32 in every model
        if name in mixer:
            mixer[name] = mixer[name].astype(mx.float32)
    mixer.eval()
    return mixer


def reference_error(backend: Backend | None) -> tuple:
    """A small spec-form model against reference.forward: as Check.run."""
    args = replace(small_args(64), weights_form="spec", num_key_value_heads=2)
    mx.random.seed(20606)
    model = Model(args)
    model.update(tree_map_with_path(_random, model.parameters()))
    model.eval()
    weights = {n: np.array(x, np.float64) for n, x in tree_flatten(model.parameters())}
    tokens = np.arange(20)[None] * 7 % args.vocab_size
    cache = model.make_cache()
    parts = [model(mx.array(tokens[:, a:b]), cache=cache) for a, b in ((0, 17), (17, 19), (19, 20))]
    out = mx.concatenate(parts, axis=1)
    error = relative_rms([out], [mx.array(reference.forward(args, weights, tokens))])
    limit = REFERENCE_LIMIT if backend is None else GPU_LIMIT
    return error, "" if error <= limit else f"differs by {error:.2g}, more than {limit:.2g}"


def checks(backend: Backend | None, own: HydraArgs | None, own_dtype: mx.Dtype) -> Iterator[Check]:
    """All checks, the most telling ones first.

    Args:
        backend: What runs kernels; with None there is only the model to check.
        own: Config of the user's model, whose layers come first, or None.
        own_dtype: Of its activations.
    """
    yield Check(ARITHMETIC, lambda: reference_error(backend))
    if backend is None:
        return
    groups = []
    if own is not None:
        groups += _model_layers(own, own_dtype)
    for D, dtype in ((128, mx.bfloat16), (64, mx.bfloat16), (128, mx.float16), (64, mx.float32)):
        groups.append((small_args(D), (0, 1, 2), dtype))
    seen: set = set()
    for args, layers, dtype in groups:
        for layer in layers:
            for check in _layer_checks(args, layer, dtype, backend):
                if check.name not in seen:
                    seen.add(check.name)
                    yield check


def _model_layers(args: HydraArgs, dtype: mx.Dtype) -> list:
    """One layer for each distinct list of FA heads."""
    args = replace(args, hidden_size=E, weights_form="fused", attention_bias=False)
    firsts: dict = {}
    for i, heads in enumerate(args.full_attention_heads):
        firsts.setdefault(tuple(heads), i)
    return [(args, tuple(firsts.values()), dtype)]


def _layer_checks(args: HydraArgs, layer: int, dtype: mx.Dtype, to: Backend) -> Iterator[Check]:
    made: list = []

    def mixer() -> FusedMixer:
        if not made:
            made.append(_mixer(args, layer, dtype))
        return made[0]

    D, Hf = args.head_dim, len(args.full_attention_heads[layer])
    Hl = args.num_attention_heads - Hf
    about = f"{Hf} FA and {Hl} LA heads of {D}, {str(dtype).rsplit('.', 1)[-1]}"

    def like(bits: int | None, heads: int) -> Any:
        from mlx_lm.models.cache import KVCache, QuantizedKVCache

        empty = KVCache() if bits is None else QuantizedKVCache(32, bits)
        return Small().cache(empty, heads, D, dtype)

    def both(T: int, bits: int | None) -> str:
        m = mixer()
        x, ab = (mx.zeros((1, T, n), dtype) for n in (m.rows.total, 2 * Hl))
        return first_use.hydra(m, HydraLayer.of(m), x, ab, like(bits, len(m.heads.kv)), to)

    def la(T: int) -> str:
        m = mixer()
        x, ab = (mx.zeros((1, T, n), dtype) for n in (m.rows.total, 2 * Hl))
        return first_use.la_step(m, LaLayer.of(m), x, ab, 0, to)

    def delta(T: int) -> str:
        q = mx.zeros((1, T, Hl, D), dtype)
        return first_use.delta(q, q, False, True, to)

    def attention(T: int, bits: int | None) -> str:
        m = mixer()
        q = mx.zeros((1, T, Hf, D), dtype)
        kv = like(bits, len(m.heads.kv))
        return first_use.attention(q, kv, m.heads.kv_of_fa, T > 8, to)

    def batch(T: int, bits: int | None) -> str:
        m = mixer()
        q = mx.zeros((2, T, Hf, D), dtype)
        return first_use.parted(q, like(bits, len(m.heads.kv)), m.heads.kv_of_fa, True, to)

    for name, bits in CACHES.items():
        if bits is not None and D % 32:
            continue
        if 1 <= Hf <= fa_shared.HEADS and D in fa_decode.HEAD_DIMS:
            yield _check(f"fa_decode, a batch, {name}, {about}", lambda b=bits: batch(1, b))
        group = None if bits is None else 32
        for path in layer_paths(args, layer, to.route, NAMES[dtype], bits, group):
            kernel = path.runs.split(" ")[0]
            asked = {
                "hydra_decode": [
                    (name, lambda b=bits: both(1, b)),
                    ("3 tokens", lambda: both(3, None)),
                ],
                "la_decode": [("1 token", lambda: la(1)), ("3 tokens", lambda: la(3))],
                "la_prefill": [
                    ("9 tokens", lambda: delta(9)),
                    ("many tokens", lambda: delta(2048)),
                ],
                "fa_decode": [(name, lambda b=bits: attention(1, b))],
                "fa_prefill": [(name, lambda b=bits: attention(70, b))],
            }.get(kernel, [])
            for what, ask in asked:
                yield _check(f"{kernel}, {what}, {about}", ask)


def _check(name: str, ask: Callable[[], str]) -> Check:
    def run() -> tuple:
        trust = first_use.TRUST
        with trust.anew(), contextlib.redirect_stderr(io.StringIO()):  # the verdict is the caller's
            why = ask()
            return max(trust.passed.values(), default=None), why

    return Check(name, run)
