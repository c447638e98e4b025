"""mlx and numpy arrays as bytes with a dtype name, and back. mlx is imported only when met."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np

# numpy has no bfloat16: its bits travel as uint16.
ITEM_BYTES = {
    "bool": 1,
    "int8": 1,
    "uint8": 1,
    "int16": 2,
    "uint16": 2,
    "float16": 2,
    "bfloat16": 2,
    "int32": 4,
    "uint32": 4,
    "float32": 4,
    "int64": 8,
    "uint64": 8,
}


@dataclass(frozen=True)
class HostArray:
    """One input: numpy view `data` (bfloat16 as uint16 bits) and its dtype name."""

    data: np.ndarray
    dtype: str

    @property
    def size(self) -> int:
        return self.data.size

    @property
    def ndim(self) -> int:
        return self.data.ndim

    @property
    def strides(self) -> tuple[int, ...]:
        """Strides in elements, as MLX counts them."""
        return tuple(s // self.data.itemsize for s in self.data.strides)


def dtype_name(dtype: object) -> str:
    """Name of an mlx or numpy dtype, such as "bfloat16".

    Raises:
        ValueError: kernels cannot take that dtype.
    """
    text = str(dtype)
    name = text.rsplit(".", 1)[-1] if text.startswith("mlx.") else np.dtype(dtype).name
    if name not in ITEM_BYTES:
        raise ValueError(f"kernels take no {name}; possible dtypes: {', '.join(ITEM_BYTES)}")
    return name


def is_numpy_dtype(dtype: object) -> bool:
    """Whether a result of this dtype is handed back as a numpy array."""
    return not str(dtype).startswith("mlx.")


def read_input(value: object) -> HostArray:
    """An input as MLX would take it: bool, int and float become 0-dimensional arrays."""
    if isinstance(value, bool):
        return HostArray(np.array(value, np.bool_), "bool")
    if isinstance(value, int):
        return HostArray(np.array(value, np.int32), "int32")
    if isinstance(value, float):
        return HostArray(np.array(value, np.float32), "float32")
    if isinstance(value, (np.ndarray, np.generic)):
        data = np.asarray(value)
        return HostArray(data, dtype_name(data.dtype))
    import mlx.core as mx

    if not isinstance(value, mx.array):
        raise ValueError(f"an input must be an array or a number, not {type(value).__name__}")
    name = dtype_name(value.dtype)
    # The buffer protocol keeps MLX's strides; a copy would make the array row-contiguous.
    data = np.asarray(value.view(mx.uint16) if name == "bfloat16" else value)
    return HostArray(data, name)


def row_contiguous(array: HostArray) -> HostArray:
    """The same values with row-major strides."""
    if array.data.flags.c_contiguous:
        return array
    return HostArray(np.ascontiguousarray(array.data), array.dtype)


def storage_bytes(array: HostArray) -> int:
    """Bytes from the first to the last element, with the gaps of the strides.

    Raises:
        ValueError: a stride is negative.
    """
    if any(s < 0 for s in array.data.strides):
        raise ValueError("arrays with negative strides are not supported as they are")
    if array.size == 0:
        return 0
    steps = zip(array.data.shape, array.data.strides, strict=True)
    return array.data.itemsize + sum((n - 1) * s for n, s in steps)


def store(array: HostArray, target: np.ndarray) -> None:
    """Writes the elements, at their strides, into a byte array of `storage_bytes`."""
    if array.size:
        view = np.ndarray(array.data.shape, array.data.dtype, target, strides=array.data.strides)
        view[...] = array.data


def fill(target: np.ndarray, dtype: str, value: float) -> None:
    """Fills a byte array with one value of the dtype, rounded as MLX rounds it."""
    if dtype == "bfloat16":
        target.view(np.uint16)[...] = bfloat16_bits(np.array(value, np.float32))
    else:
        target.view(np.dtype(dtype))[...] = np.array(value).astype(dtype)


def bfloat16_bits(values: np.ndarray) -> np.ndarray:
    """float32 values as bfloat16 bits (uint16), rounded to nearest even."""
    bits = np.asarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def make_output(raw: np.ndarray, shape: tuple[int, ...], dtype: object) -> object:
    """A result array from bytes: numpy for a numpy dtype, mlx for an mlx dtype."""
    name = dtype_name(dtype)
    data = raw.view(np.uint16 if name == "bfloat16" else np.dtype(name)).reshape(shape)
    if is_numpy_dtype(dtype):
        return data
    import mlx.core as mx

    result = mx.array(data)
    return result.view(mx.bfloat16) if name == "bfloat16" else result


def output_bytes(shape: tuple[int, ...], dtype: str) -> int:
    """Bytes of a row-contiguous array."""
    return prod(shape) * ITEM_BYTES[dtype]


def int_array(values: object, dtype: str) -> HostArray:
    """Shape, strides or rank as an input."""
    return HostArray(np.array(values, dtype), dtype)
