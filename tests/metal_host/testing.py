"""Small helpers for tests that execute kernels: the skip mark and a one-output launcher."""

from __future__ import annotations

import os
from collections.abc import Sequence

import pytest

from .kernel import MetalKernel, metal_kernel
from .toolchain import available

_OK, _REASON = available()
# With HYDRA_TEST_ROUTE a GPU executes the kernels of metal/ in its place.
_OK = _OK or "HYDRA_TEST_ROUTE" in os.environ
needs_metal_host = pytest.mark.skipif(not _OK, reason=f"metal host runtime {_REASON}")


def one_to_one(source: str, header: str = "", **options: object) -> MetalKernel:
    """A kernel with one input `x` and one output `y`."""
    return metal_kernel("case", ["x"], ["y"], source, header, **options)


def launch(
    kernel: MetalKernel,
    inputs: Sequence[object],
    shape: Sequence[int],
    dtype: object,
    threads: int = 256,
    threadgroup: int | None = None,
    **options: object,
) -> object:
    """Launches a kernel with one output on a grid of one dimension and returns the output."""
    return kernel(
        inputs=inputs,
        output_shapes=[tuple(shape)],
        output_dtypes=[dtype],
        grid=(threads, 1, 1),
        threadgroup=(threadgroup or min(threads, 256), 1, 1),
        **options,
    )[0]
