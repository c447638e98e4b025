"""How much memory a conversion takes: python benchmarks/convert_memory.py [--shard-mb N]

Writes a random HydraHead checkpoint of four bfloat16 shards into a temporary folder, converts it
in a process of its own and compares that process's peak, above what it held just before, with
the largest source shard + one output shard + SLACK. Exits with 1 when it is more.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MB = 1 << 20
# Not weights: MLX's thread pools, the folded matrix of one layer in float32, page tables.
SLACK = 64 * MB
SHARDS = 4
OUTPUT_SHARD = 100 * 10**6
TARGETS = {"-q": ["-q"], "--dtype bfloat16": ["--dtype", "bfloat16"]}


def write_source(folder: Path, shard_bytes: int):
    """A checkpoint of SHARDS shards of about `shard_bytes`, two layers in each."""
    from hydra_mlx.config import HydraArgs
    from hydra_mlx.layouts import model_shapes

    import mlx.core as mx

    E, layers = 1024, 2 * SHARDS
    # A layer has about 4.8 H*D*E weights with gates, and 3*F*E of the MLP.
    hidden = int(shard_bytes / 2 / 2 / E - 5 * E) // 3 // 64 * 64
    config = {
        "model_type": "hydrahead",
        "hidden_size": E,
        "intermediate_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 1024,
        "full_attention_heads": [[0, 3, 5, 6]] * layers,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    shards: list = [{} for _ in range(SHARDS)]
    for name, shape in model_shapes(HydraArgs.from_dict(config)).items():
        number = int(name.split(".")[2]) // 2 if ".layers." in name else SHARDS - 1
        shards[number][name] = shape
    for i, shapes in enumerate(shards):
        arrays = {n: (mx.random.normal(s) * 0.02).astype(mx.bfloat16) for n, s in shapes.items()}
        file = folder / f"model-{i + 1:05d}-of-{SHARDS:05d}.safetensors"
        mx.save_safetensors(str(file), arrays)


def status(field: str) -> int:
    """A figure of /proc/self/status in bytes, such as VmRSS or VmHWM."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def measure(source: str, target: str, flags: list):
    """Convert in this process and print the bytes that its peak is above its start."""
    import hydra_mlx  # noqa: F401  (before mlx: it chooses the BLAS library)
    from hydra_mlx import convert, converter, verify  # noqa: F401

    import mlx.core as mx
    import mlx_lm.models.base  # noqa: F401

    mx.eval(mx.quantize(mx.ones((64, 64)) @ mx.ones((64, 64))))  # start the threads
    linux = Path("/proc/self/status").exists()
    before = status("VmRSS") if linux else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    size = str(OUTPUT_SHARD)
    argv = ["--hf-path", source, "--mlx-path", target, "--quiet", "--max-shard-size", size, *flags]
    code = convert.main(argv)
    peak = status("VmHWM") if linux else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = time.perf_counter() - started
    print(json.dumps({"code": code, "peak": peak - before, "seconds": seconds}))


def main(argv: list | None = None) -> int:
    """Print the table; returns the exit code."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--shard-mb", type=int, default=120, help="MB of a source shard (default: 120)")
    p.add_argument("--measure", nargs=2, metavar=("SOURCE", "TARGET"), help=argparse.SUPPRESS)
    args, flags = p.parse_known_args(argv)
    if args.measure:
        measure(*args.measure, flags)
        return 0
    rows = []
    with tempfile.TemporaryDirectory() as temp:
        source = Path(temp) / "source"
        source.mkdir()
        write_source(source, args.shard_mb * 10**6)
        largest = max(f.stat().st_size for f in source.glob("*.safetensors"))
        for label, more in TARGETS.items():
            target = Path(temp) / label.strip("-").split()[0]
            command = [sys.executable, __file__, "--measure", str(source), str(target), *more]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode or '"code": 0' not in done.stdout:
                print(done.stderr, file=sys.stderr)
                return 2
            found = json.loads(done.stdout.splitlines()[-1])
            output = max(f.stat().st_size for f in target.glob("*.safetensors"))
            limit = largest + output + SLACK
            rows.append({"target": label, "source_shard": largest, "output_shard": output})
            rows[-1].update(peak=found["peak"], limit=limit, seconds=found["seconds"])
    print(f"peak memory of a conversion, MiB (limit: shards + {SLACK // MB})")
    print(f"{'target':18}{'source shard':>14}{'output shard':>14}{'peak':>8}{'limit':>8}{'s':>7}")
    for r in rows:
        sizes = [r[k] / MB for k in ("source_shard", "output_shard", "peak", "limit")]
        figures = "".join(f"{x:{w}.1f}" for x, w in zip(sizes, (14, 14, 8, 8), strict=True))
        print(f"{r['target']:18}{figures}{r['seconds']:7.1f}")
    print(json.dumps(rows))
    return int(any(r["peak"] > r["limit"] for r in rows))


if __name__ == "__main__":
    sys.exit(main())
