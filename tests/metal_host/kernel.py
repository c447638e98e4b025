"""The public callable: mx.fast.metal_kernel, executed by the host runtime."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from math import prod

from . import arrays, toolchain
from .counts import LaunchCounts
from .errors import CompileError, LintError
from .launch import FILLED_OUTPUT, INPUT, OUTPUT, Arena, Options, Slot, run
from .lint import lint
from .rewrite import plain_text, threadgroup_variables
from .signature import Body, Generated, generate
from .tokens import tokenize

MAX_THREADS = 1024
_BYTE_TYPES = frozenset({"bool", "char", "uchar", "int8_t", "uint8_t"})


class MetalKernel:
    """A kernel that can be launched any number of times.

    Attributes:
        last_counts: LaunchCounts of the latest launch that succeeded, or None.
        last_source: the text MLX would have handed to Metal at the latest launch.
    """

    def __init__(self, body: Body, ensure_row_contiguous: bool, use_lint: bool):
        self._body = body
        self._ensure_row_contiguous = ensure_row_contiguous
        self._use_lint = use_lint
        self._linted: set[tuple[str, ...]] = set()
        self.last_counts: LaunchCounts | None = None
        self.last_source = ""
        self._lint(())

    def __call__(
        self,
        *,
        inputs: Sequence[object],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[object],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        template: Sequence[tuple[str, object]] | None = None,
        init_value: float | None = None,
        verbose: bool = False,
        stream: object = None,
        check: bool = False,
        count: bool = False,
        order: int = 0,
        workers: int | None = None,
        timeout: float = 60.0,
        exited_lanes_ok: bool = False,
    ) -> list[object]:
        """Launches the kernel; the first nine keywords are those of MLX.

        Args:
            inputs: mlx or numpy arrays, or numbers.
            output_shapes, output_dtypes: one for each output. An mlx dtype gives an mlx array, a
                numpy dtype a numpy array.
            grid: threads in each dimension; threadgroup: threads of a threadgroup in each.
            template: (name, value) pairs, value an int, a bool or a dtype.
            init_value: what outputs hold at the start; otherwise they hold NaN bits.
            verbose: print the text MLX would hand to Metal.
            stream: ignored.
            check: find out-of-bounds, races, uninitialised reads, unwritten outputs and divergence
                (about ten times slower). Includes count.
            count: count bytes; see `last_counts`.
            order: 0 runs lanes upwards, 1 downwards, any other number in a random order.
            workers: processes that share the threadgroups; default: one for each core, one alone
                for a small grid or with check.
            timeout: seconds.
            exited_lanes_ok: lanes that have returned may be missing in simd operations and
                barriers, instead of that being a fault.

        Returns:
            One array for each output.

        Raises:
            ValueError: arguments that MLX would refuse.
            LintError, CompileError: the kernel is not valid Metal.
            KernelFault: the kernel did something wrong.
            HostUnavailable: this machine has no compiler for it.
        """
        del stream
        self._validate(inputs, output_shapes, output_dtypes, grid, threadgroup)
        host_inputs = [arrays.read_input(x) for x in inputs]
        if self._ensure_row_contiguous:
            host_inputs = [arrays.row_contiguous(a) for a in host_inputs]
        names = [arrays.dtype_name(d) for d in output_dtypes]
        values = [(n, v if isinstance(v, int) else arrays.dtype_name(v)) for n, v in template or ()]
        self._lint(tuple(n for n, v in values if isinstance(v, str)))
        generated = generate(self._body, host_inputs, names, values)
        self.last_source = generated.metal
        if verbose:
            print(f"Generated source code for `{self._body.name}`:\n```\n{generated.metal}\n```")
        if self._use_lint and "bfloat" in generated.host:
            errors = toolchain.bfloat_errors(generated.host)
            if errors:
                raise CompileError(f"implicit conversion to bfloat:\n{errors}")
        library = toolchain.build(generated.host, watched=check or count)

        shapes = [tuple(s) for s in output_shapes]
        arena = self._lay_out(generated, host_inputs, shapes, names, init_value)
        text = self._body.header + self._body.source
        options = Options(
            grid=tuple(grid),
            threadgroup=tuple(threadgroup),
            check=check,
            count=count or check,
            order=order,
            workers=workers,
            timeout=timeout,
            exited_lanes_ok=exited_lanes_ok,
            natural_alignment="packed_" not in text,
            threadgroup_item_bytes=_threadgroup_item_bytes(self._body.source),
        )
        self.last_counts = run(library, self._body.name, arena, options)
        raw = arena.views[len(arena.views) - len(shapes) :]
        return [
            arrays.make_output(r.copy(), shape, dtype)
            for r, shape, dtype in zip(raw, shapes, output_dtypes, strict=True)
        ]

    def _lint(self, template_names: tuple[str, ...]) -> None:
        if not self._use_lint or template_names in self._linted:
            return
        found = lint(self._body.source, self._body.header, template_names)
        if found:
            lines = "\n".join(f"  {f}" for f in found)
            raise LintError(f"kernel {self._body.name}:\n{lines}")
        self._linted.add(template_names)

    def _validate(
        self,
        inputs: Sequence[object],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[object],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
    ) -> None:
        body = self._body
        for what, given, wanted in (
            ("inputs", inputs, body.input_names),
            ("output_shapes", output_shapes, body.output_names),
            ("output_dtypes", output_dtypes, body.output_names),
        ):
            if len(given) != len(wanted):
                raise ValueError(
                    f"[metal_kernel] Expected `{what}` to have size {len(wanted)} but got size "
                    f"{len(given)}."
                )
        for what, sizes in (("grid", grid), ("threadgroup", threadgroup)):
            if len(sizes) != 3 or any(s < 1 for s in sizes):
                raise ValueError(f"[metal_kernel] {what} must be 3 positive numbers, not {sizes}")
        if prod(threadgroup) > MAX_THREADS:
            raise ValueError(
                f"Thread group size ({prod(threadgroup)}) is greater than the maximum allowed "
                f"threads per threadgroup ({MAX_THREADS})."
            )

    def _lay_out(
        self,
        generated: Generated,
        inputs: list[arrays.HostArray],
        shapes: list[tuple[int, ...]],
        dtypes: list[str],
        init_value: float | None,
    ) -> Arena:
        """The arena with all buffers in binding order, inputs copied in."""
        contents: dict[str, arrays.HostArray] = {}
        for name, array in zip(self._body.input_names, inputs, strict=True):
            contents[name] = array
            contents[name + "_shape"] = arrays.int_array(array.data.shape, "int32")
            contents[name + "_strides"] = arrays.int_array(array.strides, "int64")
            contents[name + "_ndim"] = arrays.int_array(array.ndim, "int32")
        outputs = dict(zip(self._body.output_names, zip(shapes, dtypes, strict=True), strict=True))
        slots = []
        for a in generated.arguments:
            if a.name in outputs:
                shape, dtype = outputs[a.name]
                kind = OUTPUT if init_value is None else FILLED_OUTPUT
                size = arrays.output_bytes(shape, dtype)
            else:
                kind, dtype = INPUT, contents[a.name].dtype
                size = arrays.storage_bytes(contents[a.name])
            slots.append(Slot(a.name, a.space, size, arrays.ITEM_BYTES[dtype], kind))
        arena = Arena(slots)
        for slot, view in zip(slots, arena.views, strict=True):
            if slot.kind == INPUT:
                arrays.store(contents[slot.name], view)
            elif slot.kind == OUTPUT:
                view[...] = 0xFF
            else:
                arrays.fill(view, outputs[slot.name][1], init_value)
        return arena


@functools.lru_cache(maxsize=256)
def _threadgroup_item_bytes(source: str) -> int:
    """The unit in which threadgroup memory is checked: 1 when the body declares arrays of bytes."""
    tokens = tokenize(plain_text(source))
    declared = {t.text for i, k in threadgroup_variables(tokens) for t in tokens[i:k]}
    return 1 if declared & _BYTE_TYPES else 2


def metal_kernel(
    name: str,
    input_names: Sequence[str],
    output_names: Sequence[str],
    source: str,
    header: str = "",
    ensure_row_contiguous: bool = True,
    atomic_outputs: bool = False,
    compile_options: dict | None = None,
    *,
    lint: bool = True,
) -> MetalKernel:
    """A kernel from a Metal body, as mx.fast.metal_kernel makes it, for the host runtime.

    Args:
        name: name of the kernel.
        input_names, output_names: names of the arrays in the body.
        source: body of the kernel function.
        header: text in front of the function.
        ensure_row_contiguous: copy inputs that are not row-contiguous.
        atomic_outputs: outputs are `device atomic<T>*`.
        compile_options: {"math_mode": "safe" | "relaxed" | "fast"}; accepted, all run as safe.
        lint: refuse what Metal refuses and clang does not see.

    Raises:
        ValueError: no output, or unknown compile options.
        LintError: the text breaks a rule.
    """
    if not output_names:
        raise ValueError("[metal_kernel] Must specify at least one output.")
    for key, value in (compile_options or {}).items():
        if key != "math_mode" or value not in ("safe", "relaxed", "fast"):
            raise ValueError(f"[metal_kernel] unknown compile option {key!r}: {value!r}")
    if not re.fullmatch(r"\w+", name):
        raise ValueError(f"[metal_kernel] {name!r} cannot be part of a function name")
    body = Body(name, tuple(input_names), tuple(output_names), source, header, atomic_outputs)
    return MetalKernel(body, ensure_row_contiguous, lint)
