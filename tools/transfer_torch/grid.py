"""Training on the grid of the quantised model: weights are rounded for the forward pass.

The gradient at the rounded weights moves the exact ones (straight-through estimation: Bengio et
al., arXiv 1308.3432), so what `hydra-mlx convert -q` rounds afterwards is what was trained.
"""

from dataclasses import dataclass

from hydra_mlx.protected import is_protected

import torch
from torch import Tensor

EPS = 1e-7  # the least step, as in MLX


@dataclass(frozen=True)
class Format:
    """Bits of matrices, weights a group, bits of the embedding; affine, as in mx.quantize."""

    bits: int
    group: int
    embed_bits: int

    @classmethod
    def parse(cls, text: str) -> "Format":
        """Of "4,64,6"."""
        return cls(*(int(x) for x in text.split(",")))


def affine(w: Tensor, bits: int) -> Tensor:
    """Groups [N, group] in float32 to the values that mx.quantize and dequantize give them.

    The end of the range that is farther from 0 is met exactly, and 0 is a value of the grid.
    """
    low, high = w.amin(1, keepdim=True), w.amax(1, keepdim=True)
    top = 2**bits - 1
    step = ((high - low) / top).clamp(min=EPS)
    from_low = low.abs() > high.abs()
    step, edge = torch.where(from_low, step, -step), torch.where(from_low, low, high)
    zero = torch.round(edge / step)
    bias = torch.where(zero != 0, edge, torch.zeros_like(edge))
    step = torch.where(zero != 0, edge / zero, step)
    return torch.round((w - bias) / step).clamp(0, top) * step + bias


class Grid:
    """Rounds the matrices of a model in place and puts the exact values back.

    Args:
        tensors: The weights by name; those that `hydra-mlx convert -q` quantises are used.
    """

    def __init__(self, tensors: dict[str, Tensor], form: Format):
        embed = "model.embed_tokens.weight"
        layers = [
            t for n, t in tensors.items()
            if t.ndim == 2 and n != embed and not is_protected(n.removesuffix(".weight"))
        ]  # fmt: skip
        wrong = [t.shape for t in (*layers, tensors[embed]) if t.shape[1] % form.group]
        if wrong:
            raise ValueError(f"groups of {form.group} do not fit rows of {wrong[0][1]}")
        self.form = form
        self.parts = [(layers, form.bits), ([tensors[embed]], form.embed_bits)]
        self.exact: list[Tensor] = []

    @torch.no_grad()
    def round(self) -> None:
        """Replaces the weights by their rounded values until `restore`."""
        self.exact = [torch.cat([t.flatten() for t in tensors]) for tensors, _ in self.parts]
        for (tensors, bits), flat in zip(self.parts, self.exact, strict=True):
            # Groups lie along rows, so all matrices are one list of groups.
            self._put(tensors, affine(flat.view(-1, self.form.group), bits).flatten())

    @torch.no_grad()
    def restore(self) -> None:
        """Puts the exact weights back."""
        for (tensors, _), flat in zip(self.parts, self.exact, strict=True):
            self._put(tensors, flat)
        self.exact = []

    def _put(self, tensors: list[Tensor], flat: Tensor) -> None:
        pieces = flat.split([t.numel() for t in tensors])
        torch._foreach_copy_(tensors, [p.view_as(t) for p, t in zip(pieces, tensors, strict=True)])
