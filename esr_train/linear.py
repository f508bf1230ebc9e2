"""Linear layers that are only read, float32 on a CPU: by oneDNN, from a copy in its own order.

PyTorch leaves float32 to MKL: on an AMD CPU with AVX-512 half as fast, 102 GFLOP/s for 230. On an
Intel CPU it is as fast, and for the few rows of a decoding step faster.
"""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

# With fewer, the call takes longer than the product.
FEWEST_WEIGHTS = 100_000


class PackedLinear(torch.nn.Linear):
    """A `torch.nn.Linear` made over by `packed_linears`, without gradient.

    It multiplies by the weight that it was last given; its own it does not need.
    """

    packed: Tensor

    def pack(self, weight: Tensor) -> None:
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach())

    def forward(self, input: Tensor) -> Tensor:
        # The operator that Inductor takes.
        return torch.ops.mkldnn._linear_pointwise(input, self.packed, self.bias, "none", [], "")


def packed_linears(model: torch.nn.Module) -> list[PackedLinear]:
    """The linear layers of `model` that are faster packed, made over in place; `pack` each."""
    layers: list[PackedLinear] = []
    if not torch.backends.mkldnn.is_available():
        return layers
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not made_by_amd():
        return layers
    for layer in model.modules():
        if type(layer) is torch.nn.Linear and _gains(layer.weight):
            layer.__class__ = PackedLinear
            layers.append(cast(PackedLinear, layer))
    return layers


@cache
def made_by_amd() -> bool:
    """Whether this machine's CPU is."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        text = platform.processor()
    return "AuthenticAMD" in text


def _gains(weight: Tensor) -> bool:
    large = weight.numel() >= FEWEST_WEIGHTS
    return large and weight.device.type == "cpu" and weight.dtype == torch.float32
