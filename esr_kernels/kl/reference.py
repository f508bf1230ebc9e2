"""The meaning of `linear_reverse_kl` in eager PyTorch, all materialised, with autograd's gradient.

In float64 this is the truth that the tests measure against; in the tested dtype it is the eager
PyTorch that the kernels are compared with.
"""

from __future__ import annotations

import torch

from esr_kernels.lm_head import LMHead


def reverse_kl_rows(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    """KL(student || teacher) of each row, [N, V] twice -> [N]; 0 * log 0 is 0."""
    student_logprobs = torch.log_softmax(student_logits, dim=-1)
    teacher_logprobs = torch.log_softmax(teacher_logits, dim=-1)
    probs = student_logprobs.exp()
    massless = probs == 0
    student_logprobs = student_logprobs.masked_fill(massless, 0)
    teacher_logprobs = teacher_logprobs.masked_fill(massless, 0)
    return (probs * (student_logprobs - teacher_logprobs)).sum(dim=-1)


def linear_reverse_kl_reference(
    student_hidden: torch.Tensor,
    student_head: LMHead,
    teacher_hidden: torch.Tensor,
    teacher_head: LMHead,
    *,
    token_weights: torch.Tensor | None = None,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    vocab_size: int | None = None,
    reduction: str = "mean",
    normalizer: torch.Tensor | None = None,
) -> torch.Tensor:
    """Arguments as in `linear_reverse_kl`; the result has the dtype of the inputs."""
    if token_weights is None:
        token_weights = student_hidden.new_ones(student_hidden.shape[0])
    weights = token_weights.to(student_hidden.dtype)
    skipped = (weights == 0).unsqueeze(1)
    student_hidden = student_hidden.masked_fill(skipped, 0)
    teacher_hidden = teacher_hidden.masked_fill(skipped, 0)
    if vocab_size is None:
        vocab_size = min(student_head.weight.shape[0], teacher_head.weight.shape[0])
    if teacher_temperature is None:
        teacher_temperature = temperature
    student_logits = student_head.logits(student_hidden)[:, :vocab_size] / temperature
    teacher_logits = teacher_head.logits(teacher_hidden)[:, :vocab_size] / teacher_temperature
    values = weights * reverse_kl_rows(student_logits, teacher_logits.to(student_logits.dtype))
    if reduction == "none":
        return values
    if reduction == "sum":
        return values.sum()
    total = weights.sum() if normalizer is None else normalizer.to(values.dtype)
    return torch.where(total == 0, 0, values.sum() / torch.where(total == 0, 1, total))
