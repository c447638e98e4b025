"""A launch's template tells the dtype of every input: mx.fast.cuda_kernel keeps builds by it."""

from dataclasses import replace

from hydra_mlx.kernels import fa_decode, fa_prefill, hydra_decode, la_decode, la_prefill

import mlx.core as mx
import pytest

D, Hl = 64, 2
B16, F32 = mx.bfloat16, mx.float32


def zeros(*shape, dtype=B16):
    return mx.zeros(shape, dtype)


def cache(dtype, bits):
    if bits is None:
        return fa_decode.KeyValues(*[zeros(1, 2, 40, D, dtype=dtype)] * 2, 40)
    words = zeros(1, 2, 40, D * bits // 32, dtype=mx.uint32)
    parts = (words, *[zeros(1, 2, 40, 1, dtype=dtype)] * 2)
    return fa_decode.KeyValues(parts, parts, 40, bits, bits, 64)


def attention(module, bits):
    def make(q=B16, cache_=B16):
        return module.launch(zeros(1, 1, 2, D, dtype=q), cache(cache_, bits), (0, 1), 0.1)

    return make


def combine(y=B16, gate=B16, weight=B16):
    part, stats = zeros(1, 1, 2, 3, D, dtype=F32), zeros(1, 1, 2, 3, 2, dtype=F32)
    gate = None if gate is None else zeros(1, 1, 2, D, dtype=gate)
    weight = None if weight is None else zeros(D, dtype=weight)
    return fa_decode.combine_launch(part, stats, y, gate, norm="rms", weight=weight)


LA_WEIGHTS = {
    "A_log": (Hl,), "dt_bias": (Hl,), "conv_weight": (3 * Hl * D, 4),
    "q_norm": (D,), "k_norm": (D,), "out_norm": (D,),
}  # fmt: skip


def weights(shapes, dtypes):
    """Weights by name, bfloat16 unless told otherwise; None is absent."""
    told = {n: dtypes.get(n, B16) for n in shapes}
    return {n: None if told[n] is None else zeros(*s, dtype=told[n]) for n, s in shapes.items()}


def hydra_layer(**dtypes):
    la = la_decode.LaLayer(
        heads=Hl, D=D, R=(4 * Hl + 8) * D, qkv_row=0, gate_row=3 * Hl * D, inv_freq=None,
        floats=zeros(8, dtype=F32), norm="rms", gate="silu", neg=False,
        **weights(LA_WEIGHTS, dtypes),
    )  # fmt: skip
    fa = {"fa_q_norm": (D,), "fa_k_norm": (D,), "fa_out_norm": (D,)}
    return hydra_decode.HydraLayer(
        la=la, Hk=2, kv_of_fa=(0, 1), inv_freq=None, fa_rope=False, floats=la.floats,
        gate="elementwise", position="pre_norm",
        **{n[3:]: w for n, w in weights(fa, dtypes).items()},
    )  # fmt: skip


def step(x=B16, ab=B16, **dtypes):
    layer = hydra_layer(**dtypes)
    x, ab = zeros(1, 1, layer.la.R, dtype=x), zeros(1, 1, 2 * Hl, dtype=ab)
    return layer, x, ab, 40, *la_decode.fresh(layer.la, 1, x.dtype, None, None)


def linear(**dtypes):
    layer, *rest = step(**dtypes)
    return la_decode.launch(layer.la, *rest)


def hydra(bits):
    def make(cache_=B16, **dtypes):
        return hydra_decode.launch(*step(**dtypes), cache(cache_, bits))

    return make


def hydra_combine(x=B16, fa_out_norm=B16):
    layer, x, *_ = step(x, fa_out_norm=fa_out_norm)
    layer = replace(layer, la=replace(layer.la, norm="rms"))
    part, stats = zeros(1, 1, 2, 3, D, dtype=F32), zeros(1, 1, 2, 3, 2, dtype=F32)
    return hydra_decode.combine_launch(layer, part, stats, zeros(1, 1, Hl, D, dtype=x.dtype), x)


def prefill(which):
    def make(q=B16, k=B16, v=B16):
        q, k, v = (zeros(1, 9, Hl, D, dtype=t) for t in (q, k, v))
        g = zeros(1, 9, Hl, dtype=F32)
        if which == "steps":
            return la_prefill.launch_steps(q, k, v, g, g)
        local = la_prefill.launch_local(q, k, g, g)
        if which == "local":
            return local
        return la_prefill.launch_scan(q, k, v, *(mx.zeros(s) for s in local.output_shapes))

    return make


STEP = ("x", "ab", *LA_WEIGHTS)
CASES = {
    "fa_decode": (attention(fa_decode, None), ("q", "cache_")),
    "fa_decode 4 bit": (attention(fa_decode, 4), ("q", "cache_")),
    "fa_prefill": (attention(fa_prefill, 8), ("q", "cache_")),
    "fa_combine": (combine, ("y", "gate", "weight")),
    "la_decode": (linear, STEP),
    "hydra_decode": (hydra(None), (*STEP, "fa_q_norm", "fa_k_norm", "cache_")),
    "hydra_decode 8 bit": (hydra(8), (*STEP, "fa_q_norm", "fa_k_norm", "cache_")),
    "hydra_combine": (hydra_combine, ("x", "fa_out_norm")),
    "la_prefill_steps": (prefill("steps"), ("q", "k", "v")),
    "la_prefill_local": (prefill("local"), ("q", "k")),
    "la_prefill_scan": (prefill("scan"), ("q", "k", "v")),
}
OPTIONAL = ("gate", "weight", "conv_weight", "q_norm", "k_norm", "fa_q_norm", "fa_k_norm")


@pytest.mark.parametrize("case", CASES)
def test_template_tells_every_dtype(case):
    """Launches of one template have inputs of the same dtypes, absent ones' stand-ins too."""
    make, names = CASES[case]
    changes = [{}, *({n: F32} for n in names), *({n: None} for n in names if n in OPTIONAL)]
    changes += [{a: F32, b: None} for a in names for b in names if b in OPTIONAL and a != b]
    seen = {}
    for change in changes:
        launch = make(**change)
        dtypes = tuple(x.dtype for x in launch.inputs if isinstance(x, mx.array))
        before, first = seen.setdefault(launch.template, (dtypes, change))
        assert before == dtypes, f"{first} and {change} have one template"
    assert len({make(**{n: F32}).template for n in names} | {make().template}) == len(names) + 1
