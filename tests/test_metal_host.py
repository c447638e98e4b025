"""The host runtime's interface: signatures, arrays, templates, simd functions, counts, cache."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from tests.metal_host import LintError, metal_kernel
from tests.metal_host import toolchain as tools
from tests.metal_host.testing import launch, needs_metal_host, one_to_one

pytestmark = needs_metal_host

GX = "thread_position_in_grid.x"


# --------------------------------------------------------------------------------- signature


def test_signature_is_the_one_mlx_writes():
    source = f"y[{GX}] = T(x[{GX}] + s + few[0] + few_ndim + x_shape[0] + int(x_strides[1]));"
    kernel = metal_kernel("sum", ["x", "s", "few"], ["y"], source, header="// helpers\n")
    kernel(
        inputs=[mx.zeros((4, 2)), 2.0, mx.zeros(3, dtype=mx.int32)],
        template=[("T", mx.bfloat16), ("N", 3), ("B", True)],
        grid=(8, 1, 1),
        threadgroup=(8, 1, 1),
        output_shapes=[(8,)],
        output_dtypes=[mx.bfloat16],
    )
    name = "custom_kernel_sum_bfloat16_t_3_1_float_floats_int32_tc_bfloat16_t"
    assert kernel.last_source == (
        "// helpers\n"
        "template <typename T, int N, bool B>\n"
        f"[[kernel]] void {name}(\n"
        "  const device float* x [[buffer(0)]],\n"
        "  const constant int* x_shape [[buffer(1)]],\n"
        "  const constant int64_t* x_strides [[buffer(2)]],\n"
        "  const constant float& s [[buffer(3)]],\n"
        "  const constant int32_t* few [[buffer(4)]],\n"
        "  const constant int& few_ndim [[buffer(5)]],\n"
        "  device bfloat16_t* y [[buffer(6)]],\n"
        "  uint3 thread_position_in_grid [[thread_position_in_grid]]) {\n"
        f"{source}\n}}\n"
        f'\ntemplate [[host_name("{name}")]] [[kernel]] '
        f"decltype({name}<bfloat16_t, 3, 1>) {name}<bfloat16_t, 3, 1>;\n"
    )


def test_signatures_that_mlx_gets_wrong_are_refused():
    two = metal_kernel("two", ["x"], ["a", "b"], "a[0] = x_shape[0]; b[0] = 1;")
    with pytest.raises(LintError, match="broken signature"):
        two(
            inputs=[mx.zeros(9)],
            grid=(1, 1, 1),
            threadgroup=(1, 1, 1),
            output_shapes=[(1,), (1,)],
            output_dtypes=[mx.float32, mx.float32],
        )
    with pytest.raises(LintError, match="no Metal name"):
        launch(one_to_one("y[0] = N;"), [1.0], (1,), mx.float32, 1, template=[("N", -1)])


def test_too_many_buffers():
    names = [f"x{i}" for i in range(31)]
    with pytest.raises(LintError, match="31"):
        launch(metal_kernel("many", names, ["y"], "y[0] = x0;"), [1.0] * 31, (1,), mx.float32, 1)


@pytest.mark.parametrize(
    "change",
    [
        {"inputs": []},
        {"output_shapes": []},
        {"output_dtypes": [mx.float32, mx.float32]},
        {"grid": (0, 1, 1)},
        {"threadgroup": (32, 33, 1)},
        {"output_dtypes": [mx.complex64]},
        {"inputs": ["text"]},
    ],
    ids=str,
)
def test_wrong_arguments(change):
    arguments = {
        "inputs": [1.0],
        "output_shapes": [(1,)],
        "output_dtypes": [mx.float32],
        "grid": (1, 1, 1),
        "threadgroup": (1, 1, 1),
    }
    with pytest.raises(ValueError):
        one_to_one("y[0] = x;")(**arguments | change)


def test_thread_attributes():
    values = {
        "thread_position_in_grid.x": 9,
        "thread_position_in_threadgroup.x": 1,
        "threadgroup_position_in_grid.x": 2,
        "threadgroups_per_grid.x": 3,
        "threads_per_grid.y": 20,
        "grid_size.x": 10,
        "threads_per_threadgroup.x": 2,
        "dispatch_threads_per_threadgroup.x": 4,
        "thread_index_in_threadgroup": 39,
        "thread_index_in_simdgroup": 7,
        "simdgroup_index_in_threadgroup": 1,
        "simdgroups_per_threadgroup": 2,
        "threads_per_simdgroup": 32,
        "thread_execution_width": 32,
        "quadgroup_index_in_threadgroup": 9,
        "thread_index_in_quadgroup": 3,
        "grid_origin.x": 0,
    }
    lines = "\n".join(f"y[{i}] = {name};" for i, name in enumerate(values))
    source = (
        f"if (thread_position_in_grid.x == 9 && thread_position_in_grid.y == 19) {{\n{lines}\n}}"
    )
    y = metal_kernel("attributes", [], ["y"], source)(
        inputs=[],
        grid=(10, 20, 1),
        threadgroup=(4, 20, 1),
        output_shapes=[(len(values),)],
        output_dtypes=[np.uint32],
    )[0]
    assert dict(zip(values, y.tolist(), strict=True)) == values


# ------------------------------------------------------------------------------------ arrays


def test_numbers_are_scalars():
    source = "y[0] = f + float(i) + (b ? 100 : 0);"
    kernel = metal_kernel("scalars", ["f", "i", "b"], ["y"], source)
    assert launch(kernel, [0.5, -3, True], (1,), np.float32, 1)[0] == 97.5


@pytest.mark.parametrize("kind", ["numpy", "mlx"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_non_contiguous_input(kind, dtype):
    whole = mx.arange(48, dtype=mx.float32).reshape(6, 8).astype(getattr(mx, dtype))
    if kind == "numpy":
        if dtype == "bfloat16":
            pytest.skip("numpy has no bfloat16")
        x = np.array(whole).T[::2]
    else:
        x = whole.T[::2]
        mx.eval(x)
    expected = np.array(mx.array(x).astype(mx.float32)).reshape(-1)
    # Copied, as MLX does by default
    y = launch(one_to_one(f"y[{GX}] = float(x[{GX}]);"), [x], (24,), mx.float32, 24, check=True)
    assert np.array(y).tolist() == expected.tolist()
    # As it lies: MLX's own helper finds the elements
    source = f"y[{GX}] = float(x[elem_to_loc({GX}, x_shape, x_strides, x_ndim)]);"
    kernel = one_to_one(source, ensure_row_contiguous=False)
    y = launch(kernel, [x], (24,), mx.float32, 24, check=True)
    assert np.array(y).tolist() == expected.tolist()
    assert kernel.last_counts.unique_device_bytes_read == x.nbytes


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_conversions_round_as_mlx_rounds(name):
    """Ties, subnormals, overflow, infinity and NaN, both ways."""
    dtype = getattr(mx, name)
    special = [0, -0.0, 1, 1 / 3, 65504, 65519, 65520, 1e-8, 3e-5, 3.4e38, np.inf, -np.inf, np.nan]
    ties = [1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11]
    noise = np.random.default_rng(0).normal(size=243) * 10.0 ** np.arange(-20, 20).repeat(7)[:243]
    x = mx.array(np.array(special + ties + noise.tolist(), np.float32))
    kernel = one_to_one(f"T v = T(x[{GX}]); y[{GX}] = v;")
    y = launch(kernel, [x], x.shape, dtype, x.size, template=[("T", dtype)], check=True)
    wanted = x.astype(dtype)
    same = (y == wanted) | (mx.isnan(y) & mx.isnan(wanted))
    assert mx.all(same).item(), [(x[i], y[i], wanted[i]) for i in np.flatnonzero(~np.array(same))]
    back = launch(one_to_one(f"y[{GX}] = x[{GX}];"), [y], x.shape, mx.float32, x.size)
    assert mx.array_equal(back, y.astype(mx.float32), equal_nan=True).item()


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_narrow_arithmetic_rounds_after_each_operation(name):
    dtype = getattr(mx, name)
    a, b = (mx.random.normal((256,), key=mx.random.key(s)).astype(dtype) for s in (0, 1))
    kernel = metal_kernel(
        "narrow", ["a", "b"], ["y"], f"T p = a[{GX}] * b[{GX}]; y[{GX}] = p + b[{GX}];"
    )
    y = launch(kernel, [a, b], (256,), dtype, template=[("T", dtype)])
    product = (a.astype(mx.float32) * b.astype(mx.float32)).astype(dtype)
    wanted = (product.astype(mx.float32) + b.astype(mx.float32)).astype(dtype)
    fused = (a.astype(mx.float32) * b.astype(mx.float32) + b.astype(mx.float32)).astype(dtype)
    assert mx.all((y == wanted) | (y == fused)).item()


@pytest.mark.parametrize(
    "name",
    ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "bool", "float32"],
)
def test_every_dtype_passes_through(name):
    dtype = getattr(mx, "bool_" if name == "bool" else name)
    x = mx.array([0, 1, 1, 0, 1, 0, 0, 1, 1]).astype(dtype)
    y = launch(one_to_one(f"y[{GX}] = x[{GX}];"), [x], (9,), dtype, 9, check=True)
    assert y.dtype == dtype and mx.array_equal(x, y).item()
    z = launch(one_to_one(f"y[{GX}] = x[{GX}];"), [np.array(x)], (9,), np.dtype(name), 9)
    assert z.dtype == np.dtype(name) and z.tolist() == x.tolist()


@pytest.mark.parametrize("name", ["float32", "bfloat16", "int32"])
def test_init_value(name):
    dtype = getattr(mx, name)
    kernel = one_to_one(f"y[{GX}] += x[0];")
    y = launch(kernel, [mx.ones(9, dtype=dtype)], (4,), dtype, 4, init_value=3, check=True)
    assert y.tolist() == [4, 4, 4, 4]


def test_templates():
    source = f"V v = V(x[{GX}]); y[{GX}] = FLAG ? T(v.y) + T(N) : T(0);"
    header = "typedef vec<float, 2> V;\n"
    for flag in (True, False):
        template = [("T", mx.int32), ("N", 7), ("FLAG", flag)]
        y = launch(
            one_to_one(source, header), [mx.full(8, 2.5)], (8,), mx.int32, 8, template=template
        )
        assert y.tolist() == [9 if flag else 0] * 8


# ----------------------------------------------------------------------------- simd functions

LANES = np.arange(32)
X = np.random.default_rng(3).integers(-50, 50, 32)
SIMD = {
    "simd_sum(v)": np.full(32, X.sum()),
    "simd_product(v > 0 ? 2 : 1)": np.full(32, 2 ** (X > 0).sum()),
    "simd_max(v)": np.full(32, X.max()),
    "simd_min(v)": np.full(32, X.min()),
    "simd_xor(v)": np.full(32, np.bitwise_xor.reduce(X)),
    "simd_prefix_inclusive_sum(v)": X.cumsum(),
    "simd_prefix_exclusive_sum(v)": X.cumsum() - X,
    "simd_shuffle(v, 31 - l)": X[::-1],
    "simd_shuffle_xor(v, 5)": X[LANES ^ 5],
    "simd_shuffle_down(v, 3)": X[np.where(LANES + 3 < 32, LANES + 3, LANES)],
    "simd_shuffle_up(v, 3)": X[np.where(LANES >= 3, LANES - 3, LANES)],
    "simd_shuffle_rotate_down(v, 3)": np.roll(X, -3),
    "simd_shuffle_rotate_up(v, 3)": np.roll(X, 3),
    "simd_shuffle_and_fill_up(v, -7, 3)": np.where(LANES >= 3, np.roll(X, 3), -7),
    "simd_shuffle_and_fill_down(v, -7, 3)": np.where(LANES < 29, np.roll(X, -3), -7),
    "simd_broadcast(v, 9)": np.full(32, X[9]),
    "simd_broadcast_first(v)": np.full(32, X[0]),
    "int(uint(ulong(simd_ballot(v > 0)) & 0xffff))": np.full(
        32, ((X[:16] > 0) << np.arange(16)).sum()
    ),
    "simd_all(v > -100) + 2 * simd_any(v > 100)": np.full(32, 1),
    "simd_is_first()": LANES == 0,
    "quad_sum(v)": X.reshape(8, 4).sum(1).repeat(4),
    "quad_broadcast(v, 2)": X.reshape(8, 4)[:, 2].repeat(4),
}


def test_simd_functions():
    lines = "".join(f"y[{i} * 32 + l] = {call};\n" for i, call in enumerate(SIMD))
    kernel = one_to_one(f"uint l = thread_index_in_simdgroup; int v = x[l];\n{lines}")
    for order in (0, 1, 2):
        y = launch(
            kernel,
            [X.astype(np.int32)],
            (len(SIMD), 32),
            np.int32,
            32,
            check=order == 0,
            order=order,
        )
        for call, row in zip(SIMD, y, strict=True):
            assert row.tolist() == SIMD[call].astype(int).tolist(), call


def test_partial_simdgroup():
    """A threadgroup of 40 has a SIMD-group of 8 lanes."""
    x = np.arange(40, dtype=np.float32)
    y = launch(one_to_one(f"y[{GX}] = simd_sum(x[{GX}]);"), [x], (40,), np.float32, 40, check=True)
    assert y[0] == x[:32].sum() and y[39] == x[32:].sum()


def test_atomics():
    source = (
        "threadgroup atomic_int n; if (thread_index_in_threadgroup == 0)"
        " atomic_store_explicit(&n, 0, memory_order_relaxed);"
        " threadgroup_barrier(mem_flags::mem_threadgroup);"
        " atomic_fetch_add_explicit(&n, 1, memory_order_relaxed);"
        " threadgroup_barrier(mem_flags::mem_threadgroup);"
        " if (thread_index_in_threadgroup == 0) atomic_fetch_add_explicit("
        "&y[0], float(atomic_load_explicit(&n, memory_order_relaxed)), memory_order_relaxed);"
        f" atomic_fetch_max_explicit(&y[1], x[{GX}], memory_order_relaxed);"
    )
    kernel = one_to_one(source, atomic_outputs=True)
    x = np.random.default_rng(0).random(8192).astype(np.float32)
    for options in ({"check": True}, {"workers": 2}):
        y = launch(kernel, [x], (2,), np.float32, 8192, init_value=0, **options)
        assert y.tolist() == [8192, x.max()]
        # 32 threadgroups: store, load and final addition each; two by every thread
        assert kernel.last_counts.atomics == 32 * 3 + 2 * 8192


def test_every_order_gives_the_same_bits():
    kernel = one_to_one(f"y[{GX}] = simd_sum(x[{GX}]) * simd_max(x[{GX}]);")
    x = np.random.default_rng(0).normal(size=256).astype(np.float32)
    results = [launch(kernel, [x], (256,), np.float32, order=o) for o in range(4)]
    assert all(np.array_equal(r, results[0]) for r in results)


# ------------------------------------------------------------------------------------- counts


def test_counts_by_hand():
    """Each load of every width counts in full; clang may neither merge nor split them."""
    source = f"""
      uint i = {GX};
      float4 a = reinterpret_cast<const device float4*>(x)[i];
      half4 h = reinterpret_cast<const device half4*>(x)[i];
      half2 p = reinterpret_cast<const device half2*>(x)[i];
      uchar c = reinterpret_cast<const device uchar*>(x)[i];
      for (int k = 0; k < 4; ++k) y[4 * i + k] = 0;
      threadgroup float s[64];
      s[i] = dot(a, float4(1)) + float(dot(h, half4(1))) + float(p.x) + float(p.y) + float(c);
      simdgroup_barrier(mem_flags::mem_threadgroup);
      y[4 * i] = s[i ^ 1];
    """
    kernel = one_to_one(source)
    x = np.zeros(256, np.float32)
    launch(kernel, [x], (256,), np.float32, 64)
    plain = kernel.last_counts
    assert plain.buffers is None and plain.device_bytes_read is None
    for options in ({"count": True}, {"check": True}, {"count": True, "workers": 2}):
        launch(kernel, [x], (256,), np.float32, 64, **options)
        counts = kernel.last_counts
        assert counts.device_bytes_read == 64 * (16 + 8 + 4 + 1)
        assert counts.unique_device_bytes_read == 64 * 16
        # clang drops the first of the two stores to y[4 * i] or keeps it: a barrier stands between.
        assert counts.device_bytes_written == 64 * (4 + 1) * 4
        assert counts.unique_device_bytes_written == 64 * 16
        assert counts.threadgroup_bytes_read == counts.threadgroup_bytes_written == 64 * 4
        assert counts.threadgroup_memory == 256
        assert counts.simdgroup_barriers == 2 and counts.simdgroups == 2
        assert counts.operations == plain.operations
        assert (counts.threads, counts.threadgroups) == (64, 1)


# ---------------------------------------------------------------------------- compiler, cache


def test_second_launch_compiles_nothing(monkeypatch):
    kernel = one_to_one(f"y[{GX}] = x[{GX}] + 41;")
    launch(kernel, [mx.ones(9)], (9,), mx.float32, 9)

    def refuse(command):
        raise AssertionError(f"compiled again: {command}")

    monkeypatch.setattr(tools, "_run", refuse)
    launch(kernel, [mx.ones(9)], (9,), mx.float32, 9)


def test_processes_share_an_empty_cache(tmp_path):
    """Two processes compile the runtime and the same kernel at once."""
    program = (
        "import numpy as np\n"
        "from tests.metal_host.testing import launch, one_to_one\n"
        f"k = one_to_one('y[{GX}] = x[{GX}] * 2;')\n"
        "print(launch(k, [np.ones(9, np.float32)], (9,), np.float32, 9, check=True).sum())\n"
    )
    root = Path(__file__).parents[1]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            cwd=root,
            env={"PATH": "", "METAL_HOST_CACHE": str(tmp_path), "PYTHONPATH": str(root)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    results = [p.communicate(timeout=60) for p in started]
    assert [out.strip() for out, _ in results] == ["18.0", "18.0"], results
    left = sorted(p.suffix for p in tmp_path.iterdir() if p.name != "zig")
    assert left == [".o", ".so"]


def test_unavailable_machine_is_told_apart(monkeypatch):
    monkeypatch.setattr(tools.platform, "machine", lambda: "arm64")
    ok, reason = tools.available()
    assert not ok and "arm64" in reason


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32"])
def test_explicit_narrow_types_raise_no_alarm(name):
    """What kernels generic over T usually write must pass the bfloat rules and the lint."""
    header = (
        "template <typename U> struct Pair { U first, second; };\n"
        "template <typename U> METAL_FUNC U twice(U v) { return v + v; }\n"
        "template <typename U> METAL_FUNC void add(threadgroup U* s, const thread U& v) {\n"
        "  s[0] += v;\n}\n"
    )
    source = f"""
      threadgroup T s[32];
      uint i = {GX};
      T a = x[i];
      float f = a;
      T m = max(a, T(0)), e = T(exp(f)), n = metal::exp(a), r = -a;
      bool c = a > T(0) && a < 100.0f;
      T z = c ? a : T(0);
      T total = simd_sum(z), next = simd_shuffle_xor(z, 1);
      vec<T, 4> q = vec<T, 4>(a, m, e, z);
      q *= q;
      q = q + vec<T, 4>(T(1));
      s[i] = q.x;
      add(s + i, a);
      const T table[2] = {{T(1), T(2)}};
      Pair<T> p = {{a, table[1]}};
      a += p.second;
      a = fma(a, a, a) + abs(r) + twice(a) + static_cast<T>(f * 0.5f) + n;
      if (a > Limits<T>::finite_max) a = numeric_limits<T>::lowest();
      float4 w = float4(q) * f;
      y[i] = T(float(a) + w.x + float(total) + float(next) + float(s[i]) * 0.0f);
    """
    dtype = getattr(mx, name)
    x = mx.full((32,), 0.5).astype(dtype)
    kernel = one_to_one(source, header)
    y = launch(kernel, [x], (32,), dtype, 32, template=[("T", dtype)], check=True)
    a = 2.5
    wanted = a * a + a + 0.5 + 2 * a + 0.25 + np.exp(0.5) + (0.25 + 1) * 0.5 + 16 + 0.5
    assert np.allclose(np.array(y.astype(mx.float32)), wanted, rtol=2e-2)
