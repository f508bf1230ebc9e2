"""The teacher's vocabulary grouped by the student ids that its ids count for."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from esr_kernels.kl.rows import NO_MASS, Activation, activate, row_blocks

# Groups of more members have a program of their own in Triton: no lane loops for its neighbours.
SHORT_GROUP = 8


@dataclass(frozen=True)
class VocabGroups:
    """Group g < V: the teacher ids that count for student id g. Group V: those that count for none.

    The members of group g are `order[offsets[g] : offsets[g + 1]]`; all int32.
    """

    order: torch.Tensor  # [Vt]
    offsets: torch.Tensor  # [V + 2]
    by_size: torch.Tensor  # [V + 1], the largest group first
    num_long: torch.Tensor  # 0-d: groups of more than SHORT_GROUP members


def make_groups(vocab_map: torch.Tensor, vocab_size: int) -> VocabGroups:
    """On the map's device, without a host sync; once a call."""
    groups = torch.where(vocab_map < 0, vocab_size, vocab_map)
    in_order, order = torch.sort(groups, stable=True)
    borders = torch.arange(vocab_size + 2, device=groups.device)
    offsets = torch.searchsorted(in_order, borders)
    sizes = offsets.diff()
    by_size = torch.sort(sizes, descending=True, stable=True).indices
    num_long = (sizes > SHORT_GROUP).sum()
    return VocabGroups(*(x.to(torch.int32) for x in (order, offsets, by_size, num_long)))


def torch_group(
    logits: torch.Tensor,
    grouped: torch.Tensor,
    teacher: Activation,
    weights: torch.Tensor | None,
    groups: VocabGroups,
) -> None:
    """grouped [rows, V + 1] = log-sum-exp of z over every group; -inf where it has no member.

    `logits` [rows, Vt] come raw from the GEMM and are consumed. Sorted segments and not an
    index_add, whose sums would come in any order on a GPU. Weights are for other backends.
    """
    activate(logits, teacher, with_slope=False)
    offsets = groups.offsets.long()
    group_of = torch.repeat_interleave(offsets.diff(), output_size=logits.shape[1])
    for rows in row_blocks(logits):
        members = logits[rows].T.index_select(0, groups.order)
        peaks = torch.segment_reduce(members, "max", offsets=offsets, initial=NO_MASS)
        members.sub_(peaks.index_select(0, group_of)).exp_()
        sums = torch.segment_reduce(members, "sum", offsets=offsets, initial=0.0)
        grouped[rows] = sums.log_().add_(peaks).T
