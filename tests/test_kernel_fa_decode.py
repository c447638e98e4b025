"""fa_decode and fa_combine on the host runtime, against the float64 oracle and the MLX twin."""

import math
from dataclasses import dataclass, replace

from hydra_mlx import ops, reference
from hydra_mlx.config import FUSION_EPS
from hydra_mlx.kernels import fa_decode
from hydra_mlx.kernels.fa_decode import KeyValues

import mlx.core as mx
import numpy as np
import pytest

from .kernel_host import host_run
from .metal_host.testing import needs_metal_host
from .tolerance import REL_RMS, assert_close, to_numpy

pytestmark = needs_metal_host

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
F32 = mx.float32


@dataclass(frozen=True)
class Case:
    """One step: shapes, cache format, and what follows the attention."""

    S: int = 33
    T: int = 1
    kv_map: tuple = (0, 1, 1)
    Hk: int = 0
    Dk: int = 64
    Dv: int = 64
    dtype: str = "float32"
    cache: str = ""
    bits: int | None = None
    v_bits: int | None = None  # as the keys
    group: int = 64
    extra: int = 7
    B: int = 1
    a: float | None = 500.0
    gate: str | None = None
    position: str = "pre_norm"
    norm: str | None = None
    weighted: bool = True
    logits: float = 1.0
    splits: tuple | None = None
    starts: tuple | None = None  # first keys of a batch's rows; those before are garbage
    cores: int = 2
    options: tuple = ()
    check: bool = False

    def __str__(self):
        plain = Case()
        return ",".join(f"{k}={v}" for k, v in vars(self).items() if v != getattr(plain, k))


def random(rng, shape, dtype, scale=1.0):
    return mx.array(rng.normal(0, scale, shape).astype(np.float32)).astype(dtype)


def poisoned(x, extra):
    """x with `extra` more tokens on axis 2, all bits of which make NaN or garbage."""
    shape = (*x.shape[:2], extra, x.shape[3])
    junk = mx.full(shape, 0xFFFFFFFF if x.dtype == mx.uint32 else float("nan"), x.dtype)
    return mx.concatenate([x, junk], axis=2)


def make_cache(rng, case, Hk, dtype):
    """The cache as KeyValues with garbage behind S, and keys and values in float64."""
    buffers, exact = [], []
    widths = (case.bits, case.v_bits or case.bits)
    for D, bits in zip((case.Dk, case.Dv), widths, strict=True):
        x = random(rng, (case.B, Hk, case.S, D), dtype)
        for b, n in enumerate(case.starts or ()):
            x[b, :, :n] = 1e4
        if case.bits is None:
            buffers.append(poisoned(x, case.extra))
            exact.append(to_numpy(x))
            continue
        words, scales, biases = mx.quantize(x, group_size=case.group, bits=bits)
        buffers.append(tuple(poisoned(y, case.extra) for y in (words, scales, biases)))
        shifts = np.arange(0, 32, bits, dtype=np.uint32)
        n = (np.array(words)[..., None] >> shifts & (2**bits - 1)).reshape(x.shape)
        s, b = (np.repeat(to_numpy(y), case.group, axis=-1) for y in (scales, biases))
        exact.append(n * s + b)
    group = None if case.bits is None else case.group
    return KeyValues(*buffers, case.S, *widths, group), exact


def exact_attention(q, k, v, case, scale, offset):
    """Oracle: log-length scale, then reference.causal_attention; k, v [B, Hk, S, D] float64."""
    t = np.maximum(offset + np.arange(case.T), 0)
    q = to_numpy(q) * scale * math.sqrt(case.Dk)
    if case.a is not None:
        q = q * reference.log_length_scale(t, case.a)[:, None, None]
    k, v = (x.swapaxes(1, 2) for x in (k, v))
    rows = [
        reference.causal_attention(
            q[b : b + 1], k[b : b + 1, n:], v[b : b + 1, n:], case.kv_map, case.S - case.T - n
        )
        for b, n in enumerate(case.starts or [0] * case.B)
    ]
    return q, np.concatenate(rows)


def exact_fusion(o, gate, case, weight):
    def norm(x):
        return x if case.norm is None else reference.rms_norm(x, weight, FUSION_EPS)

    if gate is None:
        return norm(o)
    s = reference.sigmoid(to_numpy(gate))
    return norm(o * s) if case.position == "pre_norm" else norm(o) * s


def run_case(case, seed=0):
    """Runs a case; returns the worst relative RMS error allowed and both launches' counts."""
    rng = np.random.default_rng(seed)
    dtype = DTYPES[case.dtype]
    Hf, Hk = len(case.kv_map), case.Hk or max(case.kv_map) + 1
    q = random(rng, (case.B, case.T, Hf, case.Dk), dtype, case.logits)
    kv, (k, v) = make_cache(rng, case, Hk, DTYPES[case.cache or case.dtype])
    gate = weight = None
    if case.gate:
        last = case.Dv if case.gate == "elementwise" else 1
        gate = random(rng, (case.B, case.T, Hf, last), dtype)
    if case.norm == "rms" and case.weighted:
        weight = random(rng, (case.Dv,), dtype)
    ok, reason = fa_decode.eligible(q, kv, case.kv_map, "causal", gate)
    assert ok, reason
    scale, launches = 1 / math.sqrt(case.Dk), []

    def executor(launch):
        out, counts = host_run(launch, check=case.check)
        launches.append((launch, counts))
        return out

    y, lse = fa_decode.run(
        q, kv, case.kv_map, scale, case.a, None, gate, case.position, case.norm, weight,
        executor=executor, return_lse=True, cores=case.cores, splits=case.splits,
        starts=case.starts, **dict(case.options),
    )  # fmt: skip
    scaled, o = exact_attention(q, k, v, case, scale, case.S - case.T)
    w = None if weight is None else to_numpy(weight)
    assert y.shape == (case.B, case.T, Hf, case.Dv) and y.dtype == dtype
    assert_close(y, exact_fusion(o, gate, case, w), REL_RMS[case.dtype], str(case))
    z = np.einsum("bthd,bhsd->bths", scaled, k[:, list(case.kv_map)]) / math.sqrt(case.Dk)
    late = np.arange(case.S) > case.S - case.T + np.arange(case.T)[:, None]
    early = np.arange(case.S) < np.array(case.starts or [0] * case.B)[:, None]
    z = np.where(late[None, :, None] | early[:, None, None], -np.inf, z)
    exact_lse = np.logaddexp.reduce(z, axis=-1)
    assert np.abs(to_numpy(lse) - exact_lse).max() <= 1e-5 * max(1.0, np.abs(exact_lse).max())
    return launches


SHAPES = [
    Case(S=1, extra=7),
    Case(S=2, T=2),
    Case(S=7, T=3, kv_map=(0, 0, 0)),
    Case(S=31, T=1, kv_map=(0,), Dk=128, Dv=128),
    Case(S=32, T=8, kv_map=(0,)),
    Case(S=33, T=2, kv_map=(2, 0), Hk=4, extra=0),
    Case(S=65, T=3, kv_map=(0, 1, 1, 2, 3, 3), Dk=128, Dv=128),
    Case(S=500, T=1, kv_map=(0, 1, 1, 2, 3, 3), Dk=128, Dv=128),
    Case(S=500, T=8, kv_map=(1, 1, 1, 0)),
    Case(S=65, kv_map=tuple(range(7))),
    Case(S=33, T=2, kv_map=tuple(h // 3 for h in range(13)), Dk=128, Dv=128),
    Case(S=65, T=2, Dk=64, Dv=128),
    Case(S=65, T=1, Dk=128, Dv=64, kv_map=(0,)),
    Case(S=65, T=2, B=2),
    Case(S=8, T=8, kv_map=(0, 0)),
    Case(S=31, splits=(40, 32)),  # more splits than keys
    Case(S=500, splits=(4, 160), options=(("simdgroups", 16),)),
    Case(S=65, options=(("max_rows", 2), ("unroll", 1))),
    Case(S=500, T=2, options=(("simdgroups", 2), ("unroll", 2))),
    Case(S=5, T=5, options=(("per_core", 8),)),
    Case(S=65, B=3, starts=(0, 33, 64)),
    Case(S=70, T=3, B=2, kv_map=(0, 0), starts=(67, 5), splits=(3, 32)),  # splits that see nothing
]


@pytest.mark.parametrize("case", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes(case, dtype):
    run_case(replace(case, dtype=dtype))


QUANTISED = [
    Case(S=65, T=1, kv_map=(0, 1), Dk=128, Dv=128),
    Case(S=500, T=1, kv_map=(0, 1, 1, 2), Dk=128, Dv=128),
    Case(S=33, T=2, kv_map=(0, 1, 1), Dk=64, Dv=64),
    Case(S=31, T=8, kv_map=(2, 0), Hk=3, Dk=64, Dv=128, B=2),
    Case(S=65, T=2, kv_map=(0, 0), Dk=128, Dv=64),
    Case(S=65, B=2, kv_map=(0, 1), starts=(37, 0)),
]


@pytest.mark.parametrize("case", QUANTISED, ids=str)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group", [32, 64])
def test_quantised(case, bits, group):
    dtype = ("float32", "bfloat16", "float16")[(case.S + bits + group // 32) % 3]
    run_case(replace(case, bits=bits, group=group, dtype=dtype))


@pytest.mark.parametrize("bits", [(8, 4), (4, 8)], ids=str)
@pytest.mark.parametrize("case", QUANTISED, ids=str)
def test_keys_and_values_in_different_bits(case, bits):
    dtype = ("float32", "bfloat16", "float16")[(case.S + bits[0]) % 3]
    run_case(replace(case, bits=bits[0], v_bits=bits[1], dtype=dtype))


def test_cache_of_another_dtype():
    run_case(Case(S=65, dtype="float32", cache="bfloat16"))
    run_case(Case(S=65, dtype="bfloat16", cache="float32"))


FUSIONS = [
    (gate, position, norm, weighted)
    for gate in (None, "headwise", "elementwise")
    for position in ("pre_norm", "post_norm")
    for norm, weighted in ((None, False), ("rms_no_weight", False), ("rms", True), ("rms", False))
    if gate or position == "pre_norm"
]


@pytest.mark.parametrize("gate,position,norm,weighted", FUSIONS)
def test_fusion(gate, position, norm, weighted):
    case = Case(S=33, T=2, gate=gate, position=position, norm=norm, weighted=weighted)
    run_case(replace(case, dtype="bfloat16", Dv=128 if gate == "elementwise" else 64))
    run_case(replace(case, B=1, T=1))


@pytest.mark.parametrize("a", [None, 500.0, 1.5])
def test_log_length_scale(a):
    run_case(Case(S=65, T=3, a=a))


def test_offset_need_not_be_the_cache_length():
    """A cache that dropped its oldest keys: positions run on, keys do not."""
    rng = np.random.default_rng(0)
    case = Case(S=40, T=2)
    q = random(rng, (1, 2, 3, 64), F32)
    kv, (k, v) = make_cache(rng, case, 2, F32)
    y = fa_decode.run(
        q, kv, case.kv_map, 0.125, 500.0, 100000, executor=lambda x: host_run(x)[0], cores=1
    )
    assert_close(y, exact_attention(q, k, v, case, 0.125, 100000)[1], REL_RMS["float32"])


@pytest.mark.parametrize("bits", [None, 8])
def test_huge_logits(bits):
    """Scores of a few hundred: one key takes all, nothing overflows."""
    launches = run_case(Case(S=65, T=2, logits=300.0, bits=bits, dtype="bfloat16"))
    assert len(launches) == 2


def test_equal_to_the_mlx_twin():
    """The path the model takes without kernels, on an mlx-lm cache."""
    from mlx_lm.models.cache import KVCache

    rng = np.random.default_rng(3)
    T, S, D, runs = 3, 41, 64, ((0, 1, 0, 1), (1, 2, 1, 1))
    k, v = (random(rng, (1, 2, S, D), F32) for _ in range(2))
    cache = KVCache()
    cache.update_and_fetch(k[:, :, : S - T], v[:, :, : S - T])
    q, gate = (random(rng, (1, T, 3, D), F32) for _ in range(2))
    keys, values = cache.update_and_fetch(k[:, :, S - T :], v[:, :, S - T :])
    s = ops.log_length_scale(S - T, T, 500.0)[:, None, None]
    o = ops.ragged_attention((q * s).swapaxes(1, 2), keys, values, runs, D**-0.5, "causal", cache)
    twin = ops.fa_fusion(o.swapaxes(1, 2), gate, "pre_norm", "rms", None)
    y = fa_decode.run(
        q, KeyValues.of(cache), (0, 1, 1), D**-0.5, 500.0, gate=gate, norm="rms",
        executor=lambda x: host_run(x)[0], cores=1,
    )  # fmt: skip
    assert_close(y, twin, REL_RMS["float32"])


CHECKED = [
    Case(S=65, T=2, kv_map=(0, 1, 1), dtype="bfloat16", cores=1, norm="rms", gate="elementwise"),
    Case(S=33, T=1, kv_map=(2, 0), Hk=4, extra=0, Dk=128, Dv=128, dtype="float16", cores=1),
    Case(S=33, T=8, kv_map=(0,), bits=4, group=32, dtype="bfloat16", cores=1, gate="headwise"),
    Case(S=65, T=1, kv_map=(0, 1), Dk=128, Dv=128, bits=8, dtype="float32", cores=1, B=2),
    Case(S=31, splits=(2, 32), dtype="float32", norm="rms_no_weight"),
    Case(S=65, T=2, kv_map=(0, 0), Dk=128, Dv=64, bits=8, v_bits=4, dtype="bfloat16", cores=1),
    Case(S=133, T=2, bits=4, dtype="float32", options=(("simdgroups", 1),)),
    Case(S=65, B=2, kv_map=(0, 1), bits=4, starts=(64, 3), dtype="bfloat16", cores=1),
]


@pytest.mark.parametrize("case", CHECKED, ids=str)
def test_checked(case):
    run_case(replace(case, check=True))


COUNTED = [
    Case(S=500, T=1, kv_map=(0, 1, 1), Dk=128, Dv=128, dtype="bfloat16", norm="rms"),
    Case(S=300, T=3, kv_map=(0, 0, 1), dtype="float32", gate="headwise", B=2),
    Case(
        S=500,
        kv_map=(0,),
        Dk=128,
        Dv=128,
        bits=4,
        dtype="bfloat16",
        gate="elementwise",
        splits=(4, 128),
    ),
    Case(S=300, T=2, kv_map=(0, 1), bits=8, group=32, dtype="float16", Dv=128),
    Case(S=300, kv_map=(0, 1), dtype="bfloat16", options=(("simdgroups", 2),)),
    Case(S=300, kv_map=(0, 1), dtype="bfloat16", bits=8, v_bits=4),
]


@pytest.mark.parametrize("case", COUNTED, ids=str)
def test_cost_is_what_the_host_runtime_counts(case):
    for launch, counts in run_case(replace(case, check=True)):
        first = launch.kernel is fa_decode.KERNEL
        cost = fa_decode.cost(launch) if first else fa_decode.combine_cost(launch)
        case_text = f"{case}: {launch.kernel.name}"
        assert cost.read == pytest.approx(counts.device_bytes_read, rel=0.02), case_text
        assert cost.written == pytest.approx(counts.device_bytes_written, rel=0.02), case_text
        assert cost.threadgroup_bytes == pytest.approx(counts.threadgroup_memory, abs=16)


def test_cost_against_the_composed_operations():
    """What the kernel is for: 512K keys are read once, in two dispatches; 4 bit far below 16."""
    q = mx.zeros((1, 1, 4, 128), mx.bfloat16)
    heads = (0, 1, 2, 3)

    def both(bits):
        S = 1 << 19
        if bits is None:
            x = mx.zeros((1, 4, S, 128), mx.bfloat16)
            kv = KeyValues(x, x, S)
        else:
            x = [mx.zeros((1, 4, S, n), t) for n, t in ((16, mx.uint32), *[(2, mx.bfloat16)] * 2)]
            kv = KeyValues(x, x, S, bits, bits, 64)
        first = fa_decode.launch(q, kv, heads, 0.1)
        part, stats = (mx.zeros(s) for s in first.output_shapes)
        second = fa_decode.combine_launch(part, stats, q.dtype)
        return fa_decode.cost(first, second), fa_decode.composed_cost(q, kv, heads, None, None)

    plain, composed = both(None)
    assert plain.dispatches == 2 < composed.dispatches
    assert plain.read < 1.01 * composed.read
    four, composed = both(4)
    assert four.read < 0.36 * plain.read and four.dispatches < composed.dispatches


def test_splits_fill_the_gpu():
    """At least two threadgroups a core for long caches, whole steps, no empty split."""
    for S in (1, 31, 500, 4096, 131072, 524288, 2**20):
        for columns in (1, 2, 4, 24):
            for cores in (8, 20, 132):
                n, keys = fa_decode.split_plan(S, columns, 64, cores)
                assert keys % 32 == 0 and (n - 1) * keys < S <= n * keys
                assert n <= fa_decode.MAX_SPLITS
                if S >= 131072 and columns >= 4:
                    assert n * columns >= 2 * cores


def test_work_table():
    R, items, table = fa_decode.work_table((2, 0, 0), 2)
    assert R == 4 and items == ((0, (1, 2, 4, 5)), (2, (0, 3)))
    assert table.tolist() == [0, 1, 2, 4, 5, 2, 0, 3, -1, -1]
    R, items, _ = fa_decode.work_table((0, 0, 0), 2)
    assert R == 3 and len(items) == 2
    assert fa_decode.work_table((0,), 1)[2].size == 8


def test_eligible_gives_reasons():
    q = mx.zeros((1, 1, 2, 64))
    x = mx.zeros((1, 2, 8, 64))
    kv = KeyValues(x, x, 5)

    def reason(q=q, kv=kv, heads=(0, 1), mask="causal"):
        ok, why = fa_decode.eligible(q, kv, heads, mask)
        return "" if ok else why

    assert reason() == reason(mask=None) == ""
    assert "without a causal" in reason(mx.zeros((1, 2, 2, 64)), mask=None)
    assert "9 tokens" in reason(mx.zeros((1, 9, 2, 64)))
    assert "mask" in reason(mask=mx.zeros((1, 5)))
    assert "int8" in reason(q.astype(mx.int8))
    assert "do not fit" in reason(heads=(0,))
    assert "do not fit" in reason(mx.zeros((1, 6, 2, 64)))
    y = mx.zeros((1, 2, 8, 96))
    assert "96" in reason(kv=KeyValues(y, y, 5))
    assert "valid tokens" in reason(kv=KeyValues(x, x, 9))
    assert "3 bits" in reason(kv=KeyValues((x, x, x), (x, x, x), 5, 3, 3, 64))
    one = (mx.zeros((1, 1, 1, 8), mx.uint32), mx.zeros((1, 1, 1, 1)), mx.zeros((1, 1, 1, 1)))
    assert "few" in reason(kv=KeyValues(one, one, 1, 4, 4, 64))
