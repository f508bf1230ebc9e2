"""`linear_reverse_kl`: the public function, its checks, and the choice of implementation."""

from __future__ import annotations

import math
from importlib.util import find_spec
from typing import Any

import torch

from esr_kernels.kl.chunked import (
    Call,
    LinearReverseKL,
    Reduce,
    RowStep,
    Side,
    Wanted,
    accumulate_dtype,
    row_stride,
    torch_row_step,
)
from esr_kernels.lm_head import LMHead

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_REDUCTIONS = ("mean", "sum", "none")
_IMPLS = ("auto", "triton", "torch")


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
    reduction: str = "mean",
    normalizer: torch.Tensor | None = None,
    return_stats: bool = False,
    max_workspace_bytes: int | None = None,
    impl: str = "auto",
) -> torch.Tensor:
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

    Gradients flow to `student_hidden` and, where they require it, to weight and bias of
    `student_head`; never to the teacher, the weights or the normalizer. They are made in the
    forward pass, except under reduction="none" with a trained head, where backward makes them. A
    frozen head costs neither time nor memory. Calling twice gives bitwise equal results.

    Args:
        student_hidden: [N, Ds], float32, bfloat16, float16, or float64 (impl="torch").
        student_head: LMHead, or its weight [Vs, Ds]; dtype and device of `student_hidden`.
        teacher_hidden: [N, Dt]; the dtype may differ from the student's.
        teacher_head: LMHead, or its weight [Vt, Dt]; dtype and device of `teacher_hidden`.
        token_weights: [N], >= 0. A row of weight 0 is left out of value and gradient, even if its
            hidden states hold NaN. Default 1.
        temperature: divides both models' logits; no factor T**2 is applied.
        teacher_temperature: overrides the teacher's.
        vocab_size: the common prefix that both softmaxes run over; default min(Vs, Vt).
        vocab_map: for models with different tokenizers; not implemented yet.
        reduction: "mean" divides by the sum of the weights, "sum" does not, "none" gives [N].
        normalizer: 0-d tensor that replaces the sum of the weights in "mean", as the token count of
            all processes and accumulation steps does. Where the divisor is 0 the result is 0.
        return_stats: also return per-token statistics; not implemented yet.
        max_workspace_bytes: cap on the logits in flight: 8 B * V a row (16 B in float64), V rounded
            up to 32 (16). Default: 512 rows or 600 MB, whichever is more, at most 2048 rows.
        impl: "triton", "torch", or "auto": triton for tensors on a GPU, torch elsewhere.

    Returns:
        0-d, or [N] for reduction="none"; float32, or float64 if an input is. The inputs' dtypes
        decide the precision, not autocast. Logits of -inf count as -1e30.
    """
    if vocab_map is not None:
        raise NotImplementedError("vocab_map is not implemented yet: expected None")
    if return_stats:
        raise NotImplementedError("return_stats is not implemented yet: expected False")
    student_head = _head("student_head", student_head)
    teacher_head = _head("teacher_head", teacher_head)
    _check_side("student", student_hidden, student_head)
    _check_side("teacher", teacher_hidden, teacher_head)
    num_rows, device = student_hidden.shape[0], student_hidden.device
    if teacher_hidden.shape[0] != num_rows:
        raise _error(
            "teacher_hidden",
            f"{num_rows} rows as in student_hidden",
            f"{teacher_hidden.shape[0]}",
        )
    if teacher_hidden.device != device:
        raise _error("teacher_hidden", f"device {device}", teacher_hidden.device)
    if teacher_temperature is None:
        teacher_temperature = temperature
    _check_temperature("temperature", temperature)
    _check_temperature("teacher_temperature", teacher_temperature)
    if reduction not in _REDUCTIONS:
        raise _error("reduction", f"one of {_REDUCTIONS}", repr(reduction))
    vocab_size = _vocab_size(vocab_size, student_head, teacher_head)

    student = _side(student_hidden, student_head, temperature, vocab_size)
    with torch.no_grad():
        teacher = _side(teacher_hidden, teacher_head, teacher_temperature, vocab_size)
    dtype = torch.promote_types(accumulate_dtype(student), accumulate_dtype(teacher))
    _check_workspace(max_workspace_bytes, vocab_size, dtype)
    row_step = _row_step(impl, device, dtype)
    weights = _weights(token_weights, num_rows, device, dtype)
    inverse = _inverse(reduction, normalizer, weights, num_rows, device, dtype)
    reduce = Reduce(reduction, inverse)
    call = Call(student, teacher, weights, row_step, max_workspace_bytes, reduce)
    if torch.compiler.is_compiling():  # opaque: nothing in it gains from being traced
        return torch.compiler.disable(_run)(call)
    return _run(call)


def _run(call: Call) -> torch.Tensor:
    inputs = (call.student.hidden, call.student.weight, call.student.bias)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        return LinearReverseKL.apply(*inputs, call)
    with torch.no_grad():
        values, _ = call.run(Wanted())
        return call.reduce(values)


def _error(name: str, expected: Any, got: Any) -> ValueError:
    return ValueError(f"{name}: expected {expected}, got {got}")


def _head(name: str, head: Any) -> LMHead:
    if isinstance(head, LMHead):
        return head
    if not isinstance(head, torch.Tensor):
        raise _error(name, "an LMHead or its weight [V, D]", type(head).__name__)
    if head.ndim != 2:
        raise _error(name, "a weight [V, D]", f"shape {list(head.shape)}")
    if not head.is_floating_point():
        raise _error(name, f"one of {_DTYPES}", head.dtype)
    return LMHead(head)


def _check_side(who: str, hidden: Any, head: LMHead) -> None:
    name = f"{who}_hidden"
    if not isinstance(hidden, torch.Tensor):
        raise _error(name, "a tensor [N, D]", type(hidden).__name__)
    if hidden.ndim != 2:
        raise _error(name, "shape [N, D]", f"shape {list(hidden.shape)}")
    if hidden.dtype not in _DTYPES:
        raise _error(name, f"one of {_DTYPES}", hidden.dtype)
    weight = head.weight
    if weight.shape[1] != hidden.shape[1]:
        expected = f"a weight [V, {hidden.shape[1]}] for {name} {list(hidden.shape)}"
        raise _error(f"{who}_head", expected, f"shape {list(weight.shape)}")
    if weight.dtype != hidden.dtype:
        raise _error(f"{who}_head", f"{hidden.dtype} as in {name} (cast one of them)", weight.dtype)
    if weight.device != hidden.device:
        raise _error(f"{who}_head", f"device {hidden.device} as in {name}", weight.device)


def _check_temperature(name: str, value: Any) -> None:
    if not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise _error(name, "a number > 0", repr(value))


def _vocab_size(vocab_size: Any, student_head: LMHead, teacher_head: LMHead) -> int:
    sizes = student_head.weight.shape[0], teacher_head.weight.shape[0]
    if vocab_size is None:
        vocab_size = min(sizes)
    if not isinstance(vocab_size, int) or not 0 < vocab_size <= min(sizes):
        expected = f"an int in 1..{min(sizes)} (student {sizes[0]}, teacher {sizes[1]} rows)"
        raise _error("vocab_size", expected, vocab_size)
    return vocab_size


def _side(hidden: torch.Tensor, head: LMHead, temperature: float, vocab_size: int) -> Side:
    """Both models see the first `vocab_size` ids: what is past them is in neither softmax."""
    weight, bias = head.weight, head.bias
    if vocab_size < weight.shape[0]:
        weight, bias = weight[:vocab_size], None if bias is None else bias[:vocab_size]
    bias = None if bias is None else bias.contiguous()  # the kernel has no stride for it
    return Side(hidden, weight, bias, head.softcap, head.scale, temperature)


def _check_workspace(max_workspace_bytes: Any, vocab_size: int, dtype: torch.dtype) -> None:
    if max_workspace_bytes is None:
        return
    least = 2 * row_stride(vocab_size, dtype.itemsize) * dtype.itemsize
    if not isinstance(max_workspace_bytes, int) or max_workspace_bytes < least:
        expected = f"None or at least {least}, the logits of one row,"
        raise _error("max_workspace_bytes", expected, max_workspace_bytes)


def _row_step(impl: str, device: torch.device, dtype: torch.dtype) -> RowStep:
    if impl not in _IMPLS:
        raise _error("impl", f"one of {_IMPLS}", repr(impl))
    if impl == "auto":
        kernel_runs = device.type == "cuda" and dtype == torch.float32
        impl = "triton" if kernel_runs and find_spec("triton") else "torch"
    if impl == "torch":
        return torch_row_step
    from esr_kernels.kl import kernels

    if dtype != torch.float32:
        raise _error("impl", "'torch' for float64 inputs", repr(impl))
    if device.type == "cpu" and not kernels.INTERPRETED:
        expected = "'torch' for tensors on the CPU (or TRITON_INTERPRET=1 before the first import)"
        raise _error("impl", expected, repr(impl))
    return kernels.triton_row_step


def _weights(
    token_weights: Any, num_rows: int, device: torch.device, dtype: torch.dtype
) -> torch.Tensor | None:
    if token_weights is None:
        return None
    if not isinstance(token_weights, torch.Tensor) or token_weights.shape != (num_rows,):
        got = getattr(token_weights, "shape", type(token_weights).__name__)
        raise _error("token_weights", f"a tensor [{num_rows}]", got)
    if token_weights.is_complex():
        raise _error("token_weights", "a real dtype", token_weights.dtype)
    if token_weights.device != device:
        raise _error("token_weights", f"device {device}", token_weights.device)
    return token_weights.detach().to(dtype).contiguous()


def _inverse(
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
            raise _error("normalizer", f"None with reduction={reduction!r}", "a normalizer")
        if not isinstance(normalizer, torch.Tensor) or normalizer.ndim != 0:
            got = getattr(normalizer, "shape", type(normalizer).__name__)
            raise _error("normalizer", "a 0-d tensor", got)
        if normalizer.device != device:
            raise _error("normalizer", f"device {device}", normalizer.device)
        total = normalizer.detach().to(dtype)
    elif reduction != "mean":
        return None
    elif weights is None:
        total = torch.full((), num_rows, dtype=dtype, device=device)
    else:
        total = weights.sum()
    return torch.where(total == 0, 0, total.reciprocal())
