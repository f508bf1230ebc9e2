"""One decode step's sampling for a whole batch: choice, log-probability, EOS and token write."""

from esr_kernels.sampling.api import sample_tokens
from esr_kernels.sampling.state import SamplingState

__all__ = ["SamplingState", "sample_tokens"]
