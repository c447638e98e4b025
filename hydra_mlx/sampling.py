"""Samplers and penalties: mlx-lm's, with ranges that are checked and a seed that is reported.

And which token ids a model knows, which biases and prompts must keep to.
"""

import json
import math
import secrets
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from .errors import UsageError

MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class SamplingOptions:
    """How the next token is chosen. The defaults are greedy, as mlx_lm.generate's are.

    Attributes:
        temp: 0 takes the most likely token; the five filters below need more than 0.
        top_p: Keep the likeliest tokens with this total probability, (0, 1]; 1 is off.
        min_p: Keep tokens of at least this share of the top probability, [0, 1]; 0 is off.
        min_tokens_to_keep: Tokens that min_p never removes.
        top_k: Keep this many tokens; 0 is off.
        xtc_probability, xtc_threshold: Exclude top choices: how often, [0, 1]; above which
            probability, [0, 0.5].
        repetition_penalty: Divides positive and multiplies negative logits of recent tokens.
        presence_penalty, frequency_penalty: Subtracted once, or once for each occurrence.
        ..._context_size: How many recent tokens (prompt included) the penalty looks at.
        logit_bias: {token id: number added to its logit}.
        seed: Same seed, same text; None takes a new one each time.

    Raises:
        UsageError: A value is out of range, or has no effect beside the others.
    """

    temp: float = 0.0
    top_p: float = 1.0
    min_p: float = 0.0
    min_tokens_to_keep: int = 1
    top_k: int = 0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    repetition_penalty: float | None = None
    repetition_context_size: int = 20
    presence_penalty: float | None = None
    presence_context_size: int = 20
    frequency_penalty: float | None = None
    frequency_context_size: int = 20
    logit_bias: dict | None = None
    seed: int | None = None

    def __post_init__(self):
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise UsageError(f"{flag(f.name)} is {value}, expected a finite number.")
        self._range("temp", self.temp >= 0, "0 or more")
        self._range("top_p", 0 < self.top_p <= 1, "above 0 and at most 1 (1 is off)")
        self._range("min_p", 0 <= self.min_p <= 1, "from 0 to 1")
        self._range("min_tokens_to_keep", self.min_tokens_to_keep >= 1, "1 or more")
        self._range("top_k", self.top_k >= 0, "0 or more (0 is off)")
        self._range("xtc_probability", 0 <= self.xtc_probability <= 1, "from 0 to 1")
        self._range("xtc_threshold", 0 <= self.xtc_threshold <= 0.5, "from 0 to 0.5")
        if self.repetition_penalty is not None:
            self._range("repetition_penalty", self.repetition_penalty > 0, "above 0 (1 is off)")
        if self.seed is not None:
            self._range("seed", 0 <= self.seed <= MAX_SEED, f"from 0 to {MAX_SEED}")
        self._check_effect()

    def _range(self, name: str, ok: bool, expected: str):
        if not ok:
            raise UsageError(f"{flag(name)} is {getattr(self, name)}, expected {expected}.")

    def _check_effect(self):
        if self.temp == 0:
            for name in ("top_p", "min_p", "top_k", "xtc_probability"):
                if getattr(self, name) != getattr(SamplingOptions, name):
                    raise UsageError(
                        f"{flag(name)} has no effect at --temp 0, which takes the likeliest token.",
                        "Add for example --temp 0.7.",
                    )
        pairs = [("min_tokens_to_keep", "min_p"), ("xtc_threshold", "xtc_probability")]
        for kind in ("repetition", "presence", "frequency"):
            name = f"{kind}_context_size"
            self._range(name, getattr(self, name) >= 1, "1 or more")
            pairs.append((name, f"{kind}_penalty"))
        for name, needs in pairs:
            if getattr(self, name) != getattr(SamplingOptions, name) and not getattr(self, needs):
                raise UsageError(f"{flag(name)} has no effect without {flag(needs)}.")

    def check_vocab(self, vocab_size: int):
        """Check what depends on the model.

        Raises:
            UsageError: top_k, min_tokens_to_keep or a token of logit_bias is beyond it.
        """
        for name in ("top_k", "min_tokens_to_keep"):
            self._range(name, getattr(self, name) < vocab_size, f"below {vocab_size}, its tokens")
        for token in self.logit_bias or ():
            if not 0 <= token < vocab_size:
                raise UsageError(
                    f"--logit-bias names token {token}; this model's go from 0 to {vocab_size - 1}."
                )

    def make(self, tokenizer: Any) -> tuple:
        """(sampler, logits processors) for stream_generate; never looks at the seed."""
        from mlx_lm.sample_utils import make_logits_processors, make_sampler

        sampler = make_sampler(
            self.temp,
            self.top_p,
            self.min_p,
            self.min_tokens_to_keep,
            top_k=self.top_k,
            xtc_probability=self.xtc_probability,
            xtc_threshold=self.xtc_threshold,
            xtc_special_tokens=self._kept(tokenizer),
        )
        processors = make_logits_processors(
            self.logit_bias,
            self.repetition_penalty,
            self.repetition_context_size,
            self.presence_penalty,
            self.presence_context_size,
            self.frequency_penalty,
            self.frequency_context_size,
        )
        return sampler, processors

    def _kept(self, tokenizer: Any) -> list:
        """Tokens that XTC never excludes."""
        return [*tokenizer.encode("\n", add_special_tokens=False), *tokenizer.eos_token_ids]

    def law(self, tokenizer: Any) -> Callable | None:
        """What the sampler of make() draws from, for drafts that are drawn themselves.

        Returns:
            log-probabilities [1, V] -> those of the draw [1, V], up to a constant; with XTC each
            call throws its die anew, as each draw does. None at temperature 0.
        """
        from mlx_lm import sample_utils as stock

        if self.temp == 0:
            return None
        kept, filters = self._kept(tokenizer), []  # in make_sampler's order
        if self.top_p < 1:
            filters.append(lambda x: stock.apply_top_p(x, self.top_p))
        if self.min_p:
            filters.append(lambda x: stock.apply_min_p(x, self.min_p, self.min_tokens_to_keep))
        if self.xtc_probability:
            xtc = self.xtc_probability, self.xtc_threshold
            filters.append(lambda x: stock.apply_xtc(x, *xtc, kept))
        if self.top_k:
            filters.append(lambda x: stock.apply_top_k(x, self.top_k))

        def law(logprobs):
            for apply in filters:
                logprobs = apply(logprobs)
            return logprobs * (1 / self.temp)

        return law

    def apply_seed(self) -> int | None:
        """Seed MLX's generator; returns the seed, so that a run can be repeated.

        Greedy runs draw nothing: their seed is the one asked for, or None.
        """
        import mlx.core as mx

        seed = self.seed
        if seed is None:
            if self.temp == 0:
                return None
            seed = secrets.randbelow(2**31)
        mx.random.seed(seed)
        return seed


def flag(name: str) -> str:
    """The flag of a field: top_p -> --top-p."""
    return "--" + name.replace("_", "-")


def parse_logit_bias(text: str) -> dict:
    """{"token id": number} as JSON -> {int: float}.

    Raises:
        UsageError: Not such an object.
    """
    try:
        bias = {int(k): float(v) for k, v in json.loads(text).items()}
        if not all(math.isfinite(v) for v in bias.values()):
            raise ValueError
        return bias
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise UsageError(
            f"--logit-bias is {text[:60]!r}, expected JSON.",
            "For example '{\"42\": -5}': a number for each token id.",
        ) from None


def add_flags(parser: Any):
    """The flags of SamplingOptions on an argparse parser."""
    group = parser.add_argument_group("sampling (greedy unless --temp is above 0)")
    helps = {
        "temp": "temperature; 0 takes the likeliest token",
        "top_p": "keep the likeliest tokens up to this total probability",
        "min_p": "keep tokens of at least this share of the top probability",
        "min_tokens_to_keep": "tokens that --min-p never removes",
        "top_k": "keep this many tokens",
        "xtc_probability": "how often the top choices are excluded",
        "xtc_threshold": "probability above which XTC excludes",
        "repetition_penalty": "factor against recent tokens, above 1 to avoid them",
        "repetition_context_size": "recent tokens it looks at",
        "presence_penalty": "subtracted from the logit of each recent token",
        "presence_context_size": "recent tokens it looks at",
        "frequency_penalty": "subtracted for each recent occurrence",
        "frequency_context_size": "recent tokens it looks at",
        "seed": "same seed, same text; --stats tells the one used",
    }
    whole = ("min_tokens_to_keep", "top_k", "seed")
    for name, text in helps.items():
        kind = int if name in whole or name.endswith("context_size") else float
        default = getattr(SamplingOptions, name)
        shown = "" if default is None else f" (default {default:g})"
        group.add_argument(flag(name), type=kind, default=default, metavar="N", help=text + shown)
    group.add_argument(
        "--logit-bias", metavar="JSON", help='numbers added to logits: {"token id": number}'
    )


def from_args(args: Any) -> SamplingOptions:
    """The options that parsed flags ask for.

    Raises:
        UsageError: See SamplingOptions and parse_logit_bias.
    """
    values = {f.name: getattr(args, f.name) for f in fields(SamplingOptions)}
    if values["logit_bias"] is not None:
        values["logit_bias"] = parse_logit_bias(values["logit_bias"])
    return SamplingOptions(**values)


def prompt_ids(model: Any, tokenizer: Any, prompt: Any) -> list:
    """Token ids of a prompt (text, a list of ids or an array [T]), each known to the model.

    Raises:
        UsageError: No token, not a flat list of whole numbers, or a number beyond the vocabulary.
    """
    import numpy as np

    if isinstance(prompt, str):
        bos = tokenizer.bos_token
        prompt = tokenizer.encode(
            prompt, add_special_tokens=bos is None or not prompt.startswith(bos)
        )
    ids = np.array(prompt)
    if ids.size == 0:
        raise UsageError("The prompt has no tokens.")
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise UsageError("The prompt must be text or a flat list of token ids.")
    vocab = vocab_size(model)
    worst = int(ids.max()) if vocab is None or ids.min() >= 0 else int(ids.min())
    if worst < 0 or (vocab is not None and worst >= vocab):
        raise UsageError(f"Token {worst} is not one of this model's {vocab} tokens.")
    return [int(i) for i in ids]


def vocab_size(model: Any) -> int | None:
    """V, or None for a model that does not say."""
    return getattr(getattr(model, "args", None), "vocab_size", None)
