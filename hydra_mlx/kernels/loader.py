"""Kernel bodies from metal/ into callables: built at first use, kept by name and route.

A kernel is one text. Route "metal" hands it to mx.fast.metal_kernel as it is, route "cuda" to
mx.fast.cuda_kernel after cuda.translate. Importing this touches neither.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
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


def int_table(flat: list) -> mx.array:
    """A table of ints for a kernel: 8 numbers at least, MLX puts fewer in constant memory."""
    return mx.array(flat + [0] * max(0, 8 - len(flat)), mx.int32)


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


@cache
def handle(kernel: Kernel, route: str) -> Callable:
    """The built kernel.

    Args:
        route: "metal" or "cuda".
    """
    if route == "cuda":
        from .cuda import translate

        names, source, text = translate(kernel, body(kernel), header(kernel))
        return mx.fast.cuda_kernel(
            f"hydra_{kernel.name}", list(names), list(kernel.outputs), source, text
        )
    return mx.fast.metal_kernel(
        f"hydra_{kernel.name}", list(kernel.inputs), list(kernel.outputs), body(kernel),
        header(kernel),
    )  # fmt: skip


def execute(launch: Launch, route: str) -> Any:
    """Run a launch on the GPU; returns its outputs as a list of arrays."""
    return handle(launch.kernel, route)(**launch.arguments)
