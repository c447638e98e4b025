"""The operations of a HydraHead layer on MLX: differentiable, on any backend.

They are the twins of the Metal kernels: same signatures, same results up to rounding.
"""

from .attention import log_length_scale, ragged_attention
from .conv import short_conv
from .delta import gated_delta
from .fusion import fa_fusion, l2_normalise, la_fusion

__all__ = [
    "fa_fusion",
    "gated_delta",
    "l2_normalise",
    "la_fusion",
    "log_length_scale",
    "ragged_attention",
    "short_conv",
]
