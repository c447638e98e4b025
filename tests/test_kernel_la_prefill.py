"""la_prefill, executed by the host runtime, against the float64 oracle and the MLX operations."""

from __future__ import annotations

from hydra_mlx import reference
from hydra_mlx.kernels import la_prefill as kernel
from hydra_mlx.kernels.la_prefill import Tiles
from hydra_mlx.ops import gated_delta

import mlx.core as mx
import numpy as np
import pytest

from .kernel_host import host_run
from .metal_host.testing import needs_metal_host
from .tolerance import REL_RMS, STATE, assert_close, to_numpy

pytestmark = needs_metal_host

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
BOTH = ("steps", "chunked")


def random_inputs(B, T, Hl, Dk, Dv, dtype="float32", seed=0, state=True):
    """q, k (unit length), v in dtype; g, beta, state in float32. Gates from near 0 to near 1."""
    rng = np.random.default_rng(seed)

    def unit(scale):
        x = rng.normal(size=(B, T, Hl, Dk))
        return scale * x / np.linalg.norm(x, axis=-1, keepdims=True)

    q, k, v = unit(Dk**-0.5), unit(1.0), rng.normal(size=(B, T, Hl, Dv))
    g = -np.exp(rng.normal(-2, 2, (B, T, Hl)))
    beta = 1 / (1 + np.exp(-rng.normal(0, 2, (B, T, Hl))))
    S = rng.normal(size=(B, Hl, Dv, Dk)) if state else None
    arrays = [mx.array(x.astype(np.float32)).astype(DTYPES[dtype]) for x in (q, k, v)]
    arrays += [mx.array(x.astype(np.float32)) for x in (g, beta)]
    return [*arrays, None if S is None else mx.array(S.astype(np.float32))]


def execute(inputs, which, mask=None, tiles=kernel.TILES, **options):
    """Outputs, and the host runtime's counts of each launch."""
    counts = []

    def executor(launch):
        out, c = host_run(launch, **options)
        counts.append(c)
        return out

    o, state = kernel.run(*inputs, mask=mask, executor=executor, which=which, tiles=tiles)
    return o, state, counts


def oracle(inputs, mask=None):
    """reference.gated_delta on the same, already rounded numbers."""
    exact = [None if x is None else to_numpy(x) for x in inputs]
    return reference.gated_delta(*exact, mask=None if mask is None else np.array(mask))


def compare(inputs, which, dtype="float32", mask=None, case="", **options):
    o, state, counts = execute(inputs, which, mask, **options)
    ref_o, ref_state = oracle(inputs, mask)
    assert o.dtype == DTYPES[dtype] and state.dtype == mx.float32
    assert_close(o, ref_o, REL_RMS[dtype], f"{which} {case} output")
    assert_close(state, ref_state, STATE, f"{which} {case} state")
    return o, state, counts


SHAPES = [  # B, T, Hl, Dk, Dv, dtype
    (1, 1, 1, 32, 32, "float32"),
    (2, 2, 3, 64, 128, "bfloat16"),
    (1, 7, 13, 32, 64, "float16"),
    (1, 8, 1, 128, 64, "bfloat16"),
    (2, 9, 1, 64, 64, "float16"),
    (1, 31, 7, 32, 64, "float32"),
    (1, 32, 1, 128, 128, "float32"),
    (1, 33, 3, 64, 32, "bfloat16"),
    (2, 65, 1, 96, 32, "float32"),
    (1, 64, 1, 128, 128, "float16"),
    (1, 130, 2, 64, 128, "bfloat16"),
]


@pytest.mark.parametrize("which", BOTH)
@pytest.mark.parametrize(
    "shape", SHAPES, ids=lambda s: "B{}-T{}-H{}-Dk{}-Dv{}-{}".format(*s)
)  # fmt: skip
def test_shapes(shape, which):
    dtype = shape[-1]
    inputs = random_inputs(*shape)
    o, state, _ = compare(inputs, which, dtype, case=str(shape))
    twin_o, twin_state = gated_delta(*inputs)
    assert_close(o, to_numpy(twin_o), 2 * REL_RMS[dtype], f"{shape} twin's output")
    assert_close(state, to_numpy(twin_state), STATE, f"{shape} twin's state")


def test_500_tokens():
    compare(random_inputs(1, 500, 2, 64, 64, "bfloat16"), "chunked", "bfloat16")


CHECKED = [
    (1, 1, 1, 32, 32, "float16"),
    (2, 9, 3, 64, 32, "bfloat16"),
    (1, 66, 1, 32, 64, "float32"),
    (1, 128, 1, 64, 32, "float16"),
]


@pytest.mark.parametrize("which", BOTH)
@pytest.mark.parametrize("shape", CHECKED, ids=lambda s: "B{}-T{}-H{}-Dk{}-Dv{}-{}".format(*s))
@pytest.mark.parametrize("full", [True, False], ids=["state-mask", "bare"])
def test_checked_and_counted(shape, which, full):
    """No fault in checked mode, and the formulas of cost within 2 % (here: exact)."""
    B, T, Hl, Dk, Dv, dtype = shape
    inputs = random_inputs(*shape, state=full)
    mask = mx.ones((B, T), mx.bool_) if full else None
    _, _, counts = compare(inputs, which, dtype, mask, str(shape), check=True)
    cost = kernel.cost(B, T, Hl, Dk, Dv, DTYPES[dtype], full, full, which)
    assert sum(c.device_bytes_written for c in counts) == cost.written
    # Arrays under 8 elements are in constant memory; T_len and Hl, ints, do not count.
    read = [x.read for c in counts for name, x in c.buffers.items() if name not in ("T_len", "Hl")]
    assert sum(read) == pytest.approx(cost.read, rel=0.02)
    assert max(c.threadgroup_memory for c in counts) == cost.threadgroup_bytes or len(counts) == 1
    if which == "chunked":
        assert sum(c.simdgroup_multiplies for c in counts) * 1024 == cost.flops
    assert len(counts) == cost.dispatches


@pytest.mark.parametrize("which", BOTH)
def test_device_bytes_within_two_percent(which):
    """At a model's head size, where nothing small can hide."""
    inputs = random_inputs(1, 100, 1, 128, 128, "bfloat16")
    _, _, counts = compare(inputs, which, "bfloat16", count=True)
    cost = kernel.cost(1, 100, 1, 128, 128, mx.bfloat16, which=which)
    assert sum(c.device_bytes_read for c in counts) == pytest.approx(cost.read, rel=0.02)
    assert sum(c.device_bytes_written for c in counts) == pytest.approx(cost.written, rel=0.02)
    composed = kernel.composed_cost(1, 100, 1, 128, 128, mx.bfloat16)
    assert cost.read + cost.written < composed.read + composed.written
    assert cost.dispatches < composed.dispatches


@pytest.mark.parametrize(
    "tiles",
    [
        Tiles(C=32, groups=2),
        Tiles(C=32, groups=4, slice=32),
        Tiles(groups=8),
        Tiles(groups=2, slice=32),
        Tiles(lanes=4, rows=1, block=5),
        Tiles(lanes=16, rows=4, step_groups=2),
    ],
    ids=str,
)
@pytest.mark.parametrize("which", BOTH)
def test_other_tiles(tiles, which):
    """Every size a sweep may choose gives the same."""
    inputs = random_inputs(1, 75, 1, 64, 32, "bfloat16")
    _, _, counts = compare(inputs, which, "bfloat16", tiles=tiles, check=True)
    cost = kernel.cost(1, 75, 1, 64, 32, mx.bfloat16, which=which, tiles=tiles)
    assert sum(c.device_bytes_read for c in counts) == pytest.approx(cost.read, rel=0.02)
    if which == "chunked":
        assert sum(c.simdgroup_multiplies for c in counts) * 1024 == cost.flops


@pytest.mark.parametrize("which", BOTH)
def test_no_state_equals_zeros(which):
    inputs = random_inputs(2, 20, 3, 32, 64, state=False)
    o, state, _ = compare(inputs, which)
    zeros = [*inputs[:5], mx.zeros((2, 3, 64, 32))]
    again_o, again_state, _ = execute(zeros, which)
    assert mx.array_equal(o, again_o) and mx.array_equal(state, again_state)


@pytest.mark.parametrize("which", BOTH)
def test_masked_rows(which):
    """Padding on the left, a hole, a row that is masked whole."""
    B, T = 3, 70
    inputs = random_inputs(B, T, 2, 32, 32)
    mask = np.ones((B, T), bool)
    mask[0, :9], mask[0, 40:43], mask[1] = False, False, False
    _, state, _ = compare(inputs, which, mask=mx.array(mask), check=True)
    assert mx.array_equal(state[1], inputs[5][1])


@pytest.mark.parametrize("which", BOTH)
@pytest.mark.parametrize("g", [0.0, -np.inf, None], ids=["g0", "g-inf", "g-some-inf"])
@pytest.mark.parametrize("beta", [0.0, 1.0], ids=["beta0", "beta1"])
def test_gates_at_their_ends(which, g, beta):
    inputs = random_inputs(1, 70, 1, 32, 32)
    shape = inputs[3].shape
    if g is None:  # one token in nine wipes the state, the first of a chunk and of a tile too
        wipes = mx.array((np.arange(70) % 9 == 1) | np.isin(np.arange(70), [0, 8, 64]))
        inputs[3] = mx.where(wipes[None, :, None], -np.inf, inputs[3])
    else:
        inputs[3] = mx.full(shape, g)
    inputs[4] = mx.full(shape, beta)
    compare(inputs, which) if not (g == -np.inf and beta == 0) else all_zero(inputs, which)


def all_zero(inputs, which):
    o, state, _ = execute(inputs, which)
    assert not o.any() and not state.any()


@pytest.mark.parametrize("which", BOTH)
def test_non_contiguous(which):
    """Slices of one array and a transposed one, as the fused projection gives them."""
    q, k, v, g, beta, state = random_inputs(1, 40, 2, 32, 32)
    joined = mx.concatenate([q, k, v], axis=-1)
    q2, k2, v2 = mx.split(joined, 3, axis=-1)
    g2, state2 = g.swapaxes(1, 2) * 1, state.swapaxes(2, 3) * 1
    other = (q2, k2, v2, g2.swapaxes(1, 2), beta[:, ::1], state2.swapaxes(2, 3))
    o, last, _ = execute((q, k, v, g, beta, state), which)
    again_o, again, _ = execute(other, which)
    assert mx.array_equal(o, again_o) and mx.array_equal(last, again)


@pytest.mark.parametrize("which", BOTH)
@pytest.mark.parametrize("cut", [1, 37, 64])
def test_split_in_two_calls(which, cut):
    """Two calls with the state handed over equal one."""
    inputs = random_inputs(1, 75, 1, 32, 32)
    o, state, _ = execute(inputs, which)
    first, middle, _ = execute([*(x[:, :cut] for x in inputs[:5]), inputs[5]], which)
    second, last, _ = execute([*(x[:, cut:] for x in inputs[:5]), middle], which)
    assert_close(mx.concatenate([first, second], axis=1), to_numpy(o), 1e-6, f"cut {cut}")
    assert_close(last, to_numpy(state), 1e-6, f"cut {cut}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("which", BOTH)
def test_repeated_keys(which, dtype):
    """One key, beta almost 1, nothing forgotten: where Neumann doubling explodes."""
    T = 256
    inputs = random_inputs(1, T, 1, 32, 32, dtype)
    inputs[1] = mx.broadcast_to(inputs[1][:, :1], inputs[1].shape)
    inputs[3] = mx.full((1, T, 1), -1e-6)
    inputs[4] = mx.full((1, T, 1), 0.9999)
    compare(inputs, which, dtype)


def test_repeated_keys_of_64_and_negative_eigenvalues():
    """beta up to 2 (la_allow_neg_eigval), keys from a set of three."""
    inputs = random_inputs(1, 192, 1, 64, 32)
    inputs[1] = mx.take(inputs[1], mx.array(np.arange(192) % 3), axis=1)
    inputs[3], inputs[4] = mx.zeros((1, 192, 1)), mx.full((1, 192, 1), 1.98)
    compare(inputs, "chunked")


@pytest.mark.parametrize("which", BOTH)
def test_slow_decay_over_4096_tokens(which):
    """g near 0 over a long run in bfloat16, where a 16-bit g would be 8 to 24 % off."""
    T = 4096
    inputs = random_inputs(1, T, 1, 32, 32, "bfloat16")
    rng = np.random.default_rng(3)
    inputs[3] = mx.array(-np.exp(rng.normal(-8, 1, (1, T, 1))).astype(np.float32))
    compare(inputs, which, "bfloat16")


def test_rule():
    """Which variant, and why."""
    assert kernel.line(128, 128) == 57
    assert kernel.variant(57, 128, 128)[0] == "steps"
    assert kernel.variant(58, 128, 128) == ("chunked", "58 tokens in chunks of 64")
    bf16 = [mx.zeros((1, 8, 2, 64), mx.bfloat16)] * 3
    assert kernel.eligible(*bf16)[0]
    for bad in (
        [*bf16[:2], mx.zeros((1, 8, 2, 64))],
        [mx.zeros((1, 8, 2, 80))] * 3,
        [mx.zeros((1, 8, 33, 64))] * 3,
        [mx.zeros((1, 8, 2, 64), mx.int32)] * 3,
        [*bf16, mx.zeros((1, 2, 64, 64), mx.bfloat16)],
    ):
        ok, reason = kernel.eligible(*bad)
        assert not ok and reason


def test_wrong_shapes_are_told():
    q, k, v, g, beta, state = random_inputs(1, 9, 2, 32, 32)
    with pytest.raises(ValueError, match="beta must be"):
        kernel.run(q, k, v, g, beta[..., :1], state)
