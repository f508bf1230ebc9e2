"""Gradients of a layer's parts. What is kept for them is their inputs, and nothing in between."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float, backend: Any
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.options = eps, offset, ctx.needs_input_grad[1]
        ctx.backend = backend
        return backend.run_rms_norm(x, weight, eps, offset)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        backward = ctx.backend.run_rms_norm_backward
        grad_x, grad_weight = backward(_rows(grad), None, x, weight, *ctx.options)
        return grad_x, grad_weight, None, None, None


class AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor,
        weight: Tensor,
        eps: float,
        offset: float,
        backend: Any,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        total = torch.empty_like(residual)
        normed = backend.run_rms_norm(x, weight, eps, offset, residual, total)
        ctx.save_for_backward(total, weight)
        ctx.options = eps, offset, ctx.needs_input_grad[2]
        ctx.backend, ctx.dtype = backend, x.dtype
        return normed, total

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: Tensor | None, grad_total: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        total, weight = ctx.saved_tensors
        grad_weight = None
        if grad is not None:
            more = None if grad_total is None else _rows(grad_total)
            backward = ctx.backend.run_rms_norm_backward
            grad_total, grad_weight = backward(_rows(grad), more, total, weight, *ctx.options)
        grad_x = None if grad_total is None else grad_total.to(ctx.dtype)
        return grad_x, grad_total, grad_weight, None, None, None


class Rotate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, backend: Any
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.backend = backend
        return backend.run_rotate(query, key, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_query: Tensor, grad_key: Tensor) -> tuple[Tensor | None, ...]:
        back = ctx.backend.run_rotate
        grads = back(_rows(grad_query), _rows(grad_key), *ctx.saved_tensors, backward=True)
        return *grads, None, None, None


class Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str, backend: Any) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation, ctx.backend = activation, backend
        return backend.run_gated(gate, up, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        backward = ctx.backend.run_gated_backward
        grad_gate, grad_up, _ = backward(_rows(grad), gate, up, ctx.activation, False)
        return grad_gate, grad_up, None, None


def _rows(grad: Tensor) -> Tensor:
    """The kernels have no stride for the last dimension."""
    return grad if grad.stride(-1) == 1 else grad.contiguous()
