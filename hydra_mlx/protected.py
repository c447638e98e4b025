"""Tensors that are never quantised and never cast below float32, by name."""

# Gates of the recurrence (spec section 1).
FLOAT32_NAMES = ("A_log", "dt_bias", "head_scale")
PROTECTED_NAMES = (*FLOAT32_NAMES, "ab_proj", "a_proj", "b_proj", "conv_weight", "conv1d")


def is_protected(path: str) -> bool:
    """Whether a module or tensor must stay unquantised whatever recipe is asked for."""
    return any(part in PROTECTED_NAMES or "conv1d" in part for part in path.split("."))
