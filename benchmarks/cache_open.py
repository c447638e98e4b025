"""How long a prompt cache file takes: python benchmarks/cache_open.py [--tokens N] [--folder DIR]

Makes the cache of a processed document with the geometry of HydraHead-1.7B at 3:1 (28 layers, 8
key/value heads of which 4 are kept, D=128) from random bytes, keys and values in 4 bits, with
checkpoints; saves it, opens it warm, and cold after the kernel was told to forget its pages. Prints
a table and one line of JSON. Needs twice the file's size of memory.
"""

import argparse
import hashlib
import json
import os
import shutil
import tempfile
import time
from pathlib import Path

import hydra_mlx  # noqa: F401  (before mlx)
from hydra_mlx.cache import cache_bytes, make_cache
from hydra_mlx.cache_file import CacheFile
from hydra_mlx.checkpoints import Checkpoint, Checkpoints
from hydra_mlx.predict import geometry
from hydra_mlx.prompt_cache import StoredCache, load_cache, save_cache
from hydra_mlx.text import size

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import KVCache, QuantizedKVCache


def random_array(rng: np.random.Generator, shape: tuple, dtype: mx.Dtype) -> mx.array:
    """Random bytes as numbers; scales and states are only stored here, never computed with."""
    raw = rng.integers(0, 2**32, int(np.prod(shape)) * dtype.size // 4, np.uint32)
    x = mx.array(raw).view(dtype).reshape(shape)
    mx.eval(x)
    return x


def document(tokens: int, bits: int, budget: int) -> StoredCache:
    """A cache with checkpoints as a document of so many tokens leaves them."""
    rng, args = np.random.default_rng(0), geometry("3:1")
    H, D, kept = args.num_attention_heads, args.head_dim, 4
    cache = make_cache(args)
    for i, c in enumerate(cache):
        if isinstance(c, KVCache):
            cache[i] = c = QuantizedKVCache(64, bits)
            c.keys, c.values = (
                (
                    random_array(rng, (1, kept, tokens, D * bits // 32), mx.uint32),
                    random_array(rng, (1, kept, tokens, D // 64), mx.bfloat16),
                    random_array(rng, (1, kept, tokens, D // 64), mx.bfloat16),
                )
                for _ in "kv"
            )
            c.offset = tokens
        else:
            c[0] = random_array(rng, (1, 3, (H - kept) * 3 * D), mx.bfloat16)
            c[1] = random_array(rng, (1, H - kept, D, D), mx.float32)
    points = Checkpoints.within(args, budget, tokens, 2048)
    for _ in range(tokens // points.grid.every):
        points.calls.add(points.grid.every)
    points.calls.add(tokens % points.grid.every or 1)
    end = tokens // points.grid.every
    lines = [n for n in range(1, end + 1) if points.grid.keeps(n, end)]
    slots = tuple(tuple(c.cache) for c in cache if not hasattr(c, "offset"))
    # One set of arrays stands for all: the file has each checkpoint's own bytes all the same.
    held = [Checkpoint(n * points.grid.every, n, False, slots) for n in lines]
    points.calls.end = tokens
    points.resume(points.calls, tokens, held, cache)
    ids = rng.integers(0, args.vocab_size, tokens).tolist()
    text = "word " * tokens
    return StoredCache(cache, ids, text, tokens, None, "0" * 64, "random", checkpoints=points)


def timed(work) -> tuple:
    """(result, seconds)."""
    start = time.perf_counter()
    result = work()
    return result, time.perf_counter() - start


def forget(path: Path):
    """Drop the file's pages from memory, where the system can be asked to."""
    with path.open("rb") as f:
        os.fsync(f.fileno())
        os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def pass_over(path: Path, update=lambda data: None):
    """Read every byte with one thread, for scale."""
    buffer = memoryview(bytearray(1 << 20))
    with path.open("rb", buffering=0) as f:
        while n := f.readinto(buffer):
            update(buffer[:n])


def measure(path: Path, stored: StoredCache, repeats: int) -> dict:
    """All figures of one file."""
    _, save = timed(lambda: save_cache(path, stored))
    kv, state = cache_bytes(stored.cache)
    row = {"tokens": len(stored.tokens), "bytes": path.stat().st_size, "save_s": save}
    row |= {"kv_bytes": kv, "checkpoints": len(stored.checkpoints.positions)}
    stored.cache.clear()
    stored.checkpoints.cut(0)
    mx.clear_cache()

    def opened():
        found, open_s = timed(lambda: load_cache(path))
        _, read_s = timed(found.read)
        del found
        mx.clear_cache()
        return open_s, read_s

    if hasattr(os, "posix_fadvise"):
        forget(path)
        row["cold_open_s"], row["cold_read_s"] = opened()
        forget(path)
        row["cold_header_s"] = timed(lambda: CacheFile(path))[1]
    pass_over(path)  # page it in
    times = [opened() for _ in range(repeats)]
    row["open_s"], row["read_s"] = min(t[0] for t in times), min(t[1] for t in times)
    row["header_s"] = min(timed(lambda: CacheFile(path))[1] for _ in range(repeats))
    file = CacheFile(path)
    row["check_s"] = min(timed(file.check)[1] for _ in range(repeats))
    row["copy_s"] = min(timed(lambda: pass_over(path))[1] for _ in range(repeats))
    row["sha256_s"] = timed(lambda: pass_over(path, hashlib.sha256().update))[1]
    row["load"] = os.getloadavg()[0]
    return row


def main() -> int:
    """Print the table."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--tokens", type=int, nargs="+", default=[30_000, 100_000, 300_000])
    p.add_argument("--bits", type=int, default=4)
    p.add_argument("--budget", type=float, default=0.5, help="GiB for checkpoints")
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--folder", help="where files are written and deleted again")
    args = p.parse_args()
    folder, rows = Path(tempfile.mkdtemp(dir=args.folder)), []
    names = ("tokens", "file", "save", "cold open", "open", "of which check", "read", "header")
    names += ("for scale: one plain read", "SHA-256")
    print("| " + " | ".join(names) + " |\n" + "|---" * len(names) + "|")
    try:
        for tokens in args.tokens:
            stored = document(tokens, args.bits, int(args.budget * 2**30))
            row = measure(folder / "cache", stored, args.repeats)
            del stored
            mx.clear_cache()
            keys = ("save_s", "cold_open_s", "open_s", "check_s", "read_s", "header_s")
            keys += ("copy_s", "sha256_s")
            cells = [f"{row[k]:.3f} s" if k in row else "-" for k in keys]
            print(f"| {tokens:,} | {size(row['bytes'])} | " + " | ".join(cells) + " |", flush=True)
            rows.append(row)
    finally:
        shutil.rmtree(folder)
    print(json.dumps(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
