"""LoRA's linear layers in training: three products, and one node of autograd.

PEFT's own forward is ten small operations a layer, each with a node, and casts 16-bit activations
to float32 for `lora_A`, where autocast casts them back.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear


class FusedLora(lora.Linear):
    """A `peft` LoRA layer made over by `fuse_adapters`: x W' + bias + scaling (x A') B'.

    What is more than that (DoRA, several adapters, dropout, a merged layer) PEFT computes.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        name = self._plain_adapter()
        if name is None or args or kwargs:
            return super().forward(x, *args, **kwargs)
        base = self.get_base_layer()
        up, down = self.lora_B[name].weight, self.lora_A[name].weight
        dtype = x.dtype
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
        return _LoraProduct.apply(x, base.weight, base.bias, down, up, self.scaling[name], dtype)

    def _plain_adapter(self) -> str | None:
        if self.disable_adapters or self.merged or len(self.active_adapters) != 1:
            return None
        (name,) = self.active_adapters
        base = self.get_base_layer()
        dropout = self.lora_dropout[name] if name in self.lora_A else None
        drops = isinstance(dropout, torch.nn.Dropout) and dropout.p > 0 and dropout.training
        plain = (
            dropout is not None
            and not drops
            and name not in self.lora_variant
            and not self.lora_bias.get(name)
            and type(base) is torch.nn.Linear
            and not base.weight.requires_grad
            and (base.bias is None or not base.bias.requires_grad)
        )
        return name if plain else None


def fuse_adapters(model: torch.nn.Module) -> None:
    """Make the plain LoRA layers of `model` over, in place."""
    for module in model.modules():
        if type(module) is lora.Linear:
            module.__class__ = FusedLora


class _LoraProduct(torch.autograd.Function):
    """x [..., in], W [out, in], A [r, in], B [out, r] -> [..., out] in `dtype`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        scaling: float,
        dtype: torch.dtype,
    ) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            rows = x.reshape(-1, x.shape[-1]).to(dtype)
            weight, down, up = weight.to(dtype), down.to(dtype), up.to(dtype)
            output = linear(rows, weight, None if bias is None else bias.to(dtype))
            low = rows @ down.T
            output.addmm_(low, up.T, alpha=scaling)
        ctx.save_for_backward(rows, low, weight, down, up)
        ctx.scaling, ctx.shape, ctx.dtype = scaling, x.shape, x.dtype
        return output.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, low, weight, down, up = ctx.saved_tensors
        needs_x, _, _, needs_down, needs_up = ctx.needs_input_grad[:5]
        grad_x = grad_down = grad_up = None
        with torch.autocast(grad.device.type, enabled=False):
            grad = grad.reshape(-1, grad.shape[-1]).to(rows.dtype)
            grad_low = grad @ up if needs_x or needs_down else None
            if needs_x and grad_low is not None:
                grad_x = (grad @ weight).addmm_(grad_low, down, alpha=ctx.scaling)
                grad_x = grad_x.view(ctx.shape).to(ctx.dtype)
            if needs_down and grad_low is not None:
                grad_down = _wide_product(grad_low.T, rows).mul_(ctx.scaling)
            if needs_up:
                grad_up = _wide_product(grad.T, low).mul_(ctx.scaling)
        return grad_x, None, None, grad_down, grad_up, None, None


def _wide_product(left: Tensor, right: Tensor) -> Tensor:
    """Sums over tokens leave a GPU's product in float32: an adapter's gradient is one of it."""
    if left.is_cuda and left.dtype.itemsize == 2:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left @ right
