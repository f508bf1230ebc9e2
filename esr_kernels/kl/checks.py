"""What a caller can get wrong about tensors, heads and vocabularies, refused by name."""

from __future__ import annotations

from typing import Any

import torch

from esr_kernels.checks import DTYPES, error, sees_values
from esr_kernels.lm_head import LMHead, local


def check_pair(what: str, shape: str, student: Any, teacher: Any) -> None:
    """Two matrices of equally many rows on one device."""
    for name, tensor in ((f"student_{what}", student), (f"teacher_{what}", teacher)):
        if not isinstance(tensor, torch.Tensor):
            raise error(name, f"a tensor {shape}", type(tensor).__name__)
        if tensor.ndim != 2:
            expected = f"shape {shape} (flatten batch and time)"
            raise error(name, expected, f"shape {list(tensor.shape)}")
        if tensor.dtype not in DTYPES:
            raise error(name, f"one of {DTYPES}", tensor.dtype)
    if teacher.shape[0] != student.shape[0]:
        expected = f"{student.shape[0]} rows as in student_{what} (the same tokens)"
        raise error(f"teacher_{what}", expected, teacher.shape[0])
    if teacher.device != student.device:
        expected = f"device {student.device} as of student_{what} (move one of them)"
        raise error(f"teacher_{what}", expected, teacher.device)


def check_rows_apart(name: str, logits: torch.Tensor) -> None:
    """That a gradient can be written over them."""
    num_rows, width = logits.shape
    row_stride, stride = logits.stride()
    if stride != 1 or (num_rows > 1 and row_stride < width):
        expected = "rows side by side in memory with inplace=True (take contiguous logits)"
        raise error(name, expected, f"strides {list(logits.stride())}")


def head_for(who: str, head: Any, hidden: torch.Tensor) -> LMHead:
    """The head as an LMHead, gathered, that fits the hidden states."""
    name, hidden_name = f"{who}_head", f"{who}_hidden"
    if isinstance(head, torch.Tensor):
        if head.ndim != 2:
            raise error(name, "a weight [V, D]", f"shape {list(head.shape)}")
        if not head.is_floating_point():
            raise error(name, f"one of {DTYPES}", head.dtype)
        head = LMHead(local(head))
    elif isinstance(head, LMHead):
        head = head.local()
    else:
        raise error(name, "an LMHead or its weight [V, D]", type(head).__name__)
    weight = head.weight
    if weight.shape[1] != hidden.shape[1]:
        expected = f"a weight [V, {hidden.shape[1]}] for {hidden_name} {list(hidden.shape)}"
        raise error(name, expected, f"shape {list(weight.shape)}")
    if weight.dtype != hidden.dtype:
        raise error(name, f"{hidden.dtype} as in {hidden_name} (cast one of them)", weight.dtype)
    if weight.device != hidden.device:
        expected = f"device {hidden.device} as of {hidden_name} (move one of them)"
        raise error(name, expected, weight.device)
    if not weight.shape[0]:
        raise error(name, "a weight of at least one row", f"shape {list(weight.shape)}")
    return head


def common_vocab(vocab_size: Any, student_vocab: int, teacher_vocab: int) -> int:
    least = min(student_vocab, teacher_vocab)
    if vocab_size is None:
        vocab_size = least
    if not isinstance(vocab_size, int) or not 0 < vocab_size <= least:
        expected = f"an int in 1..{least} (student {student_vocab}, teacher {teacher_vocab} ids)"
        raise error("vocab_size", expected, repr(vocab_size))
    return vocab_size


def check_workspace(max_workspace_bytes: Any, row_bytes: int) -> None:
    if max_workspace_bytes is None:
        return
    if not isinstance(max_workspace_bytes, int) or max_workspace_bytes < row_bytes:
        expected = f"None for the default, or an int from {row_bytes}, the logits of one row"
        raise error("max_workspace_bytes", expected, max_workspace_bytes)


def check_vocab_map(
    vocab_map: Any, vocab_size: Any, student_vocab: int, teacher_vocab: int, device: torch.device
) -> None:
    if vocab_size is not None:
        expected = "None with vocab_map, which says itself what both models share"
        raise error("vocab_size", expected, vocab_size)
    _check_map("vocab_map", "a teacher id", vocab_map, teacher_vocab, student_vocab, device)
    if sees_values(vocab_map) and not (vocab_map >= 0).any():
        raise error("vocab_map", "at least one teacher id that counts for a student id", "-1 only")


def check_student_map(
    student_map: Any, vocab_map: torch.Tensor | None, student_vocab: int, device: torch.device
) -> None:
    """After `check_vocab_map`."""
    if vocab_map is None:
        expected = "None without vocab_map, which says what the teacher's ids count for"
        raise error("student_map", expected, shape_of(student_map))
    _check_map("student_map", "a student id", student_map, student_vocab, student_vocab, device)
    if sees_values(student_map) and not torch.isin(student_map[student_map >= 0], vocab_map).any():
        expected = "at least one id that vocab_map holds too"
        raise error("student_map", expected, "none (but -1)")


def _check_map(
    name: str, of: str, ids: Any, size: int, student_vocab: int, device: torch.device
) -> None:
    if not isinstance(ids, torch.Tensor) or ids.shape != (size,):
        raise error(name, f"a tensor [{size}], a student id {of}", shape_of(ids))
    if ids.dtype != torch.int64:
        raise error(name, "torch.int64", ids.dtype)
    if ids.device != device:
        raise error(name, f"device {device}", ids.device)
    if not sees_values(ids):
        return
    low, high = (bound.item() for bound in ids.aminmax())
    if low < -1 or high >= student_vocab:
        expected = f"student ids in 0..{student_vocab - 1}, or -1 for none"
        raise error(name, expected, f"{low}..{high}")


def shape_of(value: Any) -> str:
    """Of a tensor, else the type's name: what came where a tensor of some shape should."""
    if isinstance(value, torch.Tensor):
        return f"shape {list(value.shape)}"
    return type(value).__name__
