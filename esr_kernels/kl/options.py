"""The arguments that `linear_reverse_kl` and `reverse_kl` share, checked and made ready."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from esr_kernels.checks import choose_impl, error, sees_values
from esr_kernels.kl.checks import shape_of
from esr_kernels.kl.rows import Backend, torch_row_step
from esr_kernels.kl.stats import STATS, TokenStats, make_stats
from esr_kernels.kl.vocab import torch_group, torch_share

_REDUCTIONS = ("mean", "sum", "none")


@dataclass(frozen=True)
class Reduce:
    """Values of rows -> result. `inverse` is 1 / normalizer, 0-d, for "mean", else None."""

    reduction: str
    inverse: torch.Tensor | None

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        if self.reduction == "none":
            return values
        total = values.sum()
        return total if self.inverse is None else total * self.inverse


@dataclass(frozen=True)
class Options:
    """How the rows of a call count: weights [N] or None, stats [len(STATS), N] or None."""

    weights: torch.Tensor | None
    temperatures: tuple[float, float]  # student, teacher
    reduce: Reduce
    stats: torch.Tensor | None
    backend: Backend

    def with_stats(self, result: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, TokenStats]:
        return result if self.stats is None else (result, make_stats(self.stats, self.weights))


def make_options(
    like: torch.Tensor,
    dtype: torch.dtype,
    *,
    token_weights: Any,
    temperature: Any,
    teacher_temperature: Any,
    reduction: Any,
    normalizer: Any,
    return_stats: bool,
    impl: Any,
) -> Options:
    """For the rows of `like` [N, ...] on its device; values, weights and statistics in `dtype`."""
    num_rows, device = like.shape[0], like.device
    if teacher_temperature is None:
        teacher_temperature = temperature
    for name, value in (
        ("temperature", temperature),
        ("teacher_temperature", teacher_temperature),
    ):
        if not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise error(name, "a number > 0", repr(value))
    if reduction not in _REDUCTIONS:
        raise error("reduction", f"one of {_REDUCTIONS}", repr(reduction))
    weights = _weights(token_weights, num_rows, device, dtype)
    return Options(
        weights,
        (temperature, teacher_temperature),
        Reduce(reduction, _inverse(reduction, normalizer, weights, num_rows, device, dtype)),
        torch.empty(len(STATS), num_rows, dtype=dtype, device=device) if return_stats else None,
        _backend(impl, device, dtype),
    )


def _weights(
    token_weights: Any, num_rows: int, device: torch.device, dtype: torch.dtype
) -> torch.Tensor | None:
    if token_weights is None:
        return None
    if not isinstance(token_weights, torch.Tensor) or token_weights.shape != (num_rows,):
        raise error("token_weights", f"a tensor [{num_rows}]", shape_of(token_weights))
    if token_weights.is_complex():
        raise error("token_weights", "a real dtype", token_weights.dtype)
    if token_weights.device != device:
        raise error("token_weights", f"device {device}", token_weights.device)
    if sees_values(token_weights) and not (token_weights >= 0).all():  # NaN is refused too
        raise error("token_weights", "weights >= 0", token_weights.min().item())
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
            raise error("normalizer", f"None with reduction={reduction!r}", "a normalizer")
        if not isinstance(normalizer, torch.Tensor) or normalizer.ndim != 0:
            raise error("normalizer", "a 0-d tensor (torch.tensor(count))", shape_of(normalizer))
        if normalizer.is_complex():
            raise error("normalizer", "a real dtype", normalizer.dtype)
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


def _backend(impl: Any, device: torch.device, dtype: torch.dtype) -> Backend:
    if choose_impl(impl, device, runs_on_triton=dtype == torch.float32) == "torch":
        return Backend(torch_row_step, torch_group, torch_share, overwrites=False)
    from esr_kernels.kl import group_kernels, kernels

    return Backend(
        kernels.triton_row_step,
        group_kernels.triton_group,
        group_kernels.triton_share,
        overwrites=True,
    )
