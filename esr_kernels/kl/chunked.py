"""The loop over row chunks.

A chunk's logits of both models live in one workspace; a *row step* turns them into the rows' KL and
overwrites the student's with their gradient, which two GEMMs then carry to hidden states and head.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch

from esr_kernels.kl.planner import plan_chunks, row_strides
from esr_kernels.kl.rows import Activation, Backend, Rows
from esr_kernels.kl.vocab import Share, StudentClasses, VocabGroups


@dataclass(frozen=True)
class Side:
    """One model's part of a call: hidden [N, D], weight [V, D], and what follows the GEMM."""

    hidden: torch.Tensor
    weight: torch.Tensor
    activation: Activation


@dataclass(frozen=True)
class Call:
    """What a call computes, but for which gradients. stats [len(STATS), N] is written if given.

    Without `groups` both weights have V rows; with them the student's has V and the teacher's Vt.
    `classes` come with groups: the student's side of them.
    """

    student: Side
    teacher: Side
    weights: torch.Tensor | None
    backend: Backend
    max_workspace_bytes: int | None
    groups: VocabGroups | None = None
    classes: StudentClasses | None = None
    stats: torch.Tensor | None = None


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
    call: Call, wanted: Wanted, hidden_factor: torch.Tensor | None = None
) -> tuple[torch.Tensor, Gradients]:
    """weight * KL of every row, [N], and the wanted gradients of their sum.

    `hidden_factor` (0-d) multiplies the gradient of the hidden states before it is rounded.
    """
    student, teacher, groups, classes = call.student, call.teacher, call.groups, call.classes
    device = student.hidden.device
    num_rows, vocab_size = student.hidden.shape[0], student.weight.shape[0]
    teacher_vocab = teacher.weight.shape[0]
    dtype = accumulate_dtype(student.hidden.dtype, teacher.hidden.dtype)
    maps = groups is not None, classes is not None
    strides = row_strides(vocab_size, teacher_vocab, *maps, dtype.itemsize)
    borders = plan_chunks(num_rows, sum(strides) * dtype.itemsize, call.max_workspace_bytes)
    most = borders[1] if num_rows else 0  # the first chunk is the largest
    workspace = torch.empty(most * sum(strides), dtype=dtype, device=device)
    buffers = [
        part.view(most, stride)
        for part, stride in zip(workspace.split([most * s for s in strides]), strides, strict=True)
    ]
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
            chunk = slice(start, stop)
            student_logits = buffers[0][: stop - start, :vocab_size]
            teacher_logits = buffers[1][: stop - start, :teacher_vocab]
            student_hidden = student.hidden[chunk].to(student_weight.dtype)
            matmul_into(student_logits, student_hidden, student_weight.T)
            teacher_hidden = teacher.hidden[chunk].to(teacher_weight.dtype)
            matmul_into(teacher_logits, teacher_hidden, teacher_weight.T)
            weights = None if call.weights is None else call.weights[chunk]
            if groups is not None:
                grouped = buffers[2][: stop - start, : vocab_size + 1]
                call.backend.group(teacher_logits, grouped, teacher.activation, weights, groups)
                teacher_logits = grouped
            if classes is not None:
                share = Share(
                    student.activation,
                    classes,
                    weights,
                    grouped,
                    peaks=buffers[3][: stop - start, :vocab_size],
                    shared=buffers[1][: stop - start, : vocab_size + 1],
                )
                call.backend.share(student_logits, share)
                teacher_logits = share.shared
            grad = None
            if wanted.any:
                grad = student_logits
                if call.backend.overwrites:
                    grad = student_logits.view(student.weight.dtype)[:, :vocab_size]
            rows = Rows(
                student.activation,
                teacher.activation,
                weights,
                values[chunk],
                None if call.stats is None else call.stats[:, chunk],
                grad,
                mapped=groups is not None,
                padded=True,
            )
            call.backend.row_step(student_logits, teacher_logits, rows)
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
                grads.hidden[chunk] = grad_hidden
            if grads.weight is not None:
                if weights is not None:  # 0 * NaN
                    skipped = (weights == 0).unsqueeze(1)
                    student_hidden = student_hidden.masked_fill(skipped, 0)
                add_matmul(grads.weight, grad.T, student_hidden)
    return values, grads


def accumulate_dtype(student: torch.dtype, teacher: torch.dtype) -> torch.dtype:
    """Of logits, sums and accumulated gradients: float32, or float64 if an input is."""
    return torch.promote_types(torch.promote_types(student, teacher), torch.float32)


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
