"""la_decode, executed by the host runtime, against float64 and against the MLX operations."""

import dataclasses
from functools import partial

from hydra_mlx import reference
from hydra_mlx.cache import CONV, STATE
from hydra_mlx.config import L2_EPS, HydraArgs
from hydra_mlx.kernels import la_decode
from hydra_mlx.mixer import FusedMixer, Projected, Step

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import ArraysCache

from .kernel_host import host_run
from .metal_host.testing import needs_metal_host
from .tolerance import REL_RMS, assert_close, to_numpy
from .tolerance import STATE as STATE_TOLERANCE

pytestmark = needs_metal_host

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
# The operations round after each step in 16 bit; the kernel only when it stores.
TWIN = {"float32": 2e-5, "float16": 4e-3, "bfloat16": 3e-2}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 1024,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}


def executor(check=False, counts=None):
    """Runs a Launch on the CPU; appends its LaunchCounts to `counts`."""

    def call(launch):
        out, n = host_run(launch, check=check, count=counts is not None)
        if counts is not None:
            counts.append(n)
        return out

    return call


def make_mixer(D, la, fa=1, dtype=mx.float32, seed=0, **options):
    """A FusedMixer of one layer with random weights; FA heads come last."""
    H = la + fa
    args = HydraArgs(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=H,
        num_key_value_heads=options.pop("kv_heads", H),
        vocab_size=8,
        head_dim=D,
        full_attention_heads=[list(range(la, H))],
        weights_form="fused",
        max_position_embeddings=4096,
        rms_norm_eps=options.pop("rms_norm_eps", 1e-5),
        **options,
    )
    mixer = FusedMixer(args, 0)
    rng = np.random.RandomState(seed)

    def fill(name, low, high, kind=dtype):
        if name in mixer:
            shape = mixer[name].shape
            mixer[name] = mx.array(rng.uniform(low, high, shape).astype(np.float32)).astype(kind)

    fill("A_log", -2, 2.5, mx.float32)
    fill("dt_bias", -7, 0, mx.float32)
    fill("conv_weight", -0.7, 0.7)
    for name in ("la_q_norm", "la_k_norm", "fa_q_norm", "fa_k_norm"):
        fill(name, 0.5, 1.5)
    return mixer


def make_inputs(mixer, B, T, dtype=mx.float32, ab=mx.float32, seed=0):
    """x, ab, tail and state as a layer finds them in the middle of a text."""
    rng = np.random.RandomState(seed)
    la, D, taps = len(mixer.heads.la), mixer.args.head_dim, mixer.args.la_conv_kernel

    def normal(*shape):
        return mx.array(rng.randn(*shape).astype(np.float32))

    x = normal(B, T, mixer.rows.total).astype(dtype)
    tail = normal(B, taps - 1, 3 * la * D).astype(dtype) if taps else None
    return x, normal(B, T, 2 * la).astype(ab), tail, normal(B, la, D, D)


def by_reference(layer, x, ab, offset, tail, state):
    """The LA heads in float64: y, state, tail."""
    x, ab, state = to_numpy(x), to_numpy(ab), to_numpy(state)
    B, T, _ = x.shape
    Hl, D = layer.heads, layer.D
    qkv = x[..., layer.qkv_row : layer.qkv_row + 3 * Hl * D]
    if layer.taps:
        qkv, tail = reference.short_conv(qkv, to_numpy(layer.conv_weight), to_numpy(tail))
        qkv = reference.silu(qkv)
    q, k, v = (y.reshape(B, T, Hl, D) for y in np.split(qkv, 3, axis=-1))
    eps, factor = layer.floats.tolist()[:2]
    if layer.q_norm is not None:
        q = reference.rms_norm(q, to_numpy(layer.q_norm), eps)
        k = reference.rms_norm(k, to_numpy(layer.k_norm), eps)
    if layer.inv_freq is not None:
        position = np.asarray(offset, np.float64).reshape(-1, 1) + np.arange(T)
        angle = position[..., None, None] * to_numpy(layer.inv_freq)
        c, s = np.cos(angle) * factor, np.sin(angle) * factor
        q, k = (
            np.concatenate([a * c - b * s, b * c + a * s], axis=-1)
            for a, b in (np.split(y, 2, axis=-1) for y in (q, k))
        )
    q = q / np.sqrt((q * q).sum(-1, keepdims=True) + L2_EPS) / np.sqrt(D)
    k = k / np.sqrt((k * k).sum(-1, keepdims=True) + L2_EPS)
    beta = reference.sigmoid(ab[..., Hl:]) * (2 if layer.neg else 1)
    dt = reference.softplus(ab[..., :Hl] + to_numpy(layer.dt_bias))
    o, state = reference.gated_delta(q, k, v, -np.exp(to_numpy(layer.A_log)) * dt, beta, state)
    if layer.norm is not None:
        weight = None if layer.out_norm is None else to_numpy(layer.out_norm)
        o = reference.rms_norm(o, weight, 1e-6)
    if layer.gate is not None:
        gate = x[..., layer.gate_row : layer.gate_row + Hl * D].reshape(o.shape)
        o = o * {"silu": reference.silu, "sigmoid": reference.sigmoid}[layer.gate](gate)
    return o, state, tail


def by_operations(mixer, x, ab, offset, tail, state):
    """Mixer.linear_attention on the same rows: y, state, tail."""
    B, T, _ = x.shape
    la_qkv, la_gate, *_ = mx.split(x, mixer.rows.ends, axis=-1)
    p = Projected(qkv_la=la_qkv)
    p.a, p.b = mx.split(ab, 2, axis=-1)
    if mixer.rows.la_gate:
        p.gate_la = la_gate.reshape(B, T, -1, mixer.args.head_dim)
    arrays = ArraysCache(2)
    arrays[CONV], arrays[STATE] = tail, state
    y = mixer.linear_attention(p, Step(offset, None, None), arrays)
    return y, arrays[STATE], arrays[CONV]


def compare(mixer, inputs, offset, case, check=False, twin=True, layer=None, **options):
    """Kernel against float64 and the operations."""
    x, ab, tail, state = inputs
    layer = layer or la_decode.LaLayer.of(mixer)
    ok, reason = la_decode.eligible(layer, x, ab)
    assert ok, reason
    out = la_decode.run(layer, x, ab, offset, tail, state, executor=executor(check), **options)
    dtype = str(x.dtype).split(".")[-1]
    assert [a.dtype for a in out] == [x.dtype, mx.float32, x.dtype]
    refs = [(by_reference(layer, x, ab, offset, tail, state), REL_RMS[dtype], STATE_TOLERANCE)]
    if twin:
        by_mlx = by_operations(mixer, x, ab, offset, tail, state)
        refs.append((by_mlx, TWIN[dtype], TWIN[dtype]))
    for ref, tolerance, state_tolerance in refs:
        assert_close(out[0], ref[0], tolerance, f"{case} y")
        assert_close(out[1], ref[1], state_tolerance, f"{case} state")
        if layer.taps:
            assert np.array_equal(to_numpy(out[2]), to_numpy(ref[2])), f"{case} tail"
        else:
            assert out[2].shape == (x.shape[0], 0, 3 * layer.heads * layer.D)
    return out


SHAPES = [
    # T, LA heads, D, B
    (1, 1, 64, 1),
    (1, 3, 128, 1),
    (1, 13, 128, 2),
    (2, 7, 64, 1),
    (3, 3, 64, 2),
    (7, 1, 128, 1),
    (8, 3, 128, 2),
    (8, 13, 64, 1),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T,la,D,B", SHAPES)
def test_shapes_and_dtypes(T, la, D, B, dtype):
    mixer = make_mixer(D, la, dtype=DTYPES[dtype])
    offset = 5 if B == 1 else mx.array([700, 3])
    ab = mx.float32 if T % 2 else DTYPES[dtype]
    inputs = make_inputs(mixer, B, T, DTYPES[dtype], ab, seed=T)
    compare(mixer, inputs, offset, f"T={T} la={la} D={D} B={B} {dtype}")


OPTIONS = {
    "no conv": {"la_conv_kernel": 0},
    "no q/k norm": {"la_qk_norm": False},
    "no rope": {"la_rope": False},
    "sigmoid gate": {"la_output_gate": "sigmoid"},
    "no gate": {"la_output_gate": None},
    "no norm": {"fusion_norm": None},
    "norm without weight": {"fusion_norm": "rms_no_weight"},
    "negative eigenvalues": {"la_allow_neg_eigval": True},
    "yarn": {"rope_scaling": YARN, "rope_theta": 1e6},
    "llama3": {"rope_scaling": LLAMA3, "rope_theta": 5e5},
    "linear": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "headwise FA gate (odd row length)": {"fa_gate": "headwise"},
    "little of everything": {
        "la_conv_kernel": 0,
        "la_qk_norm": False,
        "la_rope": False,
        "la_output_gate": None,
        "fusion_norm": None,
    },
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name):
    for T, check in ((1, False), (3, True)):
        mixer = make_mixer(64, 3, seed=T, **OPTIONS[name])
        compare(mixer, make_inputs(mixer, 1, T, seed=T), 40, f"{name} T={T}", check)


@pytest.mark.parametrize("dtype", DTYPES)
def test_checked_mode(dtype):
    """Bounds, races, uninitialised reads, unwritten outputs: none, at one and at eight tokens."""
    for T, la, D, B in ((1, 3, 128, 1), (8, 1, 64, 2)):
        mixer = make_mixer(D, la, dtype=DTYPES[dtype])
        offset = 9 if B == 1 else mx.array([0, 31])
        inputs = make_inputs(mixer, B, T, DTYPES[dtype], seed=2)
        compare(mixer, inputs, offset, f"T={T} {dtype}", check=True)


def test_norm_weights_of_both_kinds():
    """A layer whose fusion norm was not folded; norm weights in another dtype than x."""
    mixer = make_mixer(64, 2, dtype=mx.float32)
    weight = mx.array(np.random.RandomState(0).uniform(0.5, 1.5, 64).astype(np.float32))
    layer = la_decode.LaLayer.of(mixer)
    assert layer.norm == "rms_no_weight", "FusedMixer folds la_norm into o_proj"
    layer = dataclasses.replace(layer, norm="rms", out_norm=weight)
    inputs = make_inputs(mixer, 1, 2, mx.bfloat16, seed=1)
    compare(mixer, inputs, 3, "weighted norm", check=True, twin=False, layer=layer)


@pytest.mark.parametrize("groups", [1, 4, 8, 32])
def test_simdgroups_do_not_matter(groups):
    mixer = make_mixer(64, 2)
    for T in (1, 4):
        compare(mixer, make_inputs(mixer, 1, T), 1, f"SG={groups}", groups == 32, simdgroups=groups)


def test_eight_at_once_equal_eight_single_steps():
    mixer = make_mixer(64, 3)
    layer = la_decode.LaLayer.of(mixer)
    x, ab, tail, state = make_inputs(mixer, 2, 8, seed=4)
    offset = mx.array([0, 100])
    run = partial(la_decode.run, layer, executor=executor())
    y, last, last_tail = run(x, ab, offset, tail, state)
    steps = []
    for t in range(8):
        cut = slice(t, t + 1)
        y_t, state, tail = run(x[:, cut], ab[:, cut], offset + t, tail, state)
        steps.append(y_t)
    assert np.array_equal(to_numpy(tail), to_numpy(last_tail))
    assert_close(mx.concatenate(steps, axis=1), y, 1e-6, "y")
    assert_close(state, last, 1e-6, "state")


def test_extreme_gates():
    """alpha = 0 wipes the state, alpha = 1 keeps it, beta = 0 writes nothing."""
    mixer = make_mixer(64, 4)
    mixer.A_log, mixer.dt_bias = mx.zeros(4), mx.zeros(4)
    x, _, tail, state = make_inputs(mixer, 1, 1)
    ab = mx.array([[[1e4, -1e4, -1e4, 1e4, 1e4, -1e4, 1e4, -1e4]]])
    out = compare(mixer, (x, ab, tail, state), 0, "gates at 0 and 1", check=True)
    assert np.array_equal(to_numpy(out[1][0, 1]), to_numpy(state[0, 1])), "alpha 1, beta 0"
    assert not to_numpy(out[1][0, 3]).any(), "alpha 0, beta 0"


def test_slow_decay_keeps_its_digits():
    """dt = 1e-4 and less: log(1 + exp(x)) as written would lose half of its digits."""
    mixer = make_mixer(64, 2)
    mixer.A_log, mixer.dt_bias = mx.array([2.7, 0.0]), mx.array([-9.0, -14.0])
    layer = la_decode.LaLayer.of(mixer)
    x, ab, tail, state = make_inputs(mixer, 1, 8)
    exact = state
    for i in range(6):
        out = la_decode.run(layer, x, ab, 8 * i, tail, state, executor=executor())
        _, exact, _ = by_reference(layer, x, ab, 8 * i, tail, exact)
        state = out[1]
    assert_close(state, exact, 1e-6)


def test_large_positions():
    """At a million tokens the product position * frequency is still exact."""
    mixer = make_mixer(64, 1)
    compare(mixer, make_inputs(mixer, 1, 2), 1_000_003, "offset 1e6", twin=False)


def test_empty_cache_and_strided_inputs():
    mixer = make_mixer(64, 2)
    layer = la_decode.LaLayer.of(mixer)
    x, ab, tail, state = make_inputs(mixer, 1, 3)
    zero = (mx.zeros_like(tail), mx.zeros_like(state))
    out = la_decode.run(layer, x, ab, 0, None, None, executor=executor())
    ref = by_reference(layer, x, ab, 0, *zero)
    assert_close(out[0], ref[0], REL_RMS["float32"])
    wide = mx.repeat(x, 2, axis=2)[..., ::2]
    turned = mx.swapaxes(mx.contiguous(mx.swapaxes(state, 2, 3)), 2, 3)
    a = la_decode.run(layer, x, ab, 0, tail, state, executor=executor())
    b = la_decode.run(layer, wide, ab, 0, tail, turned, executor=executor())
    assert all(np.array_equal(to_numpy(i), to_numpy(j)) for i, j in zip(a, b, strict=True))


@pytest.mark.parametrize("name", ["all", "no conv", "little of everything"])
@pytest.mark.parametrize("T,la,D,dtype", [(1, 12, 128, "bfloat16"), (8, 9, 64, "float32")])
def test_cost(T, la, D, dtype, name):
    """The formulas' bytes are those of the host runtime within 2 %, and below the operations'."""
    mixer = make_mixer(D, la, dtype=DTYPES[dtype], **OPTIONS.get(name, {}))
    layer = la_decode.LaLayer.of(mixer)
    x, ab, tail, state = make_inputs(mixer, 1, T, DTYPES[dtype])
    counts = []
    la_decode.run(layer, x, ab, 7, tail, state, executor=executor(counts=counts))
    cost = la_decode.cost(layer, 1, T, x.dtype, ab.dtype)
    assert len(counts) == cost.dispatches == 1
    assert counts[0].device_bytes_read == pytest.approx(cost.read, rel=0.02)
    assert counts[0].device_bytes_written == pytest.approx(cost.written, rel=0.02)
    assert counts[0].threadgroup_memory == pytest.approx(cost.threadgroup_bytes, abs=16)
    composed = la_decode.composed_cost(layer, 1, T, x.dtype, ab.dtype)
    assert composed.read > 2 * cost.read and composed.dispatches > 10


def test_what_is_not_eligible():
    mixer = make_mixer(64, 2)
    layer = la_decode.LaLayer.of(mixer)
    x, ab, _, _ = make_inputs(mixer, 1, 9)
    assert la_decode.eligible(layer, x, ab) == (False, "9 tokens, at most 8")
    x, ab = x[:, :4], ab[:, :4]
    assert la_decode.eligible(layer, x, ab)[0]
    assert "mask" in la_decode.eligible(layer, x, ab, mask=mx.ones((1, 4), mx.bool_))[1]
    assert "lengths" in la_decode.eligible(layer, x, ab, lengths=mx.array([2]))[1]
    small = la_decode.LaLayer.of(make_mixer(32, 2))
    assert "head dim 32" in la_decode.eligible(small, x, ab)[1]
    dynamic = make_mixer(64, 2, rope_scaling={"type": "dynamic", "factor": 2.0})
    assert "frequencies" in la_decode.eligible(la_decode.LaLayer.of(dynamic), x, ab)[1]


def test_specialisations_have_their_own_template():
    """CUDA tells two builds of a kernel apart by the template values alone."""
    seen = set()
    for dtype in DTYPES.values():
        for ab in DTYPES.values():
            mixer = make_mixer(64, 2, dtype=dtype)
            x, gates, tail, state = make_inputs(mixer, 1, 1, dtype, ab)
            layer = la_decode.LaLayer.of(mixer)
            seen.add(la_decode.launch(layer, x, gates, 0, tail, state).template)
    assert len(seen) == 9
