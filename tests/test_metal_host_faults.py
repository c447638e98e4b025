"""Seeded faults: each must be found by the host runtime, with the right name."""

from __future__ import annotations

from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np
import pytest

from tests.metal_host import CompileError, KernelFault, LintError
from tests.metal_host.testing import launch, needs_metal_host, one_to_one

pytestmark = needs_metal_host

GX, LANE = "thread_position_in_grid.x", "thread_index_in_simdgroup"
SIMDGROUP, BARRIER = "simdgroup_index_in_threadgroup", "threadgroup_barrier(mem_flags::{});"
# Sums 256 numbers through threadgroup memory; {0} is the place of the barrier.
TREE = f"""
  threadgroup float s[8];
  float v = simd_sum(x[{GX}]);
  if ({LANE} == 0) s[{SIMDGROUP}] = v;
  %s
  float t = 0; for (int i = 0; i < 8; ++i) t += s[i];
  y[{GX}] = t;"""
REVERSE = f"threadgroup float s[32]; uint l = {LANE}; s[l] = x[l]; %s y[l] = s[31 - l];"
TG_BARRIER = BARRIER.format("mem_threadgroup")


@dataclass(frozen=True)
class Fault:
    """A kernel that does something forbidden when it runs, and the kind of fault it is."""

    kind: str
    source: str
    check: bool = True
    outputs: int = 256
    launch: dict = field(default_factory=dict)


SMALL = {"threads": 32}
FAULTS = {
    "missing barrier": Fault("uninitialised read", TREE % ""),
    "missing barrier, any order": Fault("uninitialised read", TREE % "", launch={"order": 7}),
    "barrier with wrong mem_flags": Fault("race", TREE % BARRIER.format("mem_device")),
    "barrier with mem_none": Fault("race", TREE % BARRIER.format("mem_none")),
    "write past end, plain": Fault("out of bounds", f"y[{GX} + 1] = x[0];", check=False),
    "write past end": Fault("out of bounds", f"y[{GX} + 1] = x[0];"),
    "read before start": Fault("out of bounds", f"y[{GX}] = x[int({GX}) - 1];"),
    "grid too large": Fault("out of bounds", f"y[{GX}] = x[{GX}];", False, 256, {"threads": 512}),
    "grid too large, checked": Fault(
        "out of bounds", f"y[{GX}] = x[{GX}];", True, 256, {"threads": 512}
    ),
    "vector read past end": Fault(
        "out of bounds",
        f"auto v = reinterpret_cast<const device float4*>(x); y[{GX}] = v[{GX} + 1].x;",
        outputs=64,
        launch={"threads": 64},
    ),
    "local array overflow": Fault(
        "out of bounds", f"float a[4] = {{0}}; a[int(x[0]) + {GX} + 4] = 1; y[{GX}] = a[0];"
    ),
    "threadgroup array overflow into the next": Fault(
        "out of bounds",
        f"threadgroup float s[32]; threadgroup float r[32]; r[{GX}] = 1; s[{GX} + 32] = 2;"
        f"{TG_BARRIER} y[{GX}] = r[{GX}] + s[0];",
        launch=SMALL,
        outputs=32,
    ),
    "misaligned vector": Fault(
        "misaligned",
        f"auto v = reinterpret_cast<const device float4*>(x + 1); y[{GX}] = v[{GX}].x;",
        launch=SMALL,
        outputs=32,
    ),
    "write to input": Fault(
        "write to input", f"auto p = (device float*)(x); p[{GX}] = 1; y[{GX}] = 1;"
    ),
    "divergent simd_sum": Fault(
        "divergent simd operation",
        f"float v = x[{GX}]; if ({LANE} < 16) v = simd_sum(v); y[{GX}] = v;",
        check=False,
    ),
    "simd operations in both branches": Fault(
        "divergent simd operation",
        f"float v = x[{GX}];\nif ({LANE} < 16) v = simd_sum(v);\nelse v = simd_max(v);\n"
        f"y[{GX}] = v;",
        check=False,
    ),
    "early return before simd_sum": Fault(
        "divergent simd operation",
        f"uint i = {GX}; if (i >= 250) return; y[i] = simd_sum(x[i]);",
        False,
    ),
    "simd_sum against barrier": Fault(
        "divergent simd operation",
        f"float v = x[{GX}]; if ({LANE} < 16) v = simd_sum(v); else {TG_BARRIER} y[{GX}] = v;",
    ),
    "divergent simdgroup_load": Fault(
        "divergent simd operation",
        f"simdgroup_float8x8 m(0); if ({LANE} < 16) simdgroup_load(m, x, 8); y[{GX}] = 1;",
    ),
    "divergent barrier": Fault(
        "divergent barrier", f"if ({SIMDGROUP} == 0) {TG_BARRIER} y[{GX}] = 1;", check=False
    ),
    "two different barriers": Fault(
        "divergent barrier",
        f"if ({SIMDGROUP} == 0)\n {TG_BARRIER}\nelse\n {TG_BARRIER}\ny[{GX}] = 1;",
        check=False,
    ),
    "shuffle from a missing lane": Fault(
        "divergent simd operation",
        f"y[{GX}] = simd_shuffle(x[{GX}], 31);",
        False,
        250,
        {"threads": 250},
    ),
    "endless loop": Fault(
        "timeout", "volatile int q = 1; while (q) {} y[0] = 1;", False, 1, {"timeout": 0.5}
    ),
    "endless loop, checked": Fault(
        "timeout", "volatile int q = 1; while (q) {} y[0] = 1;", True, 1, {"timeout": 0.5}
    ),
    "output never written": Fault("unwritten output", f"if ({GX} > 3) y[{GX}] = x[0];"),
    "race on device output": Fault("race", f"y[{GX} / 2] = x[{GX}];", outputs=128),
    "race across threadgroups": Fault(
        "race", "y[thread_position_in_threadgroup.x] = x[0];", True, 128, {"threadgroup": 128}
    ),
    "read of another threadgroup's output": Fault(
        "race",
        f"y[{GX}] = 1; if ({GX} == 200) y[200] = y[0];",
        launch={"threadgroup": 64},
    ),
    "output read before written": Fault("uninitialised read", f"y[{GX}] += x[{GX}];"),
    "no simdgroup_barrier": Fault("uninitialised read", REVERSE % "", True, 32, SMALL),
    "simdgroup_barrier with wrong mem_flags": Fault(
        "race", REVERSE % "simdgroup_barrier(mem_flags::mem_none);", True, 32, SMALL | {"order": 1}
    ),
    "overwritten before all have read": Fault(
        "race",
        f"threadgroup float s[32]; uint l = {LANE}; s[l] = x[l]; {TG_BARRIER}"
        " float v = s[31 - l]; s[l] = v; y[l] = v;",
        True,
        32,
        SMALL,
    ),
    "plain write beside an atomic": Fault(
        "race",
        "threadgroup atomic_int n; if (thread_index_in_threadgroup == 0)"
        " atomic_store_explicit(&n, 0, memory_order_relaxed);"
        " atomic_fetch_add_explicit(&n, 1, memory_order_relaxed);"
        f" reinterpret_cast<threadgroup int*>(&n)[0] = 3; {TG_BARRIER} y[{GX}] = 1;",
    ),
    "threadgroup memory of 36 KiB": Fault(
        "threadgroup memory",
        f"threadgroup float s[9000]; s[{GX}] = 1; y[{GX}] = s[{GX}];",
        check=False,
    ),
    "division by zero": Fault("division by zero", f"int n = int(x[0] * 0); y[{GX}] = 4 / n;"),
    "stack of 80 KiB": Fault(
        "out of bounds",
        f"float a[20000]; for (int i = 0; i < 20000; ++i) a[i] = x[i & 7]; y[{GX}] = a[int(x[0])];",
        check=False,
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_found(name):
    fault = FAULTS[name]
    # The lint would already refuse the cast that makes a writable pointer of an input.
    kernel = one_to_one(fault.source, lint=name != "write to input")
    x = mx.full((256,), 1.5)
    with pytest.raises(KernelFault) as caught:
        launch(kernel, [x], (fault.outputs,), mx.float32, check=fault.check, **fault.launch)
    # Without a barrier a stale value is either unwritten or raced for, by the order of the lanes.
    allowed = {fault.kind, "race"} if fault.kind == "uninitialised read" else {fault.kind}
    assert caught.value.kind in allowed, str(caught.value)


def test_missing_barrier_shows_in_a_plain_run():
    y = launch(one_to_one(TREE % ""), [mx.ones(256)], (256,), mx.float32)
    assert np.isnan(np.array(y)).any()


def test_fault_says_where():
    source = f"float v = x[{GX}];\nif ({LANE} < 16)\n  v = simd_sum(v);\ny[{GX}] = v;"
    with pytest.raises(KernelFault, match=r"simd_sum at source line 3, column 7"):
        launch(one_to_one(source), [mx.ones(256)], (256,), mx.float32)
    header = "METAL_FUNC float f(float v, uint l) {\n  return l < 3 ? simd_sum(v) : v;\n}\n"
    with pytest.raises(KernelFault, match=r"simd_sum at header line 2"):
        launch(
            one_to_one(f"y[{GX}] = f(x[0], {LANE});", header), [mx.ones(256)], (256,), mx.float32
        )


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_exited_lanes_may_be_allowed(order):
    kernel = one_to_one(f"uint i = {GX}; if (i >= 250) return; y[i] = simd_sum(x[i]);")
    x = mx.arange(256, dtype=mx.float32)
    y = launch(kernel, [x], (256,), mx.float32, exited_lanes_ok=True, order=order)
    assert y[249].item() == sum(range(224, 250))


ADDRESS = "METAL_FUNC float f(%s float* p) { return p[0]; }\n"
# name: source, header, dtype of x and y; found by the compiler alone (lint off).
COMPILE_FAULTS = {
    "missing address space": (f"y[{GX}] = f(x);", ADDRESS % "", mx.float32),
    "wrong address space": (
        "threadgroup float s[4]; s[0] = 1; y[0] = f(s);",
        ADDRESS % "device",
        mx.float32,
    ),
    "write through const input": ("x[0] = 1; y[0] = 1;", "", mx.float32),
    "device pointer as threadgroup pointer": (
        "threadgroup float* p = y; p[0] = 1;",
        "",
        mx.float32,
    ),
    "reinterpret_cast across spaces": (
        "auto p = reinterpret_cast<threadgroup float*>(y); p[0] = 1;",
        "",
        mx.float32,
    ),
    "double": ("double d = 1; y[0] = d;", "", mx.float32),
    "if constexpr": ("if constexpr (sizeof(float) == 4) y[0] = 1;", "", mx.float32),
    "structured binding": (
        "struct P { int a, b; } p{1, 2}; auto [u, v] = p; y[0] = u + v;",
        "",
        mx.float32,
    ),
    "fold expression": (
        "y[0] = f(1, 2);",
        "template <typename... A> METAL_FUNC int f(A... a) { return (a + ...); }\n",
        mx.float32,
    ),
    "variable-length array": (
        "int n = int(x[0]); float a[n]; a[0] = 1; y[0] = a[0];",
        "",
        mx.float32,
    ),
    "threadgroup initialiser": ("threadgroup float s[2] = {1, 2}; y[0] = s[0];", "", mx.float32),
    "threadgroup size not constant": (
        "int n = 3; threadgroup float s[n]; s[0] = 1;",
        "",
        mx.float32,
    ),
    "vector constructor with too few parts": ("y[0] = float4(1, 2, 3).x;", "", mx.float32),
    "vector comparison as condition": (
        "float4 v = float4(1); if (v == float4(1)) y[0] = 1;",
        "",
        mx.float32,
    ),
    "vector of another type": ("float4 v = int4(1); y[0] = v.x;", "", mx.float32),
    "simd_sum of bool": ("y[0] = simd_sum(x[0] > 0);", "", mx.float32),
    "64-bit atomic": ("threadgroup atomic<ulong> n; y[0] = 1;", "", mx.float32),
    "barrier without flags": ("threadgroup_barrier(); y[0] = 1;", "", mx.float32),
    "simdgroup_matrix of int": ("simdgroup_matrix<int, 8, 8> m; y[0] = 1;", "", mx.float32),
    "unknown name": ("y[0] = blockIdx.x;", "", mx.float32),
}


@pytest.mark.parametrize("name", COMPILE_FAULTS)
def test_compiler_rejects(name):
    source, header, dtype = COMPILE_FAULTS[name]
    kernel = one_to_one(source, header, lint=False)
    with pytest.raises(CompileError):
        launch(kernel, [mx.ones(256).astype(dtype)], (256,), dtype)


BFLOAT_FAULTS = {
    "assign float": f"y[{GX}] = float(x[{GX}]);",
    "initialise from a literal": f"T v = 0.0f; y[{GX}] = v;",
    "assign half": f"half h = 1; y[{GX}] = h;",
    "return value": f"y[{GX}] = x[{GX}] * 2.0f;",
    "threadgroup array": f"threadgroup T s[256]; s[{GX}] = 1.0f; y[{GX}] = s[{GX}];",
    "beside vectors": f"vec<T, 4> q = vec<T, 4>(T(1)); T v = float(q.x); y[{GX}] = v;",
}


@pytest.mark.parametrize("name", BFLOAT_FAULTS)
def test_implicit_bfloat_is_rejected(name):
    kernel = one_to_one(BFLOAT_FAULTS[name])
    with pytest.raises(CompileError):
        x = mx.ones(256, dtype=mx.bfloat16)
        launch(kernel, [x], (256,), mx.bfloat16, template=[("T", mx.bfloat16)])


LINT_FAULTS = {
    "address space of a parameter": ("y[0] = f(x);", ADDRESS % ""),
    "address space of a reference": (
        "y[0] = 1;",
        "template <typename T> T f(const T& p) { return p; }\n",
    ),
    "address space of a member": ("y[0] = 1;", "struct S { float* p; };\n"),
    "address space of a local": ("float a[2] = {1, 2};\n float* p = a;\n y[0] = p[1];", ""),
    "address space in a cast": ("y[0] = ((float*)x)[0];", ""),
    "address space of a vector": (
        "y[0] = f(x);",
        "float f(const vec<float, 4>* p) { return 1; }\n",
    ),
    "C-style pointer cast": ("auto p = (threadgroup float*)y; p[0] = 1;", ""),
    "C-style vector cast": ("int4 i = int4(1); y[0] = ((float4)i).x;", ""),
    "double": ("double d = 1; y[0] = d;", ""),
    "long long": ("long long d = 1; y[0] = d;", ""),
    "recursion": ("y[0] = f(3);", "int f(int n) { return n ? n * f(n - 1) : 1; }\n"),
    "mutual recursion": (
        "y[0] = f(3);",
        "int g(int n);\nint f(int n) { return n ? g(n - 1) : 0; }\nint g(int n) { return f(n); }\n",
    ),
    "mutable static": ("static int n = 0; y[0] = n;", ""),
    "global without constant": ("y[0] = t[0];", "const float t[2] = {1, 2};\n"),
    "constexpr global without constant": ("y[0] = t;", "constexpr float t = 1;\n"),
    "threadgroup array in a helper": (
        "y[0] = f();",
        "float f() { threadgroup float s[2]; return s[0]; }\n",
    ),
    "std": ("y[0] = std::max(1, 2);", ""),
    "new": ("auto q = new int; y[0] = *q;", ""),
    "goto": ("goto e; e: y[0] = 1;", ""),
    "throw": ("throw 1;", ""),
    "virtual": ("y[0] = 1;", "struct S { virtual int f() { return 1; } };\n"),
    "function pointer": ("int (*g)(int) = f; y[0] = g(1);", "int f(int n) { return n; }\n"),
    "lambda": ("auto f = [&](float v) { return v * 2; }; y[0] = f(1.0f);", ""),
    "concept": ("y[0] = 1;", "template <class T> concept Q = sizeof(T) == 4;\n"),
    "builtin": ("y[0] = __builtin_popcount(3);", ""),
    "CUDA": ("__syncthreads(); y[0] = 1;", ""),
    "printf": ('printf("x"); y[0] = 1;', ""),
    "foreign include": ("y[0] = 1;", "#include <cmath>\n"),
    "16 x 16 matrix": ("simdgroup_matrix<float, 16, 16> m; y[0] = 1;", ""),
    "header without last line break": ("y[0] = N;", "#define N 3"),
    "32-byte vector": ("ulong4 v = 0; y[0] = v.x;", ""),
}


@pytest.mark.parametrize("name", LINT_FAULTS)
def test_lint_rejects(name):
    source, header = LINT_FAULTS[name]
    with pytest.raises(LintError):
        one_to_one(source, header)


LINT_FINE = {
    "product": ("float T4 = x[0] * y[1]; uint b = uint(T4) & 3; y[0] = T4 * b;", ""),
    "auto pointer": ("float a[2] = {1, 2}; auto p = a; y[0] = p[0];", ""),
    "every space": (
        "y[0] = f(x, y);",
        "struct P { const device float* p; thread float& r; };\n"
        "template <typename T> METAL_FUNC T f(const device T* a, device T* b) { return a[0]; }\n",
    ),
    "constants": (
        "y[0] = t[1] + N;",
        "constant float t[2] = {1, 2};\nconstant constexpr int N = 3;\n",
    ),
    "static constant": ("y[0] = t;", "static constant constexpr const float t = 1;\n"),
    "enum and struct": ("y[0] = S{A}.e;", "enum E { A = 3, B };\nstruct S { E e; int n[2]; };\n"),
    "array index of index": ("int a[2] = {0, 1}; y[0] = x[a[1]];", ""),
    "words in comments": ("// std::double new float* p\n/* goto */ y[0] = 1;", "// virtual\n"),
    "template comparison": ("y[0] = (3 < 4) ? x[0] : (x[1] > 2 ? 1 : 0);", ""),
    "helper that calls others": (
        "y[0] = g(1);",
        "METAL_FUNC float f(float v) { return v; }\n"
        "METAL_FUNC float g(float v) { return f(v) + f(v); }\n",
    ),
    "define": ("y[0] = N;", "#define N 3\n#define TWICE(a) ((a) * 2)\n"),
    "metal include": ("y[0] = 1;", "#include <metal_simdgroup_matrix>\nusing namespace metal;\n"),
    "threadgroup pointer": (
        "threadgroup float s[4]; threadgroup float* p = s; p[0] = 1; y[0] = p[0];",
        "",
    ),
}


@pytest.mark.parametrize("name", LINT_FINE)
def test_lint_accepts_and_clang_compiles(name):
    source, header = LINT_FINE[name]
    launch(one_to_one(source, header), [mx.ones(256)], (256,), mx.float32, threads=1)
