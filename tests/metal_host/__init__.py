"""Host runtime: executes Metal kernels of mx.fast.metal_kernel on Linux x86-64, without a GPU."""

from .counts import BufferCounts, LaunchCounts
from .errors import CompileError, HostUnavailable, KernelFault, LintError, MetalHostError
from .kernel import MetalKernel, metal_kernel
from .lint import Finding, lint
from .toolchain import available

__all__ = [
    "BufferCounts",
    "CompileError",
    "Finding",
    "HostUnavailable",
    "KernelFault",
    "LaunchCounts",
    "LintError",
    "MetalHostError",
    "MetalKernel",
    "available",
    "lint",
    "metal_kernel",
]
