"""What the checks of all operations share, and the choice of implementation."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_IMPLS = ("auto", "triton", "torch")


def error(name: str, expected: Any, got: Any) -> ValueError:
    return ValueError(f"{name}: expected {expected}, got {got}")


def sees_values(tensor: torch.Tensor) -> bool:
    """Values are checked where looking at them is free, or under ESR_KERNELS_CHECK_VALUES=1."""
    return tensor.device.type == "cpu" or os.environ.get("ESR_KERNELS_CHECK_VALUES") == "1"


def choose_impl(impl: Any, device: torch.device, runs_on_triton: bool = True) -> str:
    """What runs: "triton" or "torch". No kernel computes in float64."""
    if impl not in _IMPLS:
        raise error("impl", f"one of {_IMPLS}", repr(impl))
    if impl == "auto":
        kernel_runs = device.type == "cuda" and runs_on_triton
        return "triton" if kernel_runs and find_spec("triton") else "torch"
    if impl == "triton":
        if not runs_on_triton:
            raise error("impl", "'torch' for float64 inputs", repr(impl))
        from esr_kernels.launch import INTERPRETED

        if device.type == "cpu" and not INTERPRETED:
            where = "tensors on the CPU (or TRITON_INTERPRET=1 before the first import)"
            raise error("impl", f"'torch' for {where}", repr(impl))
    return impl
