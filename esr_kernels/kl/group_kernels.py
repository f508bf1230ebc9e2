"""Triton: the teacher's logits of a chunk, grouped by the classes that they count for.

    grouped[g] = max_j z_j + log sum_j exp(z_j - max_j z_j)     over the members j of group g

and, under a student map, shared out among the student ids s of the class as the student shares its
own mass (the members are the student's, z are its logits):

    peaks[g] = max_j z_j;  grouped[g] -= log sum_j exp(z_j - peaks[g])
    shared[s] = (z_s - peaks[g]) + grouped[g]                   g: what s counts for

An online log-sum-exp; z as in `kernels.py`. A group without members gets -inf. Most groups have one
member, so a lane takes a group and loops; groups of more than SHORT_GROUP members, and the ids that
count for nothing, are left to a second launch, where a program takes a group at a time.
"""

# mypy: disable-error-code="no-untyped-def"
# (jit bodies carry no types)

from __future__ import annotations

import torch
import triton
import triton.language as tl

from esr_kernels.kl.kernels import activate
from esr_kernels.kl.rows import NO_MASS, Activation
from esr_kernels.kl.vocab import SHORT_GROUP, Share, VocabGroups
from esr_kernels.launch import on_device_of

BLOCK_SIZE = 1024
LONG_BLOCK_SIZE = 512
NUM_WARPS = 4
# Programs a row among which its long groups are divided, whose number the host does not know.
LONG_PROGRAMS = 16

_NO_MASS = tl.constexpr(NO_MASS)


@triton.jit
def _load_members(
    logits_ptr, bias_ptr, order_ptr, positions, mask, inner, outer, SOFTCAP: tl.constexpr
):
    members = tl.load(order_ptr + positions, mask=mask, other=0)
    x = tl.load(logits_ptr + members, mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        x += tl.load(bias_ptr + members, mask=mask, other=0.0).to(tl.float32)
    z, _ = activate(x, inner, outer, SOFTCAP)
    return tl.where(mask, z, _NO_MASS)


@triton.jit(do_not_specialize_on_alignment=["weights_ptr"])
def group_short_kernel(
    logits_ptr,
    bias_ptr,
    weights_ptr,
    grouped_ptr,
    teacher_ptr,
    order_ptr,
    offsets_ptr,
    logits_stride,
    grouped_stride,
    teacher_stride,
    num_groups,
    inner,
    outer,
    SOFTCAP: tl.constexpr,
    SHORT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_stride
    if weights_ptr is not None:
        weight = tl.load(weights_ptr + row)
        if weight == 0.0:  # The row step does not read it, and it may hold Inf.
            return
    groups = tl.program_id(1) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    mask = groups < num_groups
    begin = tl.load(offsets_ptr + groups, mask=mask, other=0)
    count = tl.load(offsets_ptr + groups + 1, mask=mask, other=0) - begin
    short = mask & (count <= SHORT)
    peak = tl.full([BLOCK_SIZE], _NO_MASS, tl.float32)
    total = tl.zeros([BLOCK_SIZE], tl.float32)
    for k in range(tl.max(tl.where(short, count, 0), 0)):
        taken = short & (k < count)
        z = _load_members(
            logits_ptr, bias_ptr, order_ptr, begin + k, taken, inner, outer, SOFTCAP
        )  # fmt: skip
        new_peak = tl.maximum(peak, z)
        total = total * tl.exp(peak - new_peak) + tl.where(taken, tl.exp(z - new_peak), 0.0)
        peak = new_peak
    some = short & (count > 0)
    grouped_ptr += row * grouped_stride
    if teacher_ptr is None:
        z = tl.where(some, peak + tl.log(tl.where(some, total, 1.0)), -float("inf"))
        tl.store(grouped_ptr + groups, z, mask=short)
    else:
        tl.store(grouped_ptr + groups, peak, mask=some)
        teacher_ptr += row * teacher_stride
        teacher = tl.load(teacher_ptr + groups, mask=some, other=0.0)
        teacher -= tl.log(tl.where(some, total, 1.0))
        tl.store(teacher_ptr + groups, teacher, mask=some)


@triton.jit(do_not_specialize_on_alignment=["weights_ptr"])
def group_long_kernel(
    logits_ptr,
    bias_ptr,
    weights_ptr,
    grouped_ptr,
    teacher_ptr,
    order_ptr,
    offsets_ptr,
    by_size_ptr,
    num_long_ptr,
    logits_stride,
    grouped_stride,
    teacher_stride,
    inner,
    outer,
    SOFTCAP: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_stride
    if weights_ptr is not None:
        weight = tl.load(weights_ptr + row)
        if weight == 0.0:  # The row step does not read it, and it may hold Inf.
            return
    lanes = tl.arange(0, BLOCK_SIZE)
    for index in range(tl.program_id(1), tl.load(num_long_ptr), PROGRAMS):
        group = tl.load(by_size_ptr + index)
        begin = tl.load(offsets_ptr + group)
        end = tl.load(offsets_ptr + group + 1)
        peak = tl.full([], _NO_MASS, tl.float32)
        total = 0.0
        for start in range(begin, end, BLOCK_SIZE):
            taken = start + lanes < end
            z = _load_members(
                logits_ptr, bias_ptr, order_ptr, start + lanes, taken, inner, outer, SOFTCAP
            )  # fmt: skip
            new_peak = tl.maximum(peak, tl.max(z, 0))
            masses = tl.where(taken, tl.exp(z - new_peak), 0.0)
            total = total * tl.exp(peak - new_peak) + tl.sum(masses, 0)
            peak = new_peak
        if teacher_ptr is None:
            tl.store(grouped_ptr + row * grouped_stride + group, peak + tl.log(total))
        else:
            tl.store(grouped_ptr + row * grouped_stride + group, peak)
            at = teacher_ptr + row * teacher_stride + group
            tl.store(at, tl.load(at) - tl.log(total))


@triton.jit(do_not_specialize_on_alignment=["weights_ptr"])
def share_kernel(
    logits_ptr,
    bias_ptr,
    weights_ptr,
    peaks_ptr,
    grouped_ptr,
    shared_ptr,
    class_of_ptr,
    logits_stride,
    peaks_stride,
    grouped_stride,
    shared_stride,
    num_columns,
    inner,
    outer,
    SOFTCAP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    peaks_ptr += row * peaks_stride
    grouped_ptr += row * grouped_stride
    if weights_ptr is not None:
        weight = tl.load(weights_ptr + row)
        if weight == 0.0:  # Nothing was grouped.
            return
    columns = tl.program_id(1) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    mask = columns < num_columns
    x = tl.load(logits_ptr + row * logits_stride + columns, mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        x += tl.load(bias_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    z, _ = activate(x, inner, outer, SOFTCAP)
    classes = tl.load(class_of_ptr + columns, mask=mask, other=-1)
    covered = classes >= 0
    # Relative to the class's peak: the digits of a class far below the others, or without mass.
    z -= tl.load(peaks_ptr + classes, mask=covered, other=0.0)
    z += tl.load(grouped_ptr + classes, mask=covered, other=0.0)
    z = tl.where(covered, z, -float("inf"))
    rest = tl.load(grouped_ptr + num_columns)
    z = tl.where(mask, z, rest)
    tl.store(shared_ptr + row * shared_stride + columns, z, mask=columns <= num_columns)


def triton_group(
    logits: torch.Tensor,
    grouped: torch.Tensor,
    teacher: Activation,
    weights: torch.Tensor | None,
    groups: VocabGroups,
) -> None:
    """grouped [rows, V + 1] from raw logits [rows, Vt]; rows of weight 0 are not written."""
    _launch_groups(logits, grouped, None, teacher, weights, groups)


def triton_share(logits: torch.Tensor, share: Share) -> None:
    """As `torch_share`; writes `grouped` and `peaks` too, and nothing of the rows of weight 0."""
    student, weights, groups = share.student, share.weights, share.classes.groups
    _launch_groups(logits, share.peaks, share.grouped, student, weights, groups)
    num_rows, num_columns = logits.shape
    inner, outer = student.factors
    with on_device_of(logits):
        share_kernel[(num_rows, triton.cdiv(num_columns + 1, BLOCK_SIZE))](
            logits,
            student.bias,
            weights,
            share.peaks,
            share.grouped,
            share.shared,
            share.classes.class_of,
            logits.stride(0),
            share.peaks.stride(0),
            share.grouped.stride(0),
            share.shared.stride(0),
            num_columns,
            inner,
            outer,
            SOFTCAP=student.softcap is not None,
            BLOCK_SIZE=BLOCK_SIZE,
            num_warps=NUM_WARPS,
        )


def _launch_groups(
    logits: torch.Tensor,
    grouped: torch.Tensor,
    teacher: torch.Tensor | None,
    side: Activation,
    weights: torch.Tensor | None,
    groups: VocabGroups,
) -> None:
    """Of either side; with the grouped `teacher` the sums go there, and the peaks alone here."""
    num_rows, num_groups = grouped.shape
    inner, outer = side.factors
    softcap = side.softcap is not None
    teacher_stride = 0 if teacher is None else teacher.stride(0)
    with on_device_of(logits):
        group_short_kernel[(num_rows, triton.cdiv(num_groups, BLOCK_SIZE))](
            logits,
            side.bias,
            weights,
            grouped,
            teacher,
            groups.order,
            groups.offsets,
            logits.stride(0),
            grouped.stride(0),
            teacher_stride,
            num_groups,
            inner,
            outer,
            SOFTCAP=softcap,
            SHORT=SHORT_GROUP,
            BLOCK_SIZE=BLOCK_SIZE,
            num_warps=NUM_WARPS,
        )
        group_long_kernel[(num_rows, LONG_PROGRAMS)](
            logits,
            side.bias,
            weights,
            grouped,
            teacher,
            groups.order,
            groups.offsets,
            groups.by_size,
            groups.num_long,
            logits.stride(0),
            grouped.stride(0),
            teacher_stride,
            inner,
            outer,
            SOFTCAP=softcap,
            PROGRAMS=LONG_PROGRAMS,
            BLOCK_SIZE=LONG_BLOCK_SIZE,
            num_warps=NUM_WARPS,
        )
