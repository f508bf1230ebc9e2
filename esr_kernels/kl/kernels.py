"""Triton row step: both models' raw logits of a chunk -> KL and, in place, its gradient.

    z = softcap * tanh(scale * (x + bias) / softcap) / temperature      x: raw logits, per model
    u = z - max(z);  S = sum exp(u);  p = exp(u) / S
    E = sum p_s (u_s - u_t);   KL = E + log(S_t / S_s)
    dKL/dx_s = p_s ((u_s - u_t) - E) * (1 - tanh^2) * scale / temperature

One program a row, two passes over V. The first reads both rows and keeps five running numbers: both
maxima, both sums and E's numerator. The second reads both again and writes the gradient over the
student's logits, as float32 or as the 16-bit dtype of the GEMMs that follow. Nothing else is saved.
Statistics ride along: entropies, arg-max and masses in the first pass, the rank in the second.

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

from esr_kernels.kl.rows import NO_MASS, Rows
from esr_kernels.launch import on_device_of

# 16 columns a thread of both rows: 56-85 registers, no spill (`python -m esr_kernels.aot`).
BLOCK_SIZE = 4096
# The statistics keep more numbers a column: 8 columns a thread, or some targets spill.
STATS_BLOCK_SIZE = 2048
NUM_WARPS = 8
# Left alone, ptxas squeezes some statistics variants into 64 registers and spills two.
STATS_MAX_REGISTERS = 128
STATS_OPTIONS = {} if torch.version.hip else {"maxnreg": STATS_MAX_REGISTERS}

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
def activate(x, inner, outer, SOFTCAP: tl.constexpr):
    """(z, dz/dx / outer / inner)"""
    if SOFTCAP:
        x = _tanh(x * inner)
        slope = 1.0 - x * x
        z = x * outer
    else:
        slope = 1.0
        z = x * (inner * outer)
    # A comparison, not a maximum, which would swallow NaN.
    return tl.where(z < _NO_MASS, _NO_MASS, z), slope


@triton.jit
def _load_logits(
    logits_ptr, bias_ptr, columns, num_columns, num_readable, inner, outer, SOFTCAP: tl.constexpr
):
    """`activate` of a block; columns past the vocabulary have no mass."""
    mask = columns < num_columns
    # The row's padding is read and dropped: a bound divisible by 16 keeps the loads 16 bytes wide
    # when the vocabulary's size is odd.
    x = tl.load(logits_ptr + columns, mask=columns < num_readable, other=0.0).to(tl.float32)
    x = tl.where(mask, x, 0.0)
    if bias_ptr is not None:
        x += tl.load(bias_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    z, slope = activate(x, inner, outer, SOFTCAP)
    return tl.where(mask, z, _NO_MASS), slope


@triton.jit
def _load_pair(
    student_ptr, teacher_ptr, student_bias_ptr, teacher_bias_ptr,
    columns, num_columns, num_readable,
    student_inner, student_outer, teacher_inner, teacher_outer,
    STUDENT_SOFTCAP: tl.constexpr, TEACHER_SOFTCAP: tl.constexpr, MAPPED: tl.constexpr,
):  # fmt: skip
    """z of both models, the student's z outside the map, and the student's slope."""
    student, slope = _load_logits(
        student_ptr, student_bias_ptr, columns, num_columns, num_readable,
        student_inner, student_outer, STUDENT_SOFTCAP,
    )  # fmt: skip
    outside = student
    if MAPPED:
        teacher = tl.load(teacher_ptr + columns, mask=columns < num_readable, other=0.0)
        teacher = tl.where(columns < num_columns, teacher, _NO_MASS)
        covered = teacher != -float("inf")
        teacher = tl.where(covered, teacher, _NO_MASS)
        outside = tl.where(covered, _NO_MASS, student)
        student = tl.where(covered, student, _NO_MASS)
    else:
        teacher, _ = _load_logits(
            teacher_ptr, teacher_bias_ptr, columns, num_columns, num_readable,
            teacher_inner, teacher_outer, TEACHER_SOFTCAP,
        )  # fmt: skip
    return student, teacher, outside, slope


@triton.jit
def _share(logsumexp, rest):
    """exp(logsumexp) / (exp(logsumexp) + exp(rest)), without overflow."""
    small = tl.exp(-tl.abs(logsumexp - rest))
    return tl.where(logsumexp < rest, small, 1.0) / (1.0 + small)


# stats_stride is the number of tokens: it changes every step, and 16 may divide it or not.
@triton.jit(
    do_not_specialize=["stats_stride"],
    do_not_specialize_on_alignment=["weights_ptr", "values_ptr", "stats_ptr"],
)
def reverse_kl_row_kernel(
    student_ptr,
    teacher_ptr,
    grad_ptr,
    student_bias_ptr,
    teacher_bias_ptr,
    weights_ptr,
    values_ptr,
    stats_ptr,
    student_stride,
    teacher_stride,
    grad_stride,
    stats_stride,
    num_columns,
    num_readable,
    student_inner,
    student_outer,
    teacher_inner,
    teacher_outer,
    STUDENT_SOFTCAP: tl.constexpr,
    TEACHER_SOFTCAP: tl.constexpr,
    MAPPED: tl.constexpr,
    WITH_GRAD: tl.constexpr,
    WITH_STATS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    student_ptr += row * student_stride
    teacher_ptr += row * teacher_stride
    offsets = tl.arange(0, BLOCK_SIZE)
    if WITH_GRAD:
        grad_ptr += row * grad_stride
    if WITH_STATS:
        stats_ptr += row

    weight = 1.0
    if weights_ptr is not None:
        weight = tl.load(weights_ptr + row).to(tl.float32)
        if weight == 0.0:  # The row may hold NaN: it is not read.
            tl.store(values_ptr + row, 0.0)
            if WITH_STATS:
                for field in tl.static_range(7):
                    tl.store(stats_ptr + field * stats_stride, 0.0)
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
    if WITH_STATS:
        student_moment = 0.0  # sum exp(u) u
        teacher_moment = 0.0
        choice = tl.full([], 0, tl.int32)
        choice_logit = tl.full([], _NO_MASS, tl.float32)  # the teacher's
        outside_max = tl.full([], _NO_MASS, tl.float32)
        outside_sum = 0.0
    for start in range(0, num_columns, BLOCK_SIZE):
        columns = start + offsets
        student, teacher, outside, _ = _load_pair(
            student_ptr, teacher_ptr, student_bias_ptr, teacher_bias_ptr,
            columns, num_columns, num_readable,
            student_inner, student_outer, teacher_inner, teacher_outer,
            STUDENT_SOFTCAP, TEACHER_SOFTCAP, MAPPED,
        )  # fmt: skip
        block_max = tl.max(student, 0)
        new_student_max = tl.maximum(student_max, block_max)
        new_teacher_max = tl.maximum(teacher_max, tl.max(teacher, 0))
        if WITH_STATS:
            first = tl.min(tl.where(student == block_max, columns, num_columns), 0)
            first_logit = tl.sum(tl.where(columns == first, teacher, 0.0), 0)
            better = block_max > student_max
            choice = tl.where(better, first, choice)
            choice_logit = tl.where(better, first_logit, choice_logit)
        student_shift = student_max - new_student_max
        teacher_shift = teacher_max - new_teacher_max
        student_decay = tl.exp(student_shift)
        teacher_decay = tl.exp(teacher_shift)
        student -= new_student_max
        teacher -= new_teacher_max
        masses = tl.exp(student)
        teacher_masses = tl.exp(teacher)
        numerator += student_sum * (student_shift - teacher_shift)
        numerator = numerator * student_decay + tl.sum(masses * (student - teacher), 0)
        if WITH_STATS:
            student_moment += student_sum * student_shift
            student_moment = student_moment * student_decay + tl.sum(masses * student, 0)
            teacher_moment += teacher_sum * teacher_shift
            teacher_moment = teacher_moment * teacher_decay + tl.sum(teacher_masses * teacher, 0)
            if MAPPED:
                new_outside_max = tl.maximum(outside_max, tl.max(outside, 0))
                outside_sum *= tl.exp(outside_max - new_outside_max)
                outside_sum += tl.sum(tl.exp(outside - new_outside_max), 0)
                outside_max = new_outside_max
        student_sum = student_sum * student_decay + tl.sum(masses, 0)
        teacher_sum = teacher_sum * teacher_decay + tl.sum(teacher_masses, 0)
        student_max = new_student_max
        teacher_max = new_teacher_max

    mean_difference = numerator / student_sum
    divergence = mean_difference + tl.log(teacher_sum / student_sum)
    tl.store(values_ptr + row, weight * divergence)

    if WITH_STATS:
        student_log_sum = tl.log(student_sum)
        teacher_log_sum = tl.log(teacher_sum)
        student_covered = 1.0
        teacher_covered = 1.0
        if MAPPED:
            outside = outside_max + tl.log(outside_sum)
            student_covered = _share(student_max + student_log_sum, outside)
            rest = tl.load(teacher_ptr + num_columns)
            teacher_covered = _share(teacher_max + teacher_log_sum, rest)
        # In the order of stats.STATS; the rank, number 4, is counted in the second pass.
        tl.store(stats_ptr, divergence)
        tl.store(stats_ptr + stats_stride, student_log_sum - student_moment / student_sum)
        tl.store(stats_ptr + 2 * stats_stride, teacher_log_sum - teacher_moment / teacher_sum)
        tl.store(stats_ptr + 3 * stats_stride, 1.0 / student_sum)
        tl.store(stats_ptr + 5 * stats_stride, student_covered)
        tl.store(stats_ptr + 6 * stats_stride, teacher_covered)

    above = tl.full([], 0, tl.int32)
    if WITH_GRAD:
        factor = weight * student_inner * student_outer / student_sum
        for start in range(0, num_columns, BLOCK_SIZE):
            columns = start + offsets
            student, teacher, _, slope = _load_pair(
                student_ptr, teacher_ptr, student_bias_ptr, teacher_bias_ptr,
                columns, num_columns, num_readable,
                student_inner, student_outer, teacher_inner, teacher_outer,
                STUDENT_SOFTCAP, TEACHER_SOFTCAP, MAPPED,
            )  # fmt: skip
            if WITH_STATS:
                # Not the choice itself: the compiler may round its logit otherwise here.
                higher = (teacher > choice_logit) & (columns != choice)
                above += tl.sum(higher.to(tl.int32), 0)
            student -= student_max
            teacher -= teacher_max
            grad = tl.exp(student) * (student - teacher - mean_difference) * (slope * factor)
            tl.debug_barrier()
            tl.store(grad_ptr + columns, grad, mask=columns < num_readable)
    elif WITH_STATS:
        for start in range(0, num_columns, BLOCK_SIZE):
            columns = start + offsets
            _, teacher, _, _ = _load_pair(
                student_ptr, teacher_ptr, student_bias_ptr, teacher_bias_ptr,
                columns, num_columns, num_readable,
                student_inner, student_outer, teacher_inner, teacher_outer,
                STUDENT_SOFTCAP, TEACHER_SOFTCAP, MAPPED,
            )  # fmt: skip
            higher = (teacher > choice_logit) & (columns != choice)
            above += tl.sum(higher.to(tl.int32), 0)

    if WITH_STATS:
        tl.store(stats_ptr + 4 * stats_stride, above.to(tl.float32))


def triton_row_step(student_logits: torch.Tensor, teacher_logits: torch.Tensor, rows: Rows) -> None:
    """The row step in one launch; `rows.grad` may lie over the student's logits, float32 then."""
    num_rows, num_columns = student_logits.shape
    num_readable = num_columns
    if rows.padded:
        num_readable = min(student_logits.stride(0), teacher_logits.stride(0))
    student_inner, student_outer = rows.student.factors
    teacher_inner, teacher_outer = rows.teacher.factors
    with on_device_of(student_logits):
        reverse_kl_row_kernel[(num_rows,)](
            student_logits,
            teacher_logits,
            rows.grad,
            rows.student.bias,
            None if rows.mapped else rows.teacher.bias,
            rows.weights,
            rows.values,
            rows.stats,
            student_logits.stride(0),
            teacher_logits.stride(0),
            0 if rows.grad is None else rows.grad.stride(0),
            0 if rows.stats is None else rows.stats.stride(0),
            num_columns,
            num_readable,
            student_inner,
            student_outer,
            teacher_inner,
            teacher_outer,
            STUDENT_SOFTCAP=rows.student.softcap is not None,
            TEACHER_SOFTCAP=rows.teacher.softcap is not None and not rows.mapped,
            MAPPED=rows.mapped,
            WITH_GRAD=rows.grad is not None,
            WITH_STATS=rows.stats is not None,
            BLOCK_SIZE=BLOCK_SIZE if rows.stats is None else STATS_BLOCK_SIZE,
            num_warps=NUM_WARPS,
            **(STATS_OPTIONS if rows.stats is not None else {}),
        )
