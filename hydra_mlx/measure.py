"""Times and memory of reading a prompt and decoding, for `hydra-mlx bench`.

A measurement is what generate does: the prompt in steps, one token at a time after it with the next
step queued while one runs. Models take turns, so that a machine that slows down slows all of them.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.generate import wired_limit
from mlx_lm.models.cache import ArraysCache, KVCache, QuantizedKVCache, make_prompt_cache

from .cache import quantise_cache
from .kv_cache import HydraKVCache
from .predict import CHIPS, Floor

WARM_TOKENS = 4  # decoded before anything is measured: they build and check the kernels
STREAM_BYTES = 1 << 28  # of the matrix that measures the bandwidth
MANY = 17


class Stopped(Exception):
    """The user wants what was measured so far."""


@dataclass
class Subject:
    """A model to be measured.

    Attributes:
        label: Its name in tables. model: Loaded. nbytes: Of its weights in memory.
        weights: How they are kept, in words.
    """

    label: str
    model: Any
    nbytes: int
    weights: str


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        decode: Tokens after each prompt. step: Prompt tokens at a time. kv_bits, kv_group: Of the
            cache; None for full precision. seed: Of the prompt's random tokens.
    """

    decode: int
    step: int
    kv_bits: int | None
    kv_group: int
    seed: int


@dataclass(frozen=True)
class Sample:
    """One measurement: tokens a second of both kinds, and the peak in bytes, weights included."""

    prefill: float
    decode: float
    peak: int


@dataclass
class Cell:
    """What is known of one model at one length.

    Attributes:
        samples: In order. floor: Bytes a decode step moves there; None where not known.
        error: Why there are no (more) samples, or "".
    """

    samples: list = field(default_factory=list)
    floor: Floor | None = None
    error: str = ""


def prompt(length: int, vocab: int, seed: int) -> mx.array:
    """[1, length] random token ids, the same for every model of a vocabulary."""
    tokens = mx.random.randint(0, vocab, (1, length), key=mx.random.key(seed))
    mx.eval(tokens)
    return tokens


def _cache(subject: Subject, settings: Settings) -> list:
    cache = make_prompt_cache(subject.model)
    if settings.kv_bits is not None:
        quantise_cache(cache, settings.kv_bits, settings.kv_group)
    return cache


def _read(
    model: Any, tokens: mx.array, cache: list, step: int, stop: Callable[[], bool]
) -> mx.array:
    """The whole prompt into the cache; the first token of the reply."""
    last = tokens.shape[1] - 1
    for at in range(0, last, step):
        if stop():
            raise Stopped
        model(tokens[:, at : min(at + step, last)], cache=cache)
        mx.eval([c.state for c in cache])
        mx.clear_cache()
    token = mx.argmax(model(tokens[:, last:], cache=cache)[:, -1:], axis=-1)
    mx.eval(token)
    return token


def _decode(model: Any, token: mx.array, cache: list, n: int, stop: Callable[[], bool]) -> float:
    """Seconds for n more tokens."""
    start = time.perf_counter()
    following = mx.argmax(model(token, cache=cache)[:, -1:], axis=-1)
    mx.async_eval(following)
    for i in range(n):
        if stop():
            raise Stopped
        token = following
        if i + 1 < n:
            following = mx.argmax(model(token, cache=cache)[:, -1:], axis=-1)
            mx.async_eval(following)
        mx.eval(token)
    return time.perf_counter() - start


def measure(
    subject: Subject, length: int, vocab: int, settings: Settings, stop: Callable[[], bool]
) -> tuple:
    """One Sample at one length, and the Floor of its last step or None.

    Raises:
        Stopped: stop() said so.
    """
    tokens = prompt(length, vocab, settings.seed)
    mx.clear_cache()
    mx.reset_peak_memory()
    held = mx.get_active_memory()
    cache = _cache(subject, settings)
    with wired_limit(subject.model):
        start = time.perf_counter()
        token = _read(subject.model, tokens, cache, settings.step, stop)
        read_s = time.perf_counter() - start
        decode_s = _decode(subject.model, token, cache, settings.decode, stop)
    peak = mx.get_peak_memory() - held + subject.nbytes
    sample = Sample(length / read_s, settings.decode / decode_s, peak)
    return sample, step_floor(subject.model, cache, length)


def warm_up(
    subject: Subject, longest: int, vocab: int, settings: Settings, stop: Callable[[], bool]
):
    """Build and check the kernels of a whole step, of a part of one, and of single tokens."""
    length = min(settings.step + 2, longest)
    cache = _cache(subject, settings)
    token = _read(subject.model, prompt(length, vocab, settings.seed), cache, settings.step, stop)
    _decode(subject.model, token, cache, WARM_TOKENS, stop)


def vocabulary(model: Any) -> int:
    """V, from the logits themselves."""
    return model(mx.zeros((1, 1), mx.int32), cache=make_prompt_cache(model)).shape[-1]


def step_floor(model: Any, cache: list, context: int) -> Floor | None:
    """Bytes a decode step of any model must move; None for caches or experts of other kinds.

    Args:
        context: Tokens in the cache that count.
    """
    weights = numbers = 0
    untied = "lm_head" in model
    for name, x in tree_flatten(model.parameters()):
        if "experts" in name or "switch" in name:
            return None
        if untied and "embed_tokens" in name:
            continue
        weights += x.nbytes
        numbers += x.size  # packed ones count as words: too few, and never the bound then
    kv = state = 0.0
    for c in cache:
        if isinstance(c, (HydraKVCache, KVCache, QuantizedKVCache)):
            parts = [x for _, x in tree_flatten((c.keys, c.values))]
            kv += context * sum(x.nbytes / x.shape[2] for x in parts)
        elif isinstance(c, ArraysCache):
            state += 2 * c.nbytes
        else:
            return None
    return Floor(weights, int(kv), int(state), 2 * numbers)


def bandwidth(model: Any) -> tuple:
    """(GB/s, TFLOP/s or None, where they come from): of this chip as stated, or measured here.

    Measured: a matrix of STREAM_BYTES times a vector, in the type of the model's norms. MANY times
    less once, since launching and waiting cost about as much as one does on a large GPU.
    """
    name = str(mx.device_info().get("device_name", "")).removeprefix("Apple ")
    if name in CHIPS:
        speed, tflops = CHIPS[name]
        return speed, tflops, f"{speed} GB/s, as Apple states for the {name}"
    norm = next((x for n, x in tree_flatten(model.parameters()) if n.endswith("norm.weight")), None)
    dtype = mx.float32 if norm is None else norm.dtype
    columns = 4096
    matrix = mx.random.normal((STREAM_BYTES // dtype.size // columns, columns), dtype)
    vector = mx.ones((columns, 1), dtype)
    mx.eval(matrix, vector)
    best = {}
    for n in (1, MANY) * 3:
        start = time.perf_counter()
        mx.eval([matrix @ (vector + i) for i in range(n)])
        best[n] = min(time.perf_counter() - start, best.get(n, float("inf")))
    seconds = (best[MANY] - best[1]) / (MANY - 1)
    speed = matrix.nbytes / (seconds if seconds > 0 else best[1]) / 1e9
    return speed, None, f"{speed:.3g} GB/s, measured here (a matrix times a vector)"


def compare(
    subjects: Sequence,
    lengths: Sequence,
    runs: int,
    vocab: int,
    settings: Settings,
    stop: Callable[[], bool],
    told: Callable[[str, int, int], None],
    out_of_memory: Callable[[Exception], bool],
) -> dict:
    """Measure all models at all lengths in turns.

    Args:
        stop: Asked between steps and tokens. told: Called with what is measured
            next, how many measurements are done, and all.
        out_of_memory: Whether an exception means that; longer prompts are left out then.

    Returns:
        {(label, length): Cell}; incomplete when stop() said so.
    """
    cells = {(s.label, n): Cell() for n in lengths for s in subjects}
    done, total = 0, runs * len(cells)
    try:
        for s in subjects:
            told(f"{s.label}: first use", 0, total)
            warm_up(s, max(lengths), vocab, settings, stop)
        for run in range(runs):
            for n in lengths:
                for i in range(len(subjects)):
                    s = subjects[(i + run) % len(subjects)]
                    cell = cells[s.label, n]
                    if stop():
                        raise Stopped
                    told(f"{s.label}: {n:,} tokens", done, total)
                    if not cell.error:
                        try:
                            sample, cell.floor = measure(s, n, vocab, settings, stop)
                            cell.samples.append(sample)
                        except (RuntimeError, MemoryError) as e:
                            if not out_of_memory(e):
                                raise
                            for longer in (x for x in lengths if x >= n):
                                cells[s.label, longer].error = "out of memory"
                    done += 1
    except Stopped:
        pass
    return cells
