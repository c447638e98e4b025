"""hydra-mlx generate: answer one prompt. The reply goes to stdout, all else to stderr.

hydra-mlx generate --model DIR @report.txt "Summarise this."
cat report.txt | hydra-mlx generate "Summarise this."
"""

import argparse
import contextlib
import sys
import time
import types
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import checkpoint_options, cli, draft_flags, prompt_list, prompts, sampling, stats
from .errors import CheckpointError, UsageError
from .text import count, first_line, read_prompt

EPILOG = """\
prompt: text, @FILE for a file's text (@@ for text that begins with @), - for stdin. Files and
piped text come first, the prompt after them, a blank line between. Nothing is unescaped.

--prompt-cache FILE: made if absent; otherwise what the model has read is taken from it, and it is
  updated after the run. It belongs to one model, dtype and adapter, is checked byte by byte, and
  is never left half written. With a chat template the prompt is the next turn of the conversation
  in the file. Without one it is a new version of the text in the file: what both begin with is kept
  as far back as there is a checkpoint, the rest is read anew, and the file has the new text then.
  A prompt that shares less than a tenth of the file's tokens is refused before any work and the
  file stays as it is, unless --prompt-cache-overwrite. To ask many questions about one text: make
  the file with `hydra-mlx cache read`, then use it with --prompt-cache-ro; with --prompts many at
  once. End the name in .safetensors and mlx_lm can read it too.

--kv-bits 4 keeps keys and values in 4 bits instead of 16, --kv-bits 8,4 keys in 8 and values in 4.
  What it takes and what it costs in quality is in docs/cache.md. A prompt of 8,192 tokens or more
  is preceded by a line about memory; what cannot fit is refused, with what would.

Ctrl-C ends the reply, still writes the prompt cache and the statistics, and exits with 130.
"""


class _CallableModule(types.ModuleType):
    # hydra_mlx.generate is a function of the package and, once imported, this module as well.
    def __call__(self, *args, **kwargs):
        from . import generation

        return generation.generate(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule


def build_parser() -> cli.Parser:
    """The flags; mlx_lm.generate's names where it has one."""
    p = cli.parser("generate", __doc__, EPILOG)
    p.add_argument("prompt", nargs="*", help="the prompt, in quotes; @FILE; -")
    p.add_argument("--prompt", "-p", dest="prompt_flag", metavar="TEXT", help="the prompt")
    p.add_argument(
        "--file", action="append", default=[], metavar="PATH", help="a file before it; repeatable"
    )
    p.add_argument(
        "--model",
        metavar="PATH",
        help="model folder or hub id (default: the small one in this package)",
    )
    p.add_argument("--adapter-path", metavar="DIR", help="adapters from mlx_lm.lora")
    p.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="of unquantised weights; auto keeps them, except float32 on a CPU",
    )
    p.add_argument(
        "--check-weights", action="store_true", help="compare the files with their checksums first"
    )
    p.add_argument(
        "--max-tokens",
        "-m",
        type=cli.number(int, -1),
        default=512,
        metavar="N",
        help="longest reply; 0 only reads the prompt, -1 is no limit (default 512)",
    )
    p.add_argument(
        "--max-context",
        type=cli.number(int, 1),
        metavar="N",
        help="refuse a prompt that with --max-tokens exceeds N tokens",
    )
    p.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before TEXT; repeatable"
    )
    p.add_argument(
        "--extra-eos-token",
        action="extend",
        nargs="+",
        default=[],
        metavar="TOKEN",
        help="tokens that end the reply too; write the prompt before this flag",
    )
    chat = p.add_argument_group("chat template (used when the tokenizer has one)")
    chat.add_argument("--system-prompt", metavar="TEXT", help="instructions before the prompt")
    chat.add_argument("--prefill-response", metavar="TEXT", help="beginning of the reply")
    chat.add_argument(
        "--ignore-chat-template", action="store_true", help="send the prompt as it is"
    )
    chat.add_argument(
        "--use-default-chat-template", action="store_true", help="ChatML, when there is none"
    )
    chat.add_argument("--chat-template-config", metavar="JSON", help="variables for the template")
    sampling.add_flags(p)
    cache = p.add_argument_group("cache")
    cache.add_argument(
        "--prompt-cache", "--prompt-cache-file", metavar="FILE", help="load or make; see below"
    )
    cache.add_argument("--prompt-cache-ro", action="store_true", help="do not update it")
    cache.add_argument("--prompt-cache-overwrite", action="store_true", help="ignore what is in it")
    cache.add_argument(
        "--kv-bits",
        type=parse_bits,
        metavar="N[,N]",
        help="quantise keys and values: 2, 3, 4, 5, 6 or 8 bits; 8,4 is 8 for keys, 4 for values",
    )
    cache.add_argument("--kv-group-size", type=int, metavar="N", help="32, 64 or 128 (default 64)")
    cache.add_argument(
        "--quantized-kv-start",
        type=cli.number(int, 0),
        metavar="N",
        help="full precision until there are N tokens (default 0)",
    )
    cache.add_argument(
        "--no-memory-plan",
        action="store_true",
        help="do not work out beforehand whether prompt and reply fit into memory",
    )
    cache.add_argument(
        "--prefill-step-size",
        type=cli.number(int, 1),
        metavar="N",
        help="prompt tokens at a time, at most; smaller needs less memory (default 2048, or 512 "
        "with checkpoints)",
    )
    checkpoint_options.add_flags(cache)
    draft_flags.add_flags(p)
    prompt_list.add_flags(p)
    stats.add_flags(p)
    for flags, reason in _REFUSED.items():
        p.add_argument(*flags.split(), action=cli.Refuse, reason=reason)
    return p


_REFUSED = {
    "--max-kv-size": "recurrent state cannot forget single tokens. Use --max-context or --kv-bits.",
    "--image": "HydraHead models read text only.",
    "--trust-remote-code": "no code of a model folder is ever run; leave it out.",
    "--quantize-activations -qa": "only weights, keys and values can be quantised.",
}


def parse_bits(text: str) -> int | tuple:
    """--kv-bits: "4", or "8,4" for keys and values; an argparse type."""
    try:
        found = tuple(int(n) for n in text.split(","))
    except ValueError:
        found = ()
    if len(found) not in (1, 2):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of bits, or two such as 8,4")
    return found[0] if len({*found}) == 1 else found


def check_flags(args: argparse.Namespace):
    """Flags that contradict each other or would do nothing; fills in defaults.

    Raises:
        UsageError: The first such flag.
    """
    stats.resolve(args)
    draft_flags.check(args)
    prompt_list.check(args)
    for name in ("kv_group_size", "quantized_kv_start"):
        if getattr(args, name) is not None and args.kv_bits is None:
            raise UsageError(f"{sampling.flag(name)} has no effect without --kv-bits.")
    for name in (
        "prompt_cache_ro",
        "prompt_cache_overwrite",
        "checkpoints",
        "checkpoint_dtype",
    ):
        if getattr(args, name) not in (None, False) and args.prompt_cache is None:
            raise UsageError(f"{sampling.flag(name)} has no effect without --prompt-cache FILE.")
    if args.prompt_cache_ro and args.prompt_cache_overwrite:
        raise UsageError("--prompt-cache-ro and --prompt-cache-overwrite exclude each other.")
    for name in ("checkpoints", "checkpoint_dtype"):
        if getattr(args, name) is not None and args.prompt_cache_ro:
            raise UsageError(
                f"{sampling.flag(name)} has no effect with --prompt-cache-ro: the file's are used."
            )
    if args.ignore_chat_template and args.use_default_chat_template:
        raise UsageError(
            "--ignore-chat-template and --use-default-chat-template exclude each other."
        )
    if "" in args.stop:
        raise UsageError("--stop is empty, which would end every reply at once.")
    if args.max_tokens == 0 and args.prefill_response is not None:
        raise UsageError("--prefill-response has no effect with --max-tokens 0.")


def load_adapters(model: Any, folder: str):
    """Put the adapters of mlx_lm.lora on a model.

    Raises:
        UsageError: There are none. CheckpointError: They do not fit.
    """
    from mlx_lm.utils import load_adapters as stock

    for name in ("adapter_config.json", "adapters.safetensors"):
        if not (Path(folder) / name).is_file():
            raise UsageError(f"--adapter-path {folder} has no {name}.")
    try:
        stock(model, folder).eval()
    except Exception as e:  # mlx-lm raises many kinds
        raise CheckpointError(
            f"The adapters in {folder} do not fit this model ({first_line(e)})."
        ) from e


def work(args: argparse.Namespace) -> int:
    """Do what the flags say; returns the exit code."""
    check_flags(args)
    options = sampling.from_args(args)
    points = checkpoint_options.from_args(
        args, bool(args.prompt_cache) and not args.prompt_cache_ro
    )
    chat = prompts.ChatOptions(
        template=not args.ignore_chat_template,
        default_template=args.use_default_chat_template,
        system=args.system_prompt,
        prefill=args.prefill_response,
        config=prompts.parse_template_config(args.chat_template_config),
    )
    given = [*args.prompt, *([] if args.prompt_flag is None else [args.prompt_flag])]
    many = args.prompts is not None
    texts = prompt_list.read(args, given) if many else [read_prompt(given, args.file)]
    note: Callable = (lambda line: None) if args.quiet else cli.say

    from . import loading
    from .prompt_cache import open_cache

    folder = loading.resolve_path(args.model)
    start = time.perf_counter()
    tokenizer = loading.load_tokenizer(folder)
    prompts.add_end_tokens(tokenizer, args.extra_eos_token)
    config = loading.read_config(folder)
    stored = open_cache(args, chat.active(tokenizer))
    tell = cli.once(note)
    requests = [prompts.plan(args, t, chat, tokenizer, config, tell, stored) for t in texts]
    draft = draft_flags.load_draft(args, tokenizer)
    model = loading.load_model(folder, args.dtype, check=args.check_weights)
    if args.adapter_path is not None:
        load_adapters(model, args.adapter_path)
    load_s = time.perf_counter() - start
    if many:
        base = requests[0].make_sequence(model, points, lambda line: None)
        return prompt_list.reply(args, options, tokenizer, base, requests, note)
    drafts, request = draft_flags.make(args, model, draft), requests[0]
    start = time.perf_counter()
    sequence = request.make_sequence(model, points, note, args.quantized_kv_start or 0)
    load_s += time.perf_counter() - start
    return reply(args, options, tokenizer, sequence, request, load_s, note, drafts)


def plan_memory(args: argparse.Namespace, sequence: Any, request: Any, note: Callable):
    """Say what a long prompt takes in memory.

    Raises:
        UsageError: Prompt and reply do not fit.
    """
    from .cache import cache_bytes
    from .config import is_hydra
    from .generation import prefill_step, reply_room
    from .machine import machine
    from .memory_plan import check, plan_of

    model = sequence.model
    if not is_hydra(model):
        return
    tokens, few = len(request.ids), None
    tokens += reply_room(tokens, request.max_tokens)
    if request.kv_bits is not None and not args.quantized_kv_start:
        bits = request.kv_bits
        few = (*(bits if isinstance(bits, tuple) else (bits, bits)), request.kv_group_size)
    points = sequence.checkpoints.most_bytes(model, tokens) if sequence.keeps_checkpoints else 0
    plan = plan_of(model, tokens, prefill_step(sequence, args.prefill_step_size), few, points)
    check(plan, machine(), len(request.ids) - request.kept, note, sum(cache_bytes(sequence.cache)))


def reply(
    args: argparse.Namespace,
    options: sampling.SamplingOptions,
    tokenizer: Any,
    sequence: Any,
    request: Any,
    load_s: float,
    note: Callable,
    drafts: Any = None,
) -> int:
    """Generate, print, save the prompt cache, print the figures; returns the exit code."""
    from .generation import stream_generate
    from .kv_cache import kv_format

    model = sequence.model
    if sampling.vocab_size(model) is not None:
        options.check_vocab(sampling.vocab_size(model))
    if not args.no_memory_plan:
        plan_memory(args, sequence, request, note)
    sampler, processors = options.make(tokenizer)
    seed = options.apply_seed()
    out, tokens = cli.Reply(), []
    rest = len(request.ids) - request.kept
    show = not args.quiet and rest > 512
    with cli.Interrupt() as interrupt, contextlib.ExitStack() as stack:
        bar = stack.enter_context(cli.progress("prompt", show, "tokens"))
        for part in stream_generate(
            model,
            tokenizer,
            request.ids,
            max_tokens=request.max_tokens,
            sampler=sampler,
            logits_processors=processors,
            prefill_step_size=args.prefill_step_size,
            stop=args.stop,
            progress=lambda done, total: bar("prompt", done, total),
            should_stop=lambda: interrupt() or out.broken,
            sequence=sequence,
            drafts=drafts,
            law=options.law(tokenizer),
        ):
            stack.close()
            if part.token is not None:
                tokens.append(part.token)
            out.write(part.text)
        timings = part.timings
        if tokens:
            out.write("\n")
        if part.finish_reason == "interrupt" and not out.broken:
            done = f"{timings.processed_tokens:,} of {count(rest, 'prompt token')}"
            note(f"Interrupted after {count(len(tokens), 'token') if tokens else done}.")
        if args.kv_bits and not any(map(kv_format, sequence.cache)):
            cli.say("--kv-bits had no effect: --quantized-kv-start was not reached.")
        if args.prompt_cache is not None and not args.prompt_cache_ro:
            n = request.save(
                args.prompt_cache,
                args.model or "the default model",
                model,
                tokenizer,
                sequence,
                tokens,
                args.prefill_response or "",
            )
            note(
                f"{args.prompt_cache} holds {count(n, 'token')}."
                if n
                else f"Nothing to save: {args.prompt_cache} is as it was."
            )
    if args.stats != "off":
        device, blas = stats.backend()
        weights = getattr(model, "load_report", None) and model.load_report.weights
        known = {"load_s": load_s, "device": device, "blas": blas, "weights": weights}
        timings = replace(timings, **known, seed=seed)
        cli.say(timings.as_json() if args.stats == "json" else timings.as_text())
    if out.broken:
        return cli.BROKEN_PIPE
    return cli.INTERRUPTED if timings.finish_reason == "interrupt" else 0


def main(argv: Sequence | None = None) -> int:
    """Entry point of `hydra-mlx generate` and `python -m hydra_mlx.generate`."""
    return cli.run(build_parser(), work, argv)


if __name__ == "__main__":
    sys.exit(main())
