"""The kernels of one layer: what a step may use and why not, and the step itself.

A layer asks here first and runs its operations where the answer is None. Every answer comes with a
reason, kept in `paths`, which --stats prints. What a layer may use is decided once for each
kind of step: by eligibility, then by the first-use check.
"""

import operator
from collections import Counter
from typing import Any

import mlx.core as mx

from . import first_use, ops
from .batch_cache import HydraBatchCache
from .cache import CONV, STATE
from .kernels import dispatch, fa_decode, fa_prefill, fa_shared, hydra_decode, la_decode, la_prefill
from .kernels.dispatch import PLAIN_FROM, Backend
from .kernels.fa_decode import KeyValues
from .kernels.hydra_decode import HydraLayer
from .kernels.la_decode import LaLayer
from .step import Projected, Step

# Tensors of a FusedMixer that the decode kernels read.
WEIGHTS = (
    "A_log", "dt_bias", "conv_weight", "la_q_norm", "la_k_norm", "fa_q_norm", "fa_k_norm",
)  # fmt: skip


FEW_TOKENS = ("kernels", f"T <= {la_decode.MAX_TOKENS}")  # a path whose verdict is known


class LayerKernels:
    """Kernels of one FusedMixer.

    Attributes:
        paths: {"decode" or "prefill", kind: (what ran last, why)}.
    """

    def __init__(self):
        self.paths = {}
        self._gathered = None
        self._from = []
        self._trusted = {}

    def gather(self, mixer: Any) -> HydraLayer | LaLayer:
        """What the decode kernels need of the layer; anew when its weights were replaced."""
        now = [mixer.get(n) for n in WEIGHTS]  # a Module is a dict; attributes are slower
        if self._gathered is None or any(map(operator.is_not, now, self._from)):
            both = mixer.heads.fa and mixer.heads.la
            self._gathered, self._from = (HydraLayer if both else LaLayer).of(mixer), now
        return self._gathered

    def _may(self, name: str, key: tuple, verdict: tuple, check: Any) -> bool:
        """Note and give the verdict; `check` is asked once for each key."""
        ok, reason = verdict
        if ok and key not in self._trusted:
            self._trusted[key] = check()
        if ok and self._trusted[key]:
            ok, reason = False, self._trusted[key]
        self.paths[name] = ("kernels" if ok else "operations", reason)
        return ok

    def both(
        self, mixer: Any, x: mx.array, ab: mx.array, step: Step, kv: Any, arrays: Any
    ) -> mx.array | None:
        """Both kinds of head for at most 8 tokens, in two dispatches; updates the caches.

        Args:
            x: [B, T, W], output of in_proj. ab: [B, T, 2*Hl], of ab_proj.

        Returns:
            Input of the output projection [B, T, H*D], or None: operations.
        """
        if x.shape[1] > la_decode.MAX_TOKENS:
            return None
        why_not = _in_parts(kv)
        if why_not:
            self.paths["decode"] = ("operations", why_not)
            return None
        to, layer = step.backend, self.gather(mixer)
        lengths = None if arrays is None else arrays.lengths
        single = kv is None or type(kv.offset) is int
        held = hydra_decode.cached(kv) if single else None
        shape = None
        if held is not None:  # a verdict holds for a million keys more
            B, heads, allocated, width = held.parts[0].shape
            shape = B, heads, allocated >> 20, width
        key = ("hydra", x.shape, x.dtype, ab.dtype, type(kv), _kind(held), shape)
        plain = single and step.la_mask is None and lengths is None
        plain = plain and not isinstance(step.fa_mask, mx.array)
        if not plain or self._trusted.get(key) != "":
            verdict = hydra_decode.eligible(layer, x, ab, kv, step.fa_mask, step.la_mask, lengths)
            if not self._may(
                "decode", key, verdict, lambda: first_use.hydra(mixer, layer, x, ab, kv, to)
            ):
                return None
        else:
            self.paths["decode"] = FEW_TOKENS
        tail, state = (None, None) if arrays is None else (arrays[CONV], arrays[STATE])
        y, state, tail, k, v = hydra_decode.run(
            layer, x, ab, step.offset, tail, state, held, to.route, to.run, cores=to.cores
        )
        if kv is not None:
            kv.update_and_fetch(k, v)
        _store(arrays, tail, state, x.shape[1])
        return y

    def linear_step(
        self, mixer: Any, x: mx.array, ab: mx.array, step: Step, arrays: Any
    ) -> mx.array | None:
        """LA heads for at most 8 tokens in one dispatch; [B, T, Hl, D] or None."""
        if x.shape[1] > la_decode.MAX_TOKENS:
            return None
        to, layer = step.backend, self.gather(mixer)
        layer = getattr(layer, "la", layer)
        lengths = None if arrays is None else arrays.lengths
        verdict = la_decode.eligible(layer, x, ab, step.la_mask, lengths)
        rows = isinstance(step.offset, mx.array) and step.offset.size > 1
        key = ("la", x.shape[1] > 1, x.dtype, ab.dtype, rows)
        if not self._may(
            "decode LA",
            key,
            verdict,
            lambda: first_use.la_step(mixer, layer, x, ab, step.offset, to),
        ):
            return None
        tail, state = (None, None) if arrays is None else (arrays[CONV], arrays[STATE])
        y, state, tail = la_decode.run(layer, x, ab, step.offset, tail, state, to.route, to.run)
        _store(arrays, tail, state, x.shape[1])
        return y

    def gated_delta(
        self, q: mx.array, k: mx.array, v: mx.array, g: mx.array, beta: mx.array,
        state: mx.array | None, mask: mx.array | None, to: Backend,
    ) -> tuple | None:  # fmt: skip
        """ops.gated_delta by kernels, or None."""
        verdict = la_prefill.eligible(q, k, v, state)
        which = la_prefill.variant(q.shape[1], q.shape[-1], v.shape[-1])[0]
        flags = (mask is not None, state is not None)
        if not self._may(
            "prefill LA",
            ("delta", which, q.dtype, *flags),
            verdict,
            lambda: first_use.delta(q, v, *flags, to),
        ):
            return None
        return la_prefill.run(q, k, v, g, beta, state, mask, to.route, to.run)

    def attention(self, mixer: Any, q: mx.array, p: Projected, step: Step, kv: Any) -> tuple:
        """FA heads up to and with gate and norm, over a cache that holds the new tokens.

        Args:
            q: [B, T, Hf, D], after norm and RoPE, before any scale. kv: The layer's cache.

        Returns:
            [B, T, Hf, D] or None, and whether gate and norm are done already.
        """
        to, T, args = step.backend, q.shape[1], mixer.args
        if _in_parts(kv):
            return self.parted(mixer, q, p, step, kv)
        if not isinstance(getattr(kv, "offset", None), int) or not hasattr(kv, "keys"):
            self.paths["FA"] = ("operations", f"a {type(kv).__name__}")
            return None, False
        held, groups, many = KeyValues.of(kv), mixer.heads.kv_of_fa, T > fa_decode.MAX_TOKENS
        if many:
            verdict = fa_prefill.eligible(q, held, groups, step.fa_mask)
        else:
            verdict = fa_decode.eligible(q, held, groups, step.fa_mask, p.gate_fa)
            least = PLAIN_FROM[to.route]
            if verdict[0] and not held.quantised and (least is None or held.S < least):
                verdict = False, "a plain cache: MLX's own attention"
        key = ("fa", many or T, q.dtype, _kind(held))
        if not self._may(
            "prefill FA" if many else "decode FA",
            key,
            verdict,
            lambda: first_use.attention(q, kv, groups, many, to),
        ):
            return None, False
        call = (q, held, groups, args.head_dim**-0.5, args.logit_scale_a)
        if many:
            return fa_prefill.run(*call, route=to.route, executor=to.run), False
        y = fa_decode.run(
            *call, None, p.gate_fa, args.fa_gate_position, args.fusion_norm,
            mixer.weight("fa_norm"), to.route, to.run, cores=to.cores,
        )  # fmt: skip
        return y, True

    def parted(self, mixer: Any, q: mx.array, p: Projected, step: Step, kv: Any) -> tuple:
        """attention() over a batch, or over keys and values shared with forks."""
        to, T, args, heads = step.backend, q.shape[1], mixer.args, mixer.heads.kv_of_fa
        held, starts, groups = fa_shared.parts_of(kv)
        if T > fa_decode.MAX_TOKENS:
            verdict = False, f"{T} tokens over shared keys"
        elif not (held.quantised or groups):
            verdict = False, "a plain batch: MLX's own attention"
        else:
            verdict = fa_shared.eligible(q, held, groups, heads, p.gate_fa)
        name, key = "decode FA", ("parted", T, q.dtype, bool(groups), _kind(held))
        if not self._may(
            name, key, verdict, lambda: first_use.parted(q, kv, heads, bool(groups), to)
        ):
            return None, False
        s = None
        if args.logit_scale_a is not None:
            s = ops.log_length_scale(step.offset, T, args.logit_scale_a)
        y = fa_shared.run(
            q, held, starts, groups, heads, args.head_dim**-0.5, s,
            p.gate_fa, args.fa_gate_position, args.fusion_norm, mixer.weight("fa_norm"),
            to.route, to.run, to.cores,
        )  # fmt: skip
        return y, True


def _in_parts(kv: Any) -> str:
    """Why a cache has no single buffer of one sequence, or ""."""
    if isinstance(kv, HydraBatchCache):
        return "a HydraBatchCache"
    return "keys and values shared with forks" if getattr(kv, "shared", ()) else ""


def _kind(held: KeyValues | None) -> tuple | None:
    """What the kernels are specialised for in a cache; None for none or an empty one."""
    return None if held is None else (held.dtype, held.widths, held.group_size)


def _store(arrays: Any, tail: mx.array, state: mx.array, T: int):
    if arrays is not None:
        arrays[CONV], arrays[STATE] = tail, state
        arrays.advance(T)


def summary(model: Any) -> str | None:
    """In words, what the layers of a model ran last and why; None for other models."""
    mixers = [getattr(layer, "self_attn", None) for layer in getattr(model, "layers", ())]
    kernels = [m.kernels for m in mixers if isinstance(getattr(m, "kernels", None), LayerKernels)]
    if not kernels:
        return None
    way, why = dispatch.route()
    if way == "ops":
        return f"operations ({why})"
    found = Counter((name, *path) for k in kernels for name, path in k.paths.items())
    parts = [
        f"{name}: {what} in {n} layers ({why})" for (name, what, why), n in sorted(found.items())
    ]
    return f"{way}; " + "; ".join(parts)
