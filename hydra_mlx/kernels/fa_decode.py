"""Softmax attention of at most 8 tokens over a long cache: metal/fa_decode.metal, fa_combine.metal.

The first pass reads every key and value once for all query heads and tokens that share it, in
splits over the whole GPU; the second joins the splits and applies gate and fusion norm. Keys and
values are read where the cache keeps them, plain or MLX affine.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import mlx.core as mx

from ..kv_format import kv_format
from ..shared_rows import SharedRows
from .cost import Cost
from .loader import Kernel, Launch, execute, few, table

MAX_TOKENS = 8
HEAD_DIMS = (64, 128)
DTYPES = (mx.float32, mx.float16, mx.bfloat16)
GATES = {None: 0, "headwise": 1, "elementwise": 2}
NORMS = {None: 0, "rms_no_weight": 1, "rms": 2}

# Query rows that share a load. Each costs a lane Dk / L + Dv / L registers; four keep a lane under
# 128, which both Metal and CUDA give to threadgroups of 256.
MAX_ROWS = 4
SIMDGROUPS = 8  # of a first-pass threadgroup: one key stream each
COMBINE_SIMDGROUPS = 8
# Numbers of a key a lane holds: 16 bytes, fewer when several query rows need the registers. With
# these, ptxas gives a lane of sm_90 64 registers for one row of bf16, 128 for 4 bits, no spills.
# | bits | 1 row | 2 rows | 3, 4 rows |
LANE_NUMBERS = {32: (8, 8, 8), 16: (8, 8, 8), 8: (16, 8, 8), 4: (32, 8, 8)}
# Keys of a lane group in flight: 4 loads of 16 bytes for keys and 4 for values.
# | bits | 1, 2 rows | 3, 4 rows |
UNROLL = {32: (2, 2), 16: (4, 4), 8: (4, 4), 4: (4, 4)}
# Cores, where nobody says: 132 multiprocessors of an H100 or H200; a Pro or Max chip of Apple.
CORES = {"metal": 20, "cuda": 132}
GROUPS_PER_CORE = 4  # threadgroups a core works on at a time, to hide each other's latency
MAX_SPLITS = 256  # the second pass has one threadgroup a head and token, and reads them all

KERNEL = Kernel(
    "fa_decode",
    (
        "q", "keys", "k_scales", "k_biases", "values", "v_scales", "v_biases", "work", "floats",
        "starts", "T", "Hf", "Hk", "S", "S_alloc", "items", "splits", "split_keys", "offset",
    ),
    ("part", "stats"),
    scalars=("T", "Hf", "Hk", "S", "S_alloc", "items", "splits", "split_keys", "offset"),
    headers=("fa_common.h", "fa_decode.h"),
)  # fmt: skip
COMBINE = Kernel(
    "fa_combine",
    ("part", "stats", "gate", "weight", "splits"),
    ("y", "lse"),
    scalars=("splits",),
    headers=("fa_common.h", "fa_combine.h"),
)


@dataclass(frozen=True)
class KeyValues:
    """A cache's whole buffers, of which the first S tokens are valid.

    Attributes:
        keys, values: [B, Hk, S_alloc, D] arrays, or triples (words, scales, biases) of
            mx.quantize. S: Valid tokens, the new ones among them.
        k_bits, v_bits, group_size: Of the triples; None for arrays.
    """

    keys: Any
    values: Any
    S: int
    k_bits: int | None = None
    v_bits: int | None = None
    group_size: int | None = None

    @classmethod
    def of(cls, cache: Any) -> "KeyValues":
        """Own rows of a cache of kv_cache.py or mlx-lm, updated with the new tokens."""
        found = kv_format(cache) or (None, None, None)
        S = cache.own if hasattr(cache, "own") else cache.offset
        return cls(cache.keys, cache.values, int(S), *found)

    @classmethod
    def of_shared(cls, rows: SharedRows, like: "KeyValues") -> "KeyValues":
        """Shared rows of a cache whose own are `like`."""
        return cls(rows.keys, rows.values, rows.n, like.k_bits, like.v_bits, like.group_size)

    @property
    def quantised(self) -> bool:
        """Whether keys and values are triples."""
        return self.k_bits is not None

    @property
    def parts(self) -> tuple:
        """All arrays: keys then values, one each or three."""
        return (*self.keys, *self.values) if self.quantised else (self.keys, self.values)

    @property
    def dtype(self) -> mx.Dtype:
        """C: of the numbers, or of scales and biases."""
        return (self.keys[1] if self.quantised else self.keys).dtype

    @property
    def widths(self) -> tuple:
        """KBITS and VBITS, of a number: 32, 16, 8 or 4."""
        plain = 8 * self.dtype.size
        return (self.k_bits, self.v_bits) if self.quantised else (plain, plain)

    @property
    def heads(self) -> int:
        """Hk."""
        return self.parts[0].shape[1]

    @property
    def allocated(self) -> int:
        """S_alloc."""
        return self.parts[0].shape[2]

    @property
    def dims(self) -> tuple:
        """Dk and Dv."""
        if not self.quantised:
            return self.keys.shape[-1], self.values.shape[-1]
        return tuple(x[0].shape[-1] * 32 // n for x, n in zip(self.pair, self.widths, strict=True))

    @property
    def pair(self) -> tuple:
        """Keys and values, arrays or triples."""
        return self.keys, self.values

    def buffers(self, other: mx.array) -> tuple:
        """Six inputs of a kernel: keys, their scales and biases, values likewise.

        Args:
            other: Stands in for scales and biases of a plain cache.
        """
        if not self.quantised:
            return (self.keys, other, other, self.values, other, other)
        return self.parts

    @property
    def row_bytes(self) -> int:
        """Bytes of one key and one value."""
        (Dk, Dv), (k, v) = self.dims, self.widths
        extra = 2 * self.dtype.size * (Dk + Dv) // self.group_size if self.quantised else 0
        return (Dk * k + Dv * v) // 8 + extra


def in_bits(kv: KeyValues) -> str:
    """ "4 bits", "8 and 4 bits"."""
    return " and ".join(map(str, dict.fromkeys(kv.widths))) + " bits"


def check_cache(kv: KeyValues, heads: int) -> str:
    """Why the kernels cannot read this cache for `heads` FA heads, or ""."""
    if kv.quantised and (not {*kv.widths} <= {4, 8} or kv.group_size not in (32, 64)):
        return f"cache of {in_bits(kv)} in groups of {kv.group_size}"
    if kv.dtype not in DTYPES or len({x.dtype for x in kv.parts} - {mx.uint32}) != 1:
        return f"cache of type {kv.dtype}"
    if not 1 <= heads <= 32:
        return f"{heads} FA heads, expected 1 to 32"
    if any(D not in HEAD_DIMS for D in kv.dims):
        return f"head dims {kv.dims}, expected 64 or 128"
    if not 1 <= kv.S <= kv.allocated:
        return f"{kv.S} valid tokens of {kv.allocated}"
    if min(x.size for x in kv.parts) < 8:
        return "a cache of a few numbers"  # MLX passes such arrays in another address space
    if kv.allocated * max(kv.dims) >= 2**31:
        return "more than 2^31 numbers for a head"
    return ""


def check_queries(q: mx.array, kv: KeyValues, kv_of_fa: tuple, mask: Any) -> str:
    """Why causal attention of these queries over this cache cannot be done, or ""."""
    B, T, Hf, _ = q.shape
    if isinstance(mask, mx.array):
        return "an array as mask"
    if T > 1 and mask != "causal":
        return "several tokens without a causal mask"
    if q.dtype not in DTYPES:
        return f"queries are {q.dtype}"
    why_not = check_cache(kv, Hf)
    if why_not:
        return why_not
    if len(kv_of_fa) != Hf or kv.parts[0].shape[0] != B or kv.S < T:
        return f"queries {q.shape} do not fit the cache"
    return ""


def eligible(
    q: mx.array,
    kv: KeyValues,
    kv_of_fa: tuple,
    mask: Any = None,
    gate: mx.array | None = None,
) -> tuple:
    """Whether the kernels can do this step: (ok, reason).

    Args:
        q: [B, T, Hf, Dk]. kv: The cache, new tokens included. kv_of_fa: LayerHeads.kv_of_fa.
        mask: Step.fa_mask, "causal" unless T is 1. gate: [B, T, Hf, Dv or 1] or None.
    """
    if q.shape[1] > MAX_TOKENS:
        return False, f"{q.shape[1]} tokens, at most {MAX_TOKENS}"
    if gate is not None and gate.dtype not in DTYPES:
        return False, f"gate is {gate.dtype}"
    why_not = check_queries(q, kv, kv_of_fa, mask)
    if not why_not and q.shape[-1] != kv.dims[0]:
        why_not = f"head dims {q.shape[-1]}, {kv.dims} do not fit"
    return not why_not, why_not or f"T <= {MAX_TOKENS}"


def readers(kv_of_fa: tuple) -> list:
    """[(key/value head, FA heads that read it)], sorted."""
    heads = {}
    for h, kv in enumerate(kv_of_fa):
        heads.setdefault(kv, []).append(h)
    return [(kv, tuple(hs)) for kv, hs in sorted(heads.items())]


@lru_cache(maxsize=256)
def work_table(kv_of_fa: tuple, T: int, max_rows: int = MAX_ROWS) -> tuple:
    """Which threadgroup column does which query rows.

    Returns:
        rows R of an item; items, a tuple of (key/value head, rows t * Hf + h); and both as the
        kernel's int32 array, unused rows -1, padded to 8 numbers.
    """
    Hf = len(kv_of_fa)
    items = []
    for kv, heads in readers(kv_of_fa):
        rows = [t * Hf + h for t in range(T) for h in heads]
        parts = -(-len(rows) // max_rows)
        each = -(-len(rows) // parts)
        items += [(kv, tuple(rows[i : i + each])) for i in range(0, len(rows), each)]
    R = max(len(rows) for _, rows in items)
    flat = [n for kv, rows in items for n in (kv, *rows, *[-1] * (R - len(rows)))]
    return R, tuple(items), table(flat)


@lru_cache(maxsize=16)
def score_floats(scale: float, a: float) -> mx.array:
    """The kernel's two floats, made once: scale of the scores and `a` of the log-length scale."""
    return few([scale, a], mx.float32)


@lru_cache(maxsize=16)
def first_keys(starts: tuple) -> mx.array:
    """The kernel's array, made once."""
    return table(list(starts))


def tile(kv: KeyValues, R: int) -> tuple:
    """L and U of fa_decode.h for this cache and R query rows."""
    Dk, Dv = kv.dims
    widest = max(kv.widths)  # its numbers take most registers
    L = max(Dk, Dv) // LANE_NUMBERS[widest][min(R, 3) - 1]
    while min(D // L * n for D, n in zip((Dk, Dv), kv.widths, strict=True)) < 32:
        L //= 2  # a lane reads whole words
    return L, UNROLL[widest][R > 2]


def split_plan(
    S: int, columns: int, step: int, cores: int, per_core: int = GROUPS_PER_CORE
) -> tuple:
    """Splits of S keys and keys of a split.

    Args:
        columns: Threadgroups of one split. step: Keys that a threadgroup takes at a time.
        cores: Of the GPU. per_core: Threadgroups for each.
    """
    wanted = min(MAX_SPLITS, max(1, cores * per_core // columns))
    granule = max(32, step)
    keys = -(-S // (wanted * granule)) * granule
    return -(-S // keys), keys


def launch(
    q: mx.array,
    kv: KeyValues,
    kv_of_fa: tuple,
    scale: float,
    a: float | None = None,
    offset: int | None = None,
    starts: Sequence | None = None,
    cores: int = CORES["cuda"],
    splits: tuple | None = None,
    simdgroups: int = SIMDGROUPS,
    unroll: int | None = None,
    lanes: int | None = None,
    max_rows: int = MAX_ROWS,
    per_core: int = GROUPS_PER_CORE,
) -> Launch:
    """The first pass.

    Args:
        q: [B, T, Hf, Dk], after its norm. kv: The cache. kv_of_fa: As in eligible.
        scale: Of the scores, 1/sqrt(D). a: Of the log-length scale, None for off.
        offset: Position of query token 0; None for S - T.
        starts: For each of B sequences, keys before which are padding; None: none.
        cores: Of the GPU. splits: (number, keys of one) instead of split_plan's.
        simdgroups, unroll, lanes, max_rows, per_core: Instead of the tables', for sweeps.

    Returns:
        Outputs part [B, T, Hf, splits, Dv] and stats [B, T, Hf, splits, 2], float32.
    """
    B, T, Hf, Dk = q.shape
    Dv = kv.dims[1]
    R, items, work = work_table(tuple(kv_of_fa), T, max_rows)
    L, U = tile(kv, R)
    L, U = lanes or L, unroll or U
    n, keys = splits or split_plan(kv.S, B * len(items), U * 32 // L * simdgroups, cores, per_core)
    offset = kv.S - T if offset is None else int(offset)
    return Launch(
        KERNEL,
        (
            q, *kv.buffers(q), work, score_floats(float(scale), float(a or 0.0)),
            first_keys(tuple(starts or (0,) * B)),
            T, Hf, kv.heads, kv.S, kv.allocated, len(items), n, keys, offset,
        ),
        (
            ("X", q.dtype), ("C", kv.dtype), ("KBITS", kv.widths[0]), ("VBITS", kv.widths[1]),
            ("GROUP", kv.group_size or 1), ("DK", Dk), ("DV", Dv), ("L", L), ("R", R), ("U", U),
            ("SG", simdgroups),
        ),
        (32 * simdgroups * len(items) * n * B, 1, 1),
        (32 * simdgroups, 1, 1),
        ((B, T, Hf, n, Dv), (B, T, Hf, n, 2)),
        (mx.float32, mx.float32),
    )  # fmt: skip


def gate_kind(gate: mx.array | None, Dv: int) -> str | None:
    """None, "headwise" or "elementwise" by the gate's last axis."""
    if gate is None:
        return None
    return "elementwise" if gate.shape[-1] == Dv else "headwise"


def combine_launch(
    part: mx.array,
    stats: mx.array,
    dtype: mx.Dtype,
    gate: mx.array | None = None,
    position: str = "pre_norm",
    norm: str | None = None,
    weight: mx.array | None = None,
    simdgroups: int = COMBINE_SIMDGROUPS,
) -> Launch:
    """The second pass.

    Args:
        part, stats: Outputs of the first. dtype: Of the result.
        gate, position, norm, weight: As ops.fa_fusion.

    Returns:
        Outputs y [B, T, Hf, Dv] in dtype and log-sum-exp [B, T, Hf] float32.
    """
    B, T, Hf, splits, Dv = part.shape
    if norm == "rms" and weight is None:
        norm = "rms_no_weight"
    weight = weight if norm == "rms" else None
    return Launch(
        COMBINE,
        (part, stats, stats if gate is None else gate, stats if weight is None else weight, splits),
        (
            ("X", dtype),
            ("G", mx.float32 if gate is None else gate.dtype),
            ("W", mx.float32 if weight is None else weight.dtype),
            ("DV", Dv), ("SG", simdgroups), ("GATE", GATES[gate_kind(gate, Dv)]),
            ("POST", int(position == "post_norm")), ("NORM", NORMS[norm]),
        ),
        (32 * simdgroups * B * T * Hf, 1, 1),
        (32 * simdgroups, 1, 1),
        ((B, T, Hf, Dv), (B, T, Hf)),
        (dtype, mx.float32),
    )  # fmt: skip


def run(
    q: mx.array,
    kv: KeyValues,
    kv_of_fa: tuple,
    scale: float,
    a: float | None = None,
    offset: int | None = None,
    gate: mx.array | None = None,
    position: str = "pre_norm",
    norm: str | None = None,
    weight: mx.array | None = None,
    route: str = "metal",
    executor: Callable | None = None,
    return_lse: bool = False,
    combine_simdgroups: int = COMBINE_SIMDGROUPS,
    **options: Any,
) -> Any:
    """Both passes: attention, gate and norm of the FA heads for at most 8 tokens.

    Args:
        q, kv, kv_of_fa, scale, a, offset: As launch. gate, position, norm, weight: As
            ops.fa_fusion. route: "metal" or "cuda". executor: Runs a Launch instead of the route.
        return_lse: Also give log-sum-exp [B, T, Hf] float32 of the scaled scores.
        combine_simdgroups: Of a second-pass threadgroup, for sweeps.
        options: cores, splits and the sweepable numbers of launch.

    Returns:
        [B, T, Hf, Dv] in the dtype of q, or with return_lse a pair.
    """
    go = executor or (lambda x: execute(x, route))
    options.setdefault("cores", CORES[route])
    part, stats = go(launch(q, kv, kv_of_fa, scale, a, offset, **options))
    second = combine_launch(part, stats, q.dtype, gate, position, norm, weight, combine_simdgroups)
    y, lse = go(second)
    return (y, lse) if return_lse else y


def cost(first: Launch, second: Launch | None = None) -> Cost:
    """Work of the two passes, from their launches (logical bytes, as the host runtime counts).

    A lane group loads each key and value once; L lanes load a key's scale and bias each. Queries
    are loaded by every lane group, the table of work and the first key by every lane. Without
    padding.
    """
    t = dict(first.template)
    q = first.inputs[0]
    B, T, Hf, Dk = q.shape
    S, _, items, splits, keys, _ = first.inputs[-6:]
    Dv, L, R, SG = (t[n] for n in ("DV", "L", "R", "SG"))
    lanes = 32 * SG
    read_keys, row = scanned_keys(t, S, splits, keys), scanned_bytes(t, Dk, Dv)
    groups = B * splits
    read = groups * items * lanes * (2 + R) * 4 + groups * T * Hf * SG * 32 // L * Dk * q.itemsize
    read += B * items * read_keys * row
    written = groups * T * Hf * 4 * (Dv + 2)
    flops = 2 * B * items * R * read_keys * (Dk + Dv)
    total = Cost(read, written, flops, SG * (Dv + 2) * 4, 1)
    return total if second is None else total + combine_cost(second)


def scanned_keys(template: dict, S: int, splits: int, keys: int) -> int:
    """Keys that one column of threadgroups loads: whole steps of each split."""
    step = template["U"] * 32 // template["L"]
    held = [min(S, i * keys + keys) - i * keys for i in range(splits) if i * keys < S]
    return sum(-(-n // step) * step for n in held)


def scanned_bytes(template: dict, Dk: int, Dv: int) -> int:
    """Bytes loaded for a key and its value."""
    row = (Dk * template["KBITS"] + Dv * template["VBITS"]) // 8
    return row + (4 * template["L"] * template["C"].size if template["KBITS"] < 16 else 0)


def join_bytes(template: dict, splits: int, D: int, gate: mx.Dtype, weight: mx.Dtype) -> int:
    """Bytes that fa_combine.h reads for one row, gate and norm weight among them."""
    read = splits * (8 * template["SG"] + 4 * 32 + 4 * D)
    read += {0: 0, 1: 32, 2: D}[template["GATE"]] * gate.size
    return read + (template["NORM"] == 2) * D * weight.size


def combine_cost(second: Launch) -> Cost:
    """Work of the second pass."""
    t = dict(second.template)
    B, T, Hf, splits, Dv = second.inputs[0].shape
    SG, rows = t["SG"], B * T * Hf
    read = join_bytes(t, splits, Dv, t["G"], t["W"])
    return Cost(
        rows * read, rows * (Dv * t["X"].size + 4), 2 * rows * splits * Dv, SG * Dv * 4, 1
    )  # fmt: skip


def composed_cost(
    q: mx.array, kv: KeyValues, kv_of_fa: tuple, gate: mx.array | None, norm: str | None
) -> Cost:
    """Work of the same step on MLX operations, each array read and written once an operation.

    Plain caches: log-length scale and cast of q, one fused attention a run of equal grouping (its
    partial results stay small), then gate and norm. Quantised: quantized_matmul of scores,
    softmax, quantized_matmul of values, with the scores in device memory (mlx-lm, unfused).
    """
    B, T, Hf, Dk = q.shape
    Dv, x = kv.dims[1], q.itemsize
    kept = len(set(kv_of_fa))
    rows = B * T * Hf
    read = rows * Dk * (x + 4 + x) + B * kept * kv.S * kv.row_bytes
    written = rows * (Dk * (4 + x) + Dv * x)
    dispatches = 3 + kept
    if kv.quantised:
        scores = rows * kv.S * x
        read, written, dispatches = read + 3 * scores, written + 2 * scores, 3 + 4 * kept
    if gate is not None:
        read += 2 * gate.nbytes + rows * Dv * x
        written += gate.nbytes + rows * Dv * x
        dispatches += 2
    if norm is not None:
        read, written, dispatches = read + rows * Dv * x, written + rows * Dv * x, dispatches + 1
    return Cost(read, written, 2 * rows * kv.S * (Dk + Dv), 0, dispatches)
