"""Rows of the fused input projection: what the converter writes and the FusedMixer reads."""

from dataclasses import dataclass

from .config import HydraArgs, layer_heads


@dataclass(frozen=True)
class FusedRows:
    """Row blocks of the fused input projection, in order; each is a number of rows.

    la_qkv 3*Hl*D (q, k, v), la_gate Hl*D or 0, fa_q Hf*D, fa_k and fa_v Hk*D each, fa_gate Hf*D,
    Hf or 0.
    """

    la_qkv: int
    la_gate: int
    fa_q: int
    fa_k: int
    fa_v: int
    fa_gate: int

    @property
    def total(self) -> int:
        """Rows in all."""
        return sum(vars(self).values())

    @property
    def ends(self) -> list:
        """Where each block but the last ends."""
        ends, n = [], 0
        for rows in list(vars(self).values())[:-1]:
            n += rows
            ends.append(n)
        return ends


def fused_rows(args: HydraArgs, layer: int) -> FusedRows:
    """Row blocks of one layer's fused input projection."""
    heads, D = layer_heads(args, layer, "fused"), args.head_dim
    Hf, Hl, Hk = len(heads.fa), len(heads.la), len(heads.kv)
    gate = {None: 0, "headwise": Hf, "elementwise": Hf * D}[args.fa_gate]
    la_gate = 0 if args.la_output_gate is None else Hl * D
    return FusedRows(3 * Hl * D, la_gate, Hf * D, Hk * D, Hk * D, gate)


def fused_bias(args: HydraArgs, layer: int) -> bool:
    """Whether the fused input projection has a bias: the FA gate's, or attention_bias."""
    has_gate = args.fa_gate is not None and bool(args.full_attention_heads[layer])
    return has_gate or args.attention_bias
