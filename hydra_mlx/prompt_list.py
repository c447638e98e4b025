"""generate --prompts FILE: a reply to each line, several at once, as lines of JSON."""

import json
import time
from collections.abc import Callable
from typing import Any

from . import cli, sampling
from .errors import UsageError
from .text import count, rate, read_file, read_prompt, size

ROWS = 8  # replies at once, by default
# Flags that belong to one reply: attribute, flag, what it is without.
ALONE = (
    ("quantized_kv_start", "--quantized-kv-start", None),
    ("prompt_lookup", "--prompt-lookup", False),
    ("draft_model", "--draft-model", None),
)


def add_flags(parser: Any):
    """--prompts and --batch-size."""
    group = parser.add_argument_group("several prompts")
    group.add_argument(
        "--prompts",
        metavar="FILE",
        help="reply to each line of FILE, files and piped text before it, as lines of JSON; what "
        "all begin with is read and held once",
    )
    group.add_argument(
        "--batch-size",
        type=cli.number(int, 1),
        metavar="N",
        help=f"replies at once (default {ROWS}); each takes memory of its own",
    )


def check(args: Any):
    """Flags that do not go with --prompts.

    Raises:
        UsageError: The first of them.
    """
    if args.prompts is None:
        if args.batch_size is not None:
            raise UsageError("--batch-size has no effect without --prompts FILE.")
        return
    for name, flag, absent in ALONE:
        if getattr(args, name) != absent:
            raise UsageError(f"{flag} is for one prompt; it cannot be used with --prompts.")
    if args.prompt_cache is not None and not args.prompt_cache_ro:
        raise UsageError(
            "--prompts only reads a --prompt-cache: it cannot hold several replies.",
            "Add --prompt-cache-ro.",
        )


def read(args: Any, given: list) -> list:
    """The prompts: each line that is not empty, after the files and the piped text.

    Args:
        given: Prompt arguments, which may be files and - but no text.

    Raises:
        UsageError: No lines, a prompt beside them, or something unreadable.
    """
    spoken = [x for x in given if x != "-" and (not x.startswith("@") or x.startswith("@@"))]
    if spoken:
        raise UsageError(
            f"The prompt {spoken[0][:30]!r} is given, and --prompts.",
            "Put it into a file: @FILE comes before each line.",
        )
    text = read_file(args.prompts, "file of prompts", "Write one prompt on each line.")
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise UsageError(f"{args.prompts} has no lines.", "Write one prompt on each line.")
    before = read_prompt([*given, "x"], args.file)[:-1]
    return [before + line for line in lines]


def reply(
    args: Any,
    options: sampling.SamplingOptions,
    tokenizer: Any,
    base: Any,
    requests: list,
    note: Callable,
) -> int:
    """Generate and print; returns the exit code.

    Args:
        base: The CachedSequence that the first request goes on from. requests: A prompts.Request
            for each.
    """
    import mlx.core as mx

    from .replies import stream_replies

    model, rows = base.model, min(args.batch_size or ROWS, len(requests))
    if not args.no_memory_plan:
        plan_memory(args, base, requests, rows, note)
    if sampling.vocab_size(model) is not None:
        options.check_vocab(sampling.vocab_size(model))
    sampler, processors = options.make(tokenizer)
    seed = options.apply_seed()
    texts, tokens, reasons = ([x] * len(requests) for x in ("", 0, None))
    out, printed, start = cli.Reply(), 0, time.perf_counter()
    with cli.Interrupt() as interrupt:
        for parts in stream_replies(
            model,
            tokenizer,
            [r.ids for r in requests],
            [r.max_tokens for r in requests],
            sampler if options.temp else None,
            processors,
            base=base,
            rows=rows,
            prefill_step_size=args.prefill_step_size,
            stop=args.stop,
            should_stop=lambda: interrupt() or out.broken,
        ):
            for i, part in parts:
                texts[i] += part.text
                tokens[i] += part.token is not None
                reasons[i] = part.finish_reason
            while printed < len(requests) and reasons[printed]:
                line = {"index": printed, "text": texts[printed], "tokens": tokens[printed]}
                line["finish_reason"] = reasons[printed]
                out.write(json.dumps(line, ensure_ascii=False) + "\n")
                printed += 1
    seconds = time.perf_counter() - start
    broken = reasons.count("interrupt")
    if broken and not out.broken:
        note(f"Interrupted; {broken} of {count(len(requests), 'prompt')} without a whole reply.")
    if args.stats != "off":
        figures = {
            "prompts": len(requests),
            "prompt_tokens": sum(len(r.ids) for r in requests),
            "generated_tokens": sum(tokens),
            "seconds": round(seconds, 3),
            "tokens_per_second": round(sum(tokens) / seconds, 3),
            "peak_memory_bytes": mx.get_peak_memory(),
            "seed": seed,
        }
        if args.stats == "json":
            cli.say(json.dumps(figures))
        else:
            cli.say(
                f"replies  {count(sum(tokens), 'token')} to {count(len(requests), 'prompt')} in "
                f"{seconds:.2f} s, prompts included: {rate(sum(tokens) / seconds)}\n"
                f"memory   peak {size(figures['peak_memory_bytes'])}"
                + ("" if seed is None else f"\nseed     {seed}")
            )
    if out.broken:
        return cli.BROKEN_PIPE
    return cli.INTERRUPTED if broken else 0


def plan_memory(args: Any, base: Any, requests: list, rows: int, note: Callable):
    """Say what long prompts take in memory, so many at once.

    Raises:
        UsageError: They do not fit.
    """
    from .cache import cache_bytes
    from .config import is_hydra
    from .generation import prefill_step, reply_room
    from .kv_cache import SHARED, kv_format
    from .machine import machine
    from .memory_plan import check, plan_of
    from .rollback import common_to_all

    if not is_hydra(base.model):
        return
    common = common_to_all([r.ids for r in requests]) if len(requests) > 1 else 0
    common = max(common, len(base))
    if common < SHARED:
        common = 0  # not held once
    longest = max(len(r.ids) + reply_room(len(r.ids), r.max_tokens) for r in requests)
    few = next(filter(None, map(kv_format, base.cache)), None)
    step = prefill_step(base, args.prefill_step_size)
    # Rows of a batch are copied when others join or leave it.
    plan = plan_of(base.model, common + 2 * rows * (longest - common), step, few, rows=2 * rows)
    read = sum(len(r.ids) - common for r in requests) + common - requests[0].kept
    check(plan, machine(), read, note, sum(cache_bytes(base.cache)))
