"""hydra_mlx: long-context local inference for head-hybrid (HydraHead) models on MLX.

model, tokenizer = hydra_mlx.load("path")
for part in hydra_mlx.stream_generate(model, tokenizer, "prompt"): print(part.text, end="")
"""

import importlib
from typing import TYPE_CHECKING

from . import blas

if TYPE_CHECKING:  # what type checkers see; at run time these come when they are asked for
    from .config import HydraArgs
    from .errors import HydraError
    from .generation import generate, stream_generate
    from .loading import load, load_model
    from .model import Model
    from .registry import register

# Must come before anything imports mlx.core; costs a dlopen on Linux and nothing elsewhere.
blas.preload()

__version__ = "0.1.0"

_PUBLIC = {
    "HydraArgs": "config",
    "HydraError": "errors",
    "Model": "model",
    "load": "loading",
    "load_model": "loading",
    "register": "registry",
    "generate": "generation",
    "stream_generate": "generation",
}
__all__ = [
    "HydraArgs",
    "HydraError",
    "Model",
    "generate",
    "load",
    "load_model",
    "register",
    "stream_generate",
]

if not TYPE_CHECKING:

    def __getattr__(name: str):
        if name not in _PUBLIC:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)
        globals()[name] = value
        return value


def __dir__() -> list:
    return sorted([*globals(), *_PUBLIC])
