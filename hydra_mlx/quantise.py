"""What is quantised, to how many bits, and what never is."""

import re
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from .config import HydraArgs
from .errors import ConfigError, UsageError
from .protected import is_protected
from .tensors import Packed, to_float

# mode -> (bits allowed, groups allowed, default bits, default group)
MODES = {
    "affine": ((2, 3, 4, 5, 6, 8), (32, 64, 128), 4, 64),
    "mxfp4": ((4,), (32,), 4, 32),
    "nvfp4": ((4,), (16,), 4, 16),
    "mxfp8": ((8,), (32,), 8, 32),
}
# name -> (low bits, high bits), as in mlx_lm.convert; high ones go where its recipes put them.
MIXED = {
    "mixed_2_6": (2, 6),
    "mixed_3_4": (3, 4),
    "mixed_3_6": (3, 6),
    "mixed_4_6": (4, 6),
}
EMBED = {"embed_6": 6, "embed_8": 8}  # bits of the embedding and the output head
RECIPES = (*MIXED, *EMBED)
MATRICES = (
    "in_proj q_proj k_proj v_proj gate_proj o_proj up_proj gate_up_proj down_proj "
    "embed_tokens lm_head"
).split()


@dataclass(frozen=True)
class QuantPlan:
    """How to quantise a model.

    Attributes:
        bits, group_size, mode: As in mx.quantize. recipe: One of RECIPES or None.
        protect: Regular expressions of tensor paths to leave unquantised, besides those that
            always are (gates of the recurrence, convolutions, norms).
        layers: L, which the mixed recipes need.
    """

    bits: int
    group_size: int
    mode: str
    recipe: str | None
    protect: tuple
    layers: int

    def params(self, path: str, width: int) -> dict | None:
        """mx.quantize parameters for the module at `path`, or None to leave it alone.

        Args:
            path: Module path such as "model.layers.3.mlp.down_proj". width: Its input size.
        """
        if path.rsplit(".", 1)[-1] not in MATRICES or is_protected(path):
            return None
        if any(re.search(p, path) for p in self.protect):
            return None
        if width % self.group_size:
            return None
        return {"group_size": self.group_size, "bits": self._bits(path), "mode": self.mode}

    def _bits(self, path: str) -> int:
        name = path.rsplit(".", 1)[-1]
        if self.recipe is None:
            return self.bits
        if self.recipe in EMBED:
            return EMBED[self.recipe] if name in ("embed_tokens", "lm_head") else self.bits
        low, high = MIXED[self.recipe]
        if name == "lm_head":
            return high
        parts = path.split(".")
        index = int(parts[2]) if parts[1] == "layers" else 0
        eighth = self.layers // 8
        more = index < eighth or index >= 7 * self.layers // 8 or (index - eighth) % 3 == 2
        # The fused input projection holds the value rows that the recipes give more bits.
        return high if more and name in ("in_proj", "v_proj", "down_proj") else low


def make_plan(
    args: HydraArgs,
    bits: int | None,
    group_size: int | None,
    mode: str,
    recipe: str | None,
    protect: tuple,
) -> QuantPlan:
    """Fill in the defaults of a mode and refuse what MLX cannot do.

    Raises:
        UsageError: Bits, group or recipe do not go with the mode, or a pattern is no regex.
    """
    if mode not in MODES:
        raise UsageError(f"--q-mode is {mode!r}, expected one of {', '.join(MODES)}.")
    all_bits, groups, default_bits, default_group = MODES[mode]
    bits = default_bits if bits is None else bits
    group_size = default_group if group_size is None else group_size
    for flag, value, allowed in (
        ("--q-bits", bits, all_bits),
        ("--q-group-size", group_size, groups),
    ):
        if value not in allowed:
            raise UsageError(f"{flag} is {value}; {mode} takes {', '.join(map(str, allowed))}.")
    if recipe is not None and recipe not in RECIPES:
        raise UsageError(f"--recipe is {recipe!r}, expected one of {', '.join(RECIPES)}.")
    if recipe is not None and mode != "affine":
        raise UsageError(f"--recipe {recipe} needs --q-mode affine, not {mode}.")
    for pattern in protect:
        try:
            re.compile(pattern)
        except re.error as e:
            raise UsageError(f"--protect {pattern!r} is no regular expression ({e}).") from None
    return QuantPlan(bits, group_size, mode, recipe, tuple(protect), args.num_hidden_layers)


def require_effect(plan: QuantPlan, shapes: dict):
    """Refuse a plan, or one of its patterns, that would change nothing.

    Args:
        shapes: {tensor name: shape} of the model to be written.

    Raises:
        UsageError: No matrix can be quantised, or a --protect pattern matches no matrix.
    """
    names = {n.removesuffix(".weight"): s for n, s in shapes.items() if len(s) == 2}
    names = {n: s for n, s in names.items() if n.rsplit(".", 1)[-1] in MATRICES}
    for pattern in plan.protect:
        if not any(re.search(pattern, n) for n in names):
            raise UsageError(f"--protect {pattern!r} matches no matrix of this model.")
    if not any(plan.params(n, s[1]) for n, s in names.items()):
        raise UsageError(
            "-q would quantise nothing: every matrix is protected, or no row length is a "
            f"multiple of the group size {plan.group_size}.",
            "Choose a smaller --q-group-size, or leave -q out.",
        )


def packed_format(config: dict, path: str) -> dict:
    """bits, group_size and mode of the quantised module at `path`, from config.json.

    Raises:
        ConfigError: They are not there or are none that MLX has.
    """
    q = config.get("quantization") or config.get("quantization_config")
    own = q.get(path) if isinstance(q, dict) else None
    both = {**q, **own} if isinstance(own, dict) else q
    try:
        out = {k: both[k] for k in ("bits", "group_size")}
        out["mode"] = both.get("mode", "affine")
        all_bits, groups, *_ = MODES[out["mode"]]
        if out["bits"] in all_bits and out["group_size"] in groups:
            return out
    except (TypeError, KeyError, AttributeError):
        pass
    raise ConfigError(
        f'config.json: "quantization" gives {path} no bits and group_size that MLX knows.'
    )


def quantise_matrix(x: Any, params: dict) -> Packed:
    """A matrix [N, K] in the format `params`; one that has it already passes unchanged.

    Scales and biases are kept in the type of the weights (float16 or bfloat16 stay small).
    """
    if isinstance(x, Packed) and x.format[:3] == (
        params["bits"],
        params["group_size"],
        params["mode"],
    ):
        return x
    if isinstance(x, Packed):
        x = to_float(x, x.scales.dtype if x.mode == "affine" else mx.bfloat16)
    weight, scales, *biases = mx.quantize(x, **params)
    biases = biases[0] if biases else None
    return Packed(weight, scales, biases, params["bits"], params["group_size"], params["mode"])
