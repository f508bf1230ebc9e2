"""KL(student || teacher) from hidden states and LM heads, or from logits."""

from esr_kernels.kl.api import linear_reverse_kl, reverse_kl
from esr_kernels.kl.stats import TokenStats

__all__ = ["TokenStats", "linear_reverse_kl", "reverse_kl"]
