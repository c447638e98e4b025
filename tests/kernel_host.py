"""Executes a hydra_mlx.kernels Launch by the host runtime, as rung 3 of the ladder.

HYDRA_TEST_ROUTE=cuda or metal makes the same tests run the same launches on that GPU (rungs 4 and
5); what only the host runtime can say, byte counts, is skipped then.
"""

import os
from functools import cache

from hydra_mlx.kernels.loader import Kernel, Launch, body, execute, header

import mlx.core as mx
import pytest

from .metal_host import metal_kernel
from .metal_host.kernel import MetalKernel

ROUTE = os.environ.get("HYDRA_TEST_ROUTE", "host")
if ROUTE != "host":
    mx.set_default_device(mx.cpu)  # references stay what they are in CI; only kernels run there


class NotCounted:
    """Counts of a launch that a GPU ran."""

    def __getattr__(self, name: str):
        pytest.skip("the host runtime counts, a GPU does not")


@cache
def _built(kernel: Kernel) -> MetalKernel:
    return metal_kernel(
        f"hydra_{kernel.name}",
        list(kernel.inputs),
        list(kernel.outputs),
        body(kernel),
        header(kernel),
    )


def host_run(launch: Launch, check: bool = False, count: bool = False, timeout: float = 60.0):
    """Run a launch on the CPU, or on the GPU of HYDRA_TEST_ROUTE.

    Returns:
        (outputs, LaunchCounts); bytes are counted with check or count only.
    """
    if ROUTE != "host":
        with mx.stream(mx.gpu):
            out = execute(launch, ROUTE)
            mx.eval(out)
        return out, NotCounted()
    kernel = _built(launch.kernel)
    out = kernel(**launch.arguments, check=check, count=count, timeout=timeout)
    return out, kernel.last_counts
