"""GGUF's packed block formats: bytes into integers with a scale and an offset.

UNPACK[type](raw (n, bytes) uint8) -> q (n, groups, g) uint8 or int8, scale and bias (n, groups)
float32, with weight = q * scale + bias. Layouts as in ggml's block definitions.
Axes: n = blocks in a slice of a tensor, g = weights that share one scale (32 or 16).
"""

from collections.abc import Callable
from functools import partial

import numpy as np

CHUNK = 1 << 15  # blocks expanded at a time: keeps the temporaries in the cache


def _half(raw: np.ndarray, at: int) -> np.ndarray:
    """The float16 at byte `at` of each block: (n, 1) float32."""
    return np.ascontiguousarray(raw[:, at : at + 2]).view("<f2").astype(np.float32)


def _shifted(raw: np.ndarray, shifts: tuple[int, ...], mask: int) -> np.ndarray:
    """(..., k) bytes -> (..., len(shifts), k): the bit fields, one row per shift."""
    return (raw[..., None, :] >> np.array(shifts, np.uint8)[:, None]) & np.uint8(mask)


def _simple(raw: np.ndarray, bits: int, has_min: bool):
    """Q4_0, Q4_1, Q5_0, Q5_1, Q8_0: one scale per 32 weights, an own minimum or a fixed one."""
    n, at, scale = len(raw), 4 if has_min else 2, _half(raw, 0)
    bias = _half(raw, 2) if has_min else scale * np.float32(-(1 << (bits - 1)))
    if bits == 8:  # signed bytes: flipping the top bit adds 128
        return (raw[:, at:] ^ np.uint8(0x80)).reshape(n, 1, 32), scale, bias
    q = _shifted(raw[:, -16:], (0, 4), 15).reshape(n, 1, 32)
    if bits == 5:
        high = np.unpackbits(raw[:, at : at + 4], axis=1, bitorder="little")
        q |= high.reshape(n, 1, 32) << 4
    return q, scale, bias


def _q45_k(raw: np.ndarray, bits: int):
    s = raw[:, 4:16]  # 8 six-bit scales and 8 minima: (n, 8) uint8 each
    low, high = s[:, :8] & 63, s[:, :8] >> 6 << 4
    scale = np.concatenate([low[:, :4], (s[:, 8:] & 15) | high[:, :4]], 1)
    minimum = np.concatenate([low[:, 4:], (s[:, 8:] >> 4) | high[:, 4:]], 1)
    q = _shifted(raw[:, -128:].reshape(-1, 4, 32), (0, 4), 15).reshape(-1, 8, 32)
    if bits == 5:
        q |= _shifted(raw[:, 16:48], tuple(range(8)), 1) << 4
    return q, _half(raw, 0) * scale, -(_half(raw, 2) * minimum)


def _q2_k(raw: np.ndarray):
    q = _shifted(raw[:, 16:80].reshape(-1, 2, 32), (0, 2, 4, 6), 3).reshape(-1, 16, 16)
    return q, _half(raw, 80) * (raw[:, :16] & 15), -(_half(raw, 82) * (raw[:, :16] >> 4))


def _q3_k(raw: np.ndarray):
    q = _shifted(raw[:, 32:96].reshape(-1, 2, 32), (0, 2, 4, 6), 3).reshape(-1, 8, 32)
    q |= _shifted(raw[:, :32], tuple(range(8)), 1) << 2
    low = _shifted(raw[:, 96:104], (0, 4), 15).reshape(-1, 16)
    high = _shifted(raw[:, 104:108], (0, 2, 4, 6), 3).reshape(-1, 16)
    scale = _half(raw, 108) * ((low | high << 4).astype(np.int8) - np.int8(32))
    return q.reshape(-1, 16, 16), scale, scale * np.float32(-4)


def _q6_k(raw: np.ndarray):
    # q stays signed: q * scale has 25 bits here, so a bias of -32 * scale would round twice.
    q = _shifted(raw[:, :128].reshape(-1, 2, 64), (0, 4), 15).reshape(-1, 2, 4, 32)
    q |= _shifted(raw[:, 128:192].reshape(-1, 2, 32), (0, 2, 4, 6), 3) << 4
    scale = _half(raw, 208) * np.ascontiguousarray(raw[:, 192:208]).view(np.int8)
    return (q.view(np.int8) - np.int8(32)).reshape(-1, 16, 16), scale, np.zeros_like(scale)


PLAIN: dict[str, Callable] = {
    "F32": lambda raw: raw.view("<f4").astype(np.float32),
    "F16": lambda raw: raw.view("<f2").astype(np.float32),
    "BF16": lambda raw: (raw.view("<u2").astype(np.uint32) << 16).view(np.float32),
}
UNPACK: dict[str, Callable] = {
    **{f"Q{b}_0": partial(_simple, bits=b, has_min=False) for b in (4, 5, 8)},
    **{f"Q{b}_1": partial(_simple, bits=b, has_min=True) for b in (4, 5)},
    **{f"Q{b}_K": partial(_q45_k, bits=b) for b in (4, 5)},
    **{"Q2_K": _q2_k, "Q3_K": _q3_k, "Q6_K": _q6_k},
}
# Types whose groups are 32 wide and whose width MLX can pack.
AFFINE_BITS = {"Q4_0": 4, "Q4_1": 4, "Q5_0": 5, "Q5_1": 5, "Q8_0": 8, "Q4_K": 4, "Q5_K": 5}


def pack_bits(q: np.ndarray, bits: int) -> np.ndarray:
    """(groups, 32) uint8 below 2**bits -> (groups, bits) uint32, first weight lowest."""
    if bits == 4:
        q = q[:, ::2] | q[:, 1::2] << 4
    elif bits != 8:
        q = np.unpackbits(q[..., None], axis=-1, count=bits, bitorder="little")
        q = np.packbits(q.reshape(len(q), -1), axis=-1, bitorder="little")
    return np.ascontiguousarray(q).view("<u4")
