"""The reply, token by token: a CachedSequence's, with stop strings and checked arguments.

However stream_generate ends, the cache holds the prompt and the tokens yielded, no more; after an
interrupt during the prompt its first Timings.processed_tokens tokens.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.generate import generation_stream, wired_limit
from mlx_lm.models.cache import KVCache, QuantizedKVCache, make_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper

from . import cache as caches
from .checkpoints import Checkpoints
from .config import is_hydra
from .errors import UsageError
from .kv_cache import BITS, GROUP_SIZES, HydraKVCache, in_words, kv_format
from .layer_kernels import summary
from .sampling import prompt_ids
from .sequence import CachedSequence
from .stats import Timings
from .text import StopMatcher

# Tokens of a reply that room is made for before it begins; a quarter of a longer prompt.
REPLY_ROOM = 1024
PREFILL_STEP = 2048


@dataclass(frozen=True)
class Part:
    """One step of a reply.

    Attributes:
        text: What can be printed now; may be empty while a character or stop string is open.
        token: The token of this step; None on a last part that brings no token of its own.
        finish_reason: None, and on the last part "stop", "length" or "interrupt".
        timings: On the last part.
    """

    text: str
    token: int | None
    finish_reason: str | None = None
    timings: Timings | None = None


def stream_generate(
    model: Any,
    tokenizer: Any,
    prompt: str | Sequence | mx.array,
    max_tokens: int = 256,
    sampler: Callable | None = None,
    logits_processors: list | None = None,
    prompt_cache: list | None = None,
    prefill_step_size: int | None = None,
    kv_bits: int | tuple | None = None,
    kv_group_size: int = 64,
    quantized_kv_start: int = 0,
    stop: Sequence = (),
    progress: Callable | None = None,
    should_stop: Callable | None = None,
    cached_tokens: Sequence = (),
    sequence: CachedSequence | None = None,
    drafts: Any = None,
    law: Callable | None = None,
) -> Iterator[Part]:
    """Generate a reply; yields a Part for each token.

    Args:
        model, tokenizer: From hydra_mlx.load.
        prompt: Text, or token ids [T]. What prompt_cache holds already is not repeated in it.
        max_tokens: 0 only reads the prompt into the cache, -1 goes on until the model stops.
        sampler: log-probabilities [1, V] -> token [1]; None takes the likeliest.
        logits_processors: Each (tokens [T], logits [1, V]) -> logits.
        prompt_cache: From model.make_cache(), extended in place; None makes one.
        prefill_step_size: Prompt tokens that go through the model at once, at most; None is 2048,
            or what lies between a sequence's checkpoints.
        kv_bits: 2, 3, 4, 5, 6 or 8 quantises keys and values, in groups of kv_group_size, once the
            cache holds quantized_kv_start tokens; (8, 4) is 8 for keys and 4 for values.
        stop: The reply ends before the first of these strings.
        progress: Called with (prompt tokens done, all) after each prefill step.
        should_stop: Asked between prefill steps and between tokens; True ends the reply.
        cached_tokens: Ids of what prompt_cache holds, for penalties that look back.
        sequence: Instead of prompt_cache: the prompt is then the whole one, of which the sequence
            keeps what it can, going back as far as needed.
        drafts: LookupDrafts or ModelDrafts for speculative decoding (speculative.py); processors
            must then depend on their arguments alone. law: SamplingOptions.law, with ModelDrafts.

    Raises:
        UsageError: At once, for arguments that cannot be honoured.
    """
    if not isinstance(tokenizer, TokenizerWrapper):
        tokenizer = TokenizerWrapper(tokenizer)
    if max_tokens < -1:
        raise UsageError(f"max_tokens is {max_tokens}, expected 0 or more, or -1 for no limit.")
    if prefill_step_size is not None and prefill_step_size < 1:
        raise UsageError(f"prefill_step_size is {prefill_step_size}, expected 1 or more.")
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if "" in stops:
        raise UsageError("A stop string is empty, which would end every reply at once.")
    ids = prompt_ids(model, tokenizer, prompt)
    whole = sequence is not None
    if sequence is None:
        sequence = make_sequence(
            model, prompt_cache, cached_tokens, None, kv_bits, kv_group_size, quantized_kv_start
        )
    elif prompt_cache is not None or len(cached_tokens) or kv_bits is not None:
        raise UsageError("A sequence has a cache, its tokens and its kv-bits: give no others.")
    elif sequence.model is not model:
        raise UsageError("The sequence belongs to another model.")
    step = prefill_step(sequence, prefill_step_size)
    run = _Run(sequence, ids, whole, tokenizer, StopMatcher(stops), progress, should_stop)
    run.drafts = drafts

    def reply(rest: list) -> Iterator[int]:
        return sequence.generate(
            rest,
            max_tokens,
            sampler,
            logits_processors,
            step,
            run.between,
            run.should_stop,
            drafts,
            law,
        )

    return run.parts(reply, max_tokens)


def make_sequence(
    model: Any,
    cache: list | None = None,
    tokens: Sequence = (),
    checkpoints: Checkpoints | None = None,
    kv_bits: int | tuple | None = None,
    kv_group_size: int = 64,
    quantized_kv_start: int = 0,
) -> CachedSequence:
    """A CachedSequence whose keys and values are kept as asked.

    Args:
        cache, tokens, checkpoints: As in CachedSequence. Others: as in stream_generate.

    Raises:
        UsageError: kv_bits that cannot be honoured. CacheError: Parts that do not agree.
    """
    cache = make_prompt_cache(model) if cache is None else cache
    if kv_bits is not None:
        check_kv_bits(model, cache, kv_bits, kv_group_size, quantized_kv_start)

    def kv(cache: list):
        if is_hydra(model):
            caches.own_cache(cache)
        if kv_bits is not None and held_tokens(cache) >= quantized_kv_start:
            _quantise(model, cache, kv_bits, kv_group_size)

    return CachedSequence(model, checkpoints, cache, tokens, kv)


def prefill_step(sequence: CachedSequence, asked: int | None = None) -> int:
    """Tokens of a prefill call at most: what was asked for, within the checkpoints' grid."""
    every = sequence.checkpoints.grid.every if sequence.keeps_checkpoints else None
    step = asked or every or PREFILL_STEP
    return min(step, every or step)


class _Run:
    """One reply: the loop and what is counted in it."""

    def __init__(self, sequence, ids, whole, tokenizer, matcher, progress, should_stop):
        self.sequence, self.ids, self.whole = sequence, ids, whole
        self.tokenizer, self.matcher = tokenizer, matcher
        self.progress = progress or (lambda done, total: None)
        self.should_stop = should_stop or (lambda: False)
        self.held = self.total = self.processed = self.generated = 0
        self.start = self.first = self.last = None
        self.drafts = None

    def between(self, done: int, total: int):
        """After each call of the prompt, and with done == total when the first token is there."""
        self.processed = done
        self.progress(done, total)

    def begin(self, max_tokens: int) -> list:
        """What is left to read."""
        sequence, ids = self.sequence, self.ids
        self.held = sequence.fit(ids) if self.whole else len(sequence)
        rest = ids[self.held :] if self.whole else ids
        self.total = len(rest)
        if is_hydra(sequence.model):
            held = self.held + len(rest)
            caches.own_cache(sequence.cache, held + reply_room(held, max_tokens))
        return rest

    def parts(self, reply: Callable, max_tokens: int) -> Iterator[Part]:
        detokenizer = self.tokenizer.detokenizer
        ends = self.tokenizer.eos_token_ids
        model, reason = self.sequence.model, None
        with contextlib.ExitStack() as stack:
            with contextlib.redirect_stdout(sys.stderr):  # it warns on stdout, the reply's place
                stack.enter_context(wired_limit(model, [generation_stream]))
            self.start = time.perf_counter()
            steps = stack.enter_context(contextlib.closing(reply(self.begin(max_tokens))))
            while reason is None:
                token = None
                if self.should_stop():
                    reason = "interrupt"
                else:
                    token = next(steps, None)
                    if token is None and self.processed < self.total:
                        reason = "interrupt"
                self._tick(token, reason)
                if token is None:
                    reason = reason or "length"
                elif token in ends:
                    reason = "stop"
                else:
                    detokenizer.add_token(token)
                    if self.generated == max_tokens:
                        reason = "length"
                if reason:
                    detokenizer.finalize()
                text, hit = self.matcher.push(detokenizer.last_segment)
                if hit:
                    reason = "stop"
                elif reason:
                    text += self.matcher.held
                if not reason:
                    yield Part(text, token)
        yield Part(text, token, reason, self.timings(reason, summary(model)))

    def _tick(self, token: int | None, reason: str | None):
        now = time.perf_counter()
        if self.first is None and reason is None:
            self.first = now
        if token is not None:
            self.generated += 1
            self.last = now

    def timings(self, reason: str, kernels: str | None) -> Timings:
        prompt_s = None if self.first is None else self.first - self.start
        reply_s = None if self.generated < 2 else self.last - self.first
        kv, state = caches.cache_bytes(self.sequence.cache)
        tally = None if self.drafts is None else self.drafts.tally
        passes = (None,) * 3 if tally is None else (tally.passes, tally.drafted, tally.accepted)
        return Timings(
            prompt_tokens=self.held + self.total,
            cached_tokens=self.held,
            processed_tokens=self.processed,
            prompt_tps=self.processed / prompt_s if prompt_s else None,
            ttft_s=prompt_s if self.generated else None,
            generated_tokens=self.generated,
            generation_s=reply_s,
            generation_tps=(self.generated - 1) / reply_s if reply_s else None,
            peak_memory_bytes=mx.get_peak_memory(),
            kv_bytes=kv,
            state_bytes=state,
            kv=caches.describe(self.sequence.cache),
            finish_reason=reason,
            kernels=kernels,
            passes=passes[0],
            drafted_tokens=passes[1],
            accepted_tokens=passes[2],
        )


def generate(
    model: Any,
    tokenizer: Any,
    prompt: str | Sequence | mx.array,
    max_tokens: int = 256,
    sampler: Callable | None = None,
    logits_processors: list | None = None,
    prompt_cache: list | None = None,
    prefill_step_size: int | None = None,
    kv_bits: int | tuple | None = None,
    kv_group_size: int = 64,
    quantized_kv_start: int = 0,
    stop: Sequence = (),
) -> str:
    """The whole reply as text; arguments and errors as in stream_generate."""
    parts = stream_generate(
        model,
        tokenizer,
        prompt,
        max_tokens,
        sampler,
        logits_processors,
        prompt_cache,
        prefill_step_size,
        kv_bits,
        kv_group_size,
        quantized_kv_start,
        stop,
    )
    return "".join(part.text for part in parts)


def held_tokens(cache: list) -> int:
    """Tokens that a single-sequence cache holds; 0 where no entry counts them."""
    return max((int(getattr(c, "offset", 0)) for c in cache), default=0)


def head_dim(model: Any) -> int | None:
    """D, or None for a model that does not say."""
    args = getattr(model, "args", None)
    found = getattr(args, "head_dim", None)
    heads, hidden = (getattr(args, n, None) for n in ("num_attention_heads", "hidden_size"))
    return found or (hidden // heads if heads and hidden else None)


def reply_room(prompt_tokens: int, max_tokens: int) -> int:
    """Tokens of the reply that room is made for; a longer one grows its cache as it goes."""
    most = max(REPLY_ROOM, prompt_tokens // 4)
    return most if max_tokens == -1 else min(max_tokens, most)


def _quantise(model: Any, cache: list, bits: int | tuple, group_size: int):
    if is_hydra(model):
        caches.quantise_cache(cache, bits, group_size)
        return
    # mlx-lm's empty QuantizedKVCache sizes rows as D // (32 // bits) words, too many for some D
    # (128 at 5 and 6 bits). Those are quantised after the first prefill step, which is right.
    D = head_dim(model)
    for i, c in enumerate(cache):
        if isinstance(c, KVCache) and not c.empty():
            cache[i] = c.to_quantized(group_size=group_size, bits=bits)
        elif isinstance(c, KVCache) and (D is None or D // (32 // bits) == D * bits // 32):
            cache[i] = QuantizedKVCache(group_size=group_size, bits=bits)


def check_kv_bits(model: Any, cache: list, bits: int | tuple, group_size: int, start: int):
    """Whether --kv-bits can be honoured.

    Raises:
        UsageError: Bits or group size do not exist or do not fit, or the cache of this model
            cannot be quantised.
    """
    pair = bits if isinstance(bits, Sequence) else (bits, bits)
    if len(pair) != 2 or not {*pair} <= {*BITS}:
        shown = ",".join(map(str, pair)) if isinstance(bits, Sequence) else bits
        raise UsageError(
            f"kv-bits is {shown}, expected one of {', '.join(map(str, BITS))}, or two for keys and "
            "values."
        )
    if isinstance(bits, Sequence) and not is_hydra(model):
        raise UsageError(
            f"kv-bits {in_words(*pair)}: only HydraHead models can keep keys and values in "
            "different numbers of bits.",
            f"Use --kv-bits {max(pair)}.",
        )
    if start < 0:
        raise UsageError(f"quantized-kv-start is {start}, expected 0 or more.")
    D = head_dim(model)
    fitting = [g for g in GROUP_SIZES if D is None or D % g == 0]
    if group_size not in fitting:
        shown = " or ".join(map(str, fitting)) or "none that exists"
        raise UsageError(
            f"kv-group-size is {group_size}, but with a head_dim of {D} it can be {shown}.",
            f"Add --kv-group-size {fitting[0]}." if fitting else "Leave --kv-bits out.",
        )
    args = getattr(model, "args", None)
    if not getattr(args, "has_fa", True):
        raise UsageError(
            "kv-bits cannot be used: no head of this model keeps keys and values.",
            "Leave --kv-bits out; the recurrent state stays float32.",
        )
    kinds = {type(c) for c in cache if hasattr(c, "offset") or hasattr(c, "caches")}
    if not kinds or kinds - {HydraKVCache, KVCache, QuantizedKVCache}:
        names = ", ".join(sorted(k.__name__ for k in kinds)) or "no keys and values"
        raise UsageError(
            f"kv-bits cannot be used: the cache of this model ({names}) cannot be quantised.",
            "Leave --kv-bits out.",
        )
    for c in cache:
        held = kv_format(c)
        if held is not None and held != (*pair, group_size):
            words = in_words(*held[:2])
            raise UsageError(
                f"kv-bits {in_words(*pair)} in groups of {group_size}, but the cache holds {words} "
                f"bits in groups of {held[2]}.",
                f"Use --kv-bits {words} --kv-group-size {held[2]}, or another cache.",
            )
