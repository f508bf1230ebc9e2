"""KL(student || teacher) from hidden states and LM heads."""

from esr_kernels.kl.api import linear_reverse_kl

__all__ = ["linear_reverse_kl"]
