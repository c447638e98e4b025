"""hydra-mlx chat: a conversation in the terminal.

hydra-mlx chat --model DIR @report.txt
hydra-mlx chat --session talk.safetensors
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import (
    chat_commands,
    chat_flags,
    chat_input,
    checkpoint_options,
    cli,
    draft_flags,
    prompts,
)
from .chat_settings import Settings
from .errors import UsageError


def build_parser() -> cli.Parser:
    """The flags."""
    return chat_flags.build_parser(__doc__)


def reader(args: argparse.Namespace, interactive: bool) -> tuple:
    """(what reads lines, what to tell about it)."""
    from .files import user_cache_dir

    kind, about = chat_input.choose(args.input, interactive and sys.stdout.isatty())
    names = list(chat_commands.COMMANDS)
    if args.history is not None:
        history = None if args.history == "off" else Path(args.history).expanduser()
        return chat_input.make(kind, interactive, history, names), about
    try:
        return chat_input.make(kind, interactive, user_cache_dir() / "chat-history", names), about
    except UsageError as e:  # a home that cannot be written is no reason not to talk
        return chat_input.make(kind, interactive, None, names), f"{e.message} {about}".rstrip()


def load(args: argparse.Namespace, options: prompts.ChatOptions) -> tuple:
    """(model, draft model or None, an empty conversation, tokens the model is made for or None).

    Raises:
        HydraError: The model cannot be loaded, or has no chat template.
    """
    from . import loading
    from .conversation import Conversation
    from .generate import load_adapters

    folder = loading.resolve_path(args.model)
    tokenizer = loading.load_tokenizer(folder)
    prompts.add_end_tokens(tokenizer, args.extra_eos_token)
    talk = Conversation(tokenizer, options)
    draft = draft_flags.load_draft(args, tokenizer)
    model = loading.load_model(folder, args.dtype)
    if args.adapter_path is not None:
        load_adapters(model, args.adapter_path)
    limit = loading.read_config(folder).get("max_position_embeddings")
    return model, draft, talk, limit if isinstance(limit, int) else None


def start(args: argparse.Namespace, interactive: bool) -> Any:
    """The Chat that the flags ask for.

    Raises:
        HydraError: They cannot be honoured.
    """
    chat_flags.check_flags(args)
    Settings(args)  # before the model is loaded
    points = checkpoint_options.from_args(args)
    options = prompts.ChatOptions(
        default_template=args.use_default_chat_template,
        system=args.system_prompt,
        config=prompts.parse_template_config(args.chat_template_config),
    )
    file = None if args.session is None else Path(args.session).expanduser()
    if file is not None:
        cli.check_target(file)
    lines, about = reader(args, interactive)

    from .chat_loop import Chat
    from .generation import make_sequence
    from .session import Session
    from .session_file import open_session

    model, draft, talk, limit = load(args, options)
    settings = Settings(args, model, draft)
    kv = (args.kv_bits, args.kv_group_size or 64)

    def opener(path: Path, chat: prompts.ChatOptions) -> Session:
        return open_session(path, model, talk.tokenizer, chat, points, *kv, args.prefill_step_size)

    if file is not None and file.exists():
        session = opener(file, options)
    else:
        sequence = make_sequence(model, None, (), points.make(model, None, None), *kv)
        session = Session(sequence, talk, args.prefill_step_size)
    label = args.model or "the default model"
    chat = Chat(session, settings, lines, lambda p: opener(p, replace(options, system=None)), label)
    chat.interactive, chat.quiet, chat.debug = interactive, args.quiet, args.debug
    chat.limit = limit
    chat.begin(file, about)
    return chat


def work(args: argparse.Namespace) -> int:
    """Do what the flags say; returns the exit code."""
    if sys.stdin is None or sys.stdin.closed:
        raise UsageError("stdin is closed: there is nobody to talk to.")
    chat = start(args, sys.stdin.isatty())
    for name in args.file:
        with cli.Interrupt() as chat.interrupt:
            chat.read(Path(name[1:]).expanduser())
    return chat.run()


def main(argv: Sequence | None = None) -> int:
    """Entry point of `hydra-mlx chat` and `python -m hydra_mlx.chat`."""
    return cli.run(build_parser(), work, argv)


if __name__ == "__main__":
    sys.exit(main())
