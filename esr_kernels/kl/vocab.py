"""Both vocabularies grouped by classes: what the ids of two tokenizers count for.

A class is a student id. Without a student map every student id is a class of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from esr_kernels.kl.rows import NO_MASS, Activation, activate, row_blocks

# Groups of more members have a program of their own in Triton: no lane loops for its neighbours.
SHORT_GROUP = 8


@dataclass(frozen=True)
class VocabGroups:
    """Group g < V: the ids that count for class g. Group V: those that count for none.

    The members of group g are `order[offsets[g] : offsets[g + 1]]`; all int32.
    """

    order: torch.Tensor  # [Vt], or [V] of the student's ids
    offsets: torch.Tensor  # [V + 2]
    by_size: torch.Tensor  # [V + 1], the largest group first; of the student's ids [V], but group V
    num_long: torch.Tensor  # 0-d: groups of more than SHORT_GROUP members, of those in by_size


@dataclass(frozen=True)
class StudentClasses:
    """What the student ids count for, under a student map."""

    class_of: torch.Tensor  # [V] int32, -1 for none
    groups: VocabGroups


@dataclass(frozen=True)
class Share:
    """What a share step reads and writes beside the student's raw logits [rows, V], which stay."""

    student: Activation
    classes: StudentClasses
    weights: torch.Tensor | None
    grouped: torch.Tensor  # [rows, V + 1], the teacher's from `group`; may be written
    peaks: torch.Tensor  # [rows, V], scratch
    shared: torch.Tensor  # [rows, V + 1], the result


def make_groups(vocab_map: torch.Tensor, vocab_size: int, rest: bool = True) -> VocabGroups:
    """On the map's device, without a host sync; once a call. rest: is group V looked at?"""
    groups = torch.where(vocab_map < 0, vocab_size, vocab_map)
    in_order, order = torch.sort(groups, stable=True)
    borders = torch.arange(vocab_size + 2, device=groups.device)
    offsets = torch.searchsorted(in_order, borders)
    sizes = offsets.diff()[: vocab_size + rest]
    by_size = torch.sort(sizes, descending=True, stable=True).indices
    num_long = (sizes > SHORT_GROUP).sum()
    return VocabGroups(*(x.to(torch.int32) for x in (order, offsets, by_size, num_long)))


def make_classes(
    vocab_map: torch.Tensor, student_map: torch.Tensor | None, vocab_size: int
) -> tuple[VocabGroups, StudentClasses | None]:
    """The teacher's ids, and under a student map the student's, by the classes that both reach."""
    if student_map is None:
        return make_groups(vocab_map, vocab_size), None
    vocab_map, student_map = (
        _reached_by(student_map, vocab_map, vocab_size),
        _reached_by(vocab_map, student_map, vocab_size),
    )
    groups = make_groups(student_map, vocab_size, rest=False)
    classes = StudentClasses(student_map.to(torch.int32), groups)
    del student_map
    return make_groups(vocab_map, vocab_size), classes


def _reached_by(other: torch.Tensor, own: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """`own` with -1 for the classes that `other` does not reach."""
    reached = torch.zeros(vocab_size + 1, dtype=torch.bool, device=own.device)
    reached.index_fill_(0, other, True)  # the last is -1
    return torch.where(reached[own], own, -1)


def torch_group(
    logits: torch.Tensor,
    grouped: torch.Tensor,
    teacher: Activation,
    weights: torch.Tensor | None,
    groups: VocabGroups,
) -> None:
    """grouped [rows, V + 1] = log-sum-exp of z over every group; -inf where it has no member.

    `logits` [rows, Vt] come raw from the GEMM and are consumed. Weights are for other backends.
    """
    activate(logits, teacher, with_slope=False)
    offsets, group_of = _segments(groups)
    for rows in row_blocks(logits):
        peaks, sums = _peaks_and_sums(logits[rows], groups, offsets, group_of)
        grouped[rows] = sums.log_().add_(peaks).T
        del peaks, sums  # before the next block's are there


def torch_share(logits: torch.Tensor, share: Share) -> None:
    """The teacher's mass of a class, shared out as the student shares its own.

    -inf where no class of both is; the last column is that of `grouped`. Weights are for other
    backends, and so is the scratch.
    """
    class_of, groups = share.classes.class_of, share.classes.groups
    offsets, group_of = _segments(groups)
    uncovered, class_of = class_of < 0, class_of.clamp(min=0)
    share.shared[:, -1] = share.grouped[:, -1]
    for rows in row_blocks(logits):
        z = share.shared[rows, :-1].copy_(logits[rows])
        activate(z, share.student, with_slope=False)
        peaks, sums = _peaks_and_sums(z, groups, offsets, group_of)
        # Relative to the class's peak: the digits of a class far below the others, or without mass.
        z -= peaks.index_select(0, class_of).T
        z += sums.log_().neg_().add_(share.grouped[rows].T).index_select(0, class_of).T
        z.masked_fill_(uncovered, -torch.inf)
        del peaks, sums


def _segments(groups: VocabGroups) -> tuple[torch.Tensor, torch.Tensor]:
    """The groups' borders, and the group of every member in order."""
    offsets = groups.offsets.long()
    return offsets, torch.repeat_interleave(offsets.diff(), output_size=len(groups.order))


def _peaks_and_sums(
    z: torch.Tensor, groups: VocabGroups, offsets: torch.Tensor, group_of: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """[V + 1, rows]: the maximum of every group, and the sum of exp(z - maximum).

    Sorted segments and not an index_add, whose sums would come in any order on a GPU.
    """
    members = z.T.index_select(0, groups.order)
    peaks = torch.segment_reduce(members, "max", offsets=offsets, initial=NO_MASS)
    members.sub_(peaks.index_select(0, group_of)).exp_()
    return peaks, torch.segment_reduce(members, "sum", offsets=offsets, initial=0.0)
