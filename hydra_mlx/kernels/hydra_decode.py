"""Both kinds of head of a layer for at most 8 tokens, in two dispatches.

hydra_decode.metal does all LA heads and the first attention pass of all FA heads side by side, from
the fused projection's rows; hydra_combine.metal joins the splits and lays FA and LA heads next to
each other, as the output projection wants them. The new keys and values come from the rows too, and
go out as arrays for the cache: storing them gates nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import mlx.core as mx

from . import fa_decode, la_decode
from .cost import Cost
from .fa_decode import KeyValues
from .la_decode import LaLayer
from .loader import Kernel, Launch, absent, execute, few

# The scan of keys rules a step, so threadgroups have its size: 8 SIMD-groups. An LA head then keeps
# 64 floats of state a lane at D = 128, which a threadgroup of 256 has registers for.
SIMDGROUPS = fa_decode.SIMDGROUPS
COMBINE_SIMDGROUPS = fa_decode.COMBINE_SIMDGROUPS

KERNEL = Kernel(
    "hydra_decode",
    (
        "x", "ab", "tail", "state", "A_log", "dt_bias", "conv_weight", "q_norm", "k_norm",
        "out_norm", "inv_freq", "offset", "floats", "fa_q_norm", "fa_k_norm", "keys", "k_scales",
        "k_biases", "values", "v_scales", "v_biases", "work", "sizes", "plan",
    ),
    ("y_la", "state_out", "tail_out", "part", "stats", "new_k", "new_v"),
    headers=("la_decode.h", "fa_common.h", "fa_decode.h", "hydra_decode.h"),
)  # fmt: skip
COMBINE = Kernel(
    "hydra_combine",
    ("part", "stats", "y_la", "x", "weight", "splits", "Hf", "N", "W", "gate_row"),
    ("y",),
    scalars=("splits", "Hf", "N", "W", "gate_row"),
    headers=("fa_common.h", "fa_combine.h"),
)


@dataclass(frozen=True)
class HydraLayer:
    """What the two kernels need of one layer, gathered once.

    Attributes:
        la: The LA half. Hk: Key/value heads kept. kv_of_fa: LayerHeads.kv_of_fa.
        q_norm, k_norm: [D] of the FA heads. inv_freq: [D/2] float32 if either kind turns.
        fa_rope: Whether FA heads turn. floats: [eps of the q/k norms, factor of RoPE's input, scale
            of the scores, a of the log-length scale]. out_norm: [D], the FA fusion norm.
            Absent ones are None.
        gate, position: fa_gate and fa_gate_position of the config.
        why_not: "" or why no kernel can do this layer.
        plans: What launches of the same kind share; a decode step has no time to work it out.
    """

    la: LaLayer
    Hk: int
    kv_of_fa: tuple
    q_norm: mx.array | None
    k_norm: mx.array | None
    inv_freq: mx.array | None
    fa_rope: bool
    floats: mx.array
    out_norm: mx.array | None
    gate: str | None
    position: str
    why_not: str = ""
    plans: dict = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, mixer: Any) -> "HydraLayer":
        """Gather from a FusedMixer that has heads of both kinds."""
        args, la = mixer.args, LaLayer.of(mixer)
        inv_freq, factor, why_not = None, 1.0, la.why_not
        if args.fa_rope or args.la_rope:
            inv_freq, factor, why_not = la_decode.rope_frequencies(mixer.rope, args.head_dim)
        a = 0.0 if args.logit_scale_a is None else args.logit_scale_a
        floats = [args.rms_norm_eps, factor, args.head_dim**-0.5, a]
        return cls(
            la=la,
            Hk=len(mixer.heads.kv),
            kv_of_fa=tuple(mixer.heads.kv_of_fa),
            q_norm=mixer.weight("fa_q_norm") if args.fa_qk_norm else None,
            k_norm=mixer.weight("fa_k_norm") if args.fa_qk_norm else None,
            inv_freq=None if inv_freq is None else mx.array(inv_freq),
            fa_rope=args.fa_rope,
            floats=few(floats, mx.float32),
            out_norm=mixer.weight("fa_norm"),
            gate=args.fa_gate,
            position=args.fa_gate_position,
            why_not=why_not,
        )

    @property
    def Hf(self) -> int:
        """FA heads."""
        return len(self.kv_of_fa)

    @property
    def norm(self) -> str | None:
        """What the FA fusion norm still has to do; its weight may be folded away."""
        plain = self.la.norm == "rms" and self.out_norm is None
        return "rms_no_weight" if plain else self.la.norm


def cached(cache: Any) -> KeyValues | None:
    """What a cache of keys and values holds before the new tokens; None for none or nothing."""
    empty = cache is None or cache.keys is None or not cache.offset
    return None if empty else KeyValues.of(cache)


def eligible(
    layer: HydraLayer,
    x: mx.array,
    ab: mx.array,
    cache: Any,
    fa_mask: Any = None,
    la_mask: mx.array | None = None,
    lengths: mx.array | None = None,
) -> tuple:
    """Whether the kernels can do this step: (ok, reason).

    Args:
        layer: The layer. x: [B, T, W], output of the fused projection. ab: [B, T, 2*Hl].
        cache: Keys and values, not yet updated with the new tokens, or None.
        fa_mask, la_mask: Of Step; None and "causal" are right. lengths: ArraysCache.lengths.
    """
    ok, reason = la_decode.eligible(layer.la, x, ab, la_mask, lengths)
    if not ok:
        return ok, reason
    if layer.why_not:
        return False, layer.why_not
    if isinstance(fa_mask, mx.array):
        return False, "an array as mask"
    if not 1 <= layer.Hf <= 32:
        return False, f"{layer.Hf} FA heads, expected 1 to 32"
    if cache is None:
        return True, "no cache"
    if not isinstance(cache.offset, int) or not hasattr(cache, "keys"):
        return False, f"a {type(cache).__name__}"
    if getattr(cache, "shared", ()):
        return False, "keys and values shared with forks"
    kv = cached(cache)
    if kv is None:
        return True, "empty cache"
    why_not = fa_decode.check_cache(kv, layer.Hf)
    if why_not:
        return False, why_not
    if kv.dims != (layer.la.D, layer.la.D) or kv.parts[0].shape[:2] != (x.shape[0], layer.Hk):
        return False, f"cache {kv.parts[0].shape} does not fit {layer.Hk} heads of {layer.la.D}"
    return True, f"T <= {la_decode.MAX_TOKENS}"


@lru_cache(maxsize=64)
def _ints(*values: int) -> mx.array:
    """A small int32 array; the layers of a step share it."""
    return few(list(values))


def launch(
    layer: HydraLayer,
    x: mx.array,
    ab: mx.array,
    offset: Any,
    tail: mx.array | None,
    state: mx.array,
    kv: KeyValues | None,
    cores: int = fa_decode.CORES["cuda"],
    splits: tuple | None = None,
    simdgroups: int = SIMDGROUPS,
    unroll: int | None = None,
    lanes: int | None = None,
    max_rows: int = fa_decode.MAX_ROWS,
    per_core: int = fa_decode.GROUPS_PER_CORE,
) -> Launch:
    """The first dispatch.

    Args:
        layer to state: As la_decode.launch. kv: The cache without the new tokens, None if empty.
        cores: Of the GPU. splits: (number, keys of one) of the cached keys, not split_plan's.
        simdgroups, unroll, lanes, max_rows, per_core: As fa_decode.launch.

    Returns:
        Outputs y_la [B, T, Hl, D], state, tail, part [B, T, Hf, splits + 1, D] and stats
        [..., 2] float32, new_k and new_v [B, Hk, T, D].
    """
    offset = la_decode.offset_array(offset)
    kind = None if kv is None else (kv.dtype, kv.widths, kv.group_size)
    sizes = (simdgroups, unroll, lanes, max_rows)
    key = (x.shape, x.dtype, ab.dtype, offset.size, kind, sizes)
    plan = layer.plans.get(key)
    if plan is None:
        plan = layer.plans[key] = _plan(layer, x, ab, offset, kv, *sizes)
    if kv is None:
        n, keys, S, allocated = 0, 1, 0, 0
    else:
        n, keys = splits or fa_decode.split_plan(kv.S, plan.columns, plan.step, cores, per_core)
        S, allocated = kv.S, kv.allocated
    return Launch(
        KERNEL,
        (
            x, ab, tail if layer.la.taps else x, state, *plan.weights, offset, layer.floats,
            *plan.norms, *((x,) * 6 if kv is None else kv.buffers(x)), *plan.tables,
            _ints(S, allocated, n, keys),
        ),
        plan.template,
        (plan.fixed_threads + plan.split_threads * (n + 1), 1, 1),
        (32 * simdgroups, 1, 1),
        (*plan.la_shapes, (*plan.rows, n + 1, layer.la.D), (*plan.rows, n + 1, 2), *plan.new),
        plan.dtypes,
    )  # fmt: skip


@dataclass(frozen=True)
class _Plan:
    """What launches of one layer and kind share.

    Attributes:
        columns: Threadgroups of one split. step: Keys that one takes at a time.
        weights, norms, tables: Inputs. fixed_threads: Of LA heads and new keys; split_threads: of
            one split. rows: (B, T, Hf). la_shapes, new, dtypes: Of outputs.
    """

    columns: int
    step: int
    weights: tuple
    norms: tuple
    tables: tuple
    template: tuple
    fixed_threads: int
    split_threads: int
    rows: tuple
    la_shapes: tuple
    new: tuple
    dtypes: tuple


def _plan(layer, x, ab, offset, kv, simdgroups, unroll, lanes, max_rows) -> _Plan:
    la, (B, T, W) = layer.la, x.shape
    D, Hf, Hk = la.D, layer.Hf, layer.Hk
    R, items, work = fa_decode.work_table(layer.kv_of_fa, T, max_rows)
    if kv is None:
        dtype, bits, group, L, U = x.dtype, (8 * x.dtype.size,) * 2, 1, D // 8, 1
    else:
        dtype, bits, group = kv.dtype, kv.widths, kv.group_size or 1
        L, U = fa_decode.tile(kv, R)
        L, U = lanes or L, unroll or U
    norms = tuple(absent(mx.float32) if w is None else w for w in (layer.q_norm, layer.k_norm))
    shapes, dtypes = la_decode.la_outputs(la, B, T, x.dtype)
    return _Plan(
        columns=B * len(items),
        step=U * 32 // L * simdgroups,
        weights=la_decode.la_weights(la, layer.inv_freq),
        norms=norms,
        tables=(work, _ints(T, B, la.heads, Hf, Hk, W, len(items))),
        template=(
            *la_decode.la_template(la, x, ab, offset), ("FQ", norms[0].dtype),
            ("FK", norms[1].dtype), ("FA_NORM", int(layer.q_norm is not None)),
            ("FA_ROPE", int(layer.fa_rope)), ("C", dtype), ("KBITS", bits[0]),
            ("VBITS", bits[1]), ("GROUP", group), ("L", L), ("R", R), ("U", U), ("SG", simdgroups),
        ),
        fixed_threads=32 * simdgroups * B * (la.heads + Hk),
        split_threads=32 * simdgroups * B * len(items),
        rows=(B, T, Hf),
        la_shapes=shapes,
        new=((B, Hk, T, D), (B, Hk, T, D)),
        dtypes=(*dtypes, mx.float32, mx.float32, x.dtype, x.dtype),
    )  # fmt: skip


def combine_launch(
    layer: HydraLayer,
    part: mx.array,
    stats: mx.array,
    y_la: mx.array,
    x: mx.array,
    simdgroups: int = COMBINE_SIMDGROUPS,
) -> Launch:
    """The second dispatch; its output is [B, T, (Hf + Hl) * D], FA heads first."""
    B, T, Hf, splits, D = part.shape
    W, N = x.shape[-1], layer.la.heads * D
    gate = {None: 0, "headwise": Hf, "elementwise": Hf * D}[layer.gate]
    weight = layer.out_norm if layer.norm == "rms" else None
    return Launch(
        COMBINE,
        (part, stats, y_la, x, part if weight is None else weight, splits, Hf, N, W, W - gate),
        (
            ("X", x.dtype), ("WT", mx.float32 if weight is None else weight.dtype), ("D", D),
            ("SG", simdgroups), ("GATE", fa_decode.GATES[layer.gate]),
            ("POST", int(layer.position == "post_norm")), ("NORM", fa_decode.NORMS[layer.norm]),
        ),
        (32 * simdgroups * B * T * (Hf + 1), 1, 1),
        (32 * simdgroups, 1, 1),
        ((B, T, Hf * D + N),),
        (x.dtype,),
    )  # fmt: skip


def run(
    layer: HydraLayer,
    x: mx.array,
    ab: mx.array,
    offset: Any,
    tail: mx.array | None,
    state: mx.array | None,
    kv: KeyValues | None,
    route: str = "metal",
    executor: Callable | None = None,
    **options: Any,
) -> tuple:
    """One step of all heads of a layer.

    The caller stores new_k and new_v in the cache afterwards (cache.update_and_fetch). Nothing of
    this step reads what that gives, so MLX does it when the next step asks for the cache; if this
    step's kernels are done by then it takes over the cache's buffer, as with stock caches.

    Args:
        layer to kv: As launch; tail and state None mean zeros. route: "metal" or "cuda".
        executor: Runs a Launch instead of the GPU. options: cores, splits and the sweepable
            numbers of launch.

    Returns:
        y [B, T, (Hf + Hl) * D] in stored head order, state [B, Hl, D, D], tail, new_k and new_v
        [B, Hk, T, D].
    """
    go = executor or (lambda a: execute(a, route))
    options.setdefault("cores", fa_decode.CORES[route])
    tail, state = la_decode.fresh(layer.la, x.shape[0], x.dtype, tail, state)
    first = launch(layer, x, ab, offset, tail, state, kv, **options)
    y_la, state, tail, part, stats, new_k, new_v = go(first)
    (y,) = go(combine_launch(layer, part, stats, y_la, x))
    if not layer.la.taps:
        tail = la_decode.empty_tail(layer.la, x.shape[0], x.dtype)
    return y, state, tail, new_k, new_v


def cost(first: Launch, second: Launch, layer: HydraLayer) -> Cost:
    """Work of the two dispatches, as logical traffic of all lanes."""
    t = dict(first.template)
    la, x, ab = layer.la, first.inputs[0], first.inputs[1]
    B, T, _ = x.shape
    D, R, SG, item = t["D"], t["R"], t["SG"], x.itemsize
    Hf, Hk, lanes = layer.Hf, layer.Hk, 32 * t["SG"]
    _, items, _ = fa_decode.work_table(layer.kv_of_fa, T, R)
    S, _, n, keys = (int(i) for i in first.inputs[-1])
    scanned, row = fa_decode.scanned_keys(t, S, n, keys), fa_decode.scanned_bytes(t, D, D)
    turn = 2 * D if layer.fa_rope else 0  # D/2 frequencies of 4 bytes
    q_vector = D * item + turn + (D * t["FQ"].size if t["FA_NORM"] else 0)
    k_vector = 2 * D * item + turn + (D * t["FK"].size if t["FA_NORM"] else 0)  # and its value
    groups = B * (n + 1)
    read = B * Hk * T * k_vector + B * len(items) * T * k_vector
    read += groups * T * Hf * q_vector + B * len(items) * scanned * row
    # The table of work: every lane the head, a SIMD-group its rows, and every lane all of them.
    read += groups * len(items) * (4 * lanes + 4 * 32 * R)
    read += B * len(items) * (n * lanes * 4 * R + 32 * R * 4)
    written = groups * T * Hf * 4 * D + groups * T * Hf * 8 + 2 * B * Hk * T * D * item
    flops = 4 * B * len(items) * R * D * (scanned + T)
    tm = t["TM"]
    floats = max(4 * tm * D, R * D + max(SG * (D + 4), 2 * tm * D))
    fa = Cost(read, written, flops, 4 * floats + 8 * tm, 0)
    return la_decode.cost(la, B, T, x.dtype, ab.dtype) + fa + combine_cost(second)


def combine_cost(second: Launch) -> Cost:
    """Work of the second dispatch."""
    t = dict(second.template)
    B, T, Hf, splits, D = second.inputs[0].shape
    N, item = second.inputs[7], t["X"].size
    read = Hf * fa_decode.join_bytes(t, splits, D, t["X"], t["WT"]) + N * item
    return Cost(
        B * T * read, B * T * (Hf * D + N) * item, 2 * B * T * Hf * splits * D, 4 * t["SG"] * D, 1
    )  # fmt: skip


def composed_cost(
    layer: HydraLayer, x: mx.array, ab: mx.array, q: mx.array, kv: KeyValues, gate: Any
) -> Cost:
    """Work of the same step on MLX operations: both kinds, q/k norms, cache append, concatenation.

    Args:
        layer, x, ab: As launch. q: [B, T, Hf, D]. kv: The cache with the new tokens.
        gate: [B, T, Hf, D or 1] or None.
    """
    B, T, _ = x.shape
    la = la_decode.composed_cost(layer.la, B, T, x.dtype, ab.dtype)
    fa = fa_decode.composed_cost(q, kv, layer.kv_of_fa, gate, layer.norm)
    new = B * T * layer.Hk * layer.la.D * x.itemsize
    y = B * T * (layer.Hf + layer.la.heads) * layer.la.D * x.itemsize
    norms = 2 * (layer.q_norm is not None)
    moved = (q.nbytes + new) * bool(norms) + 2 * new + y
    return la + fa + Cost(moved, moved, 0, 0, norms + 2 + 2)
