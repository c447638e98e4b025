"""What a request will take in memory, and whether there is room for it: said before it is read."""

from dataclasses import dataclass
from typing import Any

from .cache import state_bytes
from .checkpoints import Checkpoints
from .kv_cache import STEP
from .memory_plan import plan_of
from .server_fields import ApiError
from .text import size

SHORT = 1024  # tokens up to which the lengths of rows in a batch do not matter


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
        if tokens * self.token_bytes >= self.alone:
            return True
        return self.room is not None and self._rows(tokens, False) > self.room // 4

    def needs(self, tokens: int, solo: bool | None = None) -> int:
        """Bytes of a request of so many tokens, prompt and reply.

        Args:
            solo: Whether it is decoded alone; None: as solo() has it.
        """
        rows = self._rows(tokens, self.solo(tokens) if solo is None else solo)
        kept = min(self.points, tokens // self.every + 1)
        return rows + self.fixed + kept * self.point_bytes

    def _rows(self, tokens: int, solo: bool) -> int:
        """Bytes of keys and values; in a batch with padding, and a copy while others join."""
        rows = tokens if solo else 2 * max(2 * tokens, tokens + SHORT)
        return int(-(-rows // STEP) * STEP * self.token_bytes)

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
        while self.needs(high, True) <= self.room and high < 2**40:
            high *= 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.needs(middle, True) <= self.room else (low, middle)
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
    return Memory(
        free=free,
        step_bytes=plan.working,
        token_bytes=plan.token_bytes,
        fixed=4 * state,
        point_bytes=one,
        points=points.grid.most + points.marks,
        every=points.grid.every,
        max_context=max_context,
        alone=plan.weights,
    )
