"""What a program's flags say about checkpoints, and the checkpoints they make."""

from dataclasses import dataclass
from typing import Any

from . import cli
from .errors import UsageError

DEFAULT = "512MB"
FINEST = 256  # tokens; a finer grid would slow prefill


@dataclass(frozen=True)
class CheckpointOptions:
    """What --checkpoints and its companions ask for.

    Attributes:
        budget: Bytes; None leaves none in the file. asked: By a flag, not by default.
        dtype: Of kept states; None is the file's, or float32. every: Tokens between them.
    """

    budget: int | None = None
    asked: bool = False
    dtype: str | None = None
    every: int = 512

    def make(self, model: Any, old: Any, cache: list | None) -> Any:
        """Checkpoints for a sequence.

        Args:
            old: Of the file, or None. cache: Beside these.

        Raises:
            UsageError: The budget is too small, or the file's have another dtype.
        """
        from .sequence import make_checkpoints

        if old is not None and self.budget is None:
            return old  # to go back to in this run
        if old is not None and not self.asked and self.dtype in (None, old.dtype):
            return old
        if old is not None:
            if self.dtype not in (None, old.dtype):
                raise UsageError(
                    f"--checkpoint-dtype {self.dtype}, but the prompt cache has them as "
                    f"{old.dtype}.",
                    "Leave it out, or start anew with --prompt-cache-overwrite.",
                )
            points = make_checkpoints(model, self.budget, old.dtype, old.grid.every)
            points.resume(old.calls, old.furthest, old.held, cache)
            return points
        try:
            return make_checkpoints(model, self.budget, self.dtype or "float32", self.every)
        except UsageError as e:
            if self.asked:
                raise
            cli.say(f"No checkpoints are kept: {e.message}")
            return make_checkpoints(model, None)


def add_flags(group: Any):
    """--checkpoints and --checkpoint-dtype on an argparse group."""
    group.add_argument(
        "--checkpoints",
        type=budget,
        metavar="SIZE",
        help=f"memory for states to go back to, or off (default {DEFAULT})",
    )
    group.add_argument(
        "--checkpoint-dtype",
        choices=("float32", "bfloat16"),
        help="float32 goes back exactly (default); bfloat16 takes half",
    )


def budget(text: str) -> int:
    """Bytes of --checkpoints; 0 for "off".

    Raises:
        UsageError: Neither.
    """
    from .convert import parse_size

    if text == "off":
        return 0
    try:
        return parse_size(text)
    except UsageError:
        raise UsageError(
            f"--checkpoints is {text!r}, expected off, or a size of 1MB or more, such as {DEFAULT}."
        ) from None


def from_args(args: Any, wanted: bool = True) -> CheckpointOptions:
    """The options of parsed flags.

    Args:
        wanted: Whether there is any use for checkpoints in this run.

    Raises:
        UsageError: Flags that do nothing.
    """
    given, dtype = args.checkpoints, args.checkpoint_dtype
    if dtype is not None and given == 0:
        raise UsageError("--checkpoint-dtype has no effect with --checkpoints off.")
    if not wanted:
        return CheckpointOptions()
    step = getattr(args, "prefill_step_size", None)
    return CheckpointOptions(
        (budget(DEFAULT) if given is None else given) or None,
        given is not None,
        dtype,
        CheckpointOptions.every if step is None else max(step, FINEST),
    )
