"""Registers, spills and shared memory of the kernels, as ptxas allots them for an NVIDIA GPU.

    python benchmarks/ptxas.py [--arch sm_90] [--kernel NAME ...] [--fa OPTION=N ...]

Compiles the text that mx.fast.cuda_kernel gets, with nvcc, for representative specialisations; no
GPU needed. --fa sets options of fa_decode.launch, as unroll=2 lanes=8 simdgroups=4.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import hydra_mlx  # noqa: F401
from hydra_mlx.kernels import fa_decode, fa_prefill, la_prefill
from hydra_mlx.kernels.cuda import translate
from hydra_mlx.kernels.loader import Launch, body, header

import mlx.core as mx

TYPES = {
    mx.float32: "float",
    mx.float16: "__half",
    mx.bfloat16: "__nv_bfloat16",
    mx.int32: "int",
    mx.uint32: "uint32_t",
    mx.bool_: "bool",
}
USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")
SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")


def source(launch: Launch) -> str:
    """One .cu file: the translated text under a signature as MLX generates it."""
    kernel = launch.kernel
    names, text, head = translate(kernel, body(kernel), header(kernel))
    inputs = [
        f"const {'int' if isinstance(x, int) else TYPES[x.dtype]}* {name}"
        for name, x in zip(names, launch.inputs, strict=True)
    ]
    outputs = [
        f"{TYPES[dtype]}* {name}"
        for name, dtype in zip(kernel.outputs, launch.output_dtypes, strict=True)
    ]
    constants = "\n".join(
        f"constexpr int {n} = {int(v)};" if isinstance(v, int) else f"using {n} = {TYPES[v]};"
        for n, v in launch.template
    )
    arguments = ", ".join(inputs + outputs)
    return f"#include <cstdint>\n{head}\n__global__ void k({arguments}) {{\n{constants}\n{text}\n}}"


def measure(launch: Launch, arch: str) -> tuple:
    """(registers, spilled bytes, bytes of shared memory).

    Raises:
        RuntimeError: It does not compile; with nvcc's words.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "k.cu")
        path.write_text(source(launch))
        flags = ["-std=c++17", f"-arch={arch}", "-cubin", "-Xptxas", "-v", "-o", f"{folder}/k"]
        done = subprocess.run(["nvcc", *flags, str(path)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{launch.kernel.name}: {done.stderr[:2000]}")
    used, spills = USED.search(done.stderr), SPILLS.search(done.stderr)
    return int(used[1]), sum(map(int, spills.groups())), int(used[2] or 0)


def cache(Hk: int, S: int, dtype: mx.Dtype, bits: int | tuple | None, D: int = 128):
    """An empty cache of that form; bits may be two, of keys and of values."""
    if bits is None:
        x = mx.zeros((1, Hk, S, D), dtype)
        return fa_decode.KeyValues(x, x, S)
    both = bits if isinstance(bits, tuple) else (bits, bits)
    small = [mx.zeros((1, Hk, S, 2), dtype)] * 2
    triples = [(mx.zeros((1, Hk, S, D * n // 32), mx.uint32), *small) for n in both]
    return fa_decode.KeyValues(*triples, S, *both, 64)


def hydra(bits: int | None) -> tuple:
    """Both launches of hydra_decode: 12 LA and 4 FA heads of 128, one token."""
    from hydra_mlx.kernels import hydra_decode, la_decode

    bf16, D, Hl = mx.bfloat16, 128, 12
    ones, small = mx.zeros((D,), bf16), mx.zeros((Hl,), bf16)
    W = (4 * Hl + 4 * 4) * D
    la = la_decode.LaLayer(
        Hl, D, W, 0, 3 * Hl * D, small, small, mx.zeros((3 * Hl * D, 4), bf16), ones, ones, None,
        mx.zeros((D // 2,)), mx.zeros((8,)), "rms_no_weight", "silu", False,
    )  # fmt: skip
    layer = hydra_decode.HydraLayer(
        la, 4, (0, 1, 2, 3), ones, ones, la.inv_freq, False, mx.zeros((8,)), None, "elementwise",
        "pre_norm",
    )  # fmt: skip
    x, ab = mx.zeros((1, 1, W), bf16), mx.zeros((1, 1, 2 * Hl))
    tail, state = la_decode.fresh(la, 1, bf16, None, None)
    kv = cache(4, 4096, bf16, bits)
    first = hydra_decode.launch(layer, x, ab, 4096, tail, state, kv)
    part, stats, y_la = (mx.zeros(first.output_shapes[i]) for i in (3, 4, 0))
    second = hydra_decode.combine_launch(layer, part, stats, y_la.astype(bf16), x)
    return first, second, la_decode.launch(la, x, ab, 4096, tail, state)


def launches(fa_options: dict) -> list:
    """(what, launch) of each kernel's representative specialisations."""
    bf16, out = mx.bfloat16, []
    for rows in (1, 2, 4):
        for bits in (None, 8, 4, (8, 4)):
            q, kv = mx.zeros((1, 1, 4, 128), bf16), cache(4, 4096, bf16, bits)
            first = fa_decode.launch(
                q, kv, tuple(i // rows for i in range(4)), 0.1, 500.0, **fa_options
            )
            t = dict(first.template)
            what = f"{bits or 'bf16'} R={rows} L={t['L']} U={t['U']} SG={t['SG']}"
            out.append((what, first))
    part, stats = (mx.zeros(s) for s in first.output_shapes)
    gate = mx.zeros((1, 1, 4, 128), bf16)
    out.append(("gate, norm", fa_decode.combine_launch(part, stats, bf16, gate, norm="rms")))
    for bits in (None, 4, (8, 4)):
        out += [(f"{bits or 'bf16'}", x) for x in hydra(bits)[: 3 if bits is None else 1]]
    for bits in (8, 4, (8, 4)):
        q = mx.zeros((1, 64, 4, 128), bf16)
        kv = cache(4, 4096, bf16, bits)
        out.append((f"{bits} bit", fa_prefill.launch(q, kv, (0, 1, 2, 3), 0.1)))
    q, g = mx.zeros((1, 128, 12, 128), bf16), mx.zeros((1, 128, 12))
    local = la_prefill.launch_local(q, q, g, g)
    state = mx.zeros((1, 12, 128, 128))
    rm, since = (mx.zeros(s) for s in local.output_shapes)
    out += [("bf16", local), ("bf16", la_prefill.launch_scan(q, q, q, rm, since, state))]
    return [*out, ("bf16", la_prefill.launch_steps(q, q, q, g, g, state))]


def main(argv=None) -> int:
    """Compile and print; returns the exit code."""
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--arch", default="sm_90")
    p.add_argument("--kernel", nargs="+")
    p.add_argument("--fa", nargs="+", default=[])
    args = p.parse_args(argv)
    options = {name: int(n) for name, n in (x.split("=") for x in args.fa)}
    todo = [x for x in launches(options) if not args.kernel or x[1].kernel.name in args.kernel]
    print(f"{'kernel':18}{'specialisation':28}{'threads':>8}{'regs':>6}{'spills':>8}{'shared':>8}")
    with ThreadPoolExecutor(2) as pool:
        for (what, launch), found in zip(
            todo, pool.map(lambda x: measure(x[1], args.arch), todo), strict=True
        ):
            registers, spills, shared = found
            print(
                f"{launch.kernel.name:18}{what:28}{launch.threadgroup[0]:8}{registers:6}"
                f"{spills:8}{shared:8}"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
