"""Figures of one run, and how --stats prints them: lines for people, one JSON line for scripts."""

import json
from dataclasses import asdict, dataclass
from typing import Any

from . import blas, text
from .errors import UsageError


@dataclass(frozen=True)
class Timings:
    """Figures of one run. Times in seconds, sizes in bytes, None where nothing was measured.

    Attributes:
        prompt_tokens: Tokens of the whole prompt, cached ones included.
        cached_tokens: Those that a prompt cache held already and that were not computed again.
        processed_tokens: Those that went through the model in this run; less than the difference
            only after an interrupt.
        prompt_tps: processed_tokens a second, up to the first token of the reply.
        ttft_s: From the start of the work (after loading) to the first token of the reply.
        generated_tokens: Tokens of the reply, the end-of-text token included.
        generation_s, generation_tps: From the first token to the last, (generated_tokens - 1) of
            them a second.
        peak_memory_bytes: MLX's peak since the program began, loading included.
        kv_bytes, state_bytes: Keys and values; recurrent states and conv tails.
        kv: How keys and values are kept, in words.
        finish_reason: "stop", "length" or "interrupt".
        kernels: What the layers ran, in words; None for a model without kernels.
        passes, drafted_tokens, accepted_tokens: With drafts: passes of the model over the newest
            token and a draft, tokens guessed, and guessed rightly.
        load_s, device, blas, weights, seed: Filled in by the program, not by stream_generate.
    """

    prompt_tokens: int
    cached_tokens: int
    processed_tokens: int
    prompt_tps: float | None
    ttft_s: float | None
    generated_tokens: int
    generation_s: float | None
    generation_tps: float | None
    peak_memory_bytes: int
    kv_bytes: int
    state_bytes: int
    kv: str
    finish_reason: str
    kernels: str | None = None
    passes: int | None = None
    drafted_tokens: int | None = None
    accepted_tokens: int | None = None
    load_s: float | None = None
    device: str | None = None
    blas: str | None = None
    weights: str | None = None
    seed: int | None = None

    def as_json(self) -> str:
        """All fields as one line of JSON."""
        rounded = {k: round(v, 6) if isinstance(v, float) else v for k, v in asdict(self).items()}
        return json.dumps(rounded)

    def as_text(self) -> str:
        """A few lines for people."""
        wait = "-" if self.ttft_s is None else f"{self.ttft_s:.2f} s"
        cached = f" ({self.cached_tokens:,} cached)" if self.cached_tokens else ""
        lines = [
            f"prompt   {text.count(self.prompt_tokens, 'token')}{cached}, "
            f"{text.rate(self.prompt_tps)}, first token after {wait}",
            f"reply    {text.count(self.generated_tokens, 'token')}, "
            f"{text.rate(self.generation_tps)}, ended by {self.finish_reason}",
            f"memory   peak {text.size(self.peak_memory_bytes)}, keys and values "
            f"{text.size(self.kv_bytes)}, states {text.size(self.state_bytes)}",
            f"cache    {self.kv}",
        ]
        if self.passes is not None:
            each = (self.passes + self.accepted_tokens) / max(self.passes, 1)
            lines.append(
                f"drafts   {each:.2f} tokens a pass, {self.accepted_tokens:,} of "
                f"{text.count(self.drafted_tokens, 'guessed token')} right"
            )
        if self.kernels is not None:
            lines.append(f"kernels  {self.kernels}")
        if self.load_s is not None:
            where = ", ".join(x for x in (self.device, self.blas) if x)
            lines.append(f"model    loaded in {self.load_s:.2f} s; weights {self.weights}; {where}")
        if self.seed is not None:
            lines.append(f"seed     {self.seed}")
        return "\n".join(lines)


def backend() -> tuple:
    """(device in words, BLAS in words or None where a GPU computes)."""
    import mlx.core as mx

    if mx.default_device() == mx.Device(mx.cpu):
        return "cpu", blas.in_use()
    name = mx.device_info().get("device_name") or mx.device_info().get("architecture", "")
    return f"gpu {name}".strip(), None


def add_flags(parser: Any):
    """The output flags of a program that generates."""
    group = parser.add_argument_group("output")
    group.add_argument(
        "--stats", choices=("off", "text", "json"), help="figures on stderr (default off)"
    )
    group.add_argument("--quiet", action="store_true", help="no notes and no progress bar")
    group.add_argument(
        "--verbose",
        choices=("True", "T", "true", "t", "False", "F", "false", "f"),
        help="as in mlx_lm: True is --stats text, False is --quiet",
    )
    group.add_argument("--debug", action="store_true", help="show the traceback of an error")


def resolve(args: Any):
    """Turn --verbose into --stats and --quiet.

    Raises:
        UsageError: They contradict each other.
    """
    if args.verbose is not None:
        talk = args.verbose[0] in "Tt"
        if args.stats is not None or (talk and args.quiet):
            raise UsageError("--verbose contradicts --stats or --quiet.", "Leave --verbose out.")
        args.stats, args.quiet = ("text", args.quiet) if talk else ("off", True)
    args.stats = args.stats or "off"
