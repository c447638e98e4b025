"""OpenBLAS under MLX's CPU backend on Linux.

MLX's Linux wheel carries the reference BLAS (2 to 5 GFLOP/s in float32); with OpenBLAS loaded
first, the same calls reach 70 to 190. Only the order matters: it must be loaded before mlx.core.
"""

import ctypes
import ctypes.util
import os
import sys

NAMES = ("libopenblas.so.0", "libopenblas.so")
APT_PACKAGE = "libopenblas0-pthread"

_loaded: str | None = None
_late = False


def preload() -> str | None:
    """Load OpenBLAS so that mlx.core binds to it; HYDRA_BLAS=off leaves MLX as it is.

    Returns:
        The library's name, or None where it is absent, not needed (not Linux), switched off, or
        too late (mlx.core is imported already).
    """
    global _loaded, _late
    if _loaded or not sys.platform.startswith("linux"):
        return _loaded
    if "mlx.core" in sys.modules:
        _late = True
        return None
    if os.environ.get("HYDRA_BLAS", "auto") == "off":
        return None
    for name in NAMES:
        try:
            ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        _loaded = name
        break
    return _loaded


def in_use() -> str:
    """What the CPU's matrix products run on, in words, for --stats and doctor."""
    if not sys.platform.startswith("linux"):
        return "Accelerate"
    if _loaded:
        return f"OpenBLAS ({_loaded})"
    if _late:
        return "reference BLAS (slow; import hydra_mlx before mlx to use OpenBLAS)"
    return "reference BLAS (slow; `apt install " + APT_PACKAGE + "` makes it about 30x faster)"
