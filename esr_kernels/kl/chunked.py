"""Row chunks: the planner, the loop over chunks, and the autograd.Function around it.

A chunk's logits of both models live in one workspace; a *row step* turns them into the rows' KL and
overwrites the student's with their gradient, which two GEMMs then carry to hidden states and head.
Gradients are made in the forward pass, so that no logit is computed twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch

# Below about 550 rows reading the weights no longer hides behind the GEMM on an H100; 512 rows keep
# the workspace at 0.62 GB for V = 152k and 1.07 GB for 262k. Smaller vocabularies get more rows.
MIN_DEFAULT_ROWS = 512
MAX_DEFAULT_ROWS = 2048
DEFAULT_WORKSPACE_BYTES = 600_000_000
# Rows of a GEMM tile: chunk borders between tiles leave at most one tile of the call half empty.
TILE_ROWS = 128
# Workspace rows start on a cache line whatever V is: 16-byte loads, a stride Triton specialises.
ROW_ALIGNMENT_BYTES = 128
# What a logit of -inf counts as: exp() of it is 0, and no sum, difference or product of it is NaN.
NO_MASS = -1e30


@dataclass(frozen=True)
class Side:
    """One model's part of a call: hidden [N, D], weight [V, D], bias [V], V the common prefix."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    softcap: float | None
    scale: float
    temperature: float


# (student_logits, teacher_logits, student, teacher, weights, values, grad_dtype) -> gradient.
# The logits [rows, V] come raw from the GEMM and are consumed; values [rows] is written with
# weight * KL. The gradient [rows, V] of weight * KL with respect to the raw student logits is made
# unless grad_dtype is None; a step that stores it in 16 bits stores it in grad_dtype.
RowStep = Callable[
    [
        torch.Tensor,
        torch.Tensor,
        Side,
        Side,
        torch.Tensor | None,
        torch.Tensor,
        torch.dtype | None,
    ],
    torch.Tensor | None,
]


def row_stride(vocab_size: int, itemsize: int) -> int:
    """Elements from one workspace row to the next."""
    unit = ROW_ALIGNMENT_BYTES // itemsize
    return math.ceil(vocab_size / unit) * unit


def plan_chunks(num_rows: int, row_bytes: int, max_workspace_bytes: int | None) -> list[int]:
    """Chunk borders `[0, ..., num_rows]`.

    The workspace is `rows * row_bytes`, with `row_bytes` both models' logits of one row:
    8 B * V in float32 (V rounded up to 32), 16 B * V in float64. The rows of a chunk are capped at
    `max_workspace_bytes // row_bytes`, by default at what 600 MB hold but between 512 and 2048. The
    fewest chunks that this allows share the rows evenly: in whole tiles of 128 rows when a chunk
    may hold four of them, else to within a row. So the last chunk is never a sliver, and few rows
    are one chunk.
    """
    if max_workspace_bytes is None:
        rows = DEFAULT_WORKSPACE_BYTES // row_bytes
        cap = min(max(rows, MIN_DEFAULT_ROWS), MAX_DEFAULT_ROWS)
    else:
        cap = max_workspace_bytes // row_bytes
    unit = TILE_ROWS if cap >= 4 * TILE_ROWS else 1
    num_tiles = math.ceil(num_rows / unit)
    num_chunks = math.ceil(num_tiles / (cap // unit))
    # The first chunks take the odd tiles: the last tile may be a partial one.
    tiles = [math.ceil(num_tiles * i / num_chunks) for i in range(num_chunks)]
    return [tile * unit for tile in tiles] + [num_rows]


def torch_row_step(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    student: Side,
    teacher: Side,
    weights: torch.Tensor | None,
    values: torch.Tensor,
    grad_dtype: torch.dtype | None,
) -> torch.Tensor | None:
    """The row step in eager PyTorch, any device and dtype; the gradient keeps the logits' dtype."""
    slope = _activate(student_logits, student, with_slope=grad_dtype is not None)
    _activate(teacher_logits, teacher, with_slope=False)
    # Each model's logits relative to its own maximum: what is added to all of them costs no digits.
    student_logits -= student_logits.amax(dim=1, keepdim=True)
    teacher_logits -= teacher_logits.amax(dim=1, keepdim=True)
    probs = student_logits.exp()
    student_sum = probs.sum(dim=1, keepdim=True)
    probs /= student_sum
    difference = student_logits.sub_(teacher_logits)
    teacher_sum = teacher_logits.exp_().sum(dim=1, keepdim=True)
    mean_difference = torch.mul(probs, difference, out=teacher_logits).sum(dim=1, keepdim=True)
    torch.add(mean_difference, (teacher_sum / student_sum).log(), out=values.unsqueeze(1))
    if weights is not None:
        values.mul_(weights).masked_fill_(weights == 0, 0)
    if grad_dtype is None:
        return None
    grad = difference.sub_(mean_difference).mul_(probs).mul_(student.scale / student.temperature)
    if slope is not None:
        grad.mul_(slope)
    if weights is not None:
        grad.mul_(weights.unsqueeze(1)).masked_fill_((weights == 0).unsqueeze(1), 0)
    return grad


def _activate(logits: torch.Tensor, side: Side, with_slope: bool) -> torch.Tensor | None:
    """Bias, scale, softcap and temperature, in place; the softcap's derivative where asked for."""
    slope = None
    if side.bias is not None:
        logits += side.bias
    if side.softcap is None:
        logits *= side.scale / side.temperature
    else:
        logits.mul_(side.scale / side.softcap).tanh_()
        slope = 1 - logits.square() if with_slope else None
        logits *= side.softcap / side.temperature
    logits.clamp_(min=NO_MASS)
    return slope


@dataclass(frozen=True)
class Wanted:
    """Which gradients a pass makes."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False

    @property
    def any(self) -> bool:
        return self.hidden or self.weight or self.bias


@dataclass(frozen=True)
class Gradients:
    """Sums over rows of weight * dKL; hidden [N, D] in its own dtype, the others accumulated."""

    hidden: torch.Tensor | None = None
    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None


def run_chunks(
    student: Side,
    teacher: Side,
    weights: torch.Tensor | None,
    row_step: RowStep,
    max_workspace_bytes: int | None,
    wanted: Wanted,
    hidden_factor: torch.Tensor | None = None,
) -> tuple[torch.Tensor, Gradients]:
    """weight * KL of every row, [N], and the wanted gradients of their sum.

    `hidden_factor` (0-d) multiplies the gradient of the hidden states before it is rounded.
    """
    device = student.hidden.device
    num_rows, vocab_size = student.hidden.shape[0], student.weight.shape[0]
    dtype = torch.promote_types(accumulate_dtype(student), accumulate_dtype(teacher))
    stride = row_stride(vocab_size, dtype.itemsize)
    borders = plan_chunks(num_rows, 2 * stride * dtype.itemsize, max_workspace_bytes)
    most = borders[1] if num_rows else 0  # the first chunk is the largest
    workspace = torch.empty(2, most, stride, dtype=dtype, device=device)
    values = torch.empty(num_rows, dtype=dtype, device=device)
    grads = Gradients(
        torch.empty_like(student.hidden, memory_format=torch.contiguous_format)
        if wanted.hidden
        else None,
        torch.zeros_like(student.weight, dtype=dtype) if wanted.weight else None,
        torch.zeros(vocab_size, dtype=dtype, device=device) if wanted.bias else None,
    )
    with torch.autocast(device.type, enabled=False):
        student_weight = student.weight.to(operand_dtype(student, dtype))
        teacher_weight = teacher.weight.to(operand_dtype(teacher, dtype))
        for start, stop in pairwise(borders):
            rows = slice(start, stop)
            student_logits = workspace[0, : stop - start, :vocab_size]
            teacher_logits = workspace[1, : stop - start, :vocab_size]
            student_hidden = student.hidden[rows].to(student_weight.dtype)
            matmul_into(student_logits, student_hidden, student_weight.T)
            teacher_hidden = teacher.hidden[rows].to(teacher_weight.dtype)
            matmul_into(teacher_logits, teacher_hidden, teacher_weight.T)
            chunk_weights = None if weights is None else weights[rows]
            grad = row_step(
                student_logits,
                teacher_logits,
                student,
                teacher,
                chunk_weights,
                values[rows],
                student.weight.dtype if wanted.any else None,
            )
            if grad is None:
                continue
            if grads.bias is not None:
                grads.bias.add_(grad.sum(dim=0, dtype=dtype))
            grad = grad.to(student_weight.dtype)
            if grads.hidden is not None:
                # Through float32: a bf16 result would let cuBLAS add up its splits of V in bf16.
                grad_hidden = matmul(grad, student_weight, dtype)
                if hidden_factor is not None:
                    grad_hidden *= hidden_factor
                grads.hidden[rows] = grad_hidden
            if grads.weight is not None:
                if chunk_weights is not None:  # 0 * NaN
                    skipped = (chunk_weights == 0).unsqueeze(1)
                    student_hidden = student_hidden.masked_fill(skipped, 0)
                add_matmul(grads.weight, grad.T, student_hidden)
    return values, grads


def accumulate_dtype(side: Side) -> torch.dtype:
    """Of logits, sums and accumulated gradients."""
    return torch.promote_types(side.hidden.dtype, torch.float32)


def operand_dtype(side: Side, dtype: torch.dtype) -> torch.dtype:
    """Of the GEMM operands: as given where the GEMM has a float32 output for them, else `dtype`."""
    keeps = side.weight.dtype.itemsize == 2 and side.weight.device.type == "cuda"
    return side.weight.dtype if keeps and dtype == torch.float32 else dtype


def matmul_into(out: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    if left.dtype == out.dtype:
        torch.mm(left, right, out=out)
    else:
        torch.mm(left, right, out_dtype=out.dtype, out=out)


def matmul(left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if left.dtype == dtype:
        return torch.mm(left, right)
    return torch.mm(left, right, out_dtype=dtype)


def add_matmul(out: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    if left.dtype == out.dtype:
        torch.addmm(out, left, right, out=out)
    else:
        torch.addmm(out, left, right, out_dtype=out.dtype, out=out)


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


@dataclass(frozen=True)
class Call:
    """What the autograd.Function does not differentiate."""

    student: Side
    teacher: Side
    weights: torch.Tensor | None
    row_step: RowStep
    max_workspace_bytes: int | None
    reduce: Reduce

    def run(
        self, wanted: Wanted, hidden_factor: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Gradients]:
        return run_chunks(
            self.student,
            self.teacher,
            self.weights,
            self.row_step,
            self.max_workspace_bytes,
            wanted,
            hidden_factor,
        )


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
    ) -> torch.Tensor:
        call = replace(call, student=replace(call.student, hidden=hidden, weight=weight, bias=bias))
        wanted = Wanted(*ctx.needs_input_grad[:3])
        ctx.wanted = wanted
        ctx.rerun = call.reduce.reduction == "none" and (wanted.weight or wanted.bias)
        if ctx.rerun:
            teacher = call.teacher
            values, _ = call.run(Wanted())
            ctx.save_for_backward(
                hidden, weight, bias, teacher.hidden, teacher.weight, teacher.bias, call.weights
            )
            ctx.call = call
            return values
        inverse = call.reduce.inverse
        # In fp16 1 / normalizer waits for backward: before a gradient scaler's upstream gradient
        # lifts them, it would push the hidden states' gradients below what fp16 holds.
        late = inverse if hidden.dtype == torch.float16 else None
        values, grads = call.run(wanted, inverse if late is None else None)
        grad_weight, grad_bias = grads.weight, grads.bias
        if grad_weight is not None:
            grad_weight = _scaled(grad_weight, inverse, weight.dtype)
        if grad_bias is not None:
            grad_bias = _scaled(grad_bias, inverse, weight.dtype)
        ctx.save_for_backward(grads.hidden, grad_weight, grad_bias, late)
        return call.reduce(values)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.rerun:
            return (*_rerun(ctx, upstream), None)
        grad_hidden, grad_weight, grad_bias, late = ctx.saved_tensors
        if grad_hidden is not None:
            factor = upstream if late is None else upstream * late
            grad_hidden = _scaled(grad_hidden, factor, grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = _scaled(grad_weight, upstream, grad_weight.dtype)
        if grad_bias is not None:
            grad_bias = _scaled(grad_bias, upstream, grad_bias.dtype)
        return grad_hidden, grad_weight, grad_bias, None


def _rerun(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, weights = ctx.saved_tensors
    student = replace(ctx.call.student, hidden=hidden, weight=weight, bias=bias)
    teacher = replace(
        ctx.call.teacher, hidden=teacher_hidden, weight=teacher_weight, bias=teacher_bias
    )
    if weights is not None:
        upstream = (upstream * weights).masked_fill(weights == 0, 0)
    call = replace(ctx.call, student=student, teacher=teacher, weights=upstream.contiguous())
    _, grads = call.run(ctx.wanted)
    grad_weight = None if grads.weight is None else grads.weight.to(weight.dtype)
    grad_bias = None if grads.bias is None else grads.bias.to(bias.dtype)
    return grads.hidden, grad_weight, grad_bias


def _scaled(grad: torch.Tensor, factor: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """grad * factor, the factor [N] or 0-d and not rounded to grad's dtype first."""
    if factor is None:
        return grad.to(dtype)
    factor = factor.reshape(-1, *[1] * (grad.ndim - 1))
    return torch.mul(grad, factor, out=torch.empty_like(grad, dtype=dtype))
