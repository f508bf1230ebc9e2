"""The error budget: twice what eager PyTorch errs, plus one unit in the last place.

Truth is float64 from the same, already rounded inputs. Eager is float32 PyTorch, rounded at the end
to the dtype of the result: stricter than eager in the tested dtype, whose 16-bit logits err more.
On a small case one eager run may err little by luck, so eager runs several times, its sums in other
orders, and the worst counts.
"""

from collections.abc import Sequence

import torch


def error_norms(result: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """The largest error, and the root of the summed squares."""
    error = result.double() - truth
    norms = [torch.linalg.vector_norm(error, norm) for norm in (float("inf"), 2)]
    return torch.stack(norms)


def assert_within_budget(
    actual: torch.Tensor,
    truth: torch.Tensor,
    eager_runs: Sequence[tuple[torch.Tensor, torch.Tensor]],
    name: str,
    least_eager_error: float = 0.0,
) -> None:
    """`eager_runs` are pairs of eager's result and its truth; dtype is that of `actual`."""
    assert actual.shape == truth.shape, f"{name}: {list(actual.shape)}, not {list(truth.shape)}"
    if not actual.numel():
        return
    assert torch.isfinite(actual).all(), f"{name}: not finite"
    runs = [error_norms(eager.to(actual.dtype), its_truth) for eager, its_truth in eager_runs]
    budget = 2 * torch.stack(runs).amax(dim=0).clamp(min=least_eager_error)
    limits = torch.finfo(actual.dtype)
    # Below the smallest normal number a unit in the last place no longer shrinks.
    budget += limits.eps * error_norms(torch.zeros_like(truth), truth)
    budget += limits.tiny * actual.numel() ** 0.5
    error = error_norms(actual, truth)
    assert (error <= budget).all(), f"{name}: errors {error.tolist()}, budget {budget.tolist()}"


def relative_error(actual: torch.Tensor, truth: torch.Tensor) -> float:
    return ((actual.double() - truth).norm() / truth.norm()).item()
