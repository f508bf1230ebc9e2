"""What a decoder's layer does beside its matrix products."""

from esr_kernels.layers.api import (
    add_rms_norm,
    decode_attention,
    gated,
    gated_backward,
    rms_norm,
    rotate,
    rotate_and_store,
)

__all__ = [
    "add_rms_norm",
    "decode_attention",
    "gated",
    "gated_backward",
    "rms_norm",
    "rotate",
    "rotate_and_store",
]
