"""Which implementation runs: kernels on Metal or CUDA, or the MLX operations.

HYDRA_KERNELS=auto (default) takes the GPU that MLX runs on, if any; metal, cuda, ops ask for one.
The first use of each kernel specialisation on a real GPU is compared with the operations on a small
input; when it does not compile or does not agree, that is said once, with the numbers, and the
operations are used from then on. Training never uses kernels: they have no gradient.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache

import mlx.core as mx

from ..errors import UsageError
from .fa_decode import CORES
from .loader import Launch, execute

MODES = ("auto", "metal", "cuda", "ops")
# GPU cores by the last letter of Apple's architecture name (phone, base and Pro, Max, Ultra), the
# smaller of each.
APPLE_CORES = {"p": 5, "g": 10, "s": 32, "d": 64}
# Fewest cached keys for which fa_decode reads a plain cache instead of MLX's own attention, by
# route; None never. On Metal: predicted, MLX's second pass begins at 1024 keys and, on base chips,
# only for grouped heads, while one threadgroup a head leaves most cores idle.
PLAIN_FROM = {"metal": 1024, "cuda": None}


@dataclass(frozen=True)
class Backend:
    """What runs kernels.

    Attributes:
        route: "metal" or "cuda", whose tables of sizes apply. run: Executes a Launch, returns its
            outputs. cores: GPU cores or multiprocessors, for splitting work.
    """

    route: str
    run: Callable[[Launch], list]
    cores: int


def mode() -> str:
    """HYDRA_KERNELS.

    Raises:
        UsageError: It is no known word.
    """
    word = os.environ.get("HYDRA_KERNELS", "auto")
    if word not in MODES:
        raise UsageError(f"HYDRA_KERNELS is {word!r}, expected one of {', '.join(MODES)}.")
    return word


def route() -> tuple:
    """(route, reason): "metal", "cuda" or "ops", and why.

    Raises:
        UsageError: HYDRA_KERNELS is no known word, or asks for what is not here.
    """
    word = mode()
    if word == "ops":
        return "ops", "HYDRA_KERNELS=ops"
    on_gpu = mx.default_device().type == mx.gpu
    here = {"metal": mx.metal.is_available(), "cuda": mx.cuda.is_available()}
    if word != "auto":
        if not (here[word] and on_gpu):
            raise UsageError(
                f"HYDRA_KERNELS={word}, but MLX has no {word} device here.",
                "Unset it, or set HYDRA_KERNELS=ops.",
            )
        return word, f"HYDRA_KERNELS={word}"
    for name, there in here.items():
        if there and on_gpu:
            return name, f"MLX runs on {name}"
    return "ops", "no GPU: operations"


@cache
def _gpu(way: str) -> Backend:
    cores = CORES[way]
    if way == "metal":
        name = str(mx.device_info().get("architecture", ""))
        cores = APPLE_CORES.get(name[-1:], APPLE_CORES["g"])
    return Backend(way, lambda launch: execute(launch, way), cores)


_substitute: list = []


def backend() -> Backend | None:
    """What runs kernels now; None for operations.

    Raises:
        UsageError: As route.
    """
    if _substitute:
        return _substitute[-1]
    way, _ = route()
    return None if way == "ops" else _gpu(way)


@contextmanager
def substitute(other: Backend | None) -> Iterator[None]:
    """Inside the block `other` runs kernels, whatever the machine has (tests: the host runtime)."""
    _substitute.append(other)
    try:
        yield
    finally:
        _substitute.pop()


@dataclass
class Trust:
    """What the first-use checks found.

    Attributes:
        failed: {specialisation: reason}. passed: {specialisation: largest relative error}.
    """

    failed: dict = field(default_factory=dict)
    passed: dict = field(default_factory=dict)

    def why_not(self, key: tuple, check: Callable[[], float], limit: float) -> str:
        """Why a specialisation may not be used, or ""; checks it the first time.

        Args:
            key: Names the kernel and everything it is specialised for.
            check: Runs kernel and twin on a small input, returns the relative RMS difference.
            limit: Largest difference that passes.
        """
        if key in self.passed:
            return ""
        if key in self.failed:
            return self.failed[key]
        try:
            error = check()
            reason = "" if error <= limit else f"differs from its twin by {error:.2g} > {limit:.2g}"
        except Exception as e:  # a compile error can be of any kind
            reason = (str(e).strip().splitlines() or [type(e).__name__])[0][:200]
        if not reason:
            self.passed[key] = error
            return ""
        self.failed[key] = reason
        print(
            f"hydra_mlx: kernel {describe(key)} is not used ({reason}); operations instead.",
            file=sys.stderr,
        )
        return reason

    @contextmanager
    def anew(self) -> Iterator[None]:
        """Inside the block nothing was checked before; what it finds is forgotten after it."""
        kept = self.passed, self.failed
        self.passed, self.failed = {}, {}
        try:
            yield
        finally:
            self.passed, self.failed = kept


TRUST = Trust()


def describe(key: tuple) -> str:
    """A specialisation in words: its name, then each template entry."""
    entries = [e if isinstance(e, str) else f"{e[0]}={e[1]}" for e in key[1:]]
    return " ".join([key[0], *entries]).replace("mlx.core.", "")


def relative_rms(out: list, ref: list) -> float:
    """Largest ||out - ref|| / ||ref|| over pairs of arrays; infinity for NaN."""
    worst = 0.0
    for a, b in zip(out, ref, strict=True):
        a, b = a.astype(mx.float32), b.astype(mx.float32)
        norm = mx.sqrt((b * b).sum()).item()
        error = mx.sqrt(((a - b) ** 2).sum()).item() / max(norm, 1e-30)
        worst = max(worst, error if error == error else float("inf"))
    return worst
