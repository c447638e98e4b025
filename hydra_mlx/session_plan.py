"""What a reply is asked to be, and whether there is room for it: tokens, and memory."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .cache import cache_bytes
from .config import is_hydra
from .errors import UsageError
from .generation import REPLY_ROOM, prefill_step
from .kv_cache import kv_format
from .machine import machine
from .memory_plan import check, plan_of
from .sequence import CachedSequence
from .text import count


@dataclass(frozen=True)
class How:
    """How replies are made; fields as in stream_generate.

    Attributes:
        max_context: Tokens that conversation and reply may have; None is no limit.
        drafts, law: For speculative decoding.
    """

    max_tokens: int = -1
    sampler: Callable | None = None
    processors: Sequence = ()
    stop: Sequence = ()
    max_context: int | None = None
    drafts: Any = None
    law: Callable | None = None


@dataclass(frozen=True)
class Size:
    """What a conversation takes: tokens, and bytes of the cache beside them.

    Attributes:
        tokens: Of the conversation. kv, state: Bytes of keys and values, of states and conv tails.
        checkpoints: How many there are. checkpoint_bytes: What they take.
    """

    tokens: int
    kv: int
    state: int
    checkpoints: int
    checkpoint_bytes: int


def fit_context(tokens: int, max_tokens: int, max_context: int | None) -> int:
    """max_tokens, as far as there is room after so many tokens.

    Raises:
        UsageError: There is no room for a reply.
    """
    if max_context is None:
        return max_tokens
    room = max_context - tokens
    if room < 1:
        raise UsageError(
            f"The context is full: with this the conversation has {count(tokens, 'token')}, the "
            f"limit is {max_context:,}.",
            "Take something back with /undo, begin anew with /clear, or /set max-context.",
        )
    return room if max_tokens == -1 else min(max_tokens, room)


def fit_memory(
    sequence: CachedSequence, ids: list, max_tokens: int, step: int | None, note: Callable
):
    """Say what a long prompt takes, and refuse one that does not fit.

    Args:
        ids: All that is to be in the cache before the reply. step, note: As in Session.

    Raises:
        UsageError: It does not fit; the hint has what would.
    """
    model = sequence.model
    if not is_hydra(model):
        return
    tokens = len(ids) + (REPLY_ROOM if max_tokens == -1 else min(max_tokens, REPLY_ROOM))
    few = next((f for f in map(kv_format, sequence.cache) if f is not None), None)
    points = sequence.checkpoints.most_bytes(model, tokens) if sequence.keeps_checkpoints else 0
    plan = plan_of(model, tokens, prefill_step(sequence, step), few, points)
    to_read = len(ids) - sequence.keepable(ids)
    check(plan, machine(), to_read, note, sum(cache_bytes(sequence.cache)))
