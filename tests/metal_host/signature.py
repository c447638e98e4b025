"""The kernel function that MLX writes around a body, byte for byte, and its host counterpart.

Follows `write_signature` of MLX 0.32: which inputs are scalars by reference, which live in the
constant address space, which get `_shape`, `_strides` and `_ndim`, which thread attributes appear.
"""

from __future__ import annotations

from dataclasses import dataclass

from .arrays import HostArray
from .errors import LintError
from .rewrite import header_types, rewrite

# Inputs with fewer elements are passed in the constant address space.
CONSTANT_LIMIT = 8
# Metal's limit on buffers of one kernel.
MAX_BUFFERS = 31

METAL_TYPES = {
    "bool": "bool",
    "int8": "int8_t",
    "int16": "int16_t",
    "int32": "int32_t",
    "int64": "int64_t",
    "uint8": "uint8_t",
    "uint16": "uint16_t",
    "uint32": "uint32_t",
    "uint64": "uint64_t",
    "float16": "float16_t",
    "bfloat16": "bfloat16_t",
    "float32": "float",
}

_U3 = "uint3{{t->{0}.x, t->{0}.y, t->{0}.z}}"
_QUADS = "((t->{0}.x * t->{0}.y * t->{0}.z + 3) / 4)"
# Thread attributes in MLX's order: name, type, value taken from mh::ThreadIds* t.
ATTRIBUTES = (
    (
        "dispatch_quadgroups_per_threadgroup",
        "uint",
        _QUADS.format("dispatched_threads_per_group"),
    ),
    ("dispatch_simdgroups_per_threadgroup", "uint", "t->dispatched_simdgroups"),
    ("dispatch_threads_per_threadgroup", "uint3", _U3.format("dispatched_threads_per_group")),
    ("grid_origin", "uint3", "uint3{0, 0, 0}"),
    ("grid_size", "uint3", _U3.format("threads_per_grid")),
    ("quadgroup_index_in_threadgroup", "uint", "t->index_in_group / 4"),
    ("quadgroups_per_threadgroup", "uint", _QUADS.format("threads_per_group")),
    ("simdgroup_index_in_threadgroup", "uint", "t->simdgroup"),
    ("simdgroups_per_threadgroup", "uint", "t->simdgroups"),
    ("thread_execution_width", "uint", "32u"),
    ("thread_index_in_quadgroup", "uint", "t->lane % 4"),
    ("thread_index_in_simdgroup", "uint", "t->lane"),
    ("thread_index_in_threadgroup", "uint", "t->index_in_group"),
    ("thread_position_in_grid", "uint3", _U3.format("position_in_grid")),
    ("thread_position_in_threadgroup", "uint3", _U3.format("position_in_group")),
    ("threadgroup_position_in_grid", "uint3", _U3.format("group_position")),
    ("threadgroups_per_grid", "uint3", _U3.format("groups_per_grid")),
    ("threads_per_grid", "uint3", _U3.format("threads_per_grid")),
    ("threads_per_simdgroup", "uint", "32u"),
    ("threads_per_threadgroup", "uint3", _U3.format("threads_per_group")),
)


@dataclass(frozen=True)
class Argument:
    """One buffer of the kernel: its declaration without index, and how to pass args[i]."""

    name: str
    declaration: str
    cast: str
    space: str


@dataclass(frozen=True)
class Generated:
    """A kernel ready to compile.

    Attributes:
        function: name that MLX gives the kernel function.
        metal: the text MLX would hand to Metal.
        host: the C++ text for clang.
        arguments: the buffers in binding order.
    """

    function: str
    metal: str
    host: str
    arguments: tuple[Argument, ...]


@dataclass(frozen=True)
class Body:
    """What `metal_kernel` was built with."""

    name: str
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    source: str
    header: str
    atomic_outputs: bool


def _pointer(name: str, space: str, metal_type: str, by_reference: bool = False) -> Argument:
    mark = "&" if by_reference else "*"
    cast = f"{'*' if by_reference else ''}({space} {metal_type}*)args[{{}}]"
    return Argument(name, f"  {space} {metal_type}{mark} {name}", cast, space.split()[-1])


def _arguments(
    body: Body, inputs: list[HostArray], output_dtypes: list[str]
) -> tuple[Argument, ...]:
    found = []
    for name, array in zip(body.input_names, inputs, strict=True):
        space = "const constant" if array.size < CONSTANT_LIMIT else "const device"
        found.append(_pointer(name, space, METAL_TYPES[array.dtype], array.ndim == 0))
        if array.ndim == 0:
            continue
        extras = (("_shape", "int", False), ("_strides", "int64_t", False), ("_ndim", "int", True))
        for suffix, metal_type, by_reference in extras:
            if name + suffix in body.source:
                found.append(_pointer(name + suffix, "const constant", metal_type, by_reference))
    for name, dtype in zip(body.output_names, output_dtypes, strict=True):
        metal_type = METAL_TYPES[dtype]
        found.append(
            _pointer(name, "device", f"atomic<{metal_type}>" if body.atomic_outputs else metal_type)
        )
    return tuple(found)


def _template(template: list[tuple[str, object]]) -> tuple[str, str]:
    """(parameter list, argument list) of the kernel template; dtypes come as their names."""
    parameters, values = [], []
    for name, value in template:
        if isinstance(value, bool):
            parameters.append(f"bool {name}")
            values.append(str(int(value)))
        elif isinstance(value, int):
            parameters.append(f"int {name}")
            values.append(str(value))
        else:
            parameters.append(f"typename {name}")
            values.append(METAL_TYPES[value])
    return ", ".join(parameters), ", ".join(values)


def _function_name(
    body: Body, inputs: list[HostArray], output_dtypes: list[str], values: str
) -> str:
    name = f"custom_kernel_{body.name}"
    if values:
        name += "_" + values.replace(", ", "_")
    for array in inputs:
        kind = "s" if array.ndim == 0 else "c" if array.size < CONSTANT_LIMIT else ""
        name += f"_{METAL_TYPES[array.dtype]}{kind}"
    for dtype in output_dtypes:
        name += f"_{METAL_TYPES[dtype]}"
    if not name.replace("_", "a").isalnum():
        raise LintError(f"MLX would call the kernel function {name!r}, which is no Metal name")
    return name


def generate(
    body: Body,
    inputs: list[HostArray],
    output_dtypes: list[str],
    template: list[tuple[str, object]],
) -> Generated:
    """Writes the kernel for these inputs.

    Args:
        body: names and texts.
        inputs: dtype, size and rank of each input decide how it is passed.
        output_dtypes: dtype names.
        template: (name, value) with value an int, a bool or a dtype name.

    Raises:
        LintError: MLX's own text for this case would not compile on Metal.
    """
    parameters, values = _template(template)
    function = _function_name(body, inputs, output_dtypes, values)
    arguments = _arguments(body, inputs, output_dtypes)
    attributes = [a for a in ATTRIBUTES if a[0] in body.source]
    if len(arguments) > MAX_BUFFERS:
        raise LintError(
            f"kernel {body.name}: {len(arguments)} buffers with shapes and strides, Metal takes "
            f"{MAX_BUFFERS}"
        )
    extra = len(arguments) - len(inputs) - len(body.output_names)
    if extra and not attributes and len(body.output_names) > 1:
        raise LintError(
            f"kernel {body.name}: MLX writes a broken signature for several outputs with "
            "_shape, _strides or _ndim arguments and no thread attribute; name one in the body"
        )
    lines = [f"{a.declaration} [[buffer({i})]]" for i, a in enumerate(arguments)]
    lines += [f"  {metal_type} {name} [[{name}]]" for name, metal_type, _ in attributes]
    head = f"template <{parameters}>\n" if parameters else ""
    head += f"[[kernel]] void {function}(\n" + ",\n".join(lines) + ") {\n"
    metal = body.header + head + body.source + "\n}\n"
    instance = f"{function}<{values}>" if values else function
    if values:
        metal += f'\ntemplate [[host_name("{function}")]] [[kernel]] '
        metal += f"decltype({instance}) {instance};\n"

    type_names = {name for name, value in template if isinstance(value, str)}
    types = header_types(body.header) | frozenset(type_names)
    calls = [a.cast.format(i) for i, a in enumerate(arguments)]
    calls += [value for _, _, value in attributes]
    host = (
        '#include "msl.h"\n'
        f'#line 1 "header/{body.name}"\n{rewrite(body.header, types)}\n'
        f'#line 1 "signature/{body.name}"\n'
        f"{rewrite(head).replace('void', '__attribute__((noinline)) void', 1)}"
        f'#line 1 "source/{body.name}"\n{rewrite(body.source, types)}\n}}\n'
        "#undef double\n"
        'extern "C" __attribute__((no_sanitize("coverage"))) '
        "void mh_entry(void** args, const mh::ThreadIds* t) {\n"
        f"  {instance}({', '.join(calls)});\n}}\n"
    )
    return Generated(function, metal, host, arguments)
