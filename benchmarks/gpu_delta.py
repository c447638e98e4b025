"""la_prefill on a GPU: agreement with the MLX operations, and time against mlx's own.

    python benchmarks/gpu_delta.py [--json FILE]

B=1, H=12, D=128. Medians of calls with their synchronisation: ours, the MLX operations, MLX's own
mx.fast.gated_delta_update, and the body of mlx_lm's packed kernel through our CUDA shim. The last
line is JSON.
"""

import argparse
import json
import sys
from functools import cache
from unittest.mock import patch

import hydra_mlx  # noqa: F401
from hydra_mlx.kernels import la_prefill
from hydra_mlx.kernels.cuda import translate
from hydra_mlx.kernels.dispatch import relative_rms, route
from hydra_mlx.kernels.loader import Kernel
from hydra_mlx.ops import gated_delta

import mlx.core as mx
from mlx_lm.models import gated_delta as mlx_lm_delta
from timing import median_ms


def inputs(T: int, dtype: mx.Dtype, H: int = 12, D: int = 128) -> list:
    """Random q, k, v, g, beta, state as the model gives them."""
    keys = mx.random.split(mx.random.key(T), 6)
    q, k, v = (mx.random.normal((1, T, H, D), key=keys[i]) for i in range(3))
    q = q / mx.linalg.norm(q, axis=-1, keepdims=True) * D**-0.5
    k = k / mx.linalg.norm(k, axis=-1, keepdims=True)
    g = -mx.exp(mx.random.uniform(-7, 0, (1, T, H), key=keys[3]))
    beta = mx.random.uniform(0, 1, (1, T, H), key=keys[4])
    state = mx.random.normal((1, H, D, D), key=keys[5])
    out = [*(x.astype(dtype) for x in (q, k, v)), g, beta, state]
    mx.eval(out)
    return out


@cache
def packed_body() -> tuple:
    """Names, source and header of mlx_lm's packed kernel for CUDA; it makes it on Metal only."""
    made = {}
    with (
        patch.object(mx.metal, "is_available", lambda: True),
        patch.object(mx.fast, "metal_kernel", lambda **arguments: made.update(arguments)),
    ):
        mlx_lm_delta._make_gated_delta_packed_kernel()
    kernel = Kernel("packed", tuple(made["input_names"]), tuple(made["output_names"]), ("T",))
    names, source, header = translate(kernel, made["source"], "")
    return mx.fast.cuda_kernel("packed", list(names), list(kernel.outputs), source, header)


def packed(q, k, v, g, beta, state) -> list:
    """mlx_lm's packed kernel; it wants alpha = exp(g)."""
    B, T, H, D = q.shape
    return packed_body()(
        inputs=[q, k, v, mx.exp(g), beta, state, mx.full((8,), T, mx.int32)],
        template=[
            ("InT", q.dtype),
            ("StT", mx.float32),
            ("Dk", D),
            ("Dv", D),
            ("Hk", H),
            ("Hv", H),
        ],
        grid=(32, D // 8, B * H),
        threadgroup=(32, 2, 1),
        output_shapes=[v.shape, state.shape],
        output_dtypes=[q.dtype, mx.float32],
    )


def main(argv=None) -> int:
    """Measure and print; returns the exit code."""
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--json")
    args = p.parse_args(argv)
    way, why = route()
    if way == "ops":
        print(f"No GPU to run kernels on ({why}).", file=sys.stderr)
        return 2
    rows = []
    for name in ("float32", "bfloat16", "float16"):
        for T in (9, 65, 500, 4096):
            a = inputs(T, getattr(mx, name))
            ref = gated_delta(*a)
            for which in ("chunked", "steps"):
                out = la_prefill.run(*a, route=way, which=which)
                errors = [relative_rms([x], [y]) for x, y in zip(out, ref, strict=True)]
                print(f"{name} T={T} {which}: output {errors[0]:.1e}, state {errors[1]:.1e}")
                rows.append({"dtype": name, "T": T, "which": which, "errors": errors})
    for T in (64, 512, 2048, 32768):
        a = inputs(T, mx.bfloat16)
        row = {"T": T}
        for which in ("chunked", "steps"):
            row[which] = median_ms(lambda a=a, w=which: la_prefill.run(*a, route=way, which=w))
        if way == "cuda":
            row["packed"] = median_ms(lambda a=a: packed(*a))
            row["packed differs"] = relative_rms(packed(*a)[:1], la_prefill.run(*a, route=way)[:1])
        if T >= 2048:
            own = (*a[:3], mx.exp(a[3]), *a[4:])
            row["mlx"] = median_ms(
                lambda own=own: mx.fast.gated_delta_update(*own),
                3 if T == 2048 else 1,
            )
        if T <= 2048:
            row["ops"] = median_ms(lambda a=a: gated_delta(*a), 5)
        print(" ".join(f"{k}={v if k == 'T' else f'{v:.3f} ms'}" for k, v in row.items()))
        rows.append(row)
    text = json.dumps(rows)
    if args.json:
        with open(args.json, "w") as f:
            f.write(text)
    print(text[:200])
    return 0


if __name__ == "__main__":
    sys.exit(main())
