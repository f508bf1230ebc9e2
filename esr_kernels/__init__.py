"""Fused kernels for on-policy distillation. Triton is imported only when a kernel is first used."""

from esr_kernels.kl import TokenStats, linear_reverse_kl, reverse_kl
from esr_kernels.lm_head import LMHead
from esr_kernels.sampling import SamplingState, sample_tokens

__all__ = [
    "LMHead",
    "SamplingState",
    "TokenStats",
    "linear_reverse_kl",
    "reverse_kl",
    "sample_tokens",
]
