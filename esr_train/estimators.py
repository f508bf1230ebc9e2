"""The loss from the sampled tokens alone: reverse KL as a policy gradient.

    KL(student || teacher) = E over y ~ student of (log student(y) - log teacher(y))

a draw of which is the log-probability difference of what was written, on the shortest runs of
tokens that both models spell alike. Its gradient is estimated by that difference, held fixed, times
the gradient of log student(y). Unbiased where the rollouts are sampled at temperature 1 without
filters.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from esr_kernels import LMHead

# Logits in flight: these rows, in float32.
ROWS = 512


def target_log_probs(hidden: Tensor, head: LMHead, targets: Tensor) -> Tensor:
    """Log-probability [n] of each target under logits that are made a chunk of rows at a time.

    hidden: [n, D]. Equivalent to log_softmax(head.logits(hidden, torch.float32)) at the targets;
    differentiable, the logits being made again in backward. Those that need a gradient on a GPU
    are rounded to the inputs' dtype.
    """
    rounded = hidden.is_cuda and hidden.requires_grad

    def chunk(rows: Tensor, ids: Tensor) -> Tensor:
        logits = head.logits(rows, None if rounded else torch.float32)
        return -cross_entropy(logits.float(), ids, reduction="none")

    pieces = [
        checkpoint(chunk, rows, ids, use_reentrant=False)
        for rows, ids in zip(hidden.split(ROWS), targets.split(ROWS), strict=True)
    ]
    return torch.cat(pieces)


def sampled_reverse_kl(
    student_log_probs: Tensor,
    teacher_log_probs: Tensor,
    spans: tuple[Tensor, Tensor, Tensor, Tensor],
) -> Tensor:
    """[k]: the log-probability difference of each span, with the policy gradient of the KL.

    student_log_probs [n], teacher_log_probs [m]: of the tokens written. spans: `Rollout.spans`.
    """
    first, stop, teacher_first, teacher_stop = spans
    student = _span_sums(student_log_probs, first, stop)
    teacher = _span_sums(teacher_log_probs.detach(), teacher_first, teacher_stop)
    difference = (student - teacher).detach()
    return difference + difference * (student - student.detach())


def _span_sums(values: Tensor, first: Tensor, stop: Tensor) -> Tensor:
    # In float64: differences of long sums.
    sums = torch.nn.functional.pad(values.double().cumsum(0), (1, 0))
    return (sums[stop] - sums[first]).float()
