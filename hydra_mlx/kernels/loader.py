"""Kernel bodies from metal/ into callables: built at first use, kept by name and route.

A kernel is one text. Route "metal" hands it to mx.fast.metal_kernel as it is, route "cuda" to
mx.fast.cuda_kernel after cuda.translate. Importing this touches neither.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..errors import HydraError


@dataclass(frozen=True)
class Kernel:
    """One body in metal/.

    Attributes:
        name: metal/{name}.metal. inputs, outputs: Buffer names, in order. scalars: Those inputs
            that are single ints. headers: Files of metal/ to put after common.h.
    """

    name: str
    inputs: tuple
    outputs: tuple
    scalars: tuple = ()
    headers: tuple = ()


@dataclass(frozen=True)
class Launch:
    """One call of a kernel: everything mx.fast.metal_kernel's callable wants.

    Attributes:
        kernel: The body. inputs: Arrays and ints. template: (name, Dtype, int or bool) pairs. They
            tell every input's dtype, even those no body names: mx.fast.cuda_kernel knows a build by
            its name and template values alone, and would take that of another dtype for this.
        grid: THREADS in each dimension. threadgroup: Threads of a threadgroup in each.
        output_shapes, output_dtypes: One each for every output.
    """

    kernel: Kernel
    inputs: tuple
    template: tuple
    grid: tuple
    threadgroup: tuple
    output_shapes: tuple
    output_dtypes: tuple

    @property
    def arguments(self) -> dict:
        """As the built kernel takes them."""
        return {
            "inputs": list(self.inputs),
            "template": list(self.template),
            "grid": self.grid,
            "threadgroup": self.threadgroup,
            "output_shapes": list(self.output_shapes),
            "output_dtypes": list(self.output_dtypes),
        }


def table(values: list, dtype: mx.Dtype = mx.int32) -> mx.array:
    """Numbers for a kernel, padded to 8: MLX puts fewer in constant memory on Metal.

    On CUDA what the host writes lies in managed memory, which the first kernel to read it has to
    wait for, and pages of it travel back when the host writes again; a sum is made by the GPU.
    """
    a = mx.array([*values, *[0] * max(0, 8 - len(values))], dtype)
    return a + 0 if mx.cuda.is_available() else a


def few(values: list, dtype: mx.Dtype = mx.int32) -> mx.array:
    """Less than 8 numbers that every lane reads, for constant memory on Metal."""
    return table(values, dtype)[: len(values)]


@cache
def absent(dtype: mx.Dtype) -> mx.array:
    """For the place of an absent input: 8 numbers, since MLX puts fewer in constant memory."""
    return mx.zeros((8,), dtype)


@lru_cache(maxsize=4096)
def _number(value: int) -> mx.array:
    """A kernel's scalar on CUDA, in the GPU's own memory."""
    return mx.full((8,), value, mx.int32)


def metal_dir() -> Path:
    """The folder of the kernel texts: in the wheel, or beside the package in a checkout.

    Raises:
        HydraError: Neither is there.
    """
    package = Path(__file__).parents[1]
    # A wheel has it inside the package; an editable install maps only the package itself.
    for folder in (package / "metal", package.parent / "metal"):
        if (folder / "common.h").is_file():
            return folder
    raise HydraError("The folder metal/ with the kernels is missing.", "Reinstall hydra_mlx.")


@cache
def read(name: str) -> str:
    """Text of one file of metal/."""
    return (metal_dir() / name).read_text("utf-8")


def header(kernel: Kernel) -> str:
    """common.h and the kernel's own headers."""
    return "\n".join(read(n) for n in ("common.h", *kernel.headers)) + "\n"


def body(kernel: Kernel) -> str:
    """The kernel's body."""
    return read(f"{kernel.name}.metal")


def handle(kernel: Kernel, route: str) -> Callable:
    """The built kernel.

    Args:
        route: "metal" or "cuda".
    """
    key = kernel.name, route  # hashing a Kernel costs more than a launch should
    if key not in _HANDLES:
        _HANDLES[key] = _build(kernel, route)
    return _HANDLES[key]


_HANDLES: dict = {}


def _build(kernel: Kernel, route: str) -> Callable:
    name = f"hydra_{kernel.name}"
    if route == "cuda":
        from .cuda import translate

        names, source, text = translate(kernel, body(kernel), header(kernel))
        source, text = _included(f"{name}.cu", source), _included(f"{name}.h", text)
        return mx.fast.cuda_kernel(name, list(names), list(kernel.outputs), source, text)
    inputs, outputs = list(kernel.inputs), list(kernel.outputs)
    return mx.fast.metal_kernel(name, inputs, outputs, body(kernel), header(kernel))


def _included(name: str, text: str) -> str:
    """An #include of the text: MLX copies and hashes a CUDA kernel's whole source in every call."""
    path = Path(_folder().name, name)
    path.write_text(text, "utf-8")
    return f'#include "{path}"\n'


@cache
def _folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="hydra_mlx-")


def execute(launch: Launch, route: str) -> Any:
    """Run a launch on the GPU; returns its outputs as a list of arrays."""
    inputs = launch.inputs
    if route == "cuda":
        inputs = [_number(x) if type(x) is int else x for x in inputs]
    return handle(launch.kernel, route)(
        inputs=list(inputs),
        template=list(launch.template),
        grid=launch.grid,
        threadgroup=launch.threadgroup,
        output_shapes=list(launch.output_shapes),
        output_dtypes=list(launch.output_dtypes),
    )
