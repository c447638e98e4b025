"""Reads GGUF files (version 2 and 3): metadata and tensors.

Why our own reader: the weights of a packed GGUF block are already integers with a scale and an
offset, which is what MLX affine quantisation stores. So most types can be carried over without
being quantised a second time (`GGUFFile.read_affine`); the others are expanded to float32.

Nothing in the file is trusted: each count, length, type and offset is compared with the size of
the file before use, so a damaged file ends in a CheckpointError. Knows numpy only, not MLX.

Axes: n = blocks in a slice of a tensor, g = weights that share one scale (32 or 16).
"""

import math
import struct
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from .errors import CheckpointError
from .gguf_blocks import AFFINE_BITS, CHUNK, PLAIN, UNPACK, pack_bits

MAGIC = b"GGUF"
AGAIN = "The file is damaged or cut short: download it again."
# Far above any real file, far below what would fill the memory before an error is seen.
MAX_PAIRS, MAX_TENSORS, MAX_ARRAY, MAX_TEXT, MAX_NAME = 1 << 16, 1 << 20, 1 << 24, 1 << 24, 1 << 10

# id: (name, weights per block, bytes per block)
TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 36),
    10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136), 24: ("I8", 1, 1), 25: ("I16", 1, 2),
    26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8), 29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
}  # fmt: skip
TEXT, ARRAY = 8, 9
SCALARS = dict(zip([*range(8), 10, 11, 12], "BbHhIif?Qqd", strict=True))  # struct codes


@dataclass(frozen=True)
class GGUFTensor:
    """Where one tensor lies: shape in numpy (row-major) order, offset from the file's start."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class AffineTensor:
    """A matrix as MLX affine quantisation stores it: w = q * scale + bias.

    Shapes:
        weight: (rows, cols * bits / 32) uint32, lowest bits first
        scales, biases: (rows, cols / group_size) float32
    """

    weight: np.ndarray
    scales: np.ndarray
    biases: np.ndarray
    bits: int
    group_size: int = 32


class _Cursor:
    """Reads the header front to back; refuses to step past the end of the file."""

    def __init__(self, view: memoryview, path: Path):
        self.view, self.path, self.pos = view, path, 0

    def fail(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path.name}: {what} (near byte {self.pos}).", AGAIN)

    def take(self, code: str) -> int | float | bool | bytes:
        size = struct.calcsize("<" + code)
        if size > len(self.view) - self.pos:
            raise self.fail("the header goes past the end of the file")
        (value,) = struct.unpack_from("<" + code, self.view, self.pos)
        self.pos += size
        return value

    def count(self, what: str, limit: int, least: int) -> int:
        """A u64 count of things that take at least `least` bytes each."""
        found = self.take("Q")
        room = (len(self.view) - self.pos) // least
        if found > min(limit, room):
            raise self.fail(f"{found} {what} announced, at most {min(limit, room)} are possible")
        return found

    def text(self, limit: int = MAX_TEXT) -> str:
        size = self.count("bytes of text", limit, 1)
        self.pos += size
        # A token may be half a character; a damaged name will not be found, whatever it becomes.
        return bytes(self.view[self.pos - size : self.pos]).decode("utf-8", "replace")

    def value(self):
        """One metadata value: int, float, bool, str, or a list of these."""
        kind = self.take("I")
        if is_array := kind == ARRAY:
            kind = self.take("I")
        if kind != TEXT and kind not in SCALARS:
            raise self.fail(f"metadata of the type {kind}, known are 0 to 12")
        if not is_array:
            return self.text() if kind == TEXT else self.take(SCALARS[kind])
        if kind == TEXT:
            return [self.text() for _ in range(self.count("array entries", MAX_ARRAY, 8))]
        dtype = np.dtype("<" + SCALARS[kind])
        n = self.count("array entries", MAX_ARRAY, dtype.itemsize)
        out = np.frombuffer(self.view, dtype, n, self.pos).tolist()
        self.pos += n * dtype.itemsize
        return out


def _read_tensor_info(cur: _Cursor) -> GGUFTensor:
    """One entry of the tensor list; its offset still counts from the start of the data."""
    name = cur.text(MAX_NAME)
    if not 1 <= (n_dims := cur.take("I")) <= 4:
        raise cur.fail(f"tensor {name!r} has {n_dims} dimensions, expected 1 to 4")
    shape = tuple(cur.take("Q") for _ in range(n_dims))[::-1]  # the file stores columns first
    kind, offset = cur.take("I"), cur.take("Q")
    if kind not in TYPES:
        raise cur.fail(f"tensor {name!r} has the unknown type {kind}")
    label, block, block_bytes = TYPES[kind]
    n_weights = math.prod(shape)
    if n_weights < 1 or shape[-1] % block:
        raise cur.fail(f"tensor {name!r} of shape {shape} cannot be of type {label}")
    return GGUFTensor(name, shape, label, offset, n_weights // block * block_bytes)


class GGUFFile:
    """An open GGUF file. Make one with `GGUFFile.open`; weights are read when asked for."""

    def __init__(self, path: Path, metadata: dict, tensors: dict[str, GGUFTensor], data):
        self.path, self.metadata, self.tensors, self._data = path, metadata, tensors, data

    @classmethod
    def open(cls, path: str | Path) -> "GGUFFile":
        """Maps the file and reads its header.

        Raises:
            CheckpointError: not a GGUF file of version 2 or 3, damaged, or cut short.
        """
        path = Path(path)
        try:
            if path.stat().st_size < 24:
                raise CheckpointError(f"{path.name} is too short to be a GGUF file.", AGAIN)
            data = np.memmap(path, np.uint8, "r")
        except OSError as e:
            raise CheckpointError(f"Cannot read {path}: {e.strerror}.", "Check the path.") from e
        cur = _Cursor(memoryview(data), path)
        magic, version = cur.take("4s"), cur.take("I")
        if magic != MAGIC or version not in (2, 3):
            hint = "Expected a little-endian .gguf file as current llama.cpp writes it."
            what = f"starts with {magic!r}, version {version}"
            raise CheckpointError(f"{path.name} is not GGUF version 2 or 3: {what}.", hint)
        n_tensors = cur.count("tensors", MAX_TENSORS, 32)
        n_pairs = cur.count("metadata pairs", MAX_PAIRS, 13)
        metadata: dict = {}
        for _ in range(n_pairs):
            key = cur.text(MAX_NAME)
            metadata[key] = cur.value()
        return cls(path, metadata, cls._read_tensors(cur, metadata, n_tensors), data)

    @staticmethod
    def _read_tensors(cur: _Cursor, metadata: dict, n_tensors: int) -> dict[str, GGUFTensor]:
        align = metadata.get("general.alignment", 32)
        if type(align) is not int or not 8 <= align <= 1 << 16 or align & (align - 1):
            raise cur.fail(f"alignment {align!r}, expected a power of two from 8 to 65536")
        if metadata.get("split.count", 0) not in (0, 1):
            hint = "Join the parts first: llama-gguf-split --merge FIRST_PART OUT.gguf"
            raise CheckpointError(f"{cur.path.name} is one part of a split GGUF file.", hint)
        infos = [_read_tensor_info(cur) for _ in range(n_tensors)]
        end = start = -(-cur.pos // align) * align
        tensors: dict[str, GGUFTensor] = {}
        for t in sorted(infos, key=lambda t: t.offset):
            first = start + t.offset
            if t.name in tensors or first < end or t.offset % align:
                raise cur.fail(f"tensor {t.name!r} is misaligned, there twice or overlaps another")
            end = first + t.nbytes
            if end > len(cur.view):
                raise cur.fail(f"tensor {t.name!r} ends at byte {end} of {len(cur.view)}")
            tensors[t.name] = replace(t, offset=first)
        return tensors

    def _raw(self, name: str) -> tuple[GGUFTensor, np.ndarray]:
        """The tensor and its bytes as (blocks, bytes per block) uint8, not copied."""
        if name not in self.tensors:
            raise CheckpointError(f"{self.path.name} has no tensor {name!r}.", AGAIN)
        t = self.tensors[name]
        block_bytes = next(size for label, _, size in TYPES.values() if label == t.type)
        raw = np.asarray(self._data[t.offset : t.offset + t.nbytes])
        return t, raw.reshape(-1, block_bytes)

    def read_float(self, name: str) -> np.ndarray:
        """The tensor as float32, in ggml's own values (but a zero is +0 where ggml may give -0).

        Raises:
            CheckpointError: no such tensor, or a type that cannot be expanded.
        """
        t, raw = self._raw(name)
        if t.type in PLAIN:
            with np.errstate(all="ignore"):  # NaNs are the file's business
                return PLAIN[t.type](raw.reshape(-1)).reshape(t.shape)
        if t.type not in UNPACK:
            hint = f"Use a file with the types {', '.join([*PLAIN, *UNPACK])}."
            raise CheckpointError(f"Tensor {name!r} is of the unsupported type {t.type}.", hint)
        out = np.empty((len(raw), math.prod(t.shape) // len(raw)), np.float32)
        with np.errstate(all="ignore"):
            for i in range(0, len(raw), CHUNK):
                q, scale, bias = UNPACK[t.type](raw[i : i + CHUNK])
                x = q * scale[..., None]
                x += bias[..., None]
                out[i : i + CHUNK] = x.reshape(len(x), -1)
        return out.reshape(t.shape)

    def read_affine(self, name: str) -> AffineTensor | None:
        """The tensor repacked for MLX, or None where its type has no exact affine equal.

        `mx.dequantize` of the result and `read_float` agree bit for bit. That needs float32
        scales: q * scale has up to 22 significant bits, which float32 holds exactly, so that
        q * scale + bias is rounded once, as in ggml. In float16 the product would be rounded too.
        For Q4_0, Q4_1 and Q8_0 the scales and biases are float16 numbers (short of overflow), so
        casting *them* to float16 later loses nothing; only the arithmetic gets coarser.

        Raises:
            CheckpointError: no such tensor.
        """
        t, raw = self._raw(name)
        if t.type not in AFFINE_BITS or len(t.shape) != 2:
            return None
        bits, parts = AFFINE_BITS[t.type], []
        with np.errstate(all="ignore"):
            for i in range(0, len(raw), CHUNK):
                q, scale, bias = UNPACK[t.type](raw[i : i + CHUNK])
                parts.append((pack_bits(q.reshape(-1, 32), bits), scale.ravel(), bias.ravel()))
        whole = (np.concatenate(p).reshape(t.shape[0], -1) for p in zip(*parts, strict=True))
        return AffineTensor(*whole, bits)
