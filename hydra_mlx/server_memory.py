"""What a request will take in memory, and whether there is room for it: said before it is read."""

from dataclasses import dataclass
from typing import Any

from .cache import state_bytes
from .checkpoints import Checkpoints
from .kv_cache import STEP
from .memory_plan import plan_of
from .server_fields import ApiError
from .text import size

BATCH = 4  # of a row in a batch: padding to twice its length, and a copy while others join


@dataclass
class Memory:
    """Bytes of a request, from what the model is.

    Attributes:
        free: For sequences, the weights loaded; None where nobody knows. step_bytes: Of a step.
        token_bytes: Of keys and values of a token. fixed: Of states, at any length.
        point_bytes: Of a checkpoint. points: Kept at most. every: Tokens between them.
        max_context: Tokens of prompt and reply; None is no limit but memory.
        alone: Rows of so many bytes are not put into a batch.
    """

    free: int | None
    step_bytes: int
    token_bytes: float
    fixed: int
    point_bytes: int
    points: int
    every: int
    max_context: int | None
    alone: int

    def solo(self, tokens: int) -> bool:
        """Whether a reply that ends at so many tokens is decoded alone."""
        return tokens * self.token_bytes >= self.alone

    def needs(self, tokens: int) -> int:
        """Bytes of a request of so many tokens, prompt and reply."""
        rows = -(-tokens // STEP) * STEP * self.token_bytes * (1 if self.solo(tokens) else BATCH)
        kept = min(self.points, tokens // self.every + 1)
        return int(rows) + self.fixed + kept * self.point_bytes

    @property
    def room(self) -> int | None:
        """Bytes that requests and sequences at rest may take together."""
        return None if self.free is None else max(0, self.free - self.step_bytes)

    @property
    def most(self) -> int | None:
        """Tokens of the longest request; None is no limit."""
        if self.room is None:
            return self.max_context
        low, high = 0, 1
        while self.needs(high) <= self.room and high < 2**40:
            high *= 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.needs(middle) <= self.room else (low, middle)
        return low if self.max_context is None else min(low, self.max_context)

    def reply_room(self, prompt: int, asked: int | None, default: int) -> int:
        """Tokens that the reply may have.

        Args:
            asked: By the client; None takes the default, or what is left.

        Raises:
            ApiError: Prompt and reply do not fit; code context_length_exceeded.
        """
        most = self.most
        if most is None:
            return default if asked is None else asked
        if prompt + (asked or 1) <= most:
            return min(default, most - prompt) if asked is None else asked
        wanted = (
            f"{prompt + (asked or 1)} tokens ({prompt} in the prompt, {asked or 1} in the reply)"
        )
        limit = f"This server's maximum context length is {most} tokens"
        if most != self.max_context:
            limit += f", for which {size(self.room)} of memory are enough"
        raise ApiError(
            400,
            f"{limit}. However, you requested {wanted}. Shorten the prompt or lower max_tokens.",
            "context_length_exceeded",
            "messages",
        )


def memory_of(
    model: Any,
    free: int | None,
    step: int,
    points: Checkpoints,
    few: tuple | None,
    max_context: int | None,
) -> Memory:
    """The Memory of a HydraHead model.

    Args:
        free: See Memory. step: Tokens of a prefill call. points: As every sequence has them.
        few: kv_format of its cache.
    """
    plan = plan_of(model, step, step, few)
    itemsize = plan.itemsize
    state = state_bytes(model.args, itemsize)
    tails = state - state_bytes(model.args, 0)
    one = (state - tails) * (2 if points.dtype == "bfloat16" else 4) // 4 + tails
    alone = plan.weights if few is None else 0  # few bits have no batch
    return Memory(
        free=free,
        step_bytes=plan.working,
        token_bytes=plan.token_bytes,
        fixed=4 * state,
        point_bytes=one,
        points=points.grid.most + points.marks,
        every=points.grid.every,
        max_context=max_context,
        alone=alone,
    )
