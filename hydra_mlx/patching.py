"""Activation patching of attention heads (spec section 3), exact and in few rows.

Receiver: head h's output becomes what it is in the corrupted text, the outputs of all later
attention layers stay what they are in the clean one, MLPs are computed anew. With attention frozen,
no position influences another, so only those positions matter whose logits are read: after two full
forwards a head costs A rows through the remaining MLPs, and all heads go through together.

Sender: head s is patched in the same way, but only the current receivers may carry the change:
they alone compute attention anew. Their outputs at the read positions are then put into the clean
run, so that the sender's own direct path does not count. Here positions do matter, through the
receivers' keys and values; those in `positions` are followed, all others count as unchanged. That
is exact when they are all positions from the first difference of the two texts on.
"""

from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from .probes import Pair
from .trunk import Trunk

LAMBDA = 0.9


@dataclass
class Trace:
    """What two forwards, of the clean and the corrupted text, leave behind for some positions.

    Attributes:
        positions: n absolute positions, ascending, the read ones included.
        hidden: L arrays [n, E], clean residual stream at the input of each layer.
        attn: L arrays [n, E], clean attention outputs (after o_proj).
        clean, corrupt: L arrays [n, H, D], heads at the input of o_proj.
        kv: {layer: (keys, values)}, each [Hk, T, D], of the clean text.
        m_clean, m_corrupt: The read-out of both texts.
    """

    positions: list
    hidden: list = field(default_factory=list)
    attn: list = field(default_factory=list)
    clean: list = field(default_factory=list)
    corrupt: list = field(default_factory=list)
    kv: dict = field(default_factory=dict)
    m_clean: float = 0.0
    m_corrupt: float = 0.0

    @property
    def gap(self) -> float:
        """m(x) - m(x'), the denominator of every effect."""
        return self.m_clean - self.m_corrupt


def readout(trunk: Trunk, h: mx.array, pair: Pair) -> mx.array:
    """m = sum_j lambda^j (z_j[a+_j] - z_j[a-_j]) / sum_j lambda^j (spec section 3).

    Args:
        h: [R, A, E] residual stream after the last layer at the read positions.

    Returns:
        [R] float32.
    """
    plus, minus = mx.array(pair.plus), mx.array(pair.minus)
    weights = LAMBDA ** mx.arange(len(pair.minus)).astype(mx.float32)
    direction = trunk.unembedding(plus) - trunk.unembedding(minus)  # [A, E]
    z = (trunk.norm(h).astype(mx.float32) * direction).sum(-1)
    return (z * weights).sum(-1) / weights.sum()


def trace(trunk: Trunk, pair: Pair, positions: list, kv_layers: tuple = ()) -> Trace:
    """Run both texts and keep what patching needs.

    Args:
        positions: To keep; ascending, with all of pair.reads among them.
        kv_layers: Layers whose clean keys and values are kept.
    """
    out = Trace(list(positions))
    # Up to here the two texts are one.
    shared = min(pair.first_change, positions[0])
    keep = mx.array(list(positions)) - shared
    before = trunk.embed(mx.array([pair.clean[:shared]])) if shared else None
    h = trunk.embed(mx.array([pair.clean[shared:], pair.corrupt[shared:]]))
    for layer in range(trunk.L):
        q, k, v = trunk.qkv(layer, h, shared)
        if before is not None:
            q0, k0, v0 = trunk.qkv(layer, before)
            k, v = (
                mx.concatenate([mx.repeat(x, 2, axis=0), y], axis=2) for x, y in ((k0, k), (v0, v))
            )
            y0 = trunk.output(layer, trunk.attend(q0, k0, v0))
            before = trunk.mlp(layer, before + y0)
        heads = trunk.attend(q, k, v)
        y = trunk.output(layer, heads)
        out.hidden.append(h[0][keep])
        out.attn.append(y[0][keep])
        out.clean.append(heads[0][keep])
        out.corrupt.append(heads[1][keep])
        if layer in kv_layers:
            out.kv[layer] = (k[0], v[0])
        h = trunk.mlp(layer, h + y)
        mx.eval(h, before, out.hidden[-1], out.attn[-1], out.clean[-1], out.corrupt[-1], out.kv)
    reads = mx.array(pair.reads) - shared
    m = readout(trunk, h[:, reads], pair)
    out.m_clean, out.m_corrupt = m.tolist()
    mx.clear_cache()
    return out


def narrow(t: Trace, positions: list) -> Trace:
    """The same trace for fewer of its positions."""
    at = mx.array([t.positions.index(p) for p in positions])
    parts = [[x[at] for x in xs] for xs in (t.hidden, t.attn, t.clean, t.corrupt)]
    return Trace(list(positions), *parts, t.kv, t.m_clean, t.m_corrupt)


def busiest(t: Trace, pair: Pair, count: int) -> list:
    """The positions where the two texts' heads differ most, the read positions always included.

    Args:
        count: How many besides the read ones; 0 takes all from the first difference on.
    """
    reads = set(pair.reads)
    rest = [p for p in t.positions if p >= pair.first_change and p not in reads]
    if count and count < len(rest):
        change = np.zeros(len(t.positions))
        for a, b in zip(t.clean, t.corrupt, strict=True):
            a, b = a.astype(mx.float32), b.astype(mx.float32)
            # Relative, so that layers with large outputs do not decide alone.
            ratio = mx.square(b - a).sum(-1) / (mx.square(a).sum(-1) + 1e-9)
            change += np.array(ratio.sum(-1))
        index = {p: i for i, p in enumerate(t.positions)}
        rest = sorted(rest, key=lambda p: (-change[index[p]], p))[:count]
    return sorted([*rest, *reads])


def _each_head_patched(t: Trace, layer: int, at: mx.array | None = None) -> mx.array:
    """[H, n, H, D]: row h has head h corrupted and the others clean."""
    clean, corrupt = t.clean[layer], t.corrupt[layer]
    if at is not None:
        clean, corrupt = clean[at], corrupt[at]
    one = mx.eye(clean.shape[1]).astype(mx.bool_)[:, None, :, None]
    return mx.where(one, corrupt[None], clean[None])


def receiver_drops(trunk: Trunk, t: Trace, pair: Pair) -> mx.array:
    """m(x) - m(x; O_h <- O_h(x')) of every head, later attention frozen (spec section 3).

    Args:
        t: Of the read positions alone.

    Returns:
        [L, H] float32, not yet divided by the gap.
    """
    rows = None
    for layer in range(trunk.L):
        new = t.hidden[layer] + trunk.output(layer, _each_head_patched(t, layer))
        rows = new if rows is None else mx.concatenate([rows + t.attn[layer], new])
        rows = trunk.mlp(layer, rows)
        mx.eval(rows)
    return t.m_clean - readout(trunk, rows, pair).reshape(trunk.L, trunk.H)


def sender_drops(trunk: Trunk, t: Trace, pair: Pair, receivers: list) -> mx.array:
    """m(x) - m(x; O_r <- O_r(x; O_s <- O_s(x')) for the receivers r) of every head s.

    Args:
        t: Of the positions to follow, with kv of every layer that has receivers.
        receivers: L lists of heads.

    Returns:
        [L, H] float32, zero where no receiver comes later.
    """
    last = max((i for i, heads in enumerate(receivers) if heads), default=0)
    reads = mx.array([t.positions.index(p) for p in pair.reads])
    drops = []
    for layer in range(trunk.L):
        if layer >= last:
            drops.append(mx.zeros(trunk.H))
            continue
        rows = t.hidden[layer] + trunk.output(layer, _each_head_patched(t, layer))
        rows, caught = trunk.mlp(layer, rows), {}
        for i in range(layer + 1, last + 1):
            attn = t.attn[i]
            if receivers[i]:
                heads = _live_heads(trunk, t, i, rows, receivers[i])
                caught[i] = heads[:, reads]
                attn = trunk.output(i, heads)
            if i < last:
                rows = trunk.mlp(i, rows + attn)
                mx.eval(rows)
        drops.append(t.m_clean - _replayed(trunk, t, pair, reads, caught))
        mx.eval(drops[-1])
    mx.clear_cache()
    return mx.stack(drops)


def _live_heads(trunk: Trunk, t: Trace, layer: int, h: mx.array, heads: list) -> mx.array:
    """[R, n, H, D]: clean heads, those in `heads` computed anew from patched rows [R, n, E]."""
    positions = mx.array(t.positions, mx.int32)
    q, k, v = trunk.qkv(layer, h, positions)
    readers = mx.array([head // (trunk.H // trunk.Hk) for head in heads])
    q, k, v = q[:, mx.array(heads)], k[:, readers], v[:, readers]  # [R, N, n, D]
    R, N, n, D = q.shape
    keys, values = t.kv[layer]
    followed = set(t.positions)
    others = mx.array([p for p in range(positions[-1].item() + 1) if p not in followed], mx.int32)
    keys, values = keys[readers][:, others], values[readers][:, others]  # [N, M, D]
    flat = q.swapaxes(0, 1).reshape(N, R * n, D)
    outside = (flat @ keys.swapaxes(1, 2)).reshape(N, R, n, -1).swapaxes(0, 1)
    inside = q @ k.swapaxes(2, 3)
    scores = mx.concatenate([outside, inside], -1).astype(mx.float32) * D**-0.5
    seen = positions[:, None] >= mx.concatenate([others, positions])[None]
    weights = mx.softmax(mx.where(seen, scores, -mx.inf), axis=-1).astype(v.dtype)
    outside, inside = weights[..., : others.size], weights[..., others.size :]
    y = outside.swapaxes(0, 1).reshape(N, R * n, -1) @ values
    y = y.reshape(N, R, n, D).swapaxes(0, 1) + inside @ v
    out = mx.broadcast_to(t.clean[layer][None], (R, n, trunk.H, D)) + 0
    out[:, :, mx.array(heads)] = y.swapaxes(1, 2)
    return out


def _replayed(trunk: Trunk, t: Trace, pair: Pair, reads: mx.array, caught: dict) -> mx.array:
    """[R] read-outs of the clean run with the receivers' outputs replaced, all else frozen."""
    first = min(caught)
    rows = t.hidden[first][reads][None]
    for layer in range(first, trunk.L):
        attn = trunk.output(layer, caught[layer]) if layer in caught else t.attn[layer][reads]
        rows = trunk.mlp(layer, rows + attn)
    return readout(trunk, rows, pair)


def effects(drops: mx.array, gap: float) -> list:
    """IE = clip(drop / gap, 0, 1), L lists of H numbers."""
    ratio = np.array(drops, np.float64) / gap
    return np.clip(ratio, 0.0, 1.0).tolist()


def receiver_effects(trunk: Trunk, pair: Pair, min_gap: float) -> list | None:
    """Receiver effects of every head; None where m(x) - m(x') is under min_gap."""
    t = trace(trunk, pair, pair.reads)
    if not t.gap > min_gap:
        return None
    return effects(receiver_drops(trunk, t, pair), t.gap)


def sender_effects(
    trunk: Trunk, pair: Pair, receivers: list, min_gap: float, positions: int
) -> list | None:
    """Sender effects of every head into the receivers; None as in receiver_effects.

    Args:
        receivers: L lists of heads. positions: See busiest.
    """
    layers = tuple(i for i, heads in enumerate(receivers) if heads)
    start = min(pair.first_change, pair.reads[0])
    t = trace(trunk, pair, list(range(start, len(pair.clean))), layers)
    if not t.gap > min_gap:
        return None
    t = narrow(t, busiest(t, pair, positions))
    return effects(sender_drops(trunk, t, pair, receivers), t.gap)
