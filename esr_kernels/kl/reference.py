"""The meaning of `linear_reverse_kl` and `reverse_kl` in eager PyTorch, with autograd's gradient.

In float64 this is the truth that the tests measure against; in the tested dtype it is the eager
PyTorch that the kernels are compared with.
"""

from __future__ import annotations

from typing import Any

import torch

from esr_kernels.kl.stats import TokenStats
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


def on_covered_ids(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    vocab_map: torch.Tensor,
    student_map: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both models' logits [N, C] of the student ids that the map reaches, in ascending order.

    With a student map, of the classes that ids of both models count for.
    """
    covered = covered_classes(vocab_map, student_map)
    teacher_logits = of_classes(teacher_logits, vocab_map, covered)
    if student_map is None:
        return student_logits[:, covered], teacher_logits
    return of_classes(student_logits, student_map, covered), teacher_logits


def covered_classes(vocab_map: torch.Tensor, student_map: torch.Tensor | None) -> torch.Tensor:
    covered = vocab_map[vocab_map >= 0].unique()
    return covered if student_map is None else covered[torch.isin(covered, student_map)]


def of_classes(logits: torch.Tensor, class_of: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """[N, C]: the log-sum-exp of the logits of each class."""
    return torch.stack([logits[:, class_of == i].logsumexp(dim=-1) for i in classes], dim=-1)


def shared_out(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    vocab_map: torch.Tensor,
    student_map: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both models' log-probabilities [N, M] of the student ids of the covered classes.

    The teacher's are its classes', times the student's shares of its ids in their class.
    """
    classes = covered_classes(vocab_map, student_map)
    teacher = of_classes(teacher_logits, vocab_map, classes).log_softmax(-1)
    logprobs = torch.full_like(student_logits, torch.nan)
    for index, i in enumerate(classes):
        members = student_map == i
        shares = student_logits[:, members].log_softmax(-1)
        logprobs[:, members] = teacher[:, index : index + 1] + shares
    inside = torch.isin(student_map, classes)
    return student_logits[:, inside].log_softmax(-1), logprobs[:, inside]


def token_stats_reference(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    token_weights: torch.Tensor,
    vocab_map: torch.Tensor | None = None,
    student_map: torch.Tensor | None = None,
) -> TokenStats:
    """`TokenStats` of [N, V] logits that temperatures have divided already."""
    kept = token_weights != 0
    covered = [torch.ones_like(student_logits[:, 0]) for _ in range(2)]
    if vocab_map is not None:
        ids = torch.arange(student_logits.shape[1], device=student_logits.device)
        class_of = ids if student_map is None else student_map
        classes = covered_classes(vocab_map, student_map)
        covered[0] = student_logits.softmax(-1)[:, torch.isin(class_of, classes)].sum(-1)
        covered[1] = teacher_logits.softmax(-1)[:, torch.isin(vocab_map, classes)].sum(-1)
        logits = student_logits, teacher_logits
        student_logits, teacher_logits = on_covered_ids(*logits, vocab_map, student_map)
        kl = reverse_kl_rows(student_logits, teacher_logits)
        if student_map is not None:
            student_logits, teacher_logits = shared_out(*logits, vocab_map, student_map)
    else:
        kl = reverse_kl_rows(student_logits, teacher_logits)
    student_probs, teacher_probs = student_logits.softmax(-1), teacher_logits.softmax(-1)
    top1_prob, choice = student_probs.max(-1)
    rank = (teacher_logits > teacher_logits.gather(1, choice.unsqueeze(1))).sum(-1)
    return TokenStats(
        kl=kl * kept,
        student_entropy=-torch.special.xlogy(student_probs, student_probs).sum(-1) * kept,
        teacher_entropy=-torch.special.xlogy(teacher_probs, teacher_probs).sum(-1) * kept,
        student_top1_prob=top1_prob * kept,
        teacher_rank_of_student_top1=rank * kept,
        agree=(rank == 0) & kept,
        student_covered=covered[0] * kept,
        teacher_covered=covered[1] * kept,
    )


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
    vocab_map: torch.Tensor | None = None,
    student_map: torch.Tensor | None = None,
    reduction: str = "mean",
    normalizer: torch.Tensor | None = None,
    return_stats: bool = False,
) -> Any:
    """Arguments as in `linear_reverse_kl`; the result has the dtype of the inputs."""
    if token_weights is None:
        token_weights = student_hidden.new_ones(student_hidden.shape[0])
    weights = token_weights.to(student_hidden.dtype)
    skipped = (weights == 0).unsqueeze(1)
    student_hidden = student_hidden.masked_fill(skipped, 0)
    teacher_hidden = teacher_hidden.masked_fill(skipped, 0)
    if teacher_temperature is None:
        teacher_temperature = temperature
    student_logits = student_head.logits(student_hidden) / temperature
    teacher_logits = teacher_head.logits(teacher_hidden) / teacher_temperature
    return reverse_kl_reference(
        student_logits,
        teacher_logits,
        token_weights=weights,
        vocab_size=vocab_size,
        vocab_map=vocab_map,
        student_map=student_map,
        reduction=reduction,
        normalizer=normalizer,
        return_stats=return_stats,
    )


def reverse_kl_reference(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    *,
    token_weights: torch.Tensor | None = None,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    vocab_size: int | None = None,
    vocab_map: torch.Tensor | None = None,
    student_map: torch.Tensor | None = None,
    reduction: str = "mean",
    normalizer: torch.Tensor | None = None,
    return_stats: bool = False,
) -> Any:
    """Arguments as in `reverse_kl`; the result has the dtype of the student's logits."""
    dtype = student_logits.dtype
    if token_weights is None:
        token_weights = student_logits.new_ones(student_logits.shape[0])
    weights = token_weights.to(dtype)
    skipped = (weights == 0).unsqueeze(1)
    student_logits = student_logits.masked_fill(skipped, 0) / temperature
    teacher_logits = teacher_logits.masked_fill(skipped, 0).to(dtype) / (
        teacher_temperature or temperature
    )
    if vocab_map is None:
        common = vocab_size or min(student_logits.shape[1], teacher_logits.shape[1])
        student_logits, teacher_logits = student_logits[:, :common], teacher_logits[:, :common]
        used = student_logits, teacher_logits
    else:
        used = on_covered_ids(student_logits, teacher_logits, vocab_map, student_map)
    values = weights * reverse_kl_rows(*used)
    if reduction == "none":
        result = values
    elif reduction == "sum":
        result = values.sum()
    else:
        total = weights.sum() if normalizer is None else normalizer.to(values.dtype)
        result = torch.where(total == 0, 0, values.sum() / torch.where(total == 0, 1, total))
    if return_stats:
        logits = student_logits.detach(), teacher_logits.detach()
        return result, token_stats_reference(*logits, weights, vocab_map, student_map)
    return result
