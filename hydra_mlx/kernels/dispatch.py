"""Which implementation runs: a kernel on Metal or CUDA, or the MLX operations.

HYDRA_KERNELS=auto (default) takes the GPU that MLX runs on, if any; metal, cuda, ops ask for one.
The first use of each kernel specialisation on a real GPU is compared with the operations on a small
input; when it does not compile or does not agree, that is said once, with the numbers, and the
operations are used from then on. Training never uses kernels: they have no gradient.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

import mlx.core as mx

from ..errors import UsageError

MODES = ("auto", "metal", "cuda", "ops")


@cache
def route() -> tuple:
    """(route, reason): "metal", "cuda" or "ops", and why.

    Raises:
        UsageError: HYDRA_KERNELS is no known word, or asks for what is not here.
    """
    mode = os.environ.get("HYDRA_KERNELS", "auto")
    if mode not in MODES:
        raise UsageError(f"HYDRA_KERNELS is {mode!r}, expected one of {', '.join(MODES)}.")
    if mode == "ops":
        return "ops", "HYDRA_KERNELS=ops"
    on_gpu = mx.default_device() == mx.Device(mx.gpu)
    here = {"metal": mx.metal.is_available(), "cuda": mx.cuda.is_available()}
    if mode != "auto":
        if not (here[mode] and on_gpu):
            raise UsageError(
                f"HYDRA_KERNELS={mode}, but MLX has no {mode} device here.",
                "Unset it, or set HYDRA_KERNELS=ops.",
            )
        return mode, f"HYDRA_KERNELS={mode}"
    for name, there in here.items():
        if there and on_gpu:
            return name, f"MLX runs on {name}"
    return "ops", "no GPU: operations"


@dataclass
class Trust:
    """What the first-use checks found.

    Attributes:
        failed: {specialisation: reason}. passed: {specialisation: largest relative error}.
    """

    failed: dict = field(default_factory=dict)
    passed: dict = field(default_factory=dict)

    def allows(self, key: tuple, check: Callable[[], float], limit: float) -> bool:
        """Whether a specialisation may be used; checks it the first time.

        Args:
            key: Names the kernel and everything it is specialised for.
            check: Runs kernel and twin on a small input, returns the relative RMS difference.
            limit: Largest difference that passes.
        """
        if key in self.passed:
            return True
        if key in self.failed:
            return False
        try:
            error = check()
            reason = "" if error <= limit else f"differs from its twin by {error:.2g} > {limit:.2g}"
        except Exception as e:  # a compile error can be of any kind
            reason = (str(e).strip().splitlines() or [type(e).__name__])[0][:200]
        if not reason:
            self.passed[key] = error
            return True
        self.failed[key] = reason
        print(
            f"hydra_mlx: kernel {key[0]} {key[1:]} is not used ({reason}); operations instead.",
            file=sys.stderr,
        )
        return False


TRUST = Trust()


def relative_rms(out: list, ref: list) -> float:
    """Largest ||out - ref|| / ||ref|| over pairs of arrays; infinity for NaN."""
    worst = 0.0
    for a, b in zip(out, ref, strict=True):
        a, b = a.astype(mx.float32), b.astype(mx.float32)
        norm = mx.sqrt((b * b).sum()).item()
        error = mx.sqrt(((a - b) ** 2).sum()).item() / max(norm, 1e-30)
        worst = max(worst, error if error == error else float("inf"))
    return worst
