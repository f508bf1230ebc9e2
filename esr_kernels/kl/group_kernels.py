"""Triton: the teacher's logits of a chunk, grouped by the student ids that they count for.

    grouped[g] = max_j z_j + log sum_j exp(z_j - max_j z_j)     over the members j of group g

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
from esr_kernels.kl.vocab import SHORT_GROUP, VocabGroups
from esr_kernels.launch import on_device_of

BLOCK_SIZE = 1024
LONG_BLOCK_SIZE = 512
NUM_WARPS = 4
# Programs a row that share its long groups, whose number the host does not know.
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
    order_ptr,
    offsets_ptr,
    logits_stride,
    grouped_stride,
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
    z = tl.where(some, peak + tl.log(tl.where(some, total, 1.0)), -float("inf"))
    tl.store(grouped_ptr + row * grouped_stride + groups, z, mask=short)


@triton.jit(do_not_specialize_on_alignment=["weights_ptr"])
def group_long_kernel(
    logits_ptr,
    bias_ptr,
    weights_ptr,
    grouped_ptr,
    order_ptr,
    offsets_ptr,
    by_size_ptr,
    num_long_ptr,
    logits_stride,
    grouped_stride,
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
        tl.store(grouped_ptr + row * grouped_stride + group, peak + tl.log(total))


def triton_group(
    logits: torch.Tensor,
    grouped: torch.Tensor,
    teacher: Activation,
    weights: torch.Tensor | None,
    groups: VocabGroups,
) -> None:
    """grouped [rows, V + 1] from raw logits [rows, Vt]; rows of weight 0 are not written."""
    num_rows, num_groups = grouped.shape
    inner, outer = teacher.factors
    softcap = teacher.softcap is not None
    with on_device_of(logits):
        group_short_kernel[(num_rows, triton.cdiv(num_groups, BLOCK_SIZE))](
            logits,
            teacher.bias,
            weights,
            grouped,
            groups.order,
            groups.offsets,
            logits.stride(0),
            grouped.stride(0),
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
            teacher.bias,
            weights,
            grouped,
            groups.order,
            groups.offsets,
            groups.by_size,
            groups.num_long,
            logits.stride(0),
            grouped.stride(0),
            inner,
            outer,
            SOFTCAP=softcap,
            PROGRAMS=LONG_PROGRAMS,
            BLOCK_SIZE=LONG_BLOCK_SIZE,
            num_warps=NUM_WARPS,
        )
