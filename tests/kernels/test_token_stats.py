"""`TokenStats` against float64, and what asking for them costs."""

from typing import Any

import pytest
import torch
from kl_cases import DEVICE, IMPLS, Inputs, evaluate, make_inputs, near_identical, workspace

from esr_kernels import TokenStats, linear_reverse_kl
from esr_kernels.kl.kernels import BLOCK_SIZE
from esr_kernels.kl.reference import linear_reverse_kl_reference

pytestmark = pytest.mark.parametrize("impl", IMPLS)


def stats_of(inputs: Inputs, **options: Any) -> TokenStats:
    function = linear_reverse_kl if "impl" in options else linear_reverse_kl_reference
    heads = inputs.student_head, inputs.teacher_head
    arguments = (inputs.student_hidden, heads[0], inputs.teacher_hidden, heads[1])
    return function(*arguments, return_stats=True, **options)[1]


def check_stats(inputs: Inputs, impl: str, **options: Any) -> TokenStats:
    """Every field, with the gradient made in the same call and without one."""
    truth = stats_of(inputs.to(torch.float64), **options)
    plain = stats_of(inputs, impl=impl, **options)
    for train_head in (False, True):
        leaves, _ = inputs.leaves(train_head)
        options |= {"max_workspace_bytes": workspace(400, 131)}
        actual = stats_of(leaves, impl=impl, **options)
        for name, value, other, expected in zip(
            TokenStats._fields, actual, plain, truth, strict=True
        ):
            assert value.shape == (len(inputs.student_hidden),), name
            assert not value.requires_grad, name
            torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-6, msg=name)
            if value.is_floating_point():
                torch.testing.assert_close(value.double(), expected, rtol=2e-5, atol=2e-6, msg=name)
            else:
                assert torch.equal(value, expected), (name, value, expected)
    return actual


@pytest.mark.parametrize("vocab", [1, 131, BLOCK_SIZE + 9])
@pytest.mark.parametrize(
    "head", [{}, {"bias": True, "softcap": 3.0, "scale": 1.7}], ids=["plain", "softcap"]
)
def test_fields(impl: str, vocab: int, head: dict[str, Any]) -> None:
    inputs = make_inputs(5, vocab, vocab + 3, **head)
    stats = check_stats(inputs, impl, temperature=0.7, teacher_temperature=1.3)
    assert (stats.student_covered == 1).all()
    assert (stats.teacher_covered == 1).all()


@pytest.mark.parametrize("noise", [0.3, 0.01])
def test_near_identical_models_agree(impl: str, noise: float) -> None:
    inputs = near_identical(make_inputs(16, BLOCK_SIZE + 9), noise)
    stats = check_stats(inputs, impl)
    assert stats.agree.any()
    assert torch.equal(stats.agree, stats.teacher_rank_of_student_top1 == 0)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_rows_of_weight_zero_hold_zeros(impl: str, reduction: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(dtype=dtype, bias=True)
    inputs.student_hidden[2] = float("nan")
    inputs.teacher_hidden[[2, 5]] = float("inf")
    weights = torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0, 0.0, 3.0], device=DEVICE)
    stats = check_stats(inputs, impl, token_weights=weights, reduction=reduction)
    assert not any(field[[2, 5]].any() for field in stats)


@pytest.mark.parametrize("num_rows", [0, 1])
def test_few_rows(impl: str, num_rows: int) -> None:
    check_stats(make_inputs(num_rows), impl)


def test_ties(impl: str) -> None:
    """The student's choice is the lowest id of a tie; the teacher's equals do not outrank it."""
    eye = torch.eye(1, device=DEVICE)
    student, teacher = torch.zeros(BLOCK_SIZE + 50, 1), torch.zeros(BLOCK_SIZE + 50, 1)
    student[[40, 77, BLOCK_SIZE + 7]] = 5.0
    teacher[[3, 40, 77, 80]] = torch.tensor([[4.0], [3.0], [9.0], [3.0]])
    stats = linear_reverse_kl(
        eye, student.to(DEVICE), eye, teacher.to(DEVICE), return_stats=True, impl=impl
    )[1]
    assert stats.teacher_rank_of_student_top1.tolist() == [2]
    assert stats.agree.tolist() == [False]
    same = linear_reverse_kl(
        eye, student.to(DEVICE), eye, student.to(DEVICE), return_stats=True, impl=impl
    )[1]
    assert same.agree.tolist() == [True]


def test_peaked_and_masked(impl: str) -> None:
    inputs = make_inputs(student_dim=12, spread=1e4, bias=True)
    assert inputs.student_head.bias is not None
    assert inputs.teacher_head.bias is not None
    inputs.student_head.bias[:40] = -float("inf")
    inputs.teacher_head.bias[:40] = -float("inf")
    stats = stats_of(inputs, impl=impl)
    truth = stats_of(inputs.to(torch.float64))
    for name in ("kl", "student_entropy", "teacher_entropy", "student_top1_prob"):
        actual, expected = getattr(stats, name).double(), getattr(truth, name)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-2, msg=name)
    assert torch.equal(stats.teacher_rank_of_student_top1, truth.teacher_rank_of_student_top1)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_result_and_gradients_stay_the_same(impl: str, reduction: str) -> None:
    inputs = make_inputs(bias=True, dtype=torch.float16)

    def with_stats(*arguments: Any, **options: Any) -> torch.Tensor:
        return linear_reverse_kl(*arguments, return_stats=True, **options)[0]

    plain = evaluate(linear_reverse_kl, inputs, impl=impl, reduction=reduction)
    asked = evaluate(with_stats, inputs, impl=impl, reduction=reduction)
    assert all(torch.equal(plain[name], asked[name]) for name in plain)
