"""Executes a hydra_mlx.kernels Launch by the host runtime, as rung 3 of the ladder."""

from functools import cache

from hydra_mlx.kernels.loader import Kernel, Launch, body, header

from .metal_host import metal_kernel
from .metal_host.kernel import MetalKernel


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
    """Run a launch on the CPU.

    Returns:
        (outputs, LaunchCounts); bytes are counted with check or count only.
    """
    kernel = _built(launch.kernel)
    out = kernel(**launch.arguments, check=check, count=count, timeout=timeout)
    return out, kernel.last_counts
