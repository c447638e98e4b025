"""hydra-mlx serve: OpenAI's chat and completions API for one model, on this machine.

hydra-mlx serve --model DIR
curl localhost:8080/v1/chat/completions -H 'Content-Type: application/json' \\
  -d '{"messages": [{"role": "user", "content": "Hello"}]}'
"""

import argparse
import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import checkpoint_options, cli, prompts
from .errors import UsageError
from .generate import parse_bits
from .server_flags import check_flags, check_host, find_key, memory_size
from .text import count, size

LAST_WORDS_S = 5.0  # for replies that are broken off to say so

EPILOG = """\
What requests have read is kept in memory: a prompt that begins like an earlier one, is an edited
version of it, or asks something else about the same document is read from where it differs, and
usage tells the tokens that were reused as cached_tokens. Sequences that share a beginning share
its memory. --cache-memory bounds it; what was not used for longest is given up first.

Endpoints: /v1/chat/completions, /v1/completions, /v1/models, /health, /stats. Any model name is
taken, unless --alias says which. Ctrl-C ends the server.
"""


def build_parser() -> cli.Parser:
    """The flags; mlx_lm.server's names where it has one."""
    p = cli.parser("serve", __doc__, EPILOG)
    p.add_argument(
        "--model", metavar="PATH", help="folder or hub id (default: the small one in this package)"
    )
    p.add_argument("--adapter-path", metavar="DIR", help="adapters from mlx_lm.lora")
    p.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="of unquantised weights; auto keeps them, except float32 on a CPU",
    )
    net = p.add_argument_group("network")
    net.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    net.add_argument(
        "--port", type=cli.number(int, 0, 65535), default=8080, help="0 takes a free one (8080)"
    )
    net.add_argument(
        "--api-key",
        metavar="KEY",
        help="ask for it in every request; needed with a --host others can reach; also taken from "
        "the environment variable HYDRA_API_KEY, which ps does not show",
    )
    net.add_argument(
        "--alias",
        action="append",
        metavar="NAME",
        help="the only other name a client may call the model; repeatable (default: any name)",
    )
    net.add_argument(
        "--allowed-origins",
        type=lambda text: tuple(text.split(",")),
        default=(),
        metavar="URL,...",
        help="web pages that may use the server, * for all (default: none)",
    )
    net.add_argument(
        "--max-request", type=memory_size, default=32 << 20, metavar="SIZE", help="body (32MB)"
    )
    net.add_argument(
        "--timeout",
        type=cli.number(float, 1),
        default=60.0,
        metavar="S",
        help="for a client to send its request or take a part of the reply (60)",
    )
    memory = p.add_argument_group("memory")
    memory.add_argument(
        "--max-context", type=cli.number(int, 1), metavar="N", help="longest prompt and reply"
    )
    memory.add_argument(
        "--memory",
        type=memory_size,
        metavar="SIZE",
        help="for all but the weights (default: three quarters of what is free at the start)",
    )
    memory.add_argument(
        "--cache-memory",
        type=lambda text: 0 if text == "off" else memory_size(text),
        metavar="SIZE",
        help="for what earlier requests have read, or off (default: half of --memory)",
    )
    memory.add_argument("--kv-bits", type=parse_bits, metavar="N[,N]", help="as in generate")
    memory.add_argument("--kv-group-size", type=int, metavar="N", help="32, 64 or 128 (64)")
    memory.add_argument("--prefill-step-size", type=cli.number(int, 1), metavar="N",
        help="prompt tokens between two tokens of the other replies, at most (512)")  # fmt: skip
    memory.add_argument(
        "--checkpoints",
        type=checkpoint_options.budget,
        metavar="SIZE",
        help="of each request, for states to go back to, or off (default: what 16 of them take)",
    )
    memory.add_argument(
        "--checkpoint-dtype",
        choices=("float32", "bfloat16"),
        help="float32 goes back exactly (default); bfloat16 takes half",
    )
    work = p.add_argument_group("requests")
    work.add_argument(
        "--decode-concurrency", type=cli.number(int, 1), default=32, metavar="N",
        help="at work at once (32)",
    )  # fmt: skip
    work.add_argument(
        "--max-waiting", type=cli.number(int, 1), default=128, metavar="N",
        help="others; more are told to come later (128)",
    )  # fmt: skip
    work.add_argument("--max-tokens", "-m", type=cli.number(int, 1), default=512, metavar="N",
        help="of a reply whose client does not say (512)")  # fmt: skip
    work.add_argument("--temp", type=cli.number(float, 0), default=0.0, help="likewise (0)")
    work.add_argument("--top-p", type=cli.number(float, 0, 1), default=1.0, help="likewise (1)")
    work.add_argument("--top-k", type=cli.number(int, 0), default=0, help="likewise (0)")
    work.add_argument("--min-p", type=cli.number(float, 0, 1), default=0.0, help="likewise (0)")
    work.add_argument("--chat-template-args", metavar="JSON", help="variables for the template")
    work.add_argument(
        "--use-default-chat-template", action="store_true", help="ChatML, when there is none"
    )
    p.add_argument("--verbose", action="store_true", help="a line for each request")
    cli.add_common(p)
    for flags, reason in _REFUSED.items():
        p.add_argument(*flags.split(), action=cli.Refuse, reason=reason)
    return p


_REFUSED = {
    "--prompt-cache-size": "the cache is bounded in bytes: use --cache-memory SIZE.",
    "--prompt-cache-bytes": "use --cache-memory SIZE.",
    "--prompt-concurrency": "prompts take turns, a step each.",
    "--draft-model": "the server decodes without drafts.",
    "--num-draft-tokens": "the server decodes without drafts.",
    "--quantized-kv-start": "keys and values are quantised from the first token.",
    "--pipeline": "the server runs on one machine.",
    "--trust-remote-code": "no code of a model folder is ever run; leave it out.",
    "--log-level": "use --verbose or --quiet.",
    "--chat-template": "it comes with the model's tokenizer; see --use-default-chat-template.",
}


def work(args: argparse.Namespace) -> int:
    """Load, listen, serve until a signal; returns the exit code."""
    check_flags(args)
    key = find_key(args)
    local = check_host(args.host, key)
    note: Callable = (lambda line: None) if args.quiet else cli.say

    from . import loading
    from .server_listen import Server

    folder = loading.resolve_path(args.model)
    tokenizer = loading.load_tokenizer(folder)
    model = loading.load_model(folder, args.dtype)
    if args.adapter_path is not None:
        from .generate import load_adapters

        load_adapters(model, args.adapter_path)
    service, engine = make_service(args, model, tokenizer, folder, key, note)
    try:
        server = Server(args.host, args.port, service)
    except OSError as e:
        engine.stop()
        raise UsageError(
            f"{args.host}:{args.port} cannot be listened on ({e.strerror or e}).",
            "Take another --port; 0 takes a free one.",
        ) from None
    if not local:
        cli.say(
            f"warning: {args.host} can be reached by others. The key and all texts travel "
            "unencrypted; put a proxy with TLS before it."
        )
    host = f"[{args.host}]" if ":" in args.host else args.host
    note(f"{service.name} at http://{host}:{server.server_port}/v1 (Ctrl-C ends it)")
    return _serve(server, engine, note)


def make_service(
    args: argparse.Namespace, model: Any, tokenizer: Any, folder: Path, key: str | None, note: Any
) -> tuple:
    """(Service, its running Engine) of parsed flags.

    Raises:
        UsageError: Flags that this model cannot honour.
    """
    import mlx.core as mx
    from mlx_lm.server import get_system_fingerprint
    from mlx_lm.utils import maybe_set_recommended_wired_limit

    from .server_engine import Engine
    from .server_flags import make_memory, sequences
    from .server_http import Service
    from .server_job import Limits
    from .server_pool import Pool
    from .server_prompt import PromptMaker
    from .server_request import Defaults

    with contextlib.redirect_stdout(sys.stderr):
        maybe_set_recommended_wired_limit()
    fresh = sequences(args, model)
    memory = make_memory(args, model, fresh)
    room = memory.room
    cache = args.cache_memory
    if cache is None:
        cache = 2**32 if room is None else room // 2
    elif room is not None and cache > room:
        raise UsageError(
            f"--cache-memory is {size(cache)}, but there is room for {size(room)} in all.",
            "Lower it, or raise --memory.",
        )
    most = memory.most
    note(
        f"Room for {'any number of' if most is None else count(most, 'token')}"
        f"{' tokens' if most is None else ''} of context"
        f"{'' if room is None else f' in {size(room)}'}; up to {size(cache)} for what was read."
    )
    mx.clear_cache()
    mx.set_cache_limit(max(64 << 20, memory.step_bytes))  # free buffers count as much as others
    limits = Limits(
        args.decode_concurrency, args.max_waiting, args.prefill_step_size, args.max_tokens
    )
    engine = Engine(model, tokenizer, Pool(fresh, cache), memory, limits)
    config = prompts.parse_template_config(args.chat_template_args)
    service = Service(
        engine,
        PromptMaker(model, tokenizer, config, args.use_default_chat_template),
        tokenizer,
        folder.resolve().name,
        Defaults(args.max_tokens, args.temp, args.top_p, args.top_k, args.min_p),
        get_system_fingerprint(),
        None if args.alias is None else tuple(args.alias),
        key,
        args.allowed_origins,
        args.max_request,
        args.timeout,
        args.verbose,
    )
    return service, engine


def _serve(server: Any, engine: Any, note: Callable) -> int:
    over = threading.Event()
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, lambda *_: over.set())
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        while not over.wait(0.5):
            if not engine.healthy:
                raise RuntimeError("the engine has stopped")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        server.shutdown()
        server.server_close()
        engine.stop()
        server.finish(LAST_WORDS_S)
    note("Stopped.")
    return 0


def main(argv: Sequence | None = None) -> int:
    """Entry point of `hydra-mlx serve` and `python -m hydra_mlx.serve`."""
    return cli.run(build_parser(), work, argv)


if __name__ == "__main__":
    sys.exit(main())
