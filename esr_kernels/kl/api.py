"""`linear_reverse_kl` and `reverse_kl`: the public functions."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch

from esr_kernels.kl.autograd import LinearReverseKL
from esr_kernels.kl.checks import (
    check_pair,
    check_rows_apart,
    check_student_map,
    check_vocab_map,
    check_workspace,
    common_vocab,
    head_for,
)
from esr_kernels.kl.chunked import Call, Side, Wanted, accumulate_dtype, run_chunks
from esr_kernels.kl.logits import LogitsCall, ReverseKL, run_rows
from esr_kernels.kl.options import make_options
from esr_kernels.kl.planner import row_strides
from esr_kernels.kl.rows import Activation
from esr_kernels.kl.stats import TokenStats
from esr_kernels.kl.vocab import make_classes
from esr_kernels.lm_head import LMHead
from esr_kernels.opaque import opaque


@overload
def linear_reverse_kl(
    student_hidden: torch.Tensor,
    student_head: LMHead | torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_head: LMHead | torch.Tensor,
    *,
    return_stats: Literal[False] = False,
    **options: Any,
) -> torch.Tensor: ...


@overload
def linear_reverse_kl(
    student_hidden: torch.Tensor,
    student_head: LMHead | torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_head: LMHead | torch.Tensor,
    *,
    return_stats: Literal[True],
    **options: Any,
) -> tuple[torch.Tensor, TokenStats]: ...


@opaque
def linear_reverse_kl(
    student_hidden: torch.Tensor,
    student_head: LMHead | torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_head: LMHead | torch.Tensor,
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
    max_workspace_bytes: int | None = None,
    impl: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, TokenStats]:
    """Per-token KL(student || teacher), exact, with logits only ever a chunk of rows at a time.

    Equivalent to, at the precision of float32 logits::

        V = vocab_size or min(student_head.weight.shape[0], teacher_head.weight.shape[0])
        def logits(hidden, head):
            x = head.scale * torch.nn.functional.linear(hidden, head.weight, head.bias)
            return x if head.softcap is None else head.softcap * torch.tanh(x / head.softcap)
        s = (logits(student_hidden, student_head)[:, :V] / temperature).log_softmax(-1)
        t = (logits(teacher_hidden, teacher_head)[:, :V] / teacher_temperature).log_softmax(-1)
        kl = token_weights * (s.exp() * (s - t)).sum(-1)
        return {"mean": kl.sum() / token_weights.sum(), "sum": kl.sum(), "none": kl}[reduction]

    With `vocab_map`, `t` is the log-sum-exp of the teacher's logits over the ids of a student id,
    ids of -1 left out, and both softmaxes run over the student ids that some teacher id maps to.
    With `student_map` as well, `s` is the log-sum-exp of the student's logits over the ids of a
    class in the same way, and both softmaxes run over the classes that ids of both models count
    for::

        def by_class(logits, class_of):
            return torch.stack([logits[:, class_of == c].logsumexp(-1) for c in classes], dim=-1)
        classes = [c for c in range(Vs) if (vocab_map == c).any() and (student_map == c).any()]
        s = by_class(logits(student_hidden, student_head) / temperature, student_map)
        t = by_class(logits(teacher_hidden, teacher_head) / teacher_temperature, vocab_map)
        s, t = s.log_softmax(-1), t.log_softmax(-1)

    Gradients flow to `student_hidden` and, where they require it, to weight and bias of
    `student_head`; never to the teacher, the weights or the normalizer. They are made in the
    forward pass, except under reduction="none" with a trained head, where backward makes them. A
    frozen head costs neither time nor memory. Calling twice gives bitwise equal results.

    Args:
        student_hidden: [N, Ds], float32, bfloat16, float16, or float64 (impl="torch").
        student_head: LMHead, or its weight [Vs, Ds]; dtype and device of `student_hidden`. A
            DTensor is gathered once a call; its gradient is the mean over the ranks, as FSDP2's.
        teacher_hidden: [N, Dt]; the dtype may differ from the student's.
        teacher_head: LMHead, or its weight [Vt, Dt]; dtype and device of `teacher_hidden`.
        token_weights: [N], >= 0, also bool or int. A row of weight 0 is left out of value and
            gradient, even if its hidden states hold NaN. Default 1.
        temperature: divides both models' logits; no factor T**2 is applied.
        teacher_temperature: overrides the teacher's.
        vocab_size: the common prefix that both softmaxes run over; default min(Vs, Vt).
        vocab_map: [Vt] int64, for models with different tokenizers: the student id that each
            teacher id counts for, many to one, -1 for none. A student id that nothing maps to gets
            no gradient. Excludes `vocab_size`: all rows of both heads take part.
        student_map: [Vs] int64, with `vocab_map`: the id that each student id counts for, -1 for
            none; default: itself. The values of both maps are classes, named by student ids.
        reduction: "mean" divides by the sum of the weights, "sum" does not, "none" gives [N].
        normalizer: 0-d tensor that replaces the sum of the weights in "mean": the token count of
            all accumulation steps and processes, over the number of processes where gradients are
            averaged over them (DDP, FSDP2). Where the divisor is 0 the result is 0.
        return_stats: return (result, TokenStats): KL, entropies, ranks of every row, detached. With
            `student_map` of the student's distribution over the covered student ids, and of the
            teacher's shared out over them: each class's mass as the student shares its own.
        max_workspace_bytes: cap on the logits in flight: 8 B * V a row (16 B in float64), V rounded
            up to 32 (16); with `vocab_map` 4 B * (2 Vs + Vt), with `student_map` as well
            4 B * (3 Vs + max(Vt, Vs)). Default: 512 rows or 600 MB, whichever is more, at most 2048
            rows. 150_000_000 keeps all extra memory under 0.2 GB at V = 152k, for any N
            (docs/kernels.md).
        impl: "triton", "torch", or "auto": triton for tensors on a GPU, torch elsewhere.

    Returns:
        0-d, or [N] for reduction="none"; with `return_stats` a pair of that and TokenStats.
        float32, or float64 if an input is. The inputs' dtypes decide the precision, not autocast.
        Logits of -inf count as -1e30.

    Raises:
        ValueError: naming the argument, what was expected and what came. Negative weights and ids
            of the maps out of range are found on the CPU; on a GPU, where it would wait for the
            values, only if the environment has ESR_KERNELS_CHECK_VALUES=1.
    """
    check_pair("hidden", "[N, D]", student_hidden, teacher_hidden)
    student_head = head_for("student", student_head, student_hidden)
    teacher_head = head_for("teacher", teacher_head, teacher_hidden)
    dtype = accumulate_dtype(student_hidden.dtype, teacher_hidden.dtype)
    options = make_options(
        student_hidden,
        dtype,
        token_weights=token_weights,
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        reduction=reduction,
        normalizer=normalizer,
        return_stats=return_stats,
        impl=impl,
    )
    vocabs = student_head.weight.shape[0], teacher_head.weight.shape[0]
    if vocab_map is None:
        vocabs = (common_vocab(vocab_size, *vocabs),) * 2
    else:
        check_vocab_map(vocab_map, vocab_size, *vocabs, student_hidden.device)
    if student_map is not None:
        check_student_map(student_map, vocab_map, vocabs[0], student_hidden.device)
    maps = vocab_map is not None, student_map is not None
    strides = row_strides(*vocabs, *maps, dtype.itemsize)
    check_workspace(max_workspace_bytes, sum(strides) * dtype.itemsize)
    student = _side(student_hidden, student_head, options.temperatures[0], vocabs[0])
    with torch.no_grad():
        teacher = _side(teacher_hidden.detach(), teacher_head, options.temperatures[1], vocabs[1])
    groups, classes = None, None
    if vocab_map is not None:
        groups, classes = make_classes(vocab_map, student_map, vocabs[0])
    call = Call(
        student,
        teacher,
        options.weights,
        options.backend,
        max_workspace_bytes,
        groups,
        classes,
        options.stats,
    )
    inputs = (student.hidden, student.weight, student.activation.bias)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        return options.with_stats(LinearReverseKL.apply(*inputs, call, options.reduce))
    with torch.no_grad():
        values, _ = run_chunks(call, Wanted())
        return options.with_stats(options.reduce(values))


def _side(hidden: torch.Tensor, head: LMHead, temperature: float, vocab_size: int) -> Side:
    """Both models see the first `vocab_size` ids: what is past them is in neither softmax."""
    weight, bias = head.weight, head.bias
    if vocab_size < weight.shape[0]:
        weight, bias = weight[:vocab_size], None if bias is None else bias[:vocab_size]
    bias = None if bias is None else bias.contiguous()  # the kernel has no stride for it
    return Side(hidden, weight, Activation(bias, head.softcap, head.scale, temperature))


@overload
def reverse_kl(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    *,
    return_stats: Literal[False] = False,
    **options: Any,
) -> torch.Tensor: ...


@overload
def reverse_kl(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    *,
    return_stats: Literal[True],
    **options: Any,
) -> tuple[torch.Tensor, TokenStats]: ...


@opaque
def reverse_kl(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    *,
    token_weights: torch.Tensor | None = None,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    vocab_size: int | None = None,
    reduction: str = "mean",
    normalizer: torch.Tensor | None = None,
    return_stats: bool = False,
    inplace: bool = False,
    impl: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, TokenStats]:
    """Per-token KL(student || teacher) of two logit tensors, exact, in one pass over their rows.

    Equivalent to, computed in float32 whatever the logits' dtype::

        V = vocab_size or min(student_logits.shape[1], teacher_logits.shape[1])
        s = (student_logits[:, :V] / temperature).log_softmax(-1)
        t = (teacher_logits[:, :V] / teacher_temperature).log_softmax(-1)
        kl = token_weights * (s.exp() * (s - t)).sum(-1)
        return {"mean": kl.sum() / token_weights.sum(), "sum": kl.sum(), "none": kl}[reduction]

    The gradient flows to `student_logits` alone, in their dtype, and is made in the forward pass.
    Where logits are 16 bits wide they are rounded already: `linear_reverse_kl` does not round them.

    Args:
        student_logits: [N, Vs], float32, bfloat16, float16, or float64 (impl="torch").
        teacher_logits: [N, Vt]; dtype and width may differ from the student's.
        inplace: the gradient overwrites the storage of `student_logits`, if they require one, and
            backward runs once. Rows must not overlap, nor the two tensors. Otherwise no input is
            written to, and the gradient takes memory of its own, twice during backward.
        token_weights, temperature, teacher_temperature, vocab_size, reduction, normalizer,
            return_stats, impl: as in `linear_reverse_kl`.

    Returns:
        As `linear_reverse_kl`.
    """
    check_pair("logits", "[N, V]", student_logits, teacher_logits)
    if inplace:
        check_rows_apart("student_logits", student_logits)
    dtype = accumulate_dtype(student_logits.dtype, teacher_logits.dtype)
    options = make_options(
        student_logits,
        dtype,
        token_weights=token_weights,
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        reduction=reduction,
        normalizer=normalizer,
        return_stats=return_stats,
        impl=impl,
    )
    call = LogitsCall(
        teacher_logits.detach(),
        Activation(temperature=options.temperatures[0]),
        Activation(temperature=options.temperatures[1]),
        options.weights,
        options.backend,
        dtype,
        common_vocab(vocab_size, student_logits.shape[1], teacher_logits.shape[1]),
        options.stats,
    )
    if torch.is_grad_enabled() and student_logits.requires_grad:
        return options.with_stats(ReverseKL.apply(student_logits, call, options.reduce, inplace))
    with torch.no_grad():
        return options.with_stats(options.reduce(run_rows(student_logits, call, None)))
