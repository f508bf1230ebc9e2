"""What every launch of a kernel needs."""

from __future__ import annotations

import torch
import triton

# Do kernels run in Triton's interpreter? Settled when @triton.jit decorates, so read once.
INTERPRETED: bool = triton.knobs.runtime.interpret


def on_device_of(tensor: torch.Tensor) -> torch.cuda.device:
    """Triton launches on the current device; -1 (the CPU) changes nothing."""
    return torch.cuda.device(tensor.device if tensor.is_cuda else -1)
