"""First-use checks: each kernel specialisation on a small random input, against its twin.

The twin is the mixer's own operations in float32, whatever the model's dtype, so that the
difference is the kernel's rounding and little else. MLX may compute float32 products as TF32 on
some GPUs; the limits leave room for that.
"""

from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache

from . import ops
from .batch_cache import HydraBatchCache
from .cache import CONV, STATE
from .kernels import fa_decode, fa_prefill, fa_shared, hydra_decode, la_decode, la_prefill
from .kernels.dispatch import TRUST, Backend, relative_rms
from .kernels.fa_decode import KeyValues
from .kv_cache import HydraKVCache, kv_format
from .shared_rows import SharedRows
from .step import Step

LIMITS = {mx.float32: 3e-3, mx.float16: 5e-3, mx.bfloat16: 2e-2}
CACHED = 70  # keys before the step: more than one step of a scan, no whole number of them


class PlainCache:
    """Keys and values in float32; new ones go through the rounding of the cache they stand for."""

    def __init__(self, kv: KeyValues | None):
        self.rounding = None if kv is None or not kv.quantised else (kv.widths, kv.group_size)
        self.held = None if kv is None else _plain(kv)
        self.new = None

    def update_and_fetch(self, k: mx.array, v: mx.array) -> tuple:
        """All keys and values, [B, Hk, S + T, D] float32."""
        self.new = k, v
        new = [k, v]
        if self.rounding is not None:
            widths, group = self.rounding
            new = [
                mx.dequantize(*mx.quantize(x, group, bits), group, bits)
                for x, bits in zip(new, widths, strict=True)
            ]
        if self.held is not None:
            new = [mx.concatenate(x, axis=2) for x in zip(self.held, new, strict=True)]
        return tuple(new)


def _plain(kv: KeyValues) -> tuple:
    """Keys and values in float32."""
    both = kv.pair
    if kv.quantised:
        both = [
            mx.dequantize(*x, kv.group_size, bits) for x, bits in zip(both, kv.widths, strict=True)
        ]
    return tuple(x[:, :, : kv.S].astype(mx.float32) for x in both)


class Small:
    """Random arrays, the same every time."""

    def __init__(self):
        self.keys = iter(mx.random.split(mx.random.key(20606), 16))

    def normal(self, *shape: int, dtype: mx.Dtype = mx.float32) -> mx.array:
        """Normally distributed."""
        return mx.random.normal(shape, key=next(self.keys)).astype(dtype)

    def cache(self, like: Any, heads: int, D: int, dtype: mx.Dtype) -> Any:
        """A cache of the same kind with CACHED tokens."""
        kv = HydraKVCache(*(kv_format(like) or ()))
        kv.update_and_fetch(*(self.normal(1, heads, CACHED, D, dtype=dtype) for _ in range(2)))
        return kv

    def recurrent(self, la: Any, B: int, dtype: mx.Dtype) -> ArraysCache:
        """Tail and state of a layer."""
        arrays = ArraysCache(2)
        if la.taps:
            arrays[CONV] = self.normal(B, la.taps - 1, 3 * la.heads * la.D, dtype=dtype)
        arrays[STATE] = self.normal(B, la.heads, la.D, la.D)
        return arrays


def _twin_arrays(arrays: ArraysCache) -> ArraysCache:
    twin = ArraysCache(2)
    twin[CONV], twin[STATE] = arrays[CONV], arrays[STATE]
    if twin[CONV] is not None:
        twin[CONV] = twin[CONV].astype(mx.float32)
    return twin


def _twin_step(offset: Any, T: int) -> Step:
    return Step(offset, None if T == 1 else "causal", None)


def hydra(mixer: Any, layer: Any, x: mx.array, ab: mx.array, like: Any, to: Backend) -> str:
    """Why hydra_decode may not do steps like this one, or "".

    Args:
        mixer: The FusedMixer. layer: Its HydraLayer. x: [B, T, W], ab: [B, T, 2*Hl]: dtypes and T
            are taken. like: The layer's cache, not updated yet, or None. to: Runs the kernels.
    """
    small, T, la = Small(), x.shape[1], layer.la
    x = small.normal(1, T, x.shape[2], dtype=x.dtype)
    ab = small.normal(1, T, ab.shape[2], dtype=ab.dtype)
    arrays = small.recurrent(la, 1, x.dtype)
    held, S = hydra_decode.cached(like), 0
    if held is not None:
        held = hydra_decode.cached(small.cache(like, layer.Hk, la.D, held.dtype))
        S = CACHED
    call = (layer, x, ab, S, arrays[CONV], arrays[STATE], held)
    first = hydra_decode.launch(*call, cores=to.cores)

    def check() -> float:
        y, state, _, k, v = hydra_decode.run(*call, to.route, to.run, cores=to.cores)
        plain, twin = PlainCache(held), _twin_arrays(arrays)
        f32 = mx.float32
        ref = mixer.by_kind(x.astype(f32), ab.astype(f32), _twin_step(S, T), plain, twin)
        return relative_rms([y, state, k, v], [ref, twin[STATE], *plain.new])

    return TRUST.why_not(("hydra_decode", *first.template), check, LIMITS[x.dtype])


def la_step(mixer: Any, layer: Any, x: mx.array, ab: mx.array, offset: Any, to: Backend) -> str:
    """Why la_decode may not do steps like this one, or ""; offset: Step.offset, else as hydra."""
    small, T = Small(), x.shape[1]
    B = 2 if isinstance(offset, mx.array) and offset.size > 1 else 1
    x = small.normal(B, T, x.shape[2], dtype=x.dtype)
    ab = small.normal(B, T, ab.shape[2], dtype=ab.dtype)
    arrays = small.recurrent(layer, B, x.dtype)
    offset = CACHED if B == 1 else mx.array([CACHED, CACHED // 2])
    call = (layer, x, ab, offset, arrays[CONV], arrays[STATE])

    def check() -> float:
        y, state, _ = la_decode.run(*call, to.route, to.run)
        twin, f32 = _twin_arrays(arrays), mx.float32
        p = mixer.split(x.astype(f32), ab.astype(f32))
        ref = mixer.linear_attention(p, _twin_step(offset, T), twin)
        return relative_rms([y, state], [ref, twin[STATE]])

    first = la_decode.launch(*call)
    return TRUST.why_not(("la_decode", *first.template), check, LIMITS[x.dtype])


def delta(q: mx.array, v: mx.array, masked: bool, started: bool, to: Backend) -> str:
    """Why la_prefill may not do calls like this one, or "".

    Args:
        q: [B, T, Hl, Dk]. v: [B, T, Hl, Dv]. masked, started: Whether mask and state are given.
    """
    which, _ = la_prefill.variant(q.shape[1], q.shape[-1], v.shape[-1])
    T, H, small = (9 if which == "steps" else 70), 3, Small()
    a = [small.normal(1, T, H, x.shape[-1], dtype=x.dtype) for x in (q, q, v)]
    a[:2] = ops.l2_normalise(a[0], q.shape[-1] ** -0.5), ops.l2_normalise(a[1])
    g, beta = -mx.abs(small.normal(1, T, H)), mx.sigmoid(small.normal(1, T, H))
    state = small.normal(1, H, v.shape[-1], q.shape[-1]) if started else None
    mask = mx.arange(T)[None] != 3 if masked else None
    options = (g, beta, state, mask)
    if which == "steps":
        first = la_prefill.launch_steps(*a, *options)
    else:
        first = la_prefill.launch_local(*a[:2], g, beta, mask)
    key = ("la_prefill", which, *first.template, ("state", started), ("Dv", v.shape[-1]))

    def check() -> float:
        out = la_prefill.run(*a, *options, to.route, to.run, which=which)
        return relative_rms(
            list(out), list(ops.gated_delta(*(x.astype(mx.float32) for x in a), *options))
        )

    return TRUST.why_not(key, check, LIMITS[v.dtype])


def attention(q: mx.array, like: Any, kv_of_fa: tuple, many: bool, to: Backend) -> str:
    """Why fa_prefill (many) or fa_decode may not do calls like this one, or "".

    Args:
        q: [B, T, Hf, D]. like: The cache, already updated. kv_of_fa: LayerHeads.kv_of_fa.
    """
    small, D = Small(), q.shape[-1]
    T = 20 if many else q.shape[1]
    q = small.normal(1, T, q.shape[2], D, dtype=q.dtype)
    dtype = KeyValues.of(like).dtype
    kv = KeyValues.of(small.cache(like, max(kv_of_fa) + 1, D, dtype))
    call = (q, kv, kv_of_fa, D**-0.5)
    if many:
        name, first = "fa_prefill", fa_prefill.launch(*call)
    else:
        name, first = "fa_decode", fa_decode.launch(*call, cores=to.cores)

    def check() -> float:
        if many:
            out = fa_prefill.run(*call, route=to.route, executor=to.run)
        else:
            out = fa_decode.run(*call, route=to.route, executor=to.run, cores=to.cores)
        full = [x[:, mx.array(kv_of_fa)] for x in _plain(kv)]
        q32 = q.astype(mx.float32).swapaxes(1, 2)
        ref = mx.fast.scaled_dot_product_attention(q32, *full, scale=D**-0.5, mask="causal")
        return relative_rms([out], [ref.swapaxes(1, 2)])

    return TRUST.why_not((name, *first.template), check, LIMITS[q.dtype])


def parted(q: mx.array, like: Any, kv_of_fa: tuple, shared: bool, to: Backend) -> str:
    """Why fa_decode may not do steps of batches like this one, or "".

    Args:
        q: [B, T, Hf, D]. like: The cache, already updated. kv_of_fa: LayerHeads.kv_of_fa.
        shared: Whether rows share keys and values.
    """
    small, T, D, heads = Small(), q.shape[1], q.shape[-1], max(kv_of_fa) + 1
    dtype, f32 = KeyValues.of(like).dtype, mx.float32
    q = small.normal(2, T, q.shape[2], D, dtype=q.dtype)
    rows = [small.cache(like, heads, D, dtype) for _ in range(2)]
    rows[1].trim(CACHED // 2)
    if shared:
        whole = small.cache(like, heads, D, dtype)
        for one in rows:
            one.shared = (SharedRows(whole.keys, whole.values, CACHED - 1),)
            one.offset += CACHED - 1
    kv = HydraBatchCache.merge(rows)
    held, starts, groups = fa_shared.parts_of(kv)
    s = 1.0 + mx.arange(2 * T, dtype=f32).reshape(2, T) / 8
    call = (q, held, starts, groups, kv_of_fa, D**-0.5, s)

    def check() -> float:
        out = fa_shared.run(*call, route=to.route, executor=to.run, cores=to.cores)
        refs = []
        for i, one in enumerate(rows):
            full = [x[:, mx.array(kv_of_fa)] for x in _plain(KeyValues.of(_whole(one)))]
            q32 = (q[i : i + 1].astype(f32) * s[i][:, None, None]).swapaxes(1, 2)
            y = mx.fast.scaled_dot_product_attention(q32, *full, scale=D**-0.5, mask="causal")
            refs.append(y.swapaxes(1, 2))
        return relative_rms([out], [mx.concatenate(refs)])

    key = (
        "fa_shared",
        *fa_decode.launch(q.astype(f32), held, kv_of_fa, 1.0).template,
        ("shared", shared),
    )
    return TRUST.why_not(key, check, LIMITS[q.dtype])


def _whole(kv: HydraKVCache) -> HydraKVCache:
    """The same without sharing."""
    return HydraKVCache.from_state(kv.state)
