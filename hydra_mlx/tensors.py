"""A weight on its way through the converter: a float array, or a matrix that is packed already.

Row operations (concatenate, pick heads) work on packed matrices without unpacking them, so a
GGUF's or an MLX model's own quantisation passes through a conversion bit for bit.
"""

from dataclasses import dataclass

import mlx.core as mx


@dataclass(frozen=True)
class Packed:
    """A quantised matrix [N, K] as mx.quantize gives it.

    Attributes:
        weight: uint32 [N, K*bits/32]. scales, biases: [N, K/group_size]; biases None unless
            the mode is "affine". bits, group_size, mode: As in mx.quantize.
    """

    weight: mx.array
    scales: mx.array
    biases: mx.array | None
    bits: int
    group_size: int
    mode: str = "affine"

    @property
    def shape(self) -> tuple:
        """[N, K] of the matrix it stands for."""
        return (self.weight.shape[0], self.weight.shape[1] * 32 // self.bits)

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(x.nbytes for x in self.arrays().values())

    @property
    def format(self) -> tuple:
        """Two packed matrices of equal format and width can be stacked."""
        return (self.bits, self.group_size, self.mode, self.scales.dtype)

    def arrays(self) -> dict:
        """{"weight": ..., "scales": ..., "biases": ...} without what is absent."""
        parts = {"weight": self.weight, "scales": self.scales, "biases": self.biases}
        return {k: v for k, v in parts.items() if v is not None}

    def map_rows(self, f) -> "Packed":
        """The same format after f(array) -> array on each row-wise part."""
        biases = None if self.biases is None else f(self.biases)
        return Packed(f(self.weight), f(self.scales), biases, self.bits, self.group_size, self.mode)


def to_float(x, dtype: mx.Dtype = mx.float32) -> mx.array:
    """A float array of any weight; packed ones are unpacked without rounding in between."""
    if isinstance(x, Packed):
        x = dequantise_array(x.weight, x.scales, x.biases, x.group_size, x.bits, x.mode)
    return x.astype(dtype)


def dequantise_array(
    weight: mx.array,
    scales: mx.array,
    biases: mx.array | None,
    group_size: int,
    bits: int,
    mode: str,
) -> mx.array:
    """Float32 values of a quantised matrix, without rounding through a smaller type."""
    if mode == "affine":
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
        return mx.dequantize(weight, scales, biases, group_size, bits, mode)
    return mx.dequantize(weight, scales, None, group_size, bits, mode).astype(mx.float32)


def concat_rows(parts: list):
    """Stack weights on their first axis; stays packed when all parts share a format."""
    parts = [p for p in parts if p.shape[0]]
    if len(parts) == 1:
        return parts[0]
    packed = [p for p in parts if isinstance(p, Packed)]
    if len(packed) == len(parts) and len({p.format for p in packed}) == 1:
        first = packed[0]
        biases = None
        if first.biases is not None:
            biases = mx.concatenate([p.biases for p in packed])
        return Packed(
            mx.concatenate([p.weight for p in packed]),
            mx.concatenate([p.scales for p in packed]),
            biases,
            first.bits,
            first.group_size,
            first.mode,
        )
    if packed:
        parts = [to_float(p) for p in parts]
    return mx.concatenate(parts)


def take_row_blocks(x, indices, size: int):
    """Rows of the blocks `indices`, each `size` rows high (a head, say), in that order."""
    indices = list(indices)
    n = x.shape[0] // size
    if indices == list(range(n)):
        return x

    def pick(a):
        blocks = a.reshape(n, size, *a.shape[1:])
        return mx.take(blocks, mx.array(indices, mx.int32), axis=0).reshape(-1, *a.shape[1:])

    return x.map_rows(pick) if isinstance(x, Packed) else pick(x)
