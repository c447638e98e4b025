"""The same kernel text on an NVIDIA GPU: what has to change for mx.fast.cuda_kernel.

Address-space words go (a macro named `device` would break CUDA's own headers), threadgroup arrays
become __shared__, scalars arrive as pointers, and the positions MLX passes to a Metal kernel are
computed from threadIdx and blockIdx.
"""

import re

from .loader import Kernel, read

POSITIONS = """
  const uint3 thread_position_in_threadgroup = make_uint3(threadIdx.x, threadIdx.y, threadIdx.z);
  const uint3 threadgroup_position_in_grid = make_uint3(blockIdx.x, blockIdx.y, blockIdx.z);
  const uint3 threads_per_threadgroup = make_uint3(blockDim.x, blockDim.y, blockDim.z);
  const uint3 threadgroups_per_grid = make_uint3(gridDim.x, gridDim.y, gridDim.z);
  const uint3 thread_position_in_grid = make_uint3(
      blockIdx.x * blockDim.x + threadIdx.x, blockIdx.y * blockDim.y + threadIdx.y,
      blockIdx.z * blockDim.z + threadIdx.z);
  const uint thread_index_in_threadgroup =
      threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const uint thread_index_in_simdgroup = thread_index_in_threadgroup & 31;
  const uint simdgroup_index_in_threadgroup = thread_index_in_threadgroup >> 5;
"""
# An array declared in threadgroup memory: `threadgroup float x[...]`.
SHARED = re.compile(r"\bthreadgroup\s+((?:[\w:]+\s+)?[\w:]+(?:<[^<>;]*>)?\s+\w+\s*\[)")
SPACES = re.compile(r"\b(?:device|threadgroup|thread|constant)\b\s*")
# Functions that CUDA has too, in the global namespace: without metal:: a call is ambiguous.
SHARED_NAMES = re.compile(
    r"(?<![\w:.>])(min|max|exp2?|log2?|r?sqrt|fabs|abs|floor|round|fma|sin|cos|clamp|isinf|isnan)(?=\s*\()"
)
COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)


def plain(text: str) -> str:
    """Text without comments and address-space words, calls of shared names qualified."""
    text = SPACES.sub("", SHARED.sub(r"__shared__ \1", COMMENT.sub("", text)))
    return SHARED_NAMES.sub(r"metal::\1", text)


def translate(kernel: Kernel, body: str, header: str) -> tuple:
    """Input names, body and header for mx.fast.cuda_kernel."""
    names = tuple(f"{n}_" if n in kernel.scalars else n for n in kernel.inputs)
    scalars = "".join(f"  const int {n} = *{n}_;\n" for n in kernel.scalars)
    return names, POSITIONS + scalars + plain(body), read("cuda_shim.h") + plain(header)
