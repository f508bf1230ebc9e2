"""The autograd.Function around the chunks.

Gradients are made in the forward pass, so that no logit is computed twice.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from esr_kernels.kl.chunked import Call, Side, Wanted, run_chunks


@dataclass(frozen=True)
class Reduce:
    """Values of rows -> result. `inverse` is 1 / normalizer, 0-d, for "mean", else None."""

    reduction: str
    inverse: torch.Tensor | None

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        if self.reduction == "none":
            return values
        total = values.sum()
        return total if self.inverse is None else total * self.inverse


class LinearReverseKL(torch.autograd.Function):
    """Saves the finished gradients; backward scales them by the upstream gradient.

    Only per-row upstream gradients on a trained head need another pass: dW mixes the rows.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        call: Call,
        reduce: Reduce,
    ) -> torch.Tensor:
        call = replace(call, student=_side(call.student, hidden, weight, bias))
        wanted = Wanted(*ctx.needs_input_grad[:3])
        ctx.wanted = wanted
        ctx.rerun = reduce.reduction == "none" and (wanted.weight or wanted.bias)
        if ctx.rerun:
            teacher = call.teacher
            values, _ = run_chunks(call, Wanted())
            call = replace(call, stats=None)  # backward does not write them again
            ctx.save_for_backward(
                hidden,
                weight,
                bias,
                teacher.hidden,
                teacher.weight,
                teacher.activation.bias,
                call.weights,
            )
            ctx.call = call
            return values
        inverse = reduce.inverse
        # In fp16 1 / normalizer waits for backward: before a gradient scaler's upstream gradient
        # lifts them, it would push the hidden states' gradients below what fp16 holds.
        late = inverse if hidden.dtype == torch.float16 else None
        values, grads = run_chunks(call, wanted, inverse if late is None else None)
        grad_weight, grad_bias = grads.weight, grads.bias
        if grad_weight is not None:
            grad_weight = scaled(grad_weight, inverse, weight.dtype)
        if grad_bias is not None:
            grad_bias = scaled(grad_bias, inverse, weight.dtype)
        ctx.save_for_backward(grads.hidden, grad_weight, grad_bias, late)
        return reduce(values)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.rerun:
            return (*_rerun(ctx, upstream), None, None)
        grad_hidden, grad_weight, grad_bias, late = ctx.saved_tensors
        if grad_hidden is not None:
            factor = upstream if late is None else upstream * late
            grad_hidden = scaled(grad_hidden, factor, grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = scaled(grad_weight, upstream, grad_weight.dtype)
        if grad_bias is not None:
            grad_bias = scaled(grad_bias, upstream, grad_bias.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None


def _rerun(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, weights = ctx.saved_tensors
    student = _side(ctx.call.student, hidden, weight, bias)
    teacher = _side(ctx.call.teacher, teacher_hidden, teacher_weight, teacher_bias)
    if weights is not None:
        upstream = (upstream * weights).masked_fill(weights == 0, 0)
    call = replace(ctx.call, student=student, teacher=teacher, weights=upstream.contiguous())
    _, grads = run_chunks(call, ctx.wanted)
    grad_weight = None if grads.weight is None else grads.weight.to(weight.dtype)
    grad_bias = None if grads.bias is None else grads.bias.to(bias.dtype)
    return grads.hidden, grad_weight, grad_bias


def _side(
    side: Side, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> Side:
    return Side(hidden, weight, replace(side.activation, bias=bias))


def scaled(grad: torch.Tensor, factor: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """grad * factor, the factor [N] or 0-d and not rounded to grad's dtype first."""
    if factor is None:
        return grad.to(dtype)
    factor = factor.reshape(-1, *[1] * (grad.ndim - 1))
    return torch.mul(grad, factor, out=torch.empty_like(grad, dtype=dtype))
