"""What a row step can say of every token beside the loss."""

from __future__ import annotations

from typing import NamedTuple

import torch

# Rows of the buffer that a row step fills, in this order. The rank is a whole number in a float:
# exact up to 2**24 ids.
STATS = (
    "kl",
    "student_entropy",
    "teacher_entropy",
    "student_top1_prob",
    "teacher_rank",
    "student_covered",
    "teacher_covered",
)


class TokenStats(NamedTuple):
    """Statistics of every row, [N] each, detached, in nats, at the temperatures of the loss.

    Under a `vocab_map` they are those of the two distributions over the covered student ids, but
    for the masses. Under a `student_map` too, where a student id is covered if ids of both models
    count for its class: the teacher's mass of a class is shared out among its student ids as the
    student shares its own. Rows of weight 0 hold 0 (False) in every field.
    """

    kl: torch.Tensor  # KL(student || teacher), not weighted
    student_entropy: torch.Tensor
    teacher_entropy: torch.Tensor
    student_top1_prob: torch.Tensor
    # int64: how many ids the teacher puts strictly above the student's first choice, so 0 means
    # that the teacher would choose it too. The student's first choice is the lowest id of a tie.
    teacher_rank_of_student_top1: torch.Tensor
    agree: torch.Tensor  # bool: that rank is 0
    student_covered: torch.Tensor  # mass of the model's whole softmax inside the map; 1 without
    teacher_covered: torch.Tensor


def make_stats(buffer: torch.Tensor, weights: torch.Tensor | None) -> TokenStats:
    """From the [len(STATS), N] buffer of a row step."""
    rank = buffer[STATS.index("teacher_rank")]
    agree = rank == 0
    if weights is not None:
        agree &= weights != 0
    kl, student_entropy, teacher_entropy, top1_prob = buffer[:4]
    return TokenStats(
        kl, student_entropy, teacher_entropy, top1_prob, rank.long(), agree, buffer[5], buffer[6]
    )
