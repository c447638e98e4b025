"""The model that programs use without --model: it lies inside this package."""

from pathlib import Path

from .errors import UsageError
from .folder import is_whole

NAME = "SmolLM2-135M-HydraHead"
PLACE = Path(__file__).parent / "models" / NAME


def folder() -> Path:
    """Where the model is; nothing is ever written there.

    Raises:
        UsageError: It is not there, or some of its files are not.
    """
    if not is_whole(PLACE):
        raise UsageError(
            f"The default model is missing or not whole: {PLACE}",
            "Install hydra_mlx again from a complete clone, or give a model.",
        )
    return PLACE
