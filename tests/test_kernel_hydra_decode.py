"""hydra_decode and hydra_combine, executed by the host runtime, against the layer by operations."""

import dataclasses

from hydra_mlx import reference
from hydra_mlx.cache import CONV, STATE
from hydra_mlx.kernels import fa_decode, hydra_decode
from hydra_mlx.kernels.loader import absent
from hydra_mlx.kv_cache import HydraKVCache
from hydra_mlx.step import Step

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import ArraysCache, KVCache

from .metal_host.testing import needs_metal_host
from .test_kernel_la_decode import (
    DTYPES,
    LLAMA3,
    TWIN,
    by_reference,
    executor,
    make_inputs,
    make_mixer,
)
from .tolerance import REL_RMS, assert_close, to_numpy

pytestmark = needs_metal_host


def make_caches(mixer, B, S, tail, state, dtype, bits=None, seed=3):
    """Keys and values of S random tokens and an ArraysCache, as of a layer in use."""
    args = mixer.args
    arrays = ArraysCache(2)
    arrays[CONV], arrays[STATE] = tail, state
    kv = HydraKVCache(*(bits if isinstance(bits, tuple) else (bits, bits)))
    if S:
        rng = np.random.RandomState(seed)
        shape = (B, len(mixer.heads.kv), S, args.head_dim)
        kv.update_and_fetch(*(mx.array(rng.randn(*shape)).astype(dtype) for _ in range(2)))
    return kv, arrays


def by_operations(mixer, x, ab, kv, arrays):
    """Input of the output projection by Mixer's own operations, [B, T, (Hf + Hl) * D]."""
    T = x.shape[1]
    p = mixer.split(x, ab)
    step = Step(kv.offset, None if T == 1 else "causal", None)
    y = [mixer.full_attention(p, step, kv), mixer.linear_attention(p, step, arrays)]
    return mx.concatenate([i.flatten(2) for i in y], axis=-1)


def float64_attention(layer, x, kv, S):
    """FA heads in float64 from the same rows and cached keys, [B, T, Hf, D]."""
    la, B, T = layer.la, x.shape[0], x.shape[1]
    D, Hf, Hk, N = la.D, layer.Hf, layer.Hk, la.heads * la.D
    eps, factor, scale, a = layer.floats.tolist()[:4]
    at = (4 if la.gate else 3) * N
    q, k, v, gate = np.split(to_numpy(x)[..., at:], np.cumsum([Hf * D, Hk * D, Hk * D]), axis=-1)
    q, k, v = (y.reshape(B, T, -1, D) for y in (q, k, v))
    if layer.q_norm is not None:
        q = reference.rms_norm(q, to_numpy(layer.q_norm), eps)
        k = reference.rms_norm(k, to_numpy(layer.k_norm), eps)
    position = np.broadcast_to(S + np.arange(T), (B, T)).astype(np.float64)
    if layer.fa_rope:
        angle = position[..., None, None] * to_numpy(layer.inv_freq)
        c, s = np.cos(angle) * factor, np.sin(angle) * factor
        q, k = (
            np.concatenate([i * c - j * s, j * c + i * s], axis=-1)
            for i, j in (np.split(y, 2, axis=-1) for y in (q, k))
        )
    new = k.swapaxes(1, 2), v.swapaxes(1, 2)
    if a:
        q = q * reference.log_length_scale(position, a)[..., None, None]
    if S:
        k = np.concatenate([to_numpy(kv.keys)[:, :, :S].swapaxes(1, 2), k], axis=1)
        v = np.concatenate([to_numpy(kv.values)[:, :, :S].swapaxes(1, 2), v], axis=1)
    o = reference.causal_attention(q, k, v, layer.kv_of_fa, S)
    gate = reference.sigmoid(gate.reshape(B, T, Hf, -1)) if layer.gate else 1.0
    pre = layer.position == "pre_norm"
    n = o * gate if pre else o
    if layer.norm is not None:
        weight = None if layer.out_norm is None else to_numpy(layer.out_norm)
        n = reference.rms_norm(n, weight, 1e-6)
    return (n if pre else n * gate), new


def compare(mixer, B, T, S, dtype="float32", bits=None, check=False, layer=None, twin=True, **more):
    """Both launches against float64 and against the operations."""
    x, ab, tail, state = make_inputs(mixer, B, T, DTYPES[dtype], seed=T)
    kv, arrays = make_caches(mixer, B, S, tail, state, x.dtype, bits)
    layer = layer or hydra_decode.HydraLayer.of(mixer)
    ok, reason = hydra_decode.eligible(layer, x, ab, kv, "causal")
    assert ok, reason
    held = hydra_decode.cached(kv)
    case = f"B={B} T={T} S={S} {dtype} bits={bits}"
    more.setdefault("cores", 8)
    y, last, new_tail, k, v = hydra_decode.run(
        layer, x, ab, S, tail, state, held, executor=executor(check), **more
    )
    assert y.dtype == k.dtype == v.dtype == x.dtype
    F = layer.Hf * layer.la.D
    la = by_reference(layer.la, x, ab, S, tail, state)
    assert_close(y[..., F:], la[0].reshape(B, T, -1), REL_RMS[dtype], f"{case} LA")
    assert_close(last, la[1], 1e-5, f"{case} state")
    if bits is None:
        fa, new = float64_attention(layer, x, kv, S)
        assert_close(y[..., :F], fa.reshape(B, T, -1), REL_RMS[dtype], f"{case} FA")
        assert_close(k, new[0], REL_RMS[dtype], f"{case} new keys")
        assert np.array_equal(to_numpy(v), new[1]), f"{case} new values"
    if twin:
        ref = by_operations(mixer, x, ab, kv, arrays)
        # A new token goes through the cache's rounding here too. In 16 bits a few of its numbers
        # lie between two steps, where the last digit of a norm decides.
        few = bits in (4, (8, 4), (4, 8)) and dtype != "float32"
        tolerance = (3.0 if few else 1.0) * TWIN[dtype]
        assert_close(y, ref, tolerance, f"{case} twin")
        if layer.la.taps:
            assert np.array_equal(to_numpy(new_tail), to_numpy(arrays[CONV])), f"{case} tail"
        if bits is None:
            assert_close(k, kv.keys[:, :, S : S + T], TWIN[dtype], f"{case} cached keys")
    return y


def mixer_of(D=64, la=2, fa=3, dtype="float32", **options):
    """Three FA heads on two key/value heads: ragged."""
    options.setdefault("kv_heads", (la + fa) if (la + fa) % 2 else (la + fa) // 2)
    return make_mixer(D, la, fa, DTYPES[dtype], **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "B,T,S,D,la,fa",
    [
        (1, 1, 300, 128, 3, 1),
        (1, 1, 1, 64, 1, 3),
        (2, 1, 97, 64, 2, 4),
        (1, 2, 33, 64, 13, 1),
        (1, 3, 256, 128, 1, 3),
        (1, 7, 65, 64, 7, 1),
        (2, 8, 40, 64, 3, 3),
    ],
)
def test_shapes_and_dtypes(B, T, S, D, la, fa, dtype):
    compare(mixer_of(D, la, fa, dtype), B, T, S, dtype)


OPTIONS = {
    "plain": {},
    "one key head for all": {"kv_heads": 1},
    "a key head that nobody reads": {"fa_kv": "keep_all"},
    "own keys": {"fa_kv": "mha_own"},
    "FA rope": {"fa_rope": True, "rope_scaling": LLAMA3, "rope_theta": 5e5},
    "FA rope alone": {"fa_rope": True, "la_rope": False},
    "no q/k norm": {"fa_qk_norm": False, "la_qk_norm": False},
    "no log-length scale": {"fa_logit_scale": None},
    "headwise gate": {"fa_gate": "headwise"},
    "no FA gate": {"fa_gate": None},
    "gate after the norm": {"fa_gate_position": "post_norm"},
    "no LA gate": {"la_output_gate": None},
    "no norm, no conv, no rope": {"fusion_norm": None, "la_conv_kernel": 0, "la_rope": False},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name):
    mixer = mixer_of(64, 3, 3, **OPTIONS[name])
    compare(mixer, 1, 1, 70, check=name in ("plain", "headwise gate"))
    compare(mixer, 1, 3, 70)


@pytest.mark.parametrize("T", [1, 8])
def test_checked_mode(T):
    """Bounds, races, uninitialised reads, unwritten outputs: none."""
    compare(mixer_of(64, 2, 2, "bfloat16"), 2 if T == 1 else 1, T, 45, "bfloat16", check=True)


@pytest.mark.parametrize(
    "dtype,bits",
    [("bfloat16", 8), ("bfloat16", 4), ("float32", 4), ("bfloat16", (8, 4)), ("float32", (4, 8))],
)
def test_quantised_cache(dtype, bits):
    for D, T in ((64, 1), (128, 3)):
        compare(mixer_of(D, 1, 3, dtype), 1, T, 150, dtype, bits, check=D == 64)


@pytest.mark.parametrize("T", [1, 5])
def test_empty_cache(T):
    compare(mixer_of(64, 2, 2), 1, T, 0, check=True)


def test_splits_do_not_matter():
    mixer = mixer_of(64, 1, 2)
    for splits in ((1, 224), (7, 32), (4, 64)):
        compare(mixer, 1, 2, 201, splits=splits)
    compare(mixer, 1, 2, 201, unroll=2, simdgroups=4, check=True)


def test_norm_weight_of_an_unfolded_layer():
    mixer = mixer_of(64, 1, 2)
    weight = mx.array(np.random.RandomState(0).uniform(0.5, 1.5, 64)).astype(mx.float32)
    layer = hydra_decode.HydraLayer.of(mixer)
    la = dataclasses.replace(layer.la, norm="rms", out_norm=weight)
    layer = dataclasses.replace(layer, la=la, out_norm=weight)
    compare(mixer, 1, 1, 40, layer=layer, twin=False)


def test_two_dispatches():
    """From the fused projection's output to the output projection's input: two launches, and no
    MLX operation makes anything that they take in."""
    mixer = mixer_of(64, 3, 3, "bfloat16", fa_gate="headwise")
    layer = hydra_decode.HydraLayer.of(mixer)
    x, ab, tail, state = make_inputs(mixer, 1, 4, mx.bfloat16)
    kv, _ = make_caches(mixer, 1, 50, tail, state, x.dtype)
    held, launches, made = hydra_decode.cached(kv), [], []

    def spy(launch):
        launches.append(launch)
        made.extend(executor()(launch))
        return made[-len(launch.output_shapes) :]

    hydra_decode.run(layer, x, ab, 50, tail, state, held, executor=spy)
    assert [a.kernel.name for a in launches] == ["hydra_decode", "hydra_combine"]
    weights = [v for d in (layer, layer.la) for v in vars(d).values() if isinstance(v, mx.array)]
    weights.append(absent(mx.float32))
    known = [id(a) for a in (x, ab, tail, state, *held.parts, *weights, *made)]
    for launch in launches:
        for name, a in zip(launch.kernel.inputs, launch.inputs, strict=True):
            is_table = name in ("offset", "work", "sizes", "plan") or isinstance(a, int)
            assert is_table or id(a) in known, f"{name} is made by an operation"


def test_steps_of_a_text():
    """Eight single steps through the caches equal one step of eight, and the operations."""
    mixer = mixer_of(64, 2, 2)
    layer = hydra_decode.HydraLayer.of(mixer)
    x, ab, tail, state = make_inputs(mixer, 1, 8)
    kv, arrays = make_caches(mixer, 1, 30, tail, state, x.dtype)
    at_once, *_ = hydra_decode.run(
        layer, x, ab, 30, tail, state, hydra_decode.cached(kv), executor=executor(), cores=4
    )
    other, _ = make_caches(mixer, 1, 30, tail, state, x.dtype)
    steps = []
    for t in range(8):
        held = hydra_decode.cached(other)
        y, state, tail, k, v = hydra_decode.run(
            layer, x[:, t : t + 1], ab[:, t : t + 1], other.offset, tail, state, held,
            executor=executor(), cores=4,
        )  # fmt: skip
        other.update_and_fetch(k, v)
        steps.append(y)
    assert_close(mx.concatenate(steps, axis=1), at_once, 2e-6)
    assert_close(at_once, by_operations(mixer, x, ab, kv, arrays), TWIN["float32"])
    assert_close(other.keys[:, :, :38], kv.keys[:, :, :38], 2e-6)


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("T,S", [(1, 1000), (4, 300)])
def test_cost(T, S, bits):
    """The formulas' bytes are those of the host runtime within 2 %."""
    mixer = mixer_of(128 if T == 1 else 64, 2, 2, "bfloat16")
    layer = hydra_decode.HydraLayer.of(mixer)
    x, ab, tail, state = make_inputs(mixer, 1, T, mx.bfloat16)
    kv, _ = make_caches(mixer, 1, S, tail, state, x.dtype, bits)
    held, counts, launches = hydra_decode.cached(kv), [], []

    def spy(launch):
        launches.append(launch)
        return executor(counts=counts)(launch)

    hydra_decode.run(layer, x, ab, S, tail, state, held, executor=spy, cores=4)
    cost = hydra_decode.cost(*launches, layer)
    assert cost.dispatches == len(launches) == 2
    assert sum(c.device_bytes_read for c in counts) == pytest.approx(cost.read, rel=0.02)
    assert sum(c.device_bytes_written for c in counts) == pytest.approx(cost.written, rel=0.02)
    memory = max(c.threadgroup_memory for c in counts)
    assert memory == pytest.approx(cost.threadgroup_bytes, abs=16)
    q, gate = mx.zeros((1, T, 2, layer.la.D), mx.bfloat16), mx.zeros((1, T, 2, layer.la.D))
    composed = hydra_decode.composed_cost(layer, x, ab, q, fa_decode.KeyValues.of(kv), gate)
    assert composed.dispatches > 20 > cost.dispatches


def test_what_is_not_eligible():
    mixer = mixer_of(64, 2, 2)
    layer = hydra_decode.HydraLayer.of(mixer)
    x, ab, tail, state = make_inputs(mixer, 1, 9)
    kv, _ = make_caches(mixer, 1, 5, tail, state, x.dtype)
    assert "9 tokens" in hydra_decode.eligible(layer, x, ab, kv)[1]
    x, ab = x[:, :1], ab[:, :1]
    assert hydra_decode.eligible(layer, x, ab, kv) == (True, "T <= 8")
    assert hydra_decode.eligible(layer, x, ab, KVCache())[0]
    assert "mask" in hydra_decode.eligible(layer, x, ab, kv, fa_mask=mx.ones((1, 6)))[1]
    ragged = KVCache()
    ragged.offset = mx.array([3])
    assert "KVCache" in hydra_decode.eligible(layer, x, ab, ragged)[1]
    two_bits, _ = make_caches(mixer, 1, 5, tail, state, x.dtype, 2)
    assert "2 bits" in hydra_decode.eligible(layer, x, ab, two_bits)[1]
