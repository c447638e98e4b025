"""hydra_mlx: long-context local inference for head-hybrid (HydraHead) models on MLX.

model, tokenizer = hydra_mlx.load("path")
for part in hydra_mlx.stream_generate(model, tokenizer, "prompt"): print(part.text, end="")
"""

import importlib

from . import blas

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
__all__ = sorted(_PUBLIC)


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted([*globals(), *_PUBLIC])
