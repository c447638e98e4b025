"""The gated delta rule over T tokens for all LA heads of a layer, as kernels.

Twin: ops.gated_delta. Two variants behind one rule, `variant`:

steps    metal/la_prefill_steps.metal: token by token, the state in registers; one dispatch.
chunked  metal/la_prefill_local.metal, parallel over chunks of 64 tokens, makes what needs no state
         (R' and M, 32 KiB a chunk and head, in float32); metal/la_prefill_scan.metal goes through
         the chunks for 16 value rows a threadgroup and writes outputs and state.

Work of one head at Dk = Dv = 128, in multiply-adds (an 8 x 8 x 8 product has 512):

| variant | for | multiply-adds | device bytes read, bf16 |
|---|---|---|---|
| steps | a token | 65.5 K, and 16 K loads from threadgroup memory | 2.3 K |
| local | 64 tokens | 0.78 M (1532 products) | 115 K |
| scan | 64 tokens | 3.93 M (7680 products) | 612 K: 8 slices, most of it from the L2 cache |

So 57 steps, loads counted as work, cost as much as a chunk, however few of its 64 tokens exist:
`line` is that number. Beyond it the two stay close by count (at a full chunk the chunked one has
0.9 of the work), but the chunked one has a tenth of the dependent operations.
"""

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from ..ops import delta
from .cost import Cost
from .loader import Kernel, Launch, absent, execute

DTYPES = (mx.float32, mx.float16, mx.bfloat16)
HEAD_DIMS = range(32, 257, 32)

LOCAL = Kernel(
    "la_prefill_local",
    ("q", "k", "g", "beta", "mask", "T_len", "Hl"),
    ("rm", "since"),
    scalars=("T_len", "Hl"),
    headers=("la_prefill.h",),
)
SCAN = Kernel(
    "la_prefill_scan",
    ("q", "k", "v", "rm", "since", "state", "T_len", "Hl"),
    ("o", "state_out"),
    scalars=("T_len", "Hl"),
    headers=("la_prefill.h",),
)
STEPS = Kernel(
    "la_prefill_steps",
    ("q", "k", "v", "g", "beta", "mask", "state", "T_len", "Hl"),
    ("o", "state_out"),
    scalars=("T_len", "Hl"),
)


@dataclass(frozen=True)
class Tiles:
    """Sizes a launch is built with.

    Attributes:
        C: Tokens of a chunk, 64 or 32. slice: Value rows of a scan threadgroup: 16 gives 96
            threadgroups at 12 heads of 128; 32 would halve them. groups: SIMD-groups of one; 4
            fill the four schedulers of an SM or core and share the loads of S between 32 rows.
        lanes, rows, step_groups, block: LANES, ROWS, GROUPS, TB of the steps: 8 lanes hold two
            rows, so that a number read from threadgroup memory serves twice; 8 tokens of 128 are
            8.5 KiB, which leaves room for three threadgroups in Apple's 32 KiB.
    """

    C: int = 64
    slice: int = 16
    groups: int = 4
    lanes: int = 8
    rows: int = 2
    step_groups: int = 4
    block: int = 8

    @property
    def step_slice(self) -> int:
        """Value rows of a threadgroup of the steps."""
        return self.step_groups * self.rows * 32 // self.lanes


TILES = Tiles()


def eligible(q: mx.array, k: mx.array, v: mx.array, state: mx.array | None = None) -> tuple:
    """Whether the kernels can do this: (ok, reason)."""
    Hl, Dk = q.shape[2:]
    Dv = v.shape[-1]
    if not (q.dtype == k.dtype == v.dtype):
        return False, f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; expected one dtype"
    if v.dtype not in DTYPES:
        return False, f"activations are {v.dtype}"
    if Dk not in HEAD_DIMS or Dv not in HEAD_DIMS:
        return False, f"head dims {Dk} and {Dv}, expected multiples of 32 up to 256"
    if threadgroup_bytes(Dk, TILES) > 32768:
        return False, f"head dim {Dk} needs more than 32 KiB of threadgroup memory"
    if not 1 <= Hl <= 32:
        return False, f"{Hl} LA heads, expected 1 to 32"
    if state is not None and state.dtype != mx.float32:
        return False, f"state is {state.dtype}, expected float32"
    return True, variant(q.shape[1], Dk, Dv)[1]


def line(Dk: int, Dv: int, tiles: Tiles = TILES) -> int:
    """Most tokens for which steps count less than one chunk."""
    step = 4 * Dk * Dv + 2 * Dk * Dv // tiles.rows
    return 512 * (local_products(Dk, tiles) + scan_products(Dk, Dv, tiles)) // step


def variant(T: int, Dk: int, Dv: int, tiles: Tiles = TILES) -> tuple:
    """("steps" or "chunked", reason)."""
    most = line(Dk, Dv, tiles)
    if T <= most:
        return "steps", f"{T} tokens, up to {most} cost less one by one than a chunk of {tiles.C}"
    return "chunked", f"{T} tokens in chunks of {tiles.C}"


def _mask(mask: mx.array | None) -> mx.array:
    return absent(mx.bool_) if mask is None else mask.astype(mx.bool_)


def _state(state: mx.array | None) -> mx.array:
    return absent(mx.float32) if state is None else state.astype(mx.float32)


def _types(q: mx.array, k: mx.array) -> tuple:
    """Template entries that no body names; why they are needed: Launch.template."""
    return ("TQ", q.dtype), ("TK", k.dtype)


def launch_steps(q, k, v, g, beta, state=None, mask=None, tiles: Tiles = TILES) -> Launch:
    """The one launch of the steps; arguments as ops.gated_delta."""
    B, T, Hl, Dk = q.shape
    Dv = v.shape[-1]
    return Launch(
        kernel=STEPS,
        inputs=(
            q, k, v, g.astype(mx.float32), beta.astype(mx.float32), _mask(mask), _state(state),
            T, Hl,
        ),
        template=(
            ("T", v.dtype), *_types(q, k), ("DK", Dk), ("DV", Dv), ("LANES", tiles.lanes),
            ("ROWS", tiles.rows), ("GROUPS", tiles.step_groups), ("TB", tiles.block),
            ("HAS_MASK", int(mask is not None)), ("HAS_STATE", int(state is not None)),
        ),
        grid=(32 * tiles.step_groups, Dv // tiles.step_slice, B * Hl),
        threadgroup=(32 * tiles.step_groups, 1, 1),
        output_shapes=(v.shape, (B, Hl, Dv, Dk)),
        output_dtypes=(v.dtype, mx.float32),
    )  # fmt: skip


def launch_local(q, k, g, beta, mask=None, tiles: Tiles = TILES) -> Launch:
    """First launch of the chunked variant; outputs rm [B, Hl, N, 2C, C], since [B, Hl, N, C]."""
    B, T, Hl, Dk = q.shape
    C = tiles.C
    N = -(-T // C)
    return Launch(
        kernel=LOCAL,
        inputs=(q, k, g.astype(mx.float32), beta.astype(mx.float32), _mask(mask), T, Hl),
        template=(
            ("T", q.dtype), *_types(q, k), ("DK", Dk), ("C", C),
            ("HAS_MASK", int(mask is not None)),
        ),
        grid=(2 * C, N, B * Hl),
        threadgroup=(2 * C, 1, 1),
        output_shapes=((B, Hl, N, 2 * C, C), (B, Hl, N, C)),
        output_dtypes=(mx.float32, mx.float32),
    )  # fmt: skip


def launch_scan(q, k, v, rm, since, state=None, tiles: Tiles = TILES) -> Launch:
    """Second launch of the chunked variant; rm, since: outputs of the first."""
    B, T, Hl, Dk = q.shape
    Dv = v.shape[-1]
    return Launch(
        kernel=SCAN,
        inputs=(q, k, v, rm, since, _state(state), T, Hl),
        template=(
            ("T", v.dtype), *_types(q, k), ("DK", Dk), ("DV", Dv), ("C", tiles.C),
            ("DVS", tiles.slice), ("GROUPS", tiles.groups), ("HAS_STATE", int(state is not None)),
        ),
        grid=(32 * tiles.groups, Dv // tiles.slice, B * Hl),
        threadgroup=(32 * tiles.groups, 1, 1),
        output_shapes=(v.shape, (B, Hl, Dv, Dk)),
        output_dtypes=(v.dtype, mx.float32),
    )  # fmt: skip


def run(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    g: mx.array,
    beta: mx.array,
    state: mx.array | None = None,
    mask: mx.array | None = None,
    route: str = "metal",
    executor: Callable | None = None,
    which: str | None = None,
    tiles: Tiles = TILES,
) -> tuple:
    """The gated delta rule; arguments and results of ops.gated_delta.

    Args:
        route: "metal" or "cuda". executor: Runs a Launch instead of the GPU.
        which: "steps" or "chunked"; None follows the rule. tiles: Sizes.

    Raises:
        ValueError: Shapes disagree, as in ops.gated_delta.
    """
    delta._check_shapes(q, k, v, g, beta, state, mask, tiles.C)
    do = executor or (lambda launch: execute(launch, route))
    which = which or variant(q.shape[1], q.shape[-1], v.shape[-1], tiles)[0]
    if which == "steps":
        o, state = do(launch_steps(q, k, v, g, beta, state, mask, tiles))
        return o, state
    rm, since = do(launch_local(q, k, g, beta, mask, tiles))
    o, state = do(launch_scan(q, k, v, rm, since, state, tiles))
    return o, state


def threadgroup_bytes(Dk: int, tiles: Tiles = TILES) -> int:
    """Largest threadgroup memory of the launches."""
    C, rows = tiles.C, C_tiles(tiles)
    local = C * (C + 4) + 4 * C + 8 * C + rows * rows + 2 * rows
    scan = tiles.slice * (Dk + 4) + 2 * tiles.slice * (C + 4)
    steps = tiles.block * (2 * Dk + tiles.step_slice + 2)
    return 4 * max(local, scan, steps)


def C_tiles(tiles: Tiles) -> int:
    """8-row tiles of a chunk."""
    return tiles.C // 8


def local_products(Dk: int, tiles: Tiles = TILES) -> int:
    """8 x 8 x 8 products of the first launch for a chunk of a head."""
    n, pairs = C_tiles(tiles), tiles.C // 16
    grams = 2 * sum(2 * p + 2 for p in range(pairs)) * 2 * (Dk // 8)
    inverse = sum(d * (n - d) for d in range(1, n)) + n * (n - 1) // 2
    M = sum((2 * p + 2) * (2 * p + 3) for p in range(pairs))
    return grams + inverse + M


def _row_blocks(tiles: Tiles) -> int:
    """32-column blocks of R' (or M) that the scan uses, summed over its pairs of row tiles."""
    return sum(-(-(16 * p + 16) // 32) for p in range(tiles.C // 16))


def scan_products(Dk: int, Dv: int, tiles: Tiles = TILES) -> int:
    """8 x 8 x 8 products of the second launch for a chunk of a head."""
    C, rows = C_tiles(tiles), Dv // 8
    return rows * (3 * C * (Dk // 8) + 2 * _row_blocks(tiles) * 8)


def cost(
    B: int,
    T: int,
    Hl: int,
    Dk: int,
    Dv: int,
    dtype: mx.Dtype,
    state: bool = True,
    mask: bool = False,
    which: str | None = None,
    tiles: Tiles = TILES,
) -> Cost:
    """Work of the launches, as logical traffic of all lanes.

    Args:
        B, T, Hl, Dk, Dv, dtype: Shapes and dtype of the call. state, mask: Whether given.
        which, tiles: As in run.
    """
    which = which or variant(T, Dk, Dv, tiles)[0]
    item, n, C = dtype.size, B * Hl, tiles.C
    gates = 8 + mask
    state_bytes = 4 * Dk * Dv
    if which == "steps":
        slices = Dv // tiles.step_slice
        read = T * (slices * (2 * Dk * item + gates) + Dv * item) + state * state_bytes
        memory = 4 * tiles.block * (2 * Dk + tiles.step_slice + 2)
        written = T * Dv * item + state_bytes
        return Cost(n * read, n * written, n * T * 7 * Dk * Dv, memory, 1)
    N, slices, pairs = -(-T // C), Dv // tiles.slice, C // 16
    local_read = T * gates
    local_read += N * 2 * (16 * pairs + 8 * pairs * (pairs + 1)) * Dk * item
    local_written = N * 4 * (2 * C * C + C)
    each = 2 * C * Dk * item + C * Dk * item * (tiles.slice // 16)  # X; S
    each += 4 * (2 * pairs * 64 + 32 * tiles.groups)  # since
    each += 2 * 4 * 16 * 32 * _row_blocks(tiles)  # R' and M
    scan_read = N * slices * each + T * Dv * item + state * state_bytes
    scan_written = T * Dv * item + state_bytes
    products = local_products(Dk, tiles) + scan_products(Dk, Dv, tiles)
    return Cost(
        n * (local_read + scan_read),
        n * (local_written + scan_written),
        n * N * products * 1024,
        threadgroup_bytes(Dk, tiles),
        2,
    )


def composed_cost(B: int, T: int, Hl: int, Dk: int, Dv: int, dtype: mx.Dtype) -> Cost:
    """Work of ops.gated_delta as MLX runs it: each operation reads its operands and writes its
    result, products are dense, views are free."""
    n, item = B * Hl, dtype.size
    total = [0, 0, 0, 0]

    def op(read, written, flops=0, times=1):
        """Elements of float32 in and out."""
        for i, x in enumerate((4 * read, 4 * written, flops, 1)):
            total[i] += n * x * times if i < 3 else times

    S = Dk * Dv
    if T <= delta.STEPS_AT_MOST:
        for _ in range(T):
            op(2 * Dk + Dv, 2 * Dk + Dv)  # to float32
            op(S, S, S)  # decay
            op(S + Dk, S, S)  # S k
            op(S, Dv, S)
            op(2 * Dv, Dv, Dv, 2)  # error, beta
            op(Dv + Dk, S, S)
            op(2 * S, S, S)
            op(S + Dk, S, S)  # S q
            op(S, Dv, S)
        return Cost(total[0], total[1], total[2], 0, total[3])
    C = min(delta.CHUNK, 1 << (T - 1).bit_length())
    chunks, CC, levels = -(-T // C), C * C, C.bit_length() - 1
    groups = -(-chunks // delta.GROUP)

    def joint(read, written, flops=0, times=1):
        """Once for all chunks of a group; elements of one chunk."""
        op(chunks * read, chunks * written, chunks * flops, times)
        total[3] += (groups - 1) * times

    def chain(read, written, flops=0):
        """Once a chunk."""
        op(read, written, flops, chunks)

    V, K = C * Dv, C * Dk
    joint(2 * K + V, 2 * K + V, 0, 2)  # to float32, heads first
    total[0] -= n * chunks * (2 * K + V) * (4 - item)
    joint(CC, CC, CC, 4)  # segments: where, cumsum, exp, tri
    joint(C, C, C, 2)  # since the start
    joint(2 * K, K, K)  # beta K
    joint(2 * K, CC, 2 * CC * Dk, 2)  # the two Gram matrices
    joint(2 * CC, CC, CC, 3)  # decays, mask
    joint(2 * CC, CC, CC, 2)  # the first merge
    joint(2 * CC, CC, 2 * CC * C, 2 * (levels - 1))
    joint(2 * CC, CC, CC, 2 * (levels - 1))
    joint(2 * K, K, K, 2)  # beta D K, and K to the chunk's end
    joint(V, V, V)  # beta V
    chain(K + S, V, 2 * C * S)  # K S^T
    chain(2 * V, V, V)
    chain(CC + V, V, 2 * CC * Dv)  # P
    chain(S, S, S)
    chain(V + K, S, 2 * C * S)  # P^T K
    chain(2 * S, S, S)
    joint(S + V, S + V, 0, 2)  # states and P of the group side by side
    joint(K + S, V, 2 * C * S)  # Q S^T
    joint(CC + V, V, 2 * CC * Dv)  # its other part of O
    joint(2 * V, V, V, 2)
    joint(V, V, 0, 2)  # tokens first, dtype of v
    return Cost(total[0], total[1], total[2], 0, total[3])
