"""The flags of hydra-mlx chat."""

import argparse

from . import chat_settings, checkpoint_options, cli
from .chat_input import KINDS
from .errors import UsageError
from .generate import parse_bits

EPILOG = """\
@FILE ...: text files that the first message begins with, as with /read.

--session FILE: a conversation that is opened if it is there, and written there on leaving. It holds
  the conversation and what the model has read, so a long document is not read again. Files of
  `cache read` and of `generate --prompt-cache` open too.

At the prompt: /help lists the commands. Ctrl-C ends a reply, which stays as far as it went; at an
empty prompt it ends the chat (exit code 130). Ctrl-D leaves. A pipe can be the input too: each line
is a message or a command, replies go to stdout, and the first error ends it with exit code 2.
"""


def build_parser(about: str) -> cli.Parser:
    """The flags; generate's names where it has one."""
    p = cli.parser("chat", about, EPILOG)
    p.add_argument("file", nargs="*", metavar="@FILE", help="text files to begin with")
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
        help="as in generate; a session belongs to one dtype",
    )
    p.add_argument("--session", metavar="FILE", help="open it if it is there, write it on leaving")
    p.add_argument("--system-prompt", metavar="TEXT", help="instructions before the conversation")
    p.add_argument(
        "--use-default-chat-template", action="store_true", help="ChatML, when there is none"
    )
    p.add_argument("--chat-template-config", metavar="JSON", help="variables for the template")
    p.add_argument(
        "--extra-eos-token",
        action="append",
        default=[],
        metavar="TOKEN",
        help="a token that ends the reply too; repeatable",
    )
    chat_settings.add_flags(p)
    cache = p.add_argument_group("cache")
    cache.add_argument(
        "--kv-bits", type=parse_bits, metavar="N[,N]", help="quantise keys and values, as generate"
    )
    cache.add_argument("--kv-group-size", type=int, metavar="N", help="32, 64 or 128 (default 64)")
    cache.add_argument(
        "--prefill-step-size",
        type=cli.number(int, 1),
        metavar="N",
        help="tokens read at a time, at most (default 512, or 2048 without checkpoints)",
    )
    checkpoint_options.add_flags(cache)
    screen = p.add_argument_group("terminal")
    screen.add_argument(
        "--input", choices=KINDS, help="how lines are edited (default: the best that is there)"
    )
    screen.add_argument(
        "--history", metavar="FILE", help="earlier lines, or off (default: in the cache folder)"
    )
    cli.add_common(p)
    return p


def check_flags(args: argparse.Namespace):
    """Flags that would do nothing.

    Raises:
        UsageError: The first such flag.
    """
    if args.kv_group_size is not None and args.kv_bits is None:
        raise UsageError("--kv-group-size has no effect without --kv-bits.")
    for name in args.file:
        if not name.startswith("@") or len(name) < 2:
            raise UsageError(
                f"{name!r}: expected @FILE.",
                'Messages are typed at the prompt; for one answer: hydra-mlx generate "..."',
            )
