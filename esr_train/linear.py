"""How the weights of linear layers lie, float32 on a CPU, where PyTorch leaves them to MKL.

On an AMD CPU with AVX-512 that is half as fast as oneDNN, 102 GFLOP/s for 230: layers that are only
read go there, from a copy in its own order. On an Intel CPU MKL is as fast, and for the few rows of
a decoding step faster, if a weight lies column by column.
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
# With more, a product of few rows takes what memory takes, however they lie.
MOST_WEIGHTS = 1 << 24


def column_major(weight: Tensor) -> Tensor:
    """The weight [out, in], in memory column by column, where MKL reads it faster so; or as it is.

    Of 8 rows, on one thread of an Intel Sapphire Rapids: by [2240, 192] 100 us for 262, by
    [4096, 192] 171 for 600, by [4864, 896] 0.95 ms for 1.98. Of one row and of hundreds it takes
    the same, of two 1.3 times as long, and as much longer backward as forward is faster.
    """
    gains = weight.device.type == "cpu" and weight.dtype == torch.float32
    gains = gains and torch.backends.mkl.is_available() and not made_by_amd()
    return weight.t().contiguous().t() if gains and weight.numel() <= MOST_WEIGHTS else weight


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
