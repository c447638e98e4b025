"""Up to a million tokens on a GPU: speed and peak memory, HydraHead beside mlx_lm's Qwen3.

    python benchmarks/gpu_long.py [--tokens 131072,524288,1048576] [--limit 120] [--json FILE]
    python benchmarks/gpu_long.py --plan    # only what memory_plan predicts; needs no GPU
    python benchmarks/gpu_long.py --tiny    # small sizes, also on a CPU: is the script in order?

Qwen3-1.7B's geometry with random weights in 4 bits; HydraHead at 3:1 and 7:1 with keys and values
in 4 bits, Qwen3 with bf16. For each length the cache is filled with random numbers, prefill steps
are timed at five positions and added up over all (a step's time is linear in its position); where
that says that the whole prompt takes less than what is left of --limit seconds, it is read in
truth. Then 16 steps are decoded, each waiting for the one before, and 16 one ahead of the other.
Peaks include the weights. Each row is printed when it is there; the last line is JSON.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import hydra_mlx  # noqa: F401  (before mlx)
from hydra_mlx.cache import cache_bytes, quantise_cache
from hydra_mlx.config import HydraArgs
from hydra_mlx.kernels import dispatch
from hydra_mlx.kv_cache import HydraKVCache
from hydra_mlx.memory_plan import MemoryPlan
from hydra_mlx.model import Model
from hydra_mlx.ops import attention
from hydra_mlx.predict import weight_bytes
from hydra_mlx.text import size

import gpu_step
import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models import qwen3
from mlx_lm.models.cache import KVCache

FA_HEADS = {"3:1": [1, 6, 8, 15], "7:1": [1, 8]}  # on key/value heads of their own
TINY = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 1000,
}  # fmt: skip
TARGET = 12 * 2**30


def hydra_args(ratio: str, sizes: dict) -> HydraArgs:
    """HydraHead with the head map of a ratio."""
    heads = [FA_HEADS[ratio]] * sizes["num_hidden_layers"]
    more = {"full_attention_heads": heads, "fa_qk_norm": True, "la_qk_norm": True}
    return HydraArgs.from_dict(
        {"model_type": "hydrahead", "weights_form": "fused", **sizes, **more}
    )


def make(kind: str, sizes: dict, tiny: bool) -> nn.Module:
    """A model with random weights: 4 bits, bf16; tiny ones float32, which a CPU is fast at."""
    if kind in FA_HEADS:
        model = Model(hydra_args(kind, sizes))
    else:
        model = qwen3.Model(qwen3.ModelArgs.from_dict({**sizes, "model_type": "qwen3"}))
    model.eval()
    return model if tiny else gpu_step.quantised(model)


def empty(model: nn.Module, kind: str, tokens: int, bits: int) -> list:
    """A cache that has been told its length."""
    if kind not in FA_HEADS:
        return [KVCache() for _ in model.layers]
    cache = quantise_cache(model.make_cache(), bits, 64)
    for c in cache:
        if isinstance(c, HydraKVCache):
            c.reserve(tokens)
    return cache


def fill(cache: list, kind: str, tokens: int, sizes: dict):
    """Random keys and values in all rows; states are left as the steps before made them."""
    D = sizes["head_dim"]
    Hk = len(FA_HEADS[kind]) if kind in FA_HEADS else sizes["num_key_value_heads"]
    for c in cache:
        if isinstance(c, HydraKVCache):
            room = -(-tokens // 256) * 256
            for name, bits in (("keys", c.k_bits), ("values", c.v_bits)):
                shape = (1, Hk, room, D * bits // 32)
                words = mx.random.randint(0, 2**31 - 1, shape, mx.uint32)
                dtype = getattr(c, name)[1].dtype
                scales = mx.full((1, Hk, room, D // c.group_size), 4.0 / 2**bits, dtype)
                setattr(c, name, [words, scales, -2.0 * mx.ones_like(scales)])
                mx.eval(getattr(c, name))
        elif isinstance(c, KVCache):
            shape = (1, Hk, tokens, D)
            c.keys, c.values = (mx.random.normal(shape, dtype=c.keys.dtype) for _ in range(2))
            mx.eval(c.keys, c.values)
    mx.clear_cache()


def place(cache: list, position: int):
    """Let the cache hold so many tokens."""
    for c in cache:
        if hasattr(c, "offset"):
            c.offset = position


def read(model: nn.Module, cache: list, T: int, vocab: int) -> float:
    """Seconds of one prefill step, as generate does it: no logits, cache evaluated."""
    ids = mx.random.randint(0, vocab, (1, T))
    mx.eval(ids)
    start = time.perf_counter()
    model.model(ids, cache)
    mx.eval([c.state for c in cache])
    seconds = time.perf_counter() - start
    mx.clear_cache()
    return seconds


def positions(tokens: int, step: int) -> list:
    """Five beginnings of a step, the first and the last among them."""
    last = max(0, tokens - step)
    return sorted({last * i // 4 for i in range(5)})


def whole_time(at: list, seconds: list, tokens: int, step: int) -> float:
    """Seconds of all steps, from those of some: straight lines between them."""
    total = 0.0
    for begin in range(0, tokens, step):
        i = max(j for j, p in enumerate(at) if p <= begin)
        j = min(i + 1, len(at) - 1)
        share = (begin - at[i]) / (at[j] - at[i]) if j > i else 0.0
        total += seconds[i] + share * (seconds[j] - seconds[i])
    return total


def decode(model: nn.Module, cache: list, steps: int, ahead: bool) -> float:
    """Median seconds of a greedy step; `ahead` starts it while the one before runs."""
    token, times = mx.array([[1]]), []
    for _ in range(steps + 3):
        start = time.perf_counter()
        following = mx.argmax(model(token, cache=cache)[:, -1:], axis=-1)
        if ahead:
            mx.async_eval(following)
            mx.eval(token)
        else:
            mx.eval(following)
        token = following
        times.append(time.perf_counter() - start)
    mx.eval(token)
    return statistics.median(times[3:])


def process_memory() -> int | None:
    """Bytes of the GPU that this process holds, by nvidia-smi; None where it cannot say."""
    try:
        command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        out = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        return int(out.stdout.split()[0]) * 2**20
    except (OSError, ValueError, IndexError, subprocess.SubprocessError):
        return None


def case(model: nn.Module, kind: str, tokens: int, args, sizes: dict) -> Iterator[dict]:
    """Rows of one model and length, each with what has been measured so far."""
    end, step, vocab = time.perf_counter() + args.limit, args.step, sizes["vocab_size"]
    weights = sum(x.nbytes for _, x in tree_flatten(model.parameters()))
    row = {"model": kind, "tokens": tokens, "step": step, "weights": weights}
    cache = empty(model, kind, tokens, args.kv_bits)
    read(model, cache, min(step, tokens), vocab)  # builds and checks kernels, makes states
    place(cache, 0)
    fill(cache, kind, tokens, sizes)
    row["kv"], row["state"] = cache_bytes(cache)
    mx.reset_peak_memory()
    at, seconds = positions(tokens, step), []
    for p in at:
        place(cache, p)
        seconds.append(read(model, cache, min(step, tokens - p), vocab))
        if time.perf_counter() > end:
            at = at[: len(seconds)]
            row["stopped"] = f"time limit at position {p}"
            break
    row |= {"positions": at, "step_s": seconds, "prefill_peak": mx.get_peak_memory()}
    if "stopped" not in row:
        row["prefill_s"] = whole_time(at, seconds, tokens, step)
        row["prefill_how"] = f"{len(at)} positions"
    yield row
    for ahead in (False, True):
        place(cache, tokens - 64)
        mx.reset_peak_memory()
        s = decode(model, cache, 16, ahead)
        name = "ahead" if ahead else "in turn"
        row |= {f"decode {name}": 1 / s, f"decode {name} peak": mx.get_peak_memory()}
        yield row
    row["gpu_used"] = process_memory()
    if row.get("prefill_s", args.limit) < 0.8 * (end - time.perf_counter()):
        place(cache, 0)
        mx.reset_peak_memory()
        start = time.perf_counter()
        for p in range(0, tokens, step):
            read(model, cache, min(step, tokens - p), vocab)
        row["prefill_s"] = time.perf_counter() - start
        row |= {"prefill_how": "whole", "prefill_peak": mx.get_peak_memory()}
    peaks = [v for k, v in row.items() if k.endswith("peak")]
    row["peak"] = max(peaks)
    row["paths"] = getattr(getattr(model.layers[0].self_attn, "kernels", None), "paths", None)
    yield row


def say(row: dict):
    """One line for people."""
    speed = row["tokens"] / row["prefill_s"] if "prefill_s" in row else float("nan")
    print(f"{row['model']:5s} {row['tokens']:8d} tokens: prefill {speed:.0f} tok/s "
          f"({row.get('prefill_how', row.get('stopped'))}), decode {row['decode ahead']:.1f} tok/s "
          f"({row['decode in turn']:.1f} in turn), peak {size(row['peak'])} (prefill "
          f"{size(row['prefill_peak'])}, decode {size(row['decode in turn peak'])} in turn, "
          f"{size(row['decode ahead peak'])} ahead); weights {size(row['weights'])}, keys and "
          f"values {size(row['kv'])}", flush=True)  # fmt: skip


def plans(kinds: list, lengths: list, step: int, bits: int, sizes: dict):
    """What memory_plan predicts for each HydraHead case."""
    for kind in (k for k in kinds if k in FA_HEADS):
        args = hydra_args(kind, sizes)
        for tokens in lengths:
            plan = MemoryPlan(args, tokens, step, weight_bytes(args), bits, bits, kernels=True)
            ok = "within" if plan.total <= TARGET else "above"
            print(f"predicted, {kind}: {plan.text()}; {ok} {size(TARGET)}", flush=True)


def main(argv=None) -> int:
    """Measure and print; returns the exit code."""
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--tokens", default="131072,524288,1048576")
    p.add_argument("--models", default="7:1,3:1,qwen3")
    p.add_argument("--step", type=int, default=2048)
    p.add_argument("--kv-bits", type=int, default=4, choices=(4, 8))
    p.add_argument("--limit", type=float, default=120, help="seconds a model and length")
    p.add_argument("--cache-limit", type=float, default=0.25, help="GiB of free buffers MLX keeps")
    p.add_argument(
        "--attention", choices=("kernels", "operations"), default="kernels",
        help="of prefill steps: fa_prefill, or blocks of keys as matrix products",
    )  # fmt: skip
    p.add_argument("--layers-ahead", type=int, help="instead of model.LAYERS_AHEAD; 0: no waiting")
    p.add_argument("--plan", action="store_true")
    p.add_argument("--tiny", action="store_true")
    p.add_argument("--json")
    args = p.parse_args(argv)
    sizes = {**gpu_step.SIZE, **(TINY if args.tiny else {})}
    gpu_step.SIZE.update(sizes)
    kinds, lengths = args.models.split(","), [int(n) for n in args.tokens.split(",")]
    if args.tiny:
        lengths, args.step = [min(n, 2048) for n in lengths[:2]], 256
    plans(kinds, lengths, args.step, args.kv_bits, sizes)
    if args.plan:
        return 0
    if dispatch.route()[0] == "ops" and not args.tiny:
        print(f"No GPU to run kernels on ({dispatch.route()[1]}).", file=sys.stderr)
        return 2
    configure(args)
    rows, start = [], time.perf_counter()
    for kind in kinds:
        model = make(kind, sizes, args.tiny)
        mx.clear_cache()
        for tokens in lengths:
            row = {"model": kind, "tokens": tokens}
            try:
                with fa_prefill_off() if args.attention == "operations" else nullcontext():
                    for row in case(model, kind, tokens, args, sizes):  # noqa: B007
                        pass
                say(row)
            except RuntimeError as e:  # MLX ran out of memory
                row["error"] = str(e).splitlines()[0][:200]
                print(f"{kind} {tokens}: {row['error']}", flush=True)
            rows.append(dict(row))
            print(
                f"[{time.perf_counter() - start:4.0f} s] {json.dumps(row, default=str)}", flush=True
            )
            mx.clear_cache()
        del model
        mx.clear_cache()
    text = json.dumps({"device": str(mx.device_info()), "rows": rows}, default=str)
    if args.json:
        Path(args.json).write_text(text)
    print(text)
    return 1 if dispatch.TRUST.failed else 0


def configure(args):
    """What MLX may keep, and how far it may run ahead."""
    from hydra_mlx import model

    mx.set_cache_limit(int(args.cache_limit * 2**30))
    if args.layers_ahead is not None:
        model.LAYERS_AHEAD = args.layers_ahead or 10**9
    if args.tiny:
        attention.SCORES = 2**16


class fa_prefill_off:
    """Inside the block prefill steps do attention by operations; decoding has its kernels."""

    def __enter__(self):
        from hydra_mlx.kernels import fa_prefill

        self.module, self.eligible = fa_prefill, fa_prefill.eligible
        fa_prefill.eligible = lambda *a, **k: (False, "--attention operations")

    def __exit__(self, *exc):
        self.module.eligible = self.eligible


if __name__ == "__main__":
    sys.exit(main())
