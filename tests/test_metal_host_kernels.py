"""Correct kernels: right results against numpy, no false alarm in checked mode, right counts."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from tests.metal_host import metal_kernel
from tests.metal_host.testing import needs_metal_host
from tests.tolerance import REL_RMS, assert_close, to_numpy

pytestmark = needs_metal_host

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
PLAIN, CHECKED = {}, {"check": True}


def random(shape, dtype=mx.float32, seed=0, scale=1.0):
    """Normal numbers, rounded to the dtype."""
    values = np.random.default_rng(seed).normal(0, scale, shape).astype(np.float32)
    return mx.array(values).astype(dtype)


# ------------------------------------------------------------------ softmax, one row a threadgroup

SOFTMAX = """
  // x, y: [rows, N]; grid (256, rows, 1), threadgroup (256, 1, 1)
  threadgroup float partial[8];
  uint t = thread_position_in_threadgroup.x;
  const device T* row = x + threadgroup_position_in_grid.y * N;
  device T* out = y + threadgroup_position_in_grid.y * N;
  float m = -INFINITY;
  for (uint i = t; i < N; i += 256) m = max(m, float(row[i]));
  m = simd_max(m);
  if (thread_index_in_simdgroup == 0) partial[simdgroup_index_in_threadgroup] = m;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int i = 0; i < 8; ++i) m = max(m, partial[i]);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float sum = 0;
  for (uint i = t; i < N; i += 256) sum += exp(float(row[i]) - m);
  sum = simd_sum(sum);
  if (thread_index_in_simdgroup == 0) partial[simdgroup_index_in_threadgroup] = sum;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  sum = 0;
  for (int i = 0; i < 8; ++i) sum += partial[i];
  for (uint i = t; i < N; i += 256) out[i] = T(exp(float(row[i]) - m) / sum);
"""


@pytest.mark.parametrize("options", [PLAIN, CHECKED], ids=["plain", "checked"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_softmax(dtype, options):
    rows, n = 3, 333
    x = random((rows, n), DTYPES[dtype], scale=3)
    kernel = metal_kernel("softmax", ["x"], ["y"], SOFTMAX)
    y = kernel(
        inputs=[x],
        template=[("T", DTYPES[dtype]), ("N", n)],
        grid=(256, rows, 1),
        threadgroup=(256, 1, 1),
        output_shapes=[x.shape],
        output_dtypes=[x.dtype],
        **options,
    )[0]
    exact = np.exp(to_numpy(x) - to_numpy(x).max(1, keepdims=True))
    assert_close(y, exact / exact.sum(1, keepdims=True), REL_RMS[dtype], dtype)
    counts = kernel.last_counts
    assert counts.operations == {"threadgroup_barrier": 9, "simd_max": 24, "simd_sum": 24}
    assert counts.simd_operations == 48 and counts.threadgroup_barriers == 9
    assert counts.threadgroups == 3 and counts.threads == 768 and counts.threadgroup_memory == 32
    if options:
        size = x.nbytes
        assert counts.device_bytes_read == 3 * size and counts.device_bytes_written == size
        assert counts.unique_device_bytes_read == size
        assert counts.unique_device_bytes_written == size
        assert counts.threadgroup_bytes_written == rows * 2 * 8 * 4
        assert counts.threadgroup_bytes_read == rows * 256 * 2 * 8 * 4


# ----------------------------------------------------------- matrix product with simdgroup_matrix

GEMM = """
  // C[M, N] = A[M, K] B[K, N]; a SIMD-group makes one 8 x 8 tile of C, B goes through
  // threadgroup memory. grid (32 * N / 8, M / 8, 1), threadgroup (128, 1, 1): 4 tiles side by side
  threadgroup T tile[8 * 32];
  uint t = thread_index_in_threadgroup, s = simdgroup_index_in_threadgroup;
  uint column = threadgroup_position_in_grid.x * 32, row = threadgroup_position_in_grid.y * 8;
  simdgroup_matrix<T, 8, 8> ma, mb;
  simdgroup_float8x8 sum = make_filled_simdgroup_matrix<float, 8>(0);
  for (uint k = 0; k < K; k += 8) {
    for (uint i = t; i < 8 * 32; i += 128) tile[i] = b[(k + i / 32) * N + column + i % 32];
    threadgroup_barrier(mem_flags::mem_threadgroup);
    simdgroup_load(ma, a + row * K + k, K);
    simdgroup_load(mb, tile + s * 8, 32);
    simdgroup_multiply_accumulate(sum, ma, mb, sum);
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  simdgroup_store(sum, c + row * N + column + s * 8, N);
"""


@pytest.mark.parametrize("options", [PLAIN, CHECKED], ids=["plain", "checked"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_simdgroup_matrix_product(dtype, options):
    m, n, k = 16, 64, 24
    a, b = random((m, k), DTYPES[dtype]), random((k, n), DTYPES[dtype], seed=1)
    kernel = metal_kernel("gemm", ["a", "b"], ["c"], GEMM)
    c = kernel(
        inputs=[a, b],
        template=[("T", DTYPES[dtype]), ("N", n), ("K", k)],
        grid=(32 * n // 8, m // 8, 1),
        threadgroup=(128, 1, 1),
        output_shapes=[(m, n)],
        output_dtypes=[mx.float32],
        **options,
    )[0]
    assert_close(c, to_numpy(a) @ to_numpy(b), 1e-6, dtype)
    counts, item = kernel.last_counts, a.itemsize
    tiles = m // 8 * n // 8
    assert counts.simdgroup_multiplies == tiles * k // 8
    assert counts.operations["simdgroup_load"] == 2 * tiles * k // 8
    assert counts.operations["simdgroup_store"] == tiles
    assert counts.simd_operations == 0 and counts.threadgroup_barriers == 2 * 4 * k // 8
    if options:
        assert counts.buffers["a"].read == tiles * 8 * k * item
        assert counts.buffers["a"].unique_read == a.nbytes
        assert counts.buffers["b"].read == m // 8 * b.nbytes
        assert counts.buffers["c"].written == c.nbytes == counts.buffers["c"].unique_written
        assert counts.threadgroup_bytes_written == m // 8 * b.nbytes
        assert counts.threadgroup_bytes_read == tiles * 8 * k * item


def test_matrix_elements_lie_as_on_apple():
    """Lane l holds row (l / 4 & 4) + (l / 2 & 3) and columns from (l / 4 & 2) * 2 + (l & 1) * 2."""
    source = """
      simdgroup_float8x8 m;
      simdgroup_load(m, x, 8, ulong2(0, 0), transposed);
      uint l = thread_index_in_simdgroup;
      y[2 * l] = m.thread_elements()[0];
      y[2 * l + 1] = m.thread_elements()[1];
    """
    kernel = metal_kernel("layout", ["x"], ["y"], source)
    for transposed in (False, True):
        y = kernel(
            inputs=[np.arange(64, dtype=np.float32)],
            template=[("transposed", transposed)],
            grid=(32, 1, 1),
            threadgroup=(32, 1, 1),
            output_shapes=[(64,)],
            output_dtypes=[np.float32],
        )[0]
        rows = [(lane // 4 & 4) + (lane // 2 & 3) for lane in range(32)]
        columns = [(lane // 4 & 2) * 2 + (lane & 1) * 2 for lane in range(32)]
        at = [(r, c + e) for r, c in zip(rows, columns, strict=True) for e in (0, 1)]
        assert sorted(at) == [(r, c) for r in range(8) for c in range(8)]
        assert y.tolist() == [c * 8 + r if transposed else r * 8 + c for r, c in at]


# --------------------------------------------------------------- tree reduction, vectors, helpers

TREE = """
  // y[threadgroup] = sum of 256 elements, halving in threadgroup memory
  threadgroup float s[256];
  uint t = thread_position_in_threadgroup.x;
  s[t] = x[thread_position_in_grid.x];
  for (uint n = 128; n > 0; n /= 2) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (t < n) s[t] += s[t + n];
  }
  if (t == 0) y[threadgroup_position_in_grid.x] = s[0];
"""


@pytest.mark.parametrize("options", [PLAIN, CHECKED, {"check": True, "order": 5}])
def test_tree_reduction(options):
    x = random((1024,))
    kernel = metal_kernel("tree", ["x"], ["y"], TREE)
    y = kernel(
        inputs=[x],
        grid=(1024, 1, 1),
        threadgroup=(256, 1, 1),
        output_shapes=[(4,)],
        output_dtypes=[mx.float32],
        **options,
    )[0]
    assert_close(y, to_numpy(x).reshape(4, 256).sum(1), 1e-5)
    if options:
        counts = kernel.last_counts
        assert counts.threadgroup_barriers == 4 * 8 and counts.threadgroup_memory == 1024
        # Each of the 255 additions loads two numbers and stores one; the result is read once more.
        assert counts.threadgroup_bytes_written == 4 * 4 * (256 + 255)
        assert counts.threadgroup_bytes_read == 4 * 4 * (2 * 255 + 1)


VECTORS = """
  using V = vec<T, 4>;
  uint i = thread_position_in_grid.x;
  V v = reinterpret_cast<const device V*>(x)[i];
  float4 f = float4(v) * float4(1, 2, float2(3, 4));
  f.xy = f.yx;
  reinterpret_cast<device V*>(y)[i] = V(f);
"""


@pytest.mark.parametrize("dtype", DTYPES)
def test_vector_loads_and_stores(dtype):
    x = random((256,), DTYPES[dtype])
    kernel = metal_kernel("vectors", ["x"], ["y"], VECTORS)
    y = kernel(
        inputs=[x],
        template=[("T", x.dtype)],
        grid=(64, 1, 1),
        threadgroup=(64, 1, 1),
        output_shapes=[(256,)],
        output_dtypes=[x.dtype],
        check=True,
    )[0]
    exact = (to_numpy(x).reshape(-1, 4) * [1, 2, 3, 4])[:, [1, 0, 2, 3]].reshape(-1)
    assert_close(y, exact, REL_RMS[dtype])
    assert kernel.last_counts.device_bytes_read == x.nbytes
    assert kernel.last_counts.device_bytes_written == x.nbytes


# --------------------------------------------------------------------- 4-bit matrix times vector

QMV = """
  // y[R] = (scales * q + biases)[R, C] x[C], MLX affine, 4 bits, groups of 64.
  // w: [R, C / 8] uint, x: [C]; one SIMD-group a row, 8 columns a lane and step
  uint lane = thread_index_in_simdgroup, row = thread_position_in_grid.y;
  float sum = 0;
  for (uint c = lane * 8; c < C; c += 256) {
    uint packed = w[row * (C / 8) + c / 8];
    float scale = scales[row * (C / 64) + c / 64], bias = biases[row * (C / 64) + c / 64];
    const device vec<T, 4>* xs = reinterpret_cast<const device vec<T, 4>*>(x + c);
    for (int h = 0; h < 2; ++h) {
      float4 xv = float4(xs[h]);
      for (int i = 0; i < 4; ++i)
        sum += (scale * float(packed >> (16 * h + 4 * i) & 15) + bias) * xv[i];
    }
  }
  sum = simd_sum(sum);
  if (lane == 0) y[row] = T(sum);
"""


@pytest.mark.parametrize("options", [PLAIN, CHECKED], ids=["plain", "checked"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_four_bit_matrix_vector(dtype, options):
    rows, columns = 12, 512
    weights = random((rows, columns), DTYPES[dtype], scale=0.1)
    w, scales, biases = mx.quantize(weights, group_size=64, bits=4)
    x = random((columns,), DTYPES[dtype], seed=1)
    kernel = metal_kernel("qmv", ["w", "scales", "biases", "x"], ["y"], QMV)
    y = kernel(
        inputs=[w, scales, biases, x],
        template=[("T", x.dtype), ("C", columns)],
        grid=(32, rows, 1),
        threadgroup=(32, 2, 1),
        output_shapes=[(rows,)],
        output_dtypes=[x.dtype],
        **options,
    )[0]
    nibbles = np.array(w)[:, :, None] >> (4 * np.arange(8, dtype=np.uint32)) & 15
    groups = nibbles.reshape(rows, columns // 64, 64)
    exact = groups * to_numpy(scales)[:, :, None] + to_numpy(biases)[:, :, None]
    assert_close(y, exact.reshape(rows, columns) @ to_numpy(x), REL_RMS[dtype], dtype)
    if options:
        b = kernel.last_counts.buffers
        assert b["w"].read == w.nbytes == b["w"].unique_read
        # 8 lanes read the same scale.
        assert b["scales"].read == 8 * scales.nbytes and b["scales"].unique_read == scales.nbytes
        assert b["x"].read == rows * x.nbytes and b["x"].unique_read == x.nbytes
        assert b["y"].written == y.nbytes


# -------------------------------------------------------------- gated delta rule, token by token

GATED_DELTA = """
  // q, k: [T, H, Dk], v: [T, H, Dv], g (decay), beta: [T, H], state: [H, Dv, Dk] float.
  // A SIMD-group holds one row of the state, Dk / 32 elements a lane.
  // S = g S; S += beta (v - S k) k^T; y = S q
  constexpr int N = Dk / 32;
  uint lane = thread_index_in_simdgroup, row = thread_position_in_grid.y;
  uint h = row / Dv, dv = row % Dv;
  float s[N];
  for (int i = 0; i < N; ++i) s[i] = state[row * Dk + lane * N + i];
  for (int t = 0; t < tokens; ++t) {
    uint at = t * H + h;
    const device InT* kt = k + at * Dk + lane * N;
    const device InT* qt = q + at * Dk + lane * N;
    float decay = g[at], memory = 0;
    for (int i = 0; i < N; ++i) {
      s[i] *= decay;
      memory += s[i] * float(kt[i]);
    }
    float delta = (float(v[at * Dv + dv]) - simd_sum(memory)) * beta[at];
    float out = 0;
    for (int i = 0; i < N; ++i) {
      s[i] += float(kt[i]) * delta;
      out += s[i] * float(qt[i]);
    }
    out = simd_sum(out);
    if (lane == 0) y[at * Dv + dv] = InT(out);
  }
  for (int i = 0; i < N; ++i) state_out[row * Dk + lane * N + i] = s[i];
"""


def gated_delta_reference(q, k, v, g, beta, state):
    """Loop in float64. Shapes as in GATED_DELTA; returns y [T, H, Dv] and the state [H, Dv, Dk]."""
    out = []
    for t in range(q.shape[0]):
        state = state * g[t][:, None, None]
        delta = (v[t] - np.einsum("hvk,hk->hv", state, k[t])) * beta[t][:, None]
        state = state + np.einsum("hv,hk->hvk", delta, k[t])
        out.append(np.einsum("hvk,hk->hv", state, q[t]))
    return np.stack(out), state


@pytest.mark.parametrize("options", [PLAIN, CHECKED], ids=["plain", "checked"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gated_delta(dtype, options):
    tokens, heads, dk, dv = 9, 3, 64, 16
    q, k = (random((tokens, heads, dk), seed=s, scale=dk**-0.5) for s in (0, 1))
    v = random((tokens, heads, dv), seed=2)
    q, k, v = (a.astype(DTYPES[dtype]) for a in (q, k, v))
    g = mx.sigmoid(random((tokens, heads), seed=3) + 2)
    beta = mx.sigmoid(random((tokens, heads), seed=4))
    state = random((heads, dv, dk), seed=5)
    kernel = metal_kernel(
        "delta", ["q", "k", "v", "g", "beta", "state", "tokens"], ["y", "state_out"], GATED_DELTA
    )
    y, after = kernel(
        inputs=[q, k, v, g, beta, state, tokens],
        template=[("InT", q.dtype), ("H", heads), ("Dk", dk), ("Dv", dv)],
        grid=(32, heads * dv, 1),
        threadgroup=(32, 4, 1),
        output_shapes=[(tokens, heads, dv), state.shape],
        output_dtypes=[q.dtype, mx.float32],
        **options,
    )
    exact_y, exact_state = gated_delta_reference(*map(to_numpy, (q, k, v, g, beta, state)))
    assert_close(y, exact_y, REL_RMS[dtype], dtype)
    assert_close(after, exact_state, 1e-5, dtype)
    counts = kernel.last_counts
    assert counts.operations == {"simd_sum": 2 * tokens * heads * dv}
    if options:
        b = counts.buffers
        assert b["state"].read == state.nbytes == b["state_out"].written
        assert b["q"].read == dv * q.nbytes and b["q"].unique_read == q.nbytes
        assert b["k"].read >= dv * k.nbytes and b["k"].unique_read == k.nbytes
        assert b["g"].read == 32 * dv * g.nbytes
        assert b["tokens"].space == "constant" and counts.constant_bytes_read > 0
