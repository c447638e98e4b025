"""Operations against the float64 oracle and against other people's code, at odd shapes."""

import math

from hydra_mlx import ops, reference
from hydra_mlx.ops.delta import unit_lower_inverse

import mlx.core as mx
import numpy as np
import pytest

from .tolerance import REL_RMS, STATE, assert_close, rel_rms, to_numpy

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


def delta_inputs(B, T, Hl, Dk, Dv, seed=0, g="mixed", beta="mixed", keys="random"):
    """float32 arrays q, k, v, g, beta, state as the operation gets them."""
    rng = np.random.RandomState(seed)
    q, k = rng.randn(2, B, T, Hl, Dk)
    if keys == "repeated":
        k[:] = k[:, :1]
    q /= np.linalg.norm(q, axis=-1, keepdims=True) * math.sqrt(Dk)
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    v = rng.randn(B, T, Hl, Dv)
    shape = (B, T, Hl)
    gs = {
        "mixed": -np.exp(rng.uniform(-7, 1.5, shape)),
        "near_one": -np.exp(rng.uniform(-12, -8, shape)),
        "wiping": np.where(rng.rand(*shape) < 0.15, -np.inf, -np.exp(rng.uniform(-7, -3, shape))),
        "one": np.zeros(shape),
    }
    betas = {
        "mixed": rng.uniform(0, 1, shape),
        "near_one": rng.uniform(0.99, 1, shape),
        "ends": rng.randint(0, 2, shape).astype(float),
    }
    state = rng.randn(B, Hl, Dv, Dk)
    return [x.astype(np.float32) for x in (q, k, v, gs[g], betas[beta], state)]


def run_delta(arrays, dtype="float32", mask=None, state=True, **options):
    """Operation and oracle on the same, already rounded, inputs."""
    q, k, v = (mx.array(x).astype(DTYPES[dtype]) for x in arrays[:3])
    g, beta, S = (mx.array(x) for x in arrays[3:])
    S = S if state else None
    out = ops.gated_delta(q, k, v, g, beta, S, None if mask is None else mx.array(mask), **options)
    ref = reference.gated_delta(
        *(to_numpy(x) for x in (q, k, v, g, beta)), None if S is None else to_numpy(S), mask
    )
    return out, ref


@pytest.mark.parametrize("T", [1, 2, 7, 8, 9, 31, 32, 33, 65, 200])
@pytest.mark.parametrize("heads", [1, 3])
def test_gated_delta_lengths(T, heads):
    (o, S), (ro, rS) = run_delta(delta_inputs(2, T, heads, 24, 16, seed=T))
    assert_close(o, ro, REL_RMS["float32"], f"T={T} o")
    assert_close(S, rS, STATE, f"T={T} S")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("g", ["mixed", "near_one", "wiping", "one"])
@pytest.mark.parametrize("beta", ["mixed", "near_one", "ends"])
def test_gated_delta_gates(dtype, g, beta):
    (o, S), (ro, rS) = run_delta(delta_inputs(1, 97, 3, 16, 40, 1, g, beta), dtype)
    assert o.dtype == DTYPES[dtype] and S.dtype == mx.float32
    assert_close(o, ro, REL_RMS[dtype], f"{g} {beta} o")
    assert_close(S, rS, STATE, f"{g} {beta} S")


@pytest.mark.parametrize("heads,Dk,Dv", [(7, 64, 32), (13, 8, 24), (1, 128, 64), (2, 3, 5)])
def test_gated_delta_shapes_without_state(heads, Dk, Dv):
    (o, S), (ro, rS) = run_delta(delta_inputs(1, 40, heads, Dk, Dv, 5), state=False)
    assert_close(o, ro, REL_RMS["float32"])
    assert_close(S, rS, STATE)


def test_gated_delta_4096_repeated_keys_bf16():
    """The case that breaks Neumann doubling: repeated keys, beta and decay near 1."""
    arrays = delta_inputs(1, 4096, 2, 32, 16, 3, "near_one", "near_one", "repeated")
    (o, S), (ro, rS) = run_delta(arrays, "bfloat16")
    assert_close(S, rS, 1e-5, "state")
    assert_close(o, ro, 3e-3, "output")


def test_gated_delta_4096_bf16_random_keys():
    arrays = delta_inputs(1, 4096, 1, 24, 16, 4, "near_one", "near_one")
    (o, S), (ro, rS) = run_delta(arrays, "bfloat16")
    assert_close(S, rS, 1e-5, "state")
    assert_close(o, ro, 3e-3, "output")


@pytest.mark.parametrize("T", [3, 9, 70])
def test_masked_tokens_do_not_move_the_state(T):
    arrays = delta_inputs(3, T, 2, 16, 8, 6)
    mask = np.random.RandomState(0).rand(3, T) < 0.6
    mask[1] = False
    (o, S), (ro, rS) = run_delta(arrays, mask=mask)
    assert_close(o, ro, REL_RMS["float32"])
    assert_close(S, rS, STATE)
    assert np.array_equal(np.array(S[1]), arrays[5][1]), "a fully masked row must keep its state"


@pytest.mark.parametrize("chunk", [1, 2, 16, 128])
def test_chunk_size_does_not_matter(chunk):
    arrays = delta_inputs(1, 150, 2, 16, 24, 7)
    (o, S), (ro, rS) = run_delta(arrays, chunk=chunk)
    assert_close(o, ro, REL_RMS["float32"])
    assert_close(S, rS, STATE)


def test_non_contiguous_inputs():
    arrays = delta_inputs(2, 40, 4, 16, 8, 8)
    o, S = ops.gated_delta(*(mx.array(x) for x in arrays))
    wide = [mx.array(np.repeat(x, 2, axis=2))[:, :, ::2] for x in arrays[:5]]
    state = mx.swapaxes(mx.array(arrays[5].swapaxes(2, 3).copy()), 2, 3)
    o2, S2 = ops.gated_delta(*wide, state)
    assert np.array_equal(np.array(o), np.array(o2)) and np.array_equal(np.array(S), np.array(S2))


def test_wrong_shapes_are_named():
    arrays = [mx.array(x) for x in delta_inputs(1, 9, 2, 16, 8)]
    for i, name in enumerate(("k", "v", "g", "beta", "state"), start=1):
        wrong = list(arrays)
        wrong[i] = wrong[i][:, :1]
        with pytest.raises(ValueError, match=name):
            ops.gated_delta(*wrong)
    with pytest.raises(ValueError, match="power of two"):
        ops.gated_delta(*arrays, chunk=48)


def test_unit_lower_inverse_and_its_gradient():
    rng = np.random.RandomState(0)
    A = np.tril(rng.randn(3, 32, 32) * 0.3, -1).astype(np.float32)
    inverse = np.linalg.inv(np.eye(32) + A.astype(np.float64))
    assert_close(unit_lower_inverse(mx.array(A)), inverse, 1e-6)
    weights = mx.array(rng.randn(3, 32, 32).astype(np.float32))
    grad = mx.grad(lambda a: (unit_lower_inverse(a) * weights).sum())(mx.array(A))
    exact = -inverse.swapaxes(1, 2) @ to_numpy(weights) @ inverse.swapaxes(1, 2)
    assert_close(grad, exact, 1e-5)


@pytest.mark.parametrize("T", [3, 40])
def test_gated_delta_gradient(T):
    """Chunked gradients equal those of the token-by-token form, and finite differences."""
    from hydra_mlx.ops.delta import _steps

    arrays = [mx.array(x) for x in delta_inputs(1, T, 2, 8, 12, 9)]
    rng = np.random.RandomState(1)
    w_o = mx.array(rng.randn(1, T, 2, 12).astype(np.float32))
    w_s = mx.array(rng.randn(1, 2, 12, 8).astype(np.float32))

    def loss(f):
        def inner(*a):
            o, S = f(*a)
            return (o * w_o).sum() + (S * w_s).sum()

        return inner

    chunked = mx.grad(loss(lambda *a: ops.gated_delta(*a, chunk=16)), list(range(6)))(*arrays)
    stepped = mx.grad(loss(_steps), list(range(6)))(*arrays)
    for name, a, b in zip(("q", "k", "v", "g", "beta", "S"), chunked, stepped, strict=True):
        assert_close(a, b, 1e-4, name)
    direction = rng.randn(*arrays[3].shape).astype(np.float32)
    h = 1e-2

    def at(x):
        a = [to_numpy(y) for y in arrays]
        a[3] = a[3] + x * direction
        o, S = reference.gated_delta(*a)
        return (o * to_numpy(w_o)).sum() + (S * to_numpy(w_s)).sum()

    slope = (at(h) - at(-h)) / (2 * h)
    assert abs((to_numpy(chunked[3]) * direction).sum() - slope) < 1e-3 * max(1, abs(slope))


def test_gradient_survives_wiped_states():
    arrays = [mx.array(x) for x in delta_inputs(1, 20, 1, 8, 8, 2, "wiping")]
    grads = mx.grad(lambda *a: ops.gated_delta(*a)[0].sum(), [0, 1, 2, 4, 5])(*arrays)
    assert all(np.isfinite(np.array(x)).all() for x in grads)


def test_agrees_with_mlx_lm():
    from mlx_lm.models.gated_delta import gated_delta_ops

    q, k, v, g, beta, S = (mx.array(x) for x in delta_inputs(2, 70, 3, 32, 16, 11))
    mask = mx.array(np.random.RandomState(2).rand(2, 70) < 0.8)
    o, state = ops.gated_delta(q, k, v, g, beta, S, mask)
    theirs, their_state = gated_delta_ops(q, k, v, mx.exp(g), beta, S, mask)
    # Masked rows are unspecified there.
    assert_close(
        mx.where(mask[..., None, None], o, 0), mx.where(mask[..., None, None], theirs, 0), 1e-5
    )
    assert_close(state, their_state, 1e-5)


@pytest.mark.parametrize(
    "which", ["torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"]
)
def test_agrees_with_qwen3_next(which):
    torch = pytest.importorskip("torch", reason="PyTorch is in the extra `golden`")
    from transformers.models.qwen3_next import modeling_qwen3_next as qwen

    arrays = delta_inputs(1, 100, 2, 32, 16, 12)
    q, k, v, g, beta, S = (torch.from_numpy(x) for x in arrays)
    # Their state is [B, H, Dk, Dv], and they scale q by 1/sqrt(Dk) themselves.
    theirs, state = getattr(qwen, which)(
        q * math.sqrt(32),
        k,
        v,
        g=g,
        beta=beta,
        initial_state=S.transpose(2, 3),
        output_final_state=True,
    )
    o, ours = ops.gated_delta(*(mx.array(x) for x in arrays))
    assert_close(o, theirs.numpy(), 1e-5)
    assert_close(ours, state.transpose(2, 3).numpy(), 1e-5)


@pytest.mark.parametrize("T", [1, 2, 3, 9, 33])
def test_short_conv(T):
    rng = np.random.RandomState(T)
    x, w, tail = rng.randn(2, T, 10), rng.randn(10, 4), rng.randn(2, 3, 10)
    x, w, tail = (a.astype(np.float32) for a in (x, w, tail))
    y, new_tail = ops.short_conv(mx.array(x), mx.array(w), mx.array(tail))
    ref, ref_tail = reference.short_conv(x, w, tail)
    assert_close(y, reference.silu(ref), REL_RMS["float32"])
    assert np.array_equal(np.array(new_tail), ref_tail.astype(np.float32))
    y0, _ = ops.short_conv(mx.array(x), mx.array(w))
    assert_close(y0, reference.silu(reference.short_conv(x, w)[0]), REL_RMS["float32"])


def test_short_conv_ragged_tail():
    """With right padding, the tail is what the unpadded row alone would leave."""
    rng = np.random.RandomState(0)
    x, w, tail = rng.randn(4, 6, 5), rng.randn(5, 4), rng.randn(4, 3, 5)
    x, w, tail = (mx.array(a.astype(np.float32)) for a in (x, w, tail))
    lengths = [6, 4, 1, 0]
    mask = mx.arange(6) < mx.array(lengths)[:, None]
    _, tails = ops.short_conv(x, w, tail, mask, mx.array(lengths))
    for row, n in enumerate(lengths):
        expected = tail[row] if n == 0 else None
        if n:
            _, expected = ops.short_conv(x[row : row + 1, :n], w, tail[row : row + 1])
            expected = expected[0]
        assert np.array_equal(np.array(tails[row]), np.array(expected)), f"length {n}"


def test_log_length_scale():
    t = np.array([0, 1, 500, 10**6])
    exact = np.log(t + 500.0) / np.log(500.0)
    for offset, want in zip(t, exact, strict=True):
        got = ops.log_length_scale(int(offset), 1, 500.0)
        assert abs(got.item() - want) < 2e-7 * want
    rows = ops.log_length_scale(mx.array([-3, 7]), 5, 500.0)
    assert rows.shape == (2, 5)
    assert rows[0, 3].item() == 1.0, "a position inside the left padding counts as 0"
    assert_close(rows[1], np.log(np.arange(7, 12) + 500.0) / np.log(500.0), 1e-6)


@pytest.mark.parametrize("kv_of_fa", [(0, 1, 1, 2, 3, 3), (0, 0, 0), (0, 1, 2), (0, 2, 2, 2, 3)])
def test_ragged_attention(kv_of_fa):
    from hydra_mlx.config import LayerHeads

    heads = LayerHeads(tuple(range(len(kv_of_fa))), (), tuple(range(max(kv_of_fa) + 1)), kv_of_fa)
    rng = np.random.RandomState(0)
    Hf, Hk, D, S, T = len(kv_of_fa), len(heads.kv), 16, 21, 13
    q, k, v = rng.randn(2, T, Hf, D), rng.randn(2, S, Hk, D), rng.randn(2, S, Hk, D)
    q, k, v = (x.astype(np.float32) for x in (q, k, v))
    mq, mk, mv = (mx.array(x).swapaxes(1, 2) for x in (q, k, v))
    out = ops.ragged_attention(mq, mk, mv, heads.runs, D**-0.5, "causal")
    ref = reference.causal_attention(q, k, v, kv_of_fa, offset=S - T)
    assert_close(out.swapaxes(1, 2), ref, REL_RMS["float32"])


@pytest.mark.parametrize("norm", ["rms", "rms_no_weight", None])
@pytest.mark.parametrize("dtype", DTYPES)
def test_fusion(norm, dtype):
    rng = np.random.RandomState(0)
    o, gate = rng.randn(2, 3, 5, 2, 16).astype(np.float32)
    o[..., 0, :] *= 1e-4  # a head whose output is tiny must keep its digits
    weight = rng.randn(16).astype(np.float32)
    o, gate, weight = (mx.array(x).astype(DTYPES[dtype]) for x in (o, gate, weight))
    w = weight if norm == "rms" else None
    ro, rg, rw = to_numpy(o), to_numpy(gate), None if w is None else to_numpy(w)

    def rms(x):
        return x if norm is None else reference.rms_norm(x, rw, 1e-6)

    for position, ref in (
        ("pre_norm", rms(ro * reference.sigmoid(rg))),
        ("post_norm", rms(ro) * reference.sigmoid(rg)),
    ):
        out = ops.fa_fusion(o, gate, position, norm, w)
        assert_close(out, ref, 2 * REL_RMS[dtype], position)
    assert_close(ops.fa_fusion(o, None, "pre_norm", norm, w), rms(ro), REL_RMS[dtype])
    for activation, f in (("silu", reference.silu), ("sigmoid", reference.sigmoid)):
        out = ops.la_fusion(o, gate, activation, norm, w)
        assert_close(out, rms(ro) * f(rg), 2 * REL_RMS[dtype], activation)
    assert_close(ops.la_fusion(o, None, "silu", norm, w), rms(ro), REL_RMS[dtype])


@pytest.mark.parametrize("size", [1e-5, 1.0, 1e3])
def test_l2_normalise(size):
    x = (np.random.RandomState(0).randn(4, 3, 24) * size).astype(np.float32)
    ref = 0.5 * x / np.sqrt((x.astype(np.float64) ** 2).sum(-1, keepdims=True) + 1e-6)
    assert_close(ops.l2_normalise(mx.array(x), 0.5), ref, 1e-6)


def test_tolerance_itself_can_fail():
    assert rel_rms(np.ones(3), np.array([1, 1, np.nan])) == float("inf")
    with pytest.raises(AssertionError):
        assert_close(np.ones(3), np.ones(3) * 1.01, 1e-3)
