"""What a decoder's layer does beside its matrix products, without gradient."""

from esr_kernels.layers.api import decode_attention, gated, rms_norm, rotate_and_store

__all__ = ["decode_attention", "gated", "rms_norm", "rotate_and_store"]
