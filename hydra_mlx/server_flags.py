"""What serve's flags come to: memory, and the sequences every request begins with."""

import argparse
import ipaddress
import os
import socket
from collections.abc import Callable
from typing import Any

from .checkpoint_options import CheckpointOptions, budget
from .errors import UsageError
from .text import size

POINTS = 16  # checkpoints of a sequence, unless --checkpoints says how much memory they may take

SHARE = (
    0.75  # of free memory that the server takes, unless --memory says more: others live there too
)


def memory_size(text: str) -> int:
    """Bytes of "500MB" or "2GiB"; an argparse type."""
    from .convert import parse_size

    try:
        return parse_size(text)
    except UsageError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a size of 1MB or more, such as 2GB"
        ) from None


def check_flags(args: argparse.Namespace):
    """Flags that contradict each other or would do nothing.

    Raises:
        UsageError: The first such flag.
    """
    if args.quiet and args.verbose:
        raise UsageError("--quiet and --verbose exclude each other.")
    if args.kv_group_size is not None and args.kv_bits is None:
        raise UsageError("--kv-group-size has no effect without --kv-bits.")
    if args.checkpoint_dtype is not None and args.checkpoints == 0:
        raise UsageError("--checkpoint-dtype has no effect with --checkpoints off.")
    if args.alias is not None and not all(args.alias):
        raise UsageError("--alias is empty, expected a name.")
    if args.temp == 0:
        for name in ("top_p", "top_k", "min_p"):
            if getattr(args, name) not in (0, 1.0):
                raise UsageError(f"--{name.replace('_', '-')} has no effect without --temp.")


def find_key(args: argparse.Namespace) -> str | None:
    """--api-key, or what the environment has; None for neither.

    Raises:
        UsageError: It cannot be sent in a header.
    """
    key, name = args.api_key, "--api-key"
    if key is None:
        key, name = os.environ.get("HYDRA_API_KEY") or None, "HYDRA_API_KEY"
    if key is not None and not (key.isascii() and key.isprintable() and key == key.strip() != ""):
        raise UsageError(f"{name} is empty or has blanks around it or odd characters.")
    return key


def check_host(host: str, key: str | None) -> bool:
    """Whether only this machine can reach it.

    Raises:
        UsageError: It cannot be listened on, or others can reach it and there is no key.
    """
    try:
        found = {a[4][0] for a in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    except (OSError, UnicodeError):
        raise UsageError(f"--host {host!r} is not an address of this machine.") from None
    local = all(ipaddress.ip_address(a.split("%")[0]).is_loopback for a in found)
    if not local and key is None:
        raise UsageError(
            f"--host {host} can be reached by others, which needs --api-key.",
            "Add --api-key KEY, or leave --host out.",
        )
    return local


def sequences(args: argparse.Namespace, model: Any) -> Callable:
    """What makes an empty sequence, with its checkpoints.

    Raises:
        UsageError: kv-bits or checkpoints that cannot be had, or a model that cannot go back.
    """
    from .checkpoints import checkpoint_bytes
    from .config import is_hydra
    from .generation import make_sequence

    dtype, memory = args.checkpoint_dtype or "float32", args.checkpoints
    hydra = is_hydra(model)
    if memory is None and hydra:
        itemsize = model.model.norm.weight.dtype.size
        memory = (POINTS + 2) * checkpoint_bytes(model.args, "float32", itemsize)
    elif memory is None:
        memory = budget("512MB")
    every = max(CheckpointOptions.every, args.prefill_step_size or 0)
    options = CheckpointOptions(memory or None, True, dtype, every)
    group = args.kv_group_size or 64

    def fresh() -> Any:
        points = options.make(model, None, None)
        return make_sequence(model, None, (), points, args.kv_bits, group)

    why = fresh().obstacle
    if why:
        raise UsageError(
            f"This model keeps {why}, which cannot go back; the server needs that.",
            "mlx_lm.server serves it without.",
        )
    return fresh


def make_memory(args: argparse.Namespace, model: Any, fresh: Callable) -> Any:
    """The Memory that flags and machine allow.

    Raises:
        UsageError: Not even a short request fits.
    """
    from .config import is_hydra
    from .kv_cache import kv_format
    from .machine import machine
    from .server_memory import Memory, memory_of

    sequence = fresh()
    few = next(filter(None, map(kv_format, sequence.cache)), None)
    if not is_hydra(model):
        if args.memory is not None:
            raise UsageError(
                "--memory needs a HydraHead model: what another takes is not known.",
                "Use --max-context and --cache-memory.",
            )
        return Memory(None, 0, 0.0, 0, 0, 0, 1, args.max_context, 0 if few else 1)
    there = machine()
    free = there.free if there else None
    share = None if free is None else int(free * SHARE)
    if args.memory is not None:
        if free is not None and args.memory > free:
            raise UsageError(f"--memory is {size(args.memory)}, but {size(free)} {there.what}.")
        share = args.memory
    step = args.prefill_step_size or sequence.checkpoints.grid.every
    step = min(step, 2048)
    memory = memory_of(model, share, step, sequence.checkpoints, few, args.max_context)
    if memory.most == 0:
        raise UsageError(
            f"{size(share)} are not enough: a step takes {size(memory.step_bytes)}, a short "
            f"request {size(memory.needs(1))}.",
            "Raise --memory, or lower --prefill-step-size or --checkpoints.",
        )
    return memory
