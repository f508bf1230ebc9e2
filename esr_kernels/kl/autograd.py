"""The autograd.Function around the chunks.

Gradients are made in the forward pass, so that no logit is computed twice.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from esr_kernels.kl.chunked import Call, Side, Wanted, run_chunks
from esr_kernels.kl.options import Reduce


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
            ctx.save_for_backward(
                hidden,
                weight,
                bias,
                teacher.hidden,
                teacher.weight,
                teacher.activation.bias,
                call.weights,
            )
            # Without the tensors, which would outlive the backward pass here; statistics stand.
            ctx.call = replace(
                call,
                student=_side(call.student, None, None, None),
                teacher=_side(teacher, None, None, None),
                weights=None,
                stats=None,
            )
            return values
        inverse = reduce.inverse
        # In fp16 1 / normalizer waits for backward: before a gradient scaler's upstream gradient
        # lifts them, it would push gradients below what fp16 holds. The head's, sums over all rows
        # which without it might be above, wait in float32.
        late = inverse if hidden.dtype == torch.float16 else None
        values, grads = run_chunks(call, wanted, inverse if late is None else None)
        grad_weight, grad_bias = grads.weight, grads.bias
        if late is None:
            grad_weight = scaled(grad_weight, inverse, weight.dtype)
            grad_bias = scaled(grad_bias, inverse, weight.dtype)
        ctx.save_for_backward(grads.hidden, grad_weight, grad_bias, late)
        ctx.dtype = hidden.dtype
        return reduce(values)

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        refuse_second_derivative("linear_reverse_kl")
        if ctx.rerun:
            return (*_rerun(ctx, upstream), None, None)
        *grads, late = ctx.saved_tensors
        factor = upstream if late is None else upstream * late
        return (*(scaled(grad, factor, ctx.dtype) for grad in grads), None, None)


def _rerun(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, weights = ctx.saved_tensors
    student = _side(ctx.call.student, hidden, weight, bias)
    teacher = _side(ctx.call.teacher, teacher_hidden, teacher_weight, teacher_bias)
    if weights is not None:
        upstream = (upstream * weights).masked_fill(weights == 0, 0)
    call = replace(ctx.call, student=student, teacher=teacher, weights=upstream.contiguous())
    _, grads = run_chunks(call, ctx.wanted)
    return (
        grads.hidden,
        scaled(grads.weight, None, weight.dtype),
        scaled(grads.bias, None, weight.dtype),
    )


def _side(side: Side, hidden: Any, weight: Any, bias: torch.Tensor | None) -> Side:
    return Side(hidden, weight, replace(side.activation, bias=bias))


def refuse_second_derivative(name: str) -> None:
    """PyTorch's once_differentiable would take the gradient for a constant without a word."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{name}: its gradient cannot be differentiated again; expected a backward pass "
            "without create_graph=True"
        )


def scaled(
    grad: torch.Tensor | None, factor: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor | None:
    """grad * factor, the factor [N] or 0-d and not rounded to grad's dtype first; None is 1."""
    if grad is None or factor is None:
        return grad if grad is None else grad.to(dtype)
    factor = factor.reshape(-1, *[1] * (grad.ndim - 1))
    return torch.mul(grad, factor, out=torch.empty_like(grad, dtype=dtype))
