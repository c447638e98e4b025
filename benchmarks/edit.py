"""An edited document asked again, beside stock mlx_lm: python benchmarks/edit.py [--tokens N]

A document is read into a small random model, and a question answered. Then one sentence of it is
replaced at 30, 60 and 95 % and the question asked again: through a CachedSequence, and as
mlx_lm.server does it, with its LRUPromptCache and generate_step on the same model, registered by
hydra_mlx.register(). Then what noting checkpoints costs in decoding. Prints tables, and one line of
JSON. All in one process, on whatever device MLX takes.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator

import hydra_mlx  # noqa: F401  (before mlx)
from hydra_mlx.sequence import CachedSequence, make_checkpoints

import mlx.core as mx
import numpy as np
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import LRUPromptCache, make_prompt_cache
from rollback import CONFIG, random_model

SENTENCE, QUESTION, REPLY = 20, 30, 16  # tokens


def ours(sequence: CachedSequence, prompt: list) -> dict:
    """Ask a prompt of a sequence."""
    start, cpu, ids = time.perf_counter(), time.process_time(), []
    kept = sequence.fit(prompt)
    for token in sequence.generate(prompt[kept:], REPLY):
        if not ids:
            seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        ids.append(token)
    return {"kept": kept, "seconds": seconds, "cpu": cpu, "reply": ids}


def stock(model: object, pool: LRUPromptCache, prompt: list) -> dict:
    """Ask a prompt as mlx_lm.server does."""
    start, cpu, ids = time.perf_counter(), time.process_time(), []
    cache, rest = pool.fetch_nearest_cache("model", prompt)
    cache = make_prompt_cache(model) if cache is None else cache
    for token, _ in generate_step(mx.array(rest), model, max_tokens=REPLY, prompt_cache=cache):
        if not ids:
            seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        ids.append(token)
    pool.insert_cache("model", [*prompt, *ids], cache)
    return {"kept": len(prompt) - len(rest), "seconds": seconds, "cpu": cpu, "reply": ids}


def edits(model: object, n: int, budget: int) -> list:
    """One row for each place of the edit, after one that adds a question at the end."""
    rng = np.random.RandomState(1)

    def some(k: int) -> list:
        return rng.randint(0, CONFIG["vocab_size"], k).tolist()

    document, question = some(n), some(QUESTION)
    read = CachedSequence(model, make_checkpoints(model, budget))
    pool = LRUPromptCache()
    first, other = [*document, *question], [*document, *some(QUESTION)]
    ours(read, first)
    stock(model, pool, first)
    rows = []
    for percent in (30, 60, 95, 100):
        at = n * percent // 100
        new = other if percent == 100 else [
            *document[:at], *some(SENTENCE + 3), *document[at + SENTENCE :], *question
        ]  # fmt: skip
        mine = ours(read.fork(), new)
        theirs = stock(model, pool, new)
        anew = ours(CachedSequence(model, make_checkpoints(model, budget)), new)
        rows.append({
            "edit_percent": percent,
            "tail": len(new) - at,
            "recomputed": len(new) - mine["kept"],
            "recomputed_stock": len(new) - theirs["kept"],
            "ttft_s": round(mine["seconds"], 3),
            "ttft_stock_s": round(theirs["seconds"], 3),
            "ttft_anew_s": round(anew["seconds"], 3),
            "cpu_s": round(mine["cpu"], 2),
            "cpu_stock_s": round(theirs["cpu"], 2),
            "cpu_anew_s": round(anew["cpu"], 2),
            "replies_equal": mine["reply"] == anew["reply"],
            "as_stock": mine["reply"] == theirs["reply"],
        })  # fmt: skip
    return rows


def decoding(model: object, budget: int, pieces: int = 30, piece: int = 20) -> dict:
    """Median processor time, ms a token, after 600 tokens; the ways take turns, 20 tokens each."""
    prompt = np.random.RandomState(2).randint(0, CONFIG["vocab_size"], 600).tolist()
    n = pieces * piece + 1

    def sequence(amount: int | None) -> Iterator:
        return CachedSequence(model, make_checkpoints(model, amount)).generate(prompt, n)

    ways = {
        "checkpoints": sequence(budget),
        "no checkpoints": sequence(None),
        "mlx_lm's generate_step": generate_step(mx.array(prompt), model, max_tokens=n),
    }
    took = {name: [] for name in ways}
    for steps in ways.values():
        next(steps)
    for _ in range(pieces):
        for name, steps in ways.items():
            start = time.process_time()
            for _ in range(piece):
                next(steps)
            took[name].append((time.process_time() - start) / piece * 1e3)
    return {name: round(statistics.median(x), 3) for name, x in took.items()}


def main() -> int:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--budget", type=int, default=512 * 10**6, help="bytes of checkpoints")
    args = parser.parse_args()
    hydra_mlx.register()
    model = random_model()
    ours(CachedSequence(model), list(range(300)) * 4)  # warm up
    result = {"tokens": args.tokens, "edits": edits(model, args.tokens, args.budget)}
    print(f"{args.tokens} tokens, one sentence replaced (100 %: another question only)")
    print("  first token: seconds (of the processor)")
    print(
        "  at %   tail   recomputed   stock           ours            stock            anew   equal"
    )
    for r in result["edits"]:
        times = "".join(
            f"{r[f'ttft{way}_s']:9.2f} ({r[f'cpu{way}_s']:5.2f})" for way in ("", "_stock", "_anew")
        )
        print(
            f"  {r['edit_percent']:4} {r['tail']:6} {r['recomputed']:12} {r['recomputed_stock']:7}"
            f"{times} {r['replies_equal']!s:>7}"
        )
    result["decoding_ms"] = decoding(model, args.budget)
    for name, ms in result["decoding_ms"].items():
        print(f"decoding, {name}: {ms} ms of processor time a token")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
