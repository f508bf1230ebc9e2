"""LoRA's linear layers in training: three products each, and one node of autograd for an input.

PEFT's own forward is ten small operations a layer, each with a node, and casts 16-bit activations
to float32 for `lora_A`, where autocast casts them back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from peft.tuners import lora
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from esr_kernels.layers import gated, gated_backward


class Factors(NamedTuple):
    """Of a layer: W [out, in], its bias [out], A [r, in], B [out, r], and what A B is times."""

    weight: Tensor
    bias: Tensor | None
    down: Tensor
    up: Tensor
    scaling: float


class FusedLora(lora.Linear):
    """A `peft` LoRA layer made over by `fuse_adapters`: x W' + bias + scaling (x A') B'.

    What is more than that (DoRA, several adapters, dropout, a merged layer) PEFT computes.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or not self.is_plain():
            return super().forward(x, *args, **kwargs)
        return _products([self], x)[0]

    def factors(self) -> Factors:
        """What a plain layer multiplies by."""
        base: Any = self.get_base_layer()
        (name,) = self.active_adapters
        down, up = cast(Tensor, self.lora_A[name].weight), cast(Tensor, self.lora_B[name].weight)
        return Factors(base.weight, base.bias, down, up, self.scaling[name])

    def is_plain(self) -> bool:
        """Whether no more than `factors` is to be multiplied."""
        if self.disable_adapters or self.merged or len(self.active_adapters) != 1:
            return False
        (name,) = self.active_adapters
        if name not in self.lora_A or name in self.lora_variant or self.lora_bias.get(name):
            return False
        base, dropout = self.get_base_layer(), self.lora_dropout[name]
        drops = isinstance(dropout, torch.nn.Dropout) and dropout.p > 0 and dropout.training
        if type(base) is not torch.nn.Linear or drops or base.weight.requires_grad:
            return False
        return base.bias is None or not base.bias.requires_grad


def fuse_adapters(model: torch.nn.Module) -> None:
    """Make the plain LoRA layers of `model` over, in place."""
    for module in model.modules():
        if type(module) is lora.Linear:
            module.__class__ = FusedLora


def project(layers: Sequence[Any], x: Tensor) -> Sequence[Tensor]:
    """What linear layers make of one input [T, D]; plain LoRA layers as one node."""
    if all(isinstance(layer, FusedLora) and layer.is_plain() for layer in layers):
        return _products(layers, x)
    return [layer(x) for layer in layers]


def project_gated(layer: Any, gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """What a linear layer makes of `gated`, [T, F], which a plain LoRA layer does not keep."""
    if isinstance(layer, FusedLora) and layer.is_plain():
        return _products([layer], up, gate, activation)[0]
    output: Tensor = layer(gated(gate, up, activation))
    return output


def _products(
    layers: Sequence[FusedLora], x: Tensor, gate: Tensor | None = None, activation: str = ""
) -> Sequence[Tensor]:
    dtype = x.dtype
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    factors = [layer.factors() for layer in layers]
    scalings = [each.scaling for each in factors]
    tensors = [tensor for each in factors for tensor in each[:4]]
    outputs: tuple[Tensor, ...] = _LoraProducts.apply(
        x, gate, activation, dtype, scalings, *tensors
    )
    return outputs


class _LoraProducts(torch.autograd.Function):
    """Of x [..., in] and each layer's W [out, in], A [r, in] and B [out, r]: [..., out] in `dtype`.

    With a gate, of the gated product, which the backward pass computes again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gate: Tensor | None,
        activation: str,
        dtype: torch.dtype,
        scalings: Sequence[float],
        *tensors: Any,
    ) -> tuple[Tensor, ...]:
        outputs: list[Tensor] = []
        saved: list[Tensor] = []
        with torch.autocast(x.device.type, enabled=False):
            rows = x if gate is None else gated(gate, x, activation)
            rows = rows.reshape(-1, x.shape[-1]).to(dtype)
            for number, scaling in enumerate(scalings):
                weight, bias, down, up = tensors[4 * number : 4 * number + 4]
                weight, down, up = (tensor.to(dtype) for tensor in (weight, down, up))
                bias = None if bias is None else bias.to(dtype)
                output = linear(rows, weight, bias)
                low = rows @ down.T
                output.addmm_(low, up.T, alpha=scaling)
                # No view to autograd: a model may change its projections in place.
                shape = *x.shape[:-1], len(weight)
                outputs.append(torch.ops.aten._unsafe_view(output, shape))
                saved += [weight, down, up, low]
        ctx.save_for_backward(*((rows, None) if gate is None else (x, gate)), *saved)
        ctx.scalings, ctx.activation = scalings, activation
        ctx.shape, ctx.dtype = x.shape, x.dtype
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, gate, *saved = ctx.saved_tensors
        weights, downs, ups, lows = (saved[first::4] for first in range(4))
        needs_x = any(ctx.needs_input_grad[:2])
        grad_x = grad_gate = None
        with torch.autocast(rows.device.type, enabled=False):
            outer = [grad.reshape(-1, grad.shape[-1]).to(weights[0].dtype) for grad in grads]
            inner = [grad @ up for grad, up in zip(outer, ups, strict=True)]
            if needs_x:
                grad_x = outer[0] @ weights[0]
                for grad, weight in zip(outer[1:], weights[1:], strict=True):
                    grad_x.addmm_(grad, weight)
                for grad, down, scaling in zip(inner, downs, ctx.scalings, strict=True):
                    grad_x.addmm_(grad, down, alpha=scaling)
            if gate is not None and grad_x is not None:
                grad_gate, grad_x, rows = gated_backward(grad_x, gate, rows, ctx.activation)
            elif gate is not None:
                rows = gated(gate, rows, ctx.activation)
            rows = rows.to(weights[0].dtype)
            adapters: list[Tensor | None] = []
            for number, scaling in enumerate(ctx.scalings):
                needs_down, needs_up = ctx.needs_input_grad[7 + 4 * number : 9 + 4 * number]
                grad_down = grad_up = None
                if needs_down:
                    grad_down = _wide_product(inner[number].T, rows).mul_(scaling)
                if needs_up:
                    grad_up = _wide_product(outer[number].T, lows[number]).mul_(scaling)
                adapters += [None, None, grad_down, grad_up]
        if grad_x is not None:
            grad_x = grad_x.view(ctx.shape).to(ctx.dtype)
        return grad_x, grad_gate, None, None, None, *adapters


def _wide_product(left: Tensor, right: Tensor) -> Tensor:
    """Sums over tokens leave a GPU's product in float32: an adapter's gradient is one of it."""
    if left.is_cuda and left.dtype.itemsize == 2:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left @ right
