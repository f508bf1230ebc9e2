"""The dtype in which the surrounding trainer wants its projections."""

from __future__ import annotations

from dataclasses import replace

import torch

from esr_kernels.lm_head import LMHead


def match_dtype(hidden: torch.Tensor, head: LMHead) -> tuple[torch.Tensor, LMHead]:
    """Both in autocast's dtype, or where that is off in the hidden states'; gradients flow back.

    `linear_reverse_kl` leaves precision to its caller: it wants one dtype and ignores autocast.
    """
    device = hidden.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else hidden.dtype
    bias = None if head.bias is None else head.bias.to(dtype)
    return hidden.to(dtype), replace(head, weight=head.weight.to(dtype), bias=bias)
