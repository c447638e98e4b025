"""The flags of speculative decoding, for programs that generate."""

from typing import Any

from .errors import UsageError

MOST = 7  # tokens of a draft, as drafts.MOST
WITH_MODEL = 3  # by default, as in mlx_lm
HALF = 0.5  # of the model's weights: from there on even good guesses gain nothing


def add_flags(parser: Any):
    """--prompt-lookup, --draft-model, --num-draft-tokens."""
    group = parser.add_argument_group("speed (the reply stays what it is)")
    group.add_argument(
        "--prompt-lookup",
        action="store_true",
        help="guess the next tokens from the text so far: for quoting, editing, code",
    )
    group.add_argument(
        "--draft-model",
        metavar="PATH",
        help="guess them with a smaller model that has the same tokenizer",
    )
    group.add_argument(
        "--num-draft-tokens",
        type=int,
        metavar="N",
        help=f"tokens guessed at a time at most, 1 to {MOST} (default {WITH_MODEL} with a draft "
        f"model, else {MOST}); fewer while guesses are wrong",
    )


def check(args: Any):
    """Flags that contradict each other or would do nothing.

    Raises:
        UsageError: The first such flag.
    """
    if args.prompt_lookup and args.draft_model is not None:
        raise UsageError("--prompt-lookup and --draft-model exclude each other.")
    n = args.num_draft_tokens
    if n is not None:
        if not (args.prompt_lookup or args.draft_model is not None):
            raise UsageError(
                "--num-draft-tokens has no effect without --draft-model or --prompt-lookup."
            )
        if not 1 <= n <= MOST:
            raise UsageError(f"--num-draft-tokens is {n}, expected 1 to {MOST}.")


def load_draft(args: Any, tokenizer: Any) -> Any:
    """The draft model, or None; before the model itself is loaded, which takes longer.

    Raises:
        UsageError: Another tokenizer. HydraError: It cannot be loaded.
    """
    if args.draft_model is None:
        return None
    from . import loading
    from .drafts import check_tokenizers

    folder = loading.resolve_path(args.draft_model)
    check_tokenizers(tokenizer, loading.load_tokenizer(folder))
    return loading.load_model(folder, args.dtype)


def make(args: Any, model: Any, draft: Any) -> Any:
    """What stream_generate takes as drafts; None without these flags.

    Args:
        draft: From load_draft.

    Raises:
        UsageError: The draft model's cache cannot take tokens back, or it is not small.
    """
    from .drafts import LookupDrafts, ModelDrafts, step_cost
    from .sequence import CachedSequence

    n = args.num_draft_tokens
    if args.prompt_lookup:
        return LookupDrafts(n or MOST)
    if draft is None:
        return None
    cost = step_cost(model, draft)
    if cost > HALF:
        raise UsageError(
            f"The draft model's weights take {cost:.0%} of the model's: it would slow it down.",
            "Take a draft model of less than half the size, or --prompt-lookup.",
        )
    return ModelDrafts(CachedSequence(draft), n or WITH_MODEL, cost)
