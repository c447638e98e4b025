"""hydra-mlx cache: read a document once, ask about it many times.

hydra-mlx cache read report.txt --model DIR --out report.safetensors
hydra-mlx generate --model DIR --prompt-cache report.safetensors --prompt-cache-ro "Why?"
hydra-mlx cache info report.safetensors
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import checkpoint_options, cli
from .errors import CacheError, HydraError, UsageError
from .generate import parse_bits
from .text import count, join, rate, read_file, read_stdin, size

READ_EPILOG = """\
With a chat template the document is the beginning of the first user turn, and whatever prompt
follows it with `generate --prompt-cache` ends that turn; without one the prompt must begin with the
document. Several files are joined with a blank line between.

Ctrl-C saves what was read and exits with 130; the same command goes on from there. When the
document has changed, --update reads it from the checkpoint before the first change.
"""


def build_parser() -> cli.Parser:
    """The flags of `cache read` and `cache info`."""
    p = cli.parser("cache", __doc__)
    sub = p.add_subparsers(dest="action", metavar="ACTION", required=True)
    about = "Read a document into a prompt cache file."
    _read_flags(sub.add_parser("read", description=about, epilog=READ_EPILOG, help=about))
    about = "What is in a prompt cache file."
    info = sub.add_parser("info", description=about, help=about)
    info.add_argument("cache", metavar="CACHE", help="a file that `cache read` or generate made")
    info.add_argument("--check", action="store_true", help="compare every byte with its checksum")
    info.add_argument("--json", action="store_true", help="all figures as one JSON line")
    info.add_argument("--debug", action="store_true", help="show tracebacks")
    return p


def _read_flags(p: argparse.ArgumentParser):
    p.add_argument("file", nargs="+", metavar="FILE", help="the document; - for stdin")
    p.add_argument("--out", required=True, metavar="CACHE", help="the file to make")
    p.add_argument(
        "--model",
        metavar="PATH",
        help="model folder or hub id (default: the small one in this package)",
    )
    p.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="as in generate; a file belongs to one dtype",
    )
    p.add_argument("--system-prompt", metavar="TEXT", help="instructions before the document")
    p.add_argument(
        "--ignore-chat-template", action="store_true", help="plain text, to be continued"
    )
    p.add_argument(
        "--use-default-chat-template", action="store_true", help="ChatML, when there is none"
    )
    p.add_argument("--chat-template-config", metavar="JSON", help="variables for the template")
    p.add_argument(
        "--kv-bits",
        type=parse_bits,
        metavar="N[,N]",
        help="quantise keys and values: 2, 3, 4, 5, 6 or 8 bits; 8,4 is 8 for keys, 4 for values",
    )
    p.add_argument("--kv-group-size", type=int, metavar="N", help="32, 64 or 128 (default 64)")
    checkpoint_options.add_flags(p)
    p.add_argument(
        "--prefill-step-size",
        type=cli.number(int, 1),
        metavar="N",
        help="tokens at a time, at most; smaller needs less memory (default 512)",
    )
    known = p.add_mutually_exclusive_group()
    known.add_argument("--update", action="store_true", help="keep what an older CACHE has of it")
    known.add_argument("--overwrite", action="store_true", help="ignore what is in an older CACHE")
    cli.add_common(p)


def document_text(files: Sequence) -> str:
    """The text of all files, "-" being stdin.

    Raises:
        UsageError: Unreadable, not UTF-8, empty, or stdin twice.
    """
    if list(files).count("-") > 1:
        raise UsageError("'-' is given twice, but stdin can be read only once.")
    text = ""
    for name in files:
        hint = "Give a text file in UTF-8, or - for stdin."
        text = join(
            text, read_stdin("document") if name == "-" else read_file(name, "document", hint)
        )
    if not text.strip():
        raise UsageError("The document is empty.", "Give a file with text in it.")
    return text


def lay_out(tokenizer: Any, document: str, chat: Any) -> tuple:
    """How a model reads a document to which a prompt will be added.

    Args:
        chat: prompts.ChatOptions.

    Returns:
        (text up to where the prompt begins, its token ids, messages or None for plain text).

    Raises:
        UsageError: The chat template fails, or does not show the document as it is.
    """
    from . import prompts
    from .conversation import open_text

    if not chat.active(tokenizer):
        bos = tokenizer.bos_token
        special = not (bos and document.startswith(bos))
        return document, prompts.encode(tokenizer, document, special), None
    system = [] if chat.system is None else [{"role": "system", "content": chat.system}]
    text = open_text(tokenizer, system, document, chat)
    messages = prompts.chat_messages(document, chat)
    return text, prompts.encode(tokenizer, text, False), messages


def read(args: argparse.Namespace) -> int:
    """`cache read`; returns the exit code."""
    try:
        return _read(args)
    except HydraError as e:  # the hints are those of generate, whose flag has a longer name
        hint = e.hint.replace("--prompt-cache-overwrite", "--overwrite")
        raise type(e)(e.message, hint) from e


def _read(args: argparse.Namespace) -> int:
    from . import loading, prompts
    from .prompt_cache import check_target, load_cache

    out = Path(args.out).expanduser()
    points = checkpoint_options.from_args(args)
    if args.kv_group_size is not None and args.kv_bits is None:
        raise UsageError("--kv-group-size has no effect without --kv-bits.")
    check_target(out)
    chat = prompts.ChatOptions(
        template=not args.ignore_chat_template,
        default_template=args.use_default_chat_template,
        system=args.system_prompt,
        config=prompts.parse_template_config(args.chat_template_config),
    )
    document = document_text(args.file)
    old = load_cache(out) if out.exists() and not args.overwrite else None
    folder = loading.resolve_path(args.model)
    tokenizer = loading.load_tokenizer(folder)
    text, ids, messages = lay_out(tokenizer, document, chat)
    _fits(old, ids, args)
    model = loading.load_model(folder, args.dtype)
    from .reading import Job

    label = args.model or "the default model"
    job = Job(model, label, ids, text, messages, args.kv_bits, args.kv_group_size or 64)
    note: Callable = (lambda line: None) if args.quiet else cli.say
    if old is not None and old.tokens == ids and not old.wanted:
        job.check(old)
        cli.say(f"{out} holds this document already, {count(len(ids), 'token')}.")
        return 0
    job.start(old, points)
    job.plan(out, args.prefill_step_size, note)
    if job.kept:
        note(f"{out} has {job.kept:,} of them; {len(ids) - job.kept:,} to read.")
    start = time.perf_counter()
    with cli.Interrupt() as interrupt:
        with cli.Meter("reading", args.quiet, unit="tokens") as meter:
            done = job.read(
                args.prefill_step_size, lambda n, all: meter("reading", n, all), interrupt
            )
        took = time.perf_counter() - start
        if done == 0:
            raise KeyboardInterrupt("Interrupted before anything was read; nothing was saved.")
        job.save(out, done)
    held = f"{out} holds {count(done, 'token')}, {size(out.stat().st_size)}"
    if done < len(ids):
        cli.say(f"Interrupted: {held}, of {len(ids):,}; the same command goes on from there.")
        return cli.INTERRUPTED
    note(f"{held}; {rate((done - job.kept) / took if took else None)}.")
    return 0


def _fits(old: Any, ids: list, args: argparse.Namespace):
    """Whether an older file can be gone on from.

    Raises:
        CacheError: It holds something else, and no flag says what to do with it.
    """
    from .rollback import common_prefix

    if old is None:
        return
    same, held = common_prefix(ids, old.tokens), len(old.tokens)
    if same < held and not args.update:
        raise CacheError(
            f"{old.path} holds another document: {same:,} of its {count(held, 'token')} are "
            "the beginning of this one.",
            "Add --update to keep those, --overwrite to start anew, or take another file.",
        )


def info(args: argparse.Namespace) -> int:
    """`cache info`; returns the exit code."""
    from .cache_info import read_info

    found = read_info(Path(args.cache), args.check)
    print(found.as_json() if args.json else found.as_text())
    return 0


def main(argv: Sequence | None = None) -> int:
    """Entry point of `hydra-mlx cache`."""
    actions = {"read": read, "info": info}
    return cli.run(build_parser(), lambda args: actions[args.action](args), argv)


if __name__ == "__main__":
    sys.exit(main())
