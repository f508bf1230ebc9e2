"""`reverse_kl`'s row pass over logits that somebody else made, and its autograd.Function."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from esr_kernels.kl.autograd import refuse_second_derivative, scaled
from esr_kernels.kl.options import Reduce
from esr_kernels.kl.planner import plan_chunks, row_stride
from esr_kernels.kl.rows import Activation, Backend, Rows


@dataclass(frozen=True)
class LogitsCall:
    """What a call computes, but for its gradient. stats [len(STATS), N] is written if given."""

    teacher_logits: torch.Tensor
    student: Activation
    teacher: Activation
    weights: torch.Tensor | None
    backend: Backend
    dtype: torch.dtype
    vocab_size: int
    stats: torch.Tensor | None


def run_rows(
    student_logits: torch.Tensor, call: LogitsCall, grad: torch.Tensor | None
) -> torch.Tensor:
    """weight * KL of every row, [N]; the gradient of their sum goes to `grad` [N, V].

    `grad` may be `student_logits`. Beyond that nothing of the inputs is written: a step that
    consumes its logits gets copies, a chunk of rows at a time.
    """
    num_rows, width = student_logits.shape
    values = torch.empty(num_rows, dtype=call.dtype, device=student_logits.device)
    prefix = slice(0, call.vocab_size)
    rows = Rows(
        call.student,
        call.teacher,
        call.weights,
        values,
        call.stats,
        None if grad is None else grad[:, prefix],
    )
    if num_rows and call.backend.overwrites:
        student, teacher = _rows_of(student_logits), _rows_of(call.teacher_logits)
        call.backend.row_step(student[:, prefix], teacher[:, prefix], rows)
    elif num_rows:
        _run_copies(student_logits[:, prefix], call.teacher_logits[:, prefix], call, rows)
    if grad is not None and call.vocab_size < width:
        grad[:, call.vocab_size :] = 0
    return values


def _rows_of(logits: torch.Tensor) -> torch.Tensor:
    """With neighbouring ids next to each other: the kernel has no stride for them."""
    return logits if logits.stride(1) == 1 else logits.contiguous()


def _run_copies(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, call: LogitsCall, rows: Rows
) -> None:
    num_rows, vocab_size = student_logits.shape
    stride = row_stride(vocab_size, call.dtype.itemsize)
    borders = plan_chunks(num_rows, 2 * stride * call.dtype.itemsize, None)
    workspace = student_logits.new_empty(2, borders[1], stride, dtype=call.dtype)
    for start, stop in pairwise(borders):
        chunk = slice(start, stop)
        student, teacher = workspace[:, : stop - start, :vocab_size]
        student.copy_(student_logits[chunk])
        teacher.copy_(teacher_logits[chunk])
        call.backend.row_step(student, teacher, rows.block(chunk))


class ReverseKL(torch.autograd.Function):
    """Makes the gradient in the forward pass; backward scales it by the upstream gradient.

    In place, the gradient lies in the storage of the logits and is scaled there: one backward only.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, call: LogitsCall, reduce: Reduce, inplace: bool
    ) -> torch.Tensor:
        grad = (
            logits.detach()
            if inplace
            else torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        )
        values = run_rows(logits, call, grad)
        if inplace:
            # Whoever saved the logits for their own backward is told that they are gone.
            torch.autograd.graph.increment_version(logits)
            ctx.grad = grad
        else:
            ctx.save_for_backward(grad)
        ctx.inplace, ctx.inverse = inplace, reduce.inverse
        return reduce(values)

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        refuse_second_derivative("reverse_kl")
        grad = ctx.grad if ctx.inplace else ctx.saved_tensors[0]
        if grad is None:
            raise RuntimeError("reverse_kl: with inplace=True backward runs once, not again")
        # 1 / normalizer waits until here: before a gradient scaler's upstream gradient lifts it, a
        # 16-bit gradient would fall below what its dtype holds.
        factor = upstream if ctx.inverse is None else upstream * ctx.inverse
        if ctx.inplace:
            ctx.grad = None
            factor = factor.reshape(-1, 1) if factor.ndim else factor
            return torch.mul(grad, factor, out=grad), None, None, None
        return scaled(grad, factor, grad.dtype), None, None, None
