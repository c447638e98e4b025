"""fa_prefill on the host runtime, against the float64 oracle and the MLX twin."""

from dataclasses import replace

from hydra_mlx import ops
from hydra_mlx.kernels import fa_prefill
from hydra_mlx.kernels.fa_decode import KeyValues

import mlx.core as mx
import numpy as np
import pytest

from .kernel_host import host_run
from .metal_host.testing import needs_metal_host
from .test_kernel_fa_decode import DTYPES, F32, Case, exact_attention, make_cache, random
from .tolerance import REL_RMS, assert_close

pytestmark = needs_metal_host

PLAIN = Case(S=33, T=7, bits=8, group=64, extra=7)


def run_case(case, seed=0):
    """Runs a case; returns the launch and its counts."""
    rng = np.random.default_rng(seed)
    dtype = DTYPES[case.dtype]
    Hf, Hk = len(case.kv_map), case.Hk or max(case.kv_map) + 1
    q = random(rng, (case.B, case.T, Hf, case.Dk), dtype, case.logits)
    kv, (k, v) = make_cache(rng, case, Hk, DTYPES[case.cache or case.dtype])
    ok, reason = fa_prefill.eligible(q, kv, case.kv_map, "causal")
    assert ok, reason
    scale, launches = case.Dk**-0.5, []

    def executor(launch):
        out, counts = host_run(launch, check=case.check)
        launches.append((launch, counts))
        return out

    options = dict(case.options)
    y = fa_prefill.run(q, kv, case.kv_map, scale, case.a, executor=executor, **options)
    exact = exact_attention(q, k, v, case, scale, case.S - case.T)[1]
    assert y.shape == q.shape and y.dtype == dtype
    assert_close(y, exact, REL_RMS[case.dtype], str(case))
    return launches[0]


SHAPES = [
    replace(PLAIN, S=1, T=1, extra=15),
    replace(PLAIN, S=33, T=1, kv_map=(0,)),
    replace(PLAIN, S=7, T=7, kv_map=(0, 1, 1, 2, 3, 3)),
    replace(PLAIN, S=65, T=9, kv_map=(0, 0, 0), extra=0),
    replace(PLAIN, S=31, T=31, kv_map=(2, 0), Hk=4),
    replace(PLAIN, S=100, T=33, Dk=128, Dv=128),
    replace(PLAIN, S=65, T=65, Dk=128, Dv=128, kv_map=(1, 1, 0)),
    replace(PLAIN, S=500, T=65, kv_map=(0,)),
    replace(PLAIN, S=40, T=9, kv_map=tuple(h // 3 for h in range(13))),
    replace(PLAIN, S=33, T=9, B=2),
    replace(PLAIN, S=65, T=33, options=(("simdgroups", 4), ("tile_keys", 8))),
]


@pytest.mark.parametrize("case", SHAPES, ids=str)
@pytest.mark.parametrize("bits", [8, 4])
def test_shapes(case, bits):
    group, dtype = (32, 64)[(case.S + bits // 4) % 2], list(DTYPES)[(case.T + bits // 4) % 3]
    run_case(replace(case, bits=bits, group=group, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group", [32, 64])
def test_formats(dtype, bits, group):
    run_case(replace(PLAIN, S=40, T=9, bits=bits, group=group, dtype=dtype))


@pytest.mark.parametrize("bits", [(8, 4), (4, 8)], ids=str)
@pytest.mark.parametrize("D", [64, 128])
def test_keys_and_values_in_different_bits(bits, D):
    case = replace(PLAIN, S=75, T=20, Dk=D, Dv=D, bits=bits[0], v_bits=bits[1], dtype="bfloat16")
    run_case(replace(case, check=D == 64, group=32))
    run_case(replace(case, B=2, dtype="float32"))


def test_other_dtypes_scales_and_logits():
    run_case(replace(PLAIN, dtype="float32", cache="bfloat16"))
    run_case(replace(PLAIN, a=None))
    run_case(replace(PLAIN, logits=300.0, dtype="bfloat16"))


def test_offset_need_not_be_the_cache_length():
    rng = np.random.default_rng(0)
    case = replace(PLAIN, S=40, T=9)
    q = random(rng, (1, 9, 3, 64), F32)
    kv, (k, v) = make_cache(rng, case, 2, F32)
    y = fa_prefill.run(q, kv, case.kv_map, 0.125, 500.0, 100000, executor=lambda x: host_run(x)[0])
    assert_close(y, exact_attention(q, k, v, case, 0.125, 100000)[1], REL_RMS["float32"])


def test_equal_to_the_mlx_twin():
    """The path the model takes without kernels, on an mlx-lm cache."""
    from mlx_lm.models.cache import QuantizedKVCache

    rng = np.random.default_rng(3)
    T, S, D, runs = 9, 41, 64, ((0, 1, 0, 1), (1, 2, 1, 1))
    k, v = (random(rng, (1, 2, S, D), F32) for _ in range(2))
    cache = QuantizedKVCache(group_size=32, bits=4)
    cache.update_and_fetch(k[:, :, : S - T], v[:, :, : S - T])
    q = random(rng, (1, T, 3, D), F32)
    keys, values = cache.update_and_fetch(k[:, :, S - T :], v[:, :, S - T :])
    s = ops.log_length_scale(S - T, T, 500.0)[:, None, None]
    o = ops.ragged_attention((q * s).swapaxes(1, 2), keys, values, runs, D**-0.5, "causal", cache)
    y = fa_prefill.run(
        q, KeyValues.of(cache), (0, 1, 1), D**-0.5, 500.0, executor=lambda x: host_run(x)[0]
    )
    assert_close(y, o.swapaxes(1, 2), REL_RMS["float32"])


CHECKED = [
    replace(PLAIN, S=33, T=9, kv_map=(0, 1, 1), dtype="bfloat16", bits=4, group=32),
    replace(PLAIN, S=40, T=33, kv_map=(1, 1), Hk=3, dtype="float16", extra=0),
    replace(PLAIN, S=50, T=7, kv_map=(0,), Dk=128, Dv=128, B=2),
]


@pytest.mark.parametrize("case", CHECKED, ids=str)
def test_checked_and_cost(case):
    launch, counts = run_case(replace(case, check=True))
    cost = fa_prefill.cost(launch, case.kv_map)
    assert cost.read == pytest.approx(counts.device_bytes_read, rel=0.02)
    assert cost.written == counts.device_bytes_written
    assert cost.threadgroup_bytes == pytest.approx(counts.threadgroup_memory, abs=32)
    # Every multiply of 8 x 8 x 8 is 1024 operations.
    assert cost.flops == 1024 * counts.simdgroup_multiplies


def test_cost_against_the_composed_operations():
    """What the kernel is for: no scores in device memory."""
    q = mx.zeros((1, 2048, 4, 128), mx.bfloat16)
    x = [mx.zeros((1, 4, 32768, n), t) for n, t in ((16, mx.uint32), *[(2, mx.bfloat16)] * 2)]
    kv = KeyValues(x, x, 32768, 4, 4, 64)
    heads = (0, 1, 2, 3)
    ours = fa_prefill.cost(fa_prefill.launch(q, kv, heads, 0.1), heads)
    composed = fa_prefill.composed_cost(q, kv, heads)
    assert ours.dispatches == 1 < composed.dispatches
    assert ours.read < composed.read and ours.written < composed.written / 100


def test_eligible_gives_reasons():
    q = mx.zeros((1, 9, 2, 64))
    x = [mx.zeros((1, 2, 16, n), t) for n, t in ((8, mx.uint32), (1, F32), (1, F32))]
    kv = KeyValues(x, x, 16, 4, 4, 64)

    def reason(q=q, kv=kv, heads=(0, 1), mask="causal"):
        ok, why = fa_prefill.eligible(q, kv, heads, mask)
        return "" if ok else why

    assert reason() == ""
    assert "not quantised" in reason(kv=KeyValues(q, q, 9))
    assert "array as mask" in reason(mask=mx.zeros((9, 16)))
    assert "without a causal" in reason(mask=None)
    assert "do not fit" in reason(heads=(0,))
    assert "do not fit" in reason(mx.zeros((1, 17, 2, 64)))
    assert "equal" in reason(mx.zeros((1, 9, 2, 128)))
    assert "6 and 4 bits" in reason(kv=replace(kv, k_bits=6))
    assert "int8" in reason(q.astype(mx.int8))
