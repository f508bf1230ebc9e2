"""The loss from the sampled tokens alone: reverse KL as a policy gradient.

    KL(student || teacher) = E over y ~ student of (log student(y) - log teacher(y))

a draw of which is the log-probability difference of what was written, on the shortest runs of
tokens that spell the same for both models. Its gradient is estimated by that difference, held
fixed, times the gradient of log student(y). Unbiased for one tokenizer, where the rollouts are
sampled at temperature 1 without filters. Of two, log teacher(y) is of one spelling of the text.
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
    differentiable, the logits being made again in backward. On a GPU the gradient, not the value,
    is of logits rounded to the inputs' dtype: a GEMM from 16 to 32 bits has none.
    """
    needs_grad = torch.is_grad_enabled() and hidden.requires_grad
    rounded = needs_grad and hidden.is_cuda and hidden.dtype.itemsize == 2

    def chunk(rows: Tensor, ids: Tensor) -> Tensor:
        logits = head.logits(rows, None if rounded else torch.float32)
        return -cross_entropy(logits.float(), ids, reduction="none")

    pieces = []
    for rows, ids in zip(hidden.split(ROWS), targets.split(ROWS), strict=True):
        if not needs_grad:
            pieces.append(chunk(rows, ids))
            continue
        piece = checkpoint(chunk, rows, ids, use_reentrant=False, preserve_rng_state=False)
        if rounded:
            with torch.no_grad():
                exact = -cross_entropy(head.logits(rows, torch.float32), ids, reduction="none")
            piece = exact + piece - piece.detach()
        pieces.append(piece)
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
    lengths = stop - first
    begins = lengths.cumsum(0) - lengths
    span = torch.repeat_interleave(torch.arange(len(first), device=first.device), lengths)
    rows = torch.arange(len(span), device=first.device) - begins[span] + first[span]
    return torch.segment_reduce(values[rows], "sum", lengths=lengths, initial=0.0)
