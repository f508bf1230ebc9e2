"""Triton row step: both models' raw logits of a chunk -> KL and, in place, its gradient.

    z = softcap * tanh(scale * (x + bias) / softcap) / temperature      x: raw logits, per model
    u = z - max(z);  S = sum exp(u);  p = exp(u) / S
    E = sum p_s (u_s - u_t);   KL = E + log(S_t / S_s)
    dKL/dx_s = p_s ((u_s - u_t) - E) * (1 - tanh^2) * scale / temperature

One program a row, two passes over V. The first reads both rows and keeps five running numbers: both
maxima, both sums and E's numerator. The second reads both again and writes the gradient over the
student's logits, as float32 or as the 16-bit dtype of the GEMMs that follow. Nothing else is saved.

In 16 bits, column j lies at byte 2j of the row whose float32 logit j lay at byte 4j. Block b is
written at bytes [2bB, 2(b+1)B): what it covers was read in this or an earlier iteration, by other
threads too, so a barrier stands between the loads and the stores of an iteration.
"""

# mypy: disable-error-code="no-untyped-def"
# (jit bodies carry no types)

from __future__ import annotations

import torch
import triton
import triton.language as tl

from esr_kernels.kl.chunked import NO_MASS, Side

# 16 columns a thread of both rows: 56-85 registers, no spill (`python -m esr_kernels.aot`).
BLOCK_SIZE = 4096
NUM_WARPS = 8

_NO_MASS = tl.constexpr(NO_MASS)


@triton.jit
def _tanh(x):
    # Both tails are exact: exp(-2|x|) goes to 0. Near 0, where 1 - exp() cancels, Taylor's series.
    decay = tl.exp(-2.0 * tl.abs(x))
    tail = (1.0 - decay) / (1.0 + decay)
    square = x * x
    series = -0.05396825396825397 + square * 0.021869488536155203
    series = 0.13333333333333333 + square * series
    series = 1.0 + square * (-0.3333333333333333 + square * series)
    return tl.where(tl.abs(x) < 0.3, x * series, tl.where(x < 0, -tail, tail))


@triton.jit
def _load_logits(
    logits_ptr, bias_ptr, columns, num_columns, num_readable, inner, outer, SOFTCAP: tl.constexpr
):
    """(z, dz/dx / outer / inner) of a block; columns past the vocabulary have no mass."""
    mask = columns < num_columns
    # The row's padding is read and dropped: a bound divisible by 16 keeps the loads 16 bytes wide
    # when the vocabulary's size is odd.
    x = tl.load(logits_ptr + columns, mask=columns < num_readable, other=0.0).to(tl.float32)
    x = tl.where(mask, x, 0.0)
    if bias_ptr is not None:
        x += tl.load(bias_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    if SOFTCAP:
        x = _tanh(x * inner)
        slope = 1.0 - x * x
        z = x * outer
    else:
        slope = 1.0
        z = x * (inner * outer)
    # A comparison, not a maximum, which would swallow NaN.
    z = tl.where(z < _NO_MASS, _NO_MASS, z)
    return tl.where(mask, z, _NO_MASS), slope


@triton.jit(do_not_specialize_on_alignment=["weights_ptr", "values_ptr"])
def reverse_kl_row_kernel(
    student_ptr,
    teacher_ptr,
    grad_ptr,
    student_bias_ptr,
    teacher_bias_ptr,
    weights_ptr,
    values_ptr,
    student_stride,
    teacher_stride,
    grad_stride,
    num_columns,
    num_readable,
    student_inner,
    student_outer,
    teacher_inner,
    teacher_outer,
    STUDENT_SOFTCAP: tl.constexpr,
    TEACHER_SOFTCAP: tl.constexpr,
    WITH_GRAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    student_ptr += row * student_stride
    teacher_ptr += row * teacher_stride
    offsets = tl.arange(0, BLOCK_SIZE)
    if WITH_GRAD:
        grad_ptr += row * grad_stride

    weight = 1.0
    if weights_ptr is not None:
        weight = tl.load(weights_ptr + row).to(tl.float32)
        if weight == 0.0:  # The row may hold NaN: it is not read.
            tl.store(values_ptr + row, 0.0)
            if WITH_GRAD:
                zeros = tl.zeros([BLOCK_SIZE], dtype=tl.float32)
                for start in range(0, num_columns, BLOCK_SIZE):
                    columns = start + offsets
                    tl.store(grad_ptr + columns, zeros, mask=columns < num_readable)
            return

    student_max = tl.full([], _NO_MASS, tl.float32)
    teacher_max = tl.full([], _NO_MASS, tl.float32)
    student_sum = 0.0
    teacher_sum = 0.0
    numerator = 0.0  # sum exp(u_s) (u_s - u_t), relative to the running maxima
    for start in range(0, num_columns, BLOCK_SIZE):
        columns = start + offsets
        student, _ = _load_logits(
            student_ptr, student_bias_ptr, columns, num_columns, num_readable,
            student_inner, student_outer, STUDENT_SOFTCAP,
        )  # fmt: skip
        teacher, _ = _load_logits(
            teacher_ptr, teacher_bias_ptr, columns, num_columns, num_readable,
            teacher_inner, teacher_outer, TEACHER_SOFTCAP,
        )  # fmt: skip
        new_student_max = tl.maximum(student_max, tl.max(student, 0))
        new_teacher_max = tl.maximum(teacher_max, tl.max(teacher, 0))
        student_shift = student_max - new_student_max
        teacher_shift = teacher_max - new_teacher_max
        student_decay = tl.exp(student_shift)
        student -= new_student_max
        teacher -= new_teacher_max
        masses = tl.exp(student)
        numerator += student_sum * (student_shift - teacher_shift)
        numerator = numerator * student_decay + tl.sum(masses * (student - teacher), 0)
        student_sum = student_sum * student_decay + tl.sum(masses, 0)
        teacher_sum = teacher_sum * tl.exp(teacher_shift) + tl.sum(tl.exp(teacher), 0)
        student_max = new_student_max
        teacher_max = new_teacher_max

    mean_difference = numerator / student_sum
    divergence = mean_difference + tl.log(teacher_sum / student_sum)
    tl.store(values_ptr + row, weight * divergence)

    if WITH_GRAD:
        factor = weight * student_inner * student_outer / student_sum
        for start in range(0, num_columns, BLOCK_SIZE):
            columns = start + offsets
            student, slope = _load_logits(
                student_ptr, student_bias_ptr, columns, num_columns, num_readable,
                student_inner, student_outer, STUDENT_SOFTCAP,
            )  # fmt: skip
            teacher, _ = _load_logits(
                teacher_ptr, teacher_bias_ptr, columns, num_columns, num_readable,
                teacher_inner, teacher_outer, TEACHER_SOFTCAP,
            )  # fmt: skip
            student -= student_max
            teacher -= teacher_max
            grad = tl.exp(student) * (student - teacher - mean_difference) * (slope * factor)
            tl.debug_barrier()
            tl.store(grad_ptr + columns, grad, mask=columns < num_readable)


INTERPRETED = not isinstance(reverse_kl_row_kernel, triton.JITFunction)


def triton_row_step(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    student: Side,
    teacher: Side,
    weights: torch.Tensor | None,
    values: torch.Tensor,
    grad_dtype: torch.dtype | None,
) -> torch.Tensor | None:
    """The row step in one launch; the gradient takes the place of the student's logits.

    Rows may be read and written up to their stride: the workspace's padding is the kernel's.
    """
    num_rows, num_columns = student_logits.shape
    grad = None
    if grad_dtype is not None:
        grad = student_logits.view(grad_dtype)[:, :num_columns]
    student_inner, student_outer = _factors(student)
    teacher_inner, teacher_outer = _factors(teacher)
    with _on_device_of(student_logits):
        reverse_kl_row_kernel[(num_rows,)](
            student_logits,
            teacher_logits,
            grad,
            student.bias,
            teacher.bias,
            weights,
            values,
            student_logits.stride(0),
            teacher_logits.stride(0),
            0 if grad is None else grad.stride(0),
            num_columns,
            min(student_logits.stride(0), teacher_logits.stride(0)),
            student_inner,
            student_outer,
            teacher_inner,
            teacher_outer,
            STUDENT_SOFTCAP=student.softcap is not None,
            TEACHER_SOFTCAP=teacher.softcap is not None,
            WITH_GRAD=grad is not None,
            BLOCK_SIZE=BLOCK_SIZE,
            num_warps=NUM_WARPS,
        )
    return grad


def _factors(side: Side) -> tuple[float, float]:
    """(before the tanh, after it); without softcap their product is all that counts."""
    if side.softcap is None:
        return side.scale, 1.0 / side.temperature
    return side.scale / side.softcap, side.softcap / side.temperature


def _on_device_of(tensor: torch.Tensor) -> torch.cuda.device:
    """Triton launches on the current device; -1 (the CPU) changes nothing."""
    return torch.cuda.device(tensor.device if tensor.is_cuda else -1)
