"""Inputs of `linear_reverse_kl`, and a run of it that returns value and gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from numerics import assert_within_budget

from esr_kernels import LMHead, linear_reverse_kl
from esr_kernels.kl.reference import linear_reverse_kl_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLS = ("torch", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Inputs:
    student_hidden: torch.Tensor
    student_head: LMHead
    teacher_hidden: torch.Tensor
    teacher_head: LMHead

    def to(self, dtype: torch.dtype) -> Inputs:
        return Inputs(
            self.student_hidden.to(dtype),
            _cast(self.student_head, dtype),
            self.teacher_hidden.to(dtype),
            _cast(self.teacher_head, dtype),
        )

    def shuffled(self) -> Inputs:
        """The same problem with the hidden dimensions, so the logits' sums, in other order."""
        student = torch.randperm(self.student_hidden.shape[1])
        teacher = torch.randperm(self.teacher_hidden.shape[1])
        return Inputs(
            self.student_hidden[:, student],
            replace(self.student_head, weight=self.student_head.weight[:, student]),
            self.teacher_hidden[:, teacher],
            replace(self.teacher_head, weight=self.teacher_head.weight[:, teacher]),
        )

    def leaves(self, train_head: bool) -> tuple[Inputs, dict[str, torch.Tensor]]:
        """A copy whose student requires gradients, and its leaves."""
        head = self.student_head
        leaves = {"hidden": self.student_hidden.detach().clone().requires_grad_()}
        if train_head:
            leaves["weight"] = head.weight.detach().clone().requires_grad_()
            if head.bias is not None:
                leaves["bias"] = head.bias.detach().clone().requires_grad_()
        head = replace(
            head,
            weight=leaves.get("weight", head.weight),
            bias=leaves.get("bias", head.bias),
        )
        return replace(self, student_hidden=leaves["hidden"], student_head=head), leaves


def _cast(head: LMHead, dtype: torch.dtype) -> LMHead:
    bias = None if head.bias is None else head.bias.to(dtype)
    return replace(head, weight=head.weight.to(dtype), bias=bias)


def make_inputs(
    num_rows: int = 7,
    student_vocab: int = 131,
    teacher_vocab: int = 131,
    student_dim: int = 20,
    teacher_dim: int = 12,
    dtype: torch.dtype = torch.float32,
    bias: bool = False,
    softcap: float | None = None,
    scale: float = 1.0,
    spread: float = 2.0,
) -> Inputs:
    """Unrelated models with logits of standard deviation `spread`."""

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=DEVICE)

    def side(vocab: int, dim: int) -> tuple[torch.Tensor, LMHead]:
        weight = random(vocab, dim) * spread / dim**0.5
        head = LMHead(weight, random(vocab) if bias else None, softcap, scale)
        return random(num_rows, dim).to(dtype), _cast(head, dtype)

    return Inputs(*side(student_vocab, student_dim), *side(teacher_vocab, teacher_dim))


def near_identical(inputs: Inputs, noise: float = 0.03) -> Inputs:
    """The teacher is the student with noise on its hidden states and weights."""

    def shaken(tensor: torch.Tensor) -> torch.Tensor:
        return tensor + noise * tensor.std() * torch.randn_like(tensor)

    head = inputs.student_head
    return replace(
        inputs,
        teacher_hidden=shaken(inputs.student_hidden),
        teacher_head=replace(head, weight=shaken(head.weight)),
    )


def evaluate(
    function: Callable[..., torch.Tensor],
    inputs: Inputs,
    train_head: bool = True,
    upstream: torch.Tensor | None = None,
    **options: Any,
) -> dict[str, torch.Tensor]:
    """Value and the gradients of the student's leaves."""
    inputs, leaves = inputs.leaves(train_head)
    value = function(
        inputs.student_hidden,
        inputs.student_head,
        inputs.teacher_hidden,
        inputs.teacher_head,
        **options,
    )
    if upstream is None:
        upstream = torch.ones_like(value)
    grads = torch.autograd.grad(value, list(leaves.values()), upstream.to(value.dtype))
    return {"value": value.detach(), **dict(zip(leaves, grads, strict=True))}


def check(
    inputs: Inputs,
    impl: str,
    train_head: bool = True,
    upstream: torch.Tensor | None = None,
    max_workspace_bytes: int | None = None,
    **options: Any,
) -> dict[str, torch.Tensor]:
    """Value and every gradient of `impl` within the budget; returns them."""
    options |= {"train_head": train_head, "upstream": upstream}
    actual = evaluate(
        linear_reverse_kl, inputs, impl=impl, max_workspace_bytes=max_workspace_bytes, **options
    )
    runs = []
    for same in (inputs, *(inputs.shuffled() for _ in range(9))):
        eager = evaluate(linear_reverse_kl_reference, same.to(torch.float32), **options)
        truth = evaluate(linear_reverse_kl_reference, same.to(torch.float64), **options)
        runs.append((eager, truth))
    for name, result in actual.items():
        pairs = [(eager[name], truth[name]) for eager, truth in runs]
        floor = _error_of_rows(inputs, options) if result.ndim == 0 else 0.0
        assert_within_budget(result, pairs[0][1], pairs, name, floor)
    return actual


def _error_of_rows(inputs: Inputs, options: dict[str, Any]) -> float:
    """What eager errs in a scalar if no two rows' errors cancel."""
    none = options | {"reduction": "none", "normalizer": None, "upstream": None}
    rows = [
        evaluate(linear_reverse_kl_reference, inputs.to(dtype), **none)["value"].double()
        for dtype in (torch.float32, torch.float64)
    ]
    error = (rows[0] - rows[1]).abs().sum()
    if options.get("reduction", "mean") == "sum":
        return error.item()
    weights = options.get("token_weights")
    total = torch.tensor(float(len(rows[0]))) if weights is None else weights.sum()
    normalizer = options.get("normalizer")
    return (error / (total if normalizer is None else normalizer).clamp(min=1e-6)).item()


def workspace(num_rows: int, vocab_size: int) -> int:
    """Bytes that hold exactly `num_rows` rows of float32 logits of both models."""
    return num_rows * 8 * (-(-vocab_size // 32) * 32)
