"""What a caller can get wrong, refused by name; and the choice of implementation."""

from __future__ import annotations

import math
from typing import Any

import torch

from esr_kernels.checks import DTYPES, choose_impl, error, sees_values
from esr_kernels.kl.rows import Backend, torch_row_step
from esr_kernels.kl.vocab import torch_group
from esr_kernels.lm_head import LMHead, local

_REDUCTIONS = ("mean", "sum", "none")


def head(name: str, head: Any) -> LMHead:
    if isinstance(head, LMHead):
        return head.local()
    if not isinstance(head, torch.Tensor):
        raise error(name, "an LMHead or its weight [V, D]", type(head).__name__)
    if head.ndim != 2:
        raise error(name, "a weight [V, D]", f"shape {list(head.shape)}")
    if not head.is_floating_point():
        raise error(name, f"one of {DTYPES}", head.dtype)
    return LMHead(local(head))


def check_side(who: str, hidden: Any, head: LMHead) -> None:
    name = f"{who}_hidden"
    if not isinstance(hidden, torch.Tensor):
        raise error(name, "a tensor [N, D]", type(hidden).__name__)
    if hidden.ndim != 2:
        raise error(name, "shape [N, D]", f"shape {list(hidden.shape)}")
    if hidden.dtype not in DTYPES:
        raise error(name, f"one of {DTYPES}", hidden.dtype)
    weight = head.weight
    if weight.shape[1] != hidden.shape[1]:
        expected = f"a weight [V, {hidden.shape[1]}] for {name} {list(hidden.shape)}"
        raise error(f"{who}_head", expected, f"shape {list(weight.shape)}")
    if weight.dtype != hidden.dtype:
        raise error(f"{who}_head", f"{hidden.dtype} as in {name} (cast one of them)", weight.dtype)
    if weight.device != hidden.device:
        raise error(f"{who}_head", f"device {hidden.device} as in {name}", weight.device)


def check_logits(name: str, logits: Any) -> None:
    if not isinstance(logits, torch.Tensor):
        raise error(name, "a tensor [N, V]", type(logits).__name__)
    if logits.ndim != 2:
        raise error(name, "shape [N, V]", f"shape {list(logits.shape)}")
    if logits.dtype not in DTYPES:
        raise error(name, f"one of {DTYPES}", logits.dtype)


def check_temperature(name: str, value: Any) -> None:
    if not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise error(name, "a number > 0", repr(value))


def common_vocab(vocab_size: Any, student_vocab: int, teacher_vocab: int) -> int:
    least = min(student_vocab, teacher_vocab)
    if vocab_size is None:
        vocab_size = least
    if not isinstance(vocab_size, int) or not 0 < vocab_size <= least:
        expected = f"an int in 1..{least} (student {student_vocab}, teacher {teacher_vocab} ids)"
        raise error("vocab_size", expected, vocab_size)
    return vocab_size


def check_reduction(reduction: Any) -> None:
    if reduction not in _REDUCTIONS:
        raise error("reduction", f"one of {_REDUCTIONS}", repr(reduction))


def check_workspace(max_workspace_bytes: Any, row_bytes: int) -> None:
    if max_workspace_bytes is None:
        return
    if not isinstance(max_workspace_bytes, int) or max_workspace_bytes < row_bytes:
        expected = f"None or at least {row_bytes}, the logits of one row,"
        raise error("max_workspace_bytes", expected, max_workspace_bytes)


def check_vocab_map(
    vocab_map: Any, vocab_size: Any, student_vocab: int, teacher_vocab: int, device: torch.device
) -> None:
    if vocab_size is not None:
        expected = "None with vocab_map, which says itself what both models share"
        raise error("vocab_size", expected, vocab_size)
    if not isinstance(vocab_map, torch.Tensor) or vocab_map.shape != (teacher_vocab,):
        got = getattr(vocab_map, "shape", type(vocab_map).__name__)
        raise error("vocab_map", f"a tensor [{teacher_vocab}], a student id a teacher id", got)
    if vocab_map.dtype != torch.int64:
        raise error("vocab_map", "torch.int64", vocab_map.dtype)
    if vocab_map.device != device:
        raise error("vocab_map", f"device {device}", vocab_map.device)
    if not sees_values(vocab_map):
        return
    low, high = vocab_map.aminmax()
    if low < -1 or high >= student_vocab:
        expected = f"student ids in 0..{student_vocab - 1}, or -1 for none"
        raise error("vocab_map", expected, f"{low.item()}..{high.item()}")
    if high < 0:
        raise error("vocab_map", "at least one teacher id that counts for a student id", "-1 only")


def backend(impl: str, device: torch.device, dtype: torch.dtype) -> Backend:
    if choose_impl(impl, device, runs_on_triton=dtype == torch.float32) == "torch":
        return Backend(torch_row_step, torch_group, overwrites=False)
    from esr_kernels.kl import group_kernels, kernels

    return Backend(kernels.triton_row_step, group_kernels.triton_group, overwrites=True)


def weights(
    token_weights: Any, num_rows: int, device: torch.device, dtype: torch.dtype
) -> torch.Tensor | None:
    if token_weights is None:
        return None
    if not isinstance(token_weights, torch.Tensor) or token_weights.shape != (num_rows,):
        got = getattr(token_weights, "shape", type(token_weights).__name__)
        raise error("token_weights", f"a tensor [{num_rows}]", got)
    if token_weights.is_complex():
        raise error("token_weights", "a real dtype", token_weights.dtype)
    if token_weights.device != device:
        raise error("token_weights", f"device {device}", token_weights.device)
    if sees_values(token_weights) and (token_weights < 0).any():
        raise error("token_weights", "weights >= 0", token_weights.min().item())
    return token_weights.detach().to(dtype).contiguous()


def inverse(
    reduction: str,
    normalizer: Any,
    weights: torch.Tensor | None,
    num_rows: int,
    device: torch.device,
    dtype: torch.dtype,
) -> torch.Tensor | None:
    """1 / normalizer for "mean", 0 where that is 0; without looking at it from the host."""
    if normalizer is not None:
        if reduction != "mean":
            raise error("normalizer", f"None with reduction={reduction!r}", "a normalizer")
        if not isinstance(normalizer, torch.Tensor) or normalizer.ndim != 0:
            got = getattr(normalizer, "shape", type(normalizer).__name__)
            raise error("normalizer", "a 0-d tensor", got)
        if normalizer.device != device:
            raise error("normalizer", f"device {device}", normalizer.device)
        total = normalizer.detach().to(dtype)
    elif reduction != "mean":
        return None
    elif weights is None:
        total = torch.full((), num_rows, dtype=dtype, device=device)
    else:
        total = weights.sum()
    return torch.where(total == 0, 0, total.reciprocal())
