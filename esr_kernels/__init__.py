"""Fused kernels for on-policy distillation. Triton is imported only when a kernel is first used."""

from esr_kernels.kl import TokenStats, linear_reverse_kl, reverse_kl
from esr_kernels.lm_head import LMHead
from esr_kernels.rollout import RolloutBatch, gather_rows, rollout_batch

__all__ = [
    "LMHead",
    "RolloutBatch",
    "TokenStats",
    "gather_rows",
    "linear_reverse_kl",
    "reverse_kl",
    "rollout_batch",
]
