"""`reverse_kl` of two logit tensors: value, gradient and statistics against float64."""

import re
from typing import Any

import pytest
import torch
from kl_cases import DEVICE, DTYPES, IMPLS
from numerics import assert_within_budget

from esr_kernels import TokenStats, reverse_kl
from esr_kernels.kl.kernels import BLOCK_SIZE
from esr_kernels.kl.reference import reverse_kl_reference

pytestmark = pytest.mark.parametrize("impl", IMPLS)


def make_logits(
    num_rows: int = 7,
    student_vocab: int = 131,
    teacher_vocab: int = 131,
    dtype: torch.dtype = torch.float32,
    spread: float = 2.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    shapes = (num_rows, student_vocab), (num_rows, teacher_vocab)
    student, teacher = (torch.randn(*shape, device=DEVICE) * spread for shape in shapes)
    return student.to(dtype), teacher.to(dtype)


def evaluate(
    function: Any,
    student: torch.Tensor,
    teacher: torch.Tensor,
    upstream: torch.Tensor | None = None,
    **options: Any,
) -> dict[str, torch.Tensor]:
    leaf = student.detach().clone().requires_grad_()
    # The product stands for a model: in-place work on a leaf would hide a missing copy.
    value = function(leaf * 1, teacher, **options)
    upstream = torch.ones_like(value) if upstream is None else upstream.to(value.dtype)
    (grad,) = torch.autograd.grad(value, [leaf], upstream)
    assert grad.dtype == student.dtype
    return {"value": value.detach(), "grad": grad}


def check(
    student: torch.Tensor, teacher: torch.Tensor, impl: str, inplace: bool = False, **options: Any
) -> dict[str, torch.Tensor]:
    actual = evaluate(reverse_kl, student, teacher, impl=impl, inplace=inplace, **options)
    vocab = options.get("vocab_size") or min(student.shape[1], teacher.shape[1])
    runs = []
    for turn in range(6):
        order = torch.randperm(vocab, device=DEVICE) if turn else torch.arange(vocab)
        pair = student[:, :vocab][:, order], teacher[:, :vocab][:, order]
        both = [
            evaluate(reverse_kl_reference, *(x.to(dtype) for x in pair), **options)
            for dtype in (torch.float32, torch.float64)
        ]
        runs.append(both)
    truth = runs[0][1]["grad"]
    assert not actual["grad"][:, vocab:].any()
    pairs = [(eager["grad"], its_truth["grad"]) for eager, its_truth in runs]
    assert_within_budget(actual["grad"][:, :vocab], truth, pairs, "grad")
    values = actual["value"].double()
    torch.testing.assert_close(values, runs[0][1]["value"], rtol=1e-5, atol=1e-6)
    return actual


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_dtypes_and_reductions(
    impl: str, dtype: torch.dtype, inplace: bool, reduction: str
) -> None:
    upstream = torch.randn(7 if reduction == "none" else (), device=DEVICE)
    weights = torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0, 0.0, 3.0], device=DEVICE)
    student, teacher = make_logits(dtype=dtype)
    student[2] = float("nan")
    teacher[5] = float("inf")
    options = {"token_weights": weights, "reduction": reduction, "upstream": upstream}
    result = check(student, teacher, impl, inplace, **options)
    assert not result["grad"][[2, 5]].any()


@pytest.mark.parametrize("vocab", [1, 32, BLOCK_SIZE, BLOCK_SIZE + 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_vocabulary_sizes(impl: str, vocab: int, dtype: torch.dtype) -> None:
    student, teacher = make_logits(3, vocab, vocab, dtype)
    check(student, teacher, impl, temperature=0.7, teacher_temperature=1.3)


@pytest.mark.parametrize("widths", [(131, 150), (150, 131)])
@pytest.mark.parametrize("vocab_size", [None, 97])
@pytest.mark.parametrize("inplace", [False, True])
def test_common_prefix(
    impl: str, widths: tuple[int, int], vocab_size: int | None, inplace: bool
) -> None:
    student, teacher = make_logits(5, *widths)
    student[:, vocab_size or 131 :] = float("nan")
    check(student, teacher, impl, inplace, vocab_size=vocab_size)


@pytest.mark.parametrize("num_rows", [0, 1])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_few_rows(impl: str, num_rows: int, reduction: str) -> None:
    check(*make_logits(num_rows), impl, reduction=reduction)


def test_large_logits_and_ids_without_mass(impl: str) -> None:
    student, teacher = make_logits(spread=1e4)
    student[:, :40] = teacher[:, :40] = -float("inf")
    check(student, teacher, impl)


def test_normalizer(impl: str) -> None:
    check(*make_logits(), impl, normalizer=torch.tensor(53.0, device=DEVICE))


def test_models_of_different_dtypes(impl: str) -> None:
    student, teacher = make_logits()
    check(student.bfloat16(), teacher, impl)


@pytest.mark.parametrize("inplace", [False, True])
def test_strided(impl: str, inplace: bool) -> None:
    student, teacher = make_logits(14, 262, 262)
    weights = torch.rand(14, device=DEVICE)[::2]
    rows = student[::2, :131]
    check(rows, teacher[::2, ::2], impl, inplace, token_weights=weights)
    if not inplace:
        leaf = student.T.contiguous().T.requires_grad_()
        value = reverse_kl(leaf[::2, ::2], teacher.T.contiguous().T[::2, ::2], impl=impl)
        value.backward()
        dense = check(student.detach()[::2, ::2], teacher[::2, ::2], impl)
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad[::2, ::2], dense["grad"], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_inputs_stay_as_they_are(impl: str, dtype: torch.dtype) -> None:
    student, teacher = make_logits(dtype=dtype)
    leaf, copies = student.clone().requires_grad_(), (student.clone(), teacher.clone())
    value = reverse_kl(leaf, teacher, impl=impl)
    first = torch.autograd.grad(value, leaf, retain_graph=True)
    second = torch.autograd.grad(value, leaf)
    assert torch.equal(first[0], second[0])
    assert torch.equal(leaf, copies[0])
    assert torch.equal(teacher, copies[1])
    with torch.no_grad():
        assert torch.equal(reverse_kl(leaf, teacher, inplace=True, impl=impl), value)
    assert torch.equal(leaf, copies[0]), "nothing to write where no gradient is made"


def test_in_place_uses_the_logits_storage_once(impl: str) -> None:
    student, teacher = make_logits()
    copy = teacher.clone()
    student.requires_grad_()
    logits = student * 1
    value = reverse_kl(logits, teacher, inplace=True, impl=impl)
    (grad,) = torch.autograd.grad(value, logits, retain_graph=True)
    assert grad.data_ptr() == logits.data_ptr()
    assert torch.equal(teacher, copy)
    with pytest.raises(RuntimeError, match="backward runs once"):
        torch.autograd.grad(value, logits)


def test_second_derivatives_are_refused(impl: str) -> None:
    student, teacher = make_logits()
    value = reverse_kl(student.requires_grad_(), teacher, impl=impl)
    with pytest.raises(RuntimeError, match="^reverse_kl: its gradient cannot be differentiated"):
        torch.autograd.grad(value, student, create_graph=True)


def test_one_row_may_have_any_stride_in_place(impl: str) -> None:
    student, teacher = make_logits(1)
    leaf = torch.empty(131, 1, device=DEVICE).copy_(student.T).requires_grad_()
    assert leaf.T.stride() == (1, 1)
    value = reverse_kl((leaf * 1).T, teacher, inplace=True, impl=impl)
    (grad,) = torch.autograd.grad(value, leaf)
    expected = check(student, teacher, impl)
    assert torch.equal(grad.T, expected["grad"])


def test_in_place_is_seen_by_autograd(impl: str) -> None:
    student, teacher = make_logits()
    logits = (student.requires_grad_() * 1).exp()  # exp saves its result
    value = reverse_kl(logits, teacher, inplace=True, impl=impl)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_in_place_is_seen_by_a_loss_whose_backward_comes_first(impl: str) -> None:
    student, teacher = make_logits()
    logits = student.requires_grad_() * 1
    other = logits.square().sum()  # saves the logits
    reverse_kl(logits, teacher, inplace=True, impl=impl)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("with_grad", [False, True])
def test_statistics(impl: str, dtype: torch.dtype, with_grad: bool) -> None:
    student, teacher = make_logits(dtype=dtype, student_vocab=140)
    options: dict[str, Any] = {
        "token_weights": torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0, 1.0, 3.0], device=DEVICE),
        "temperature": 0.8,
        "return_stats": True,
    }
    _, truth = reverse_kl_reference(student.double(), teacher.double(), **options)
    leaf = student.clone().requires_grad_(with_grad)
    _, stats = reverse_kl(leaf, teacher, impl=impl, **options)
    for name, value, expected in zip(TokenStats._fields, stats, truth, strict=True):
        torch.testing.assert_close(
            value.double(), expected.double(), rtol=1e-5, atol=1e-6, msg=name
        )


def test_twice_is_bitwise_equal(impl: str) -> None:
    student, teacher = make_logits()
    first, second = (evaluate(reverse_kl, student, teacher, impl=impl) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_autocast_changes_nothing(impl: str) -> None:
    student, teacher = make_logits()
    plain = evaluate(reverse_kl, student, teacher, impl=impl)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        autocast = evaluate(reverse_kl, student, teacher, impl=impl)
    assert all(torch.equal(plain[name], autocast[name]) for name in plain)


def test_gradcheck(impl: str) -> None:
    student, teacher = make_logits(3, 13, 15, torch.float64)
    if impl == "triton":
        with pytest.raises(ValueError, match="^impl: expected 'torch' for float64"):
            reverse_kl(student, teacher, impl=impl)
        return

    def function(leaf: torch.Tensor) -> torch.Tensor:
        return reverse_kl(leaf * 1, teacher, temperature=1.3, reduction="none", impl=impl)

    assert torch.autograd.gradcheck(function, (student.requires_grad_(),))


ones = torch.ones
BAD: list[tuple[str, str, dict[str, Any]]] = [
    ("student_logits", "list", {"student_logits": [[1.0]]}),
    ("student_logits", "[1, 5, 40]", {"student_logits": ones(1, 5, 40)}),
    ("student_logits", "int64", {"student_logits": ones(5, 40).long()}),
    ("student_logits", "strides [1, 5]", {"student_logits": ones(40, 5).T, "inplace": True}),
    ("student_logits", "strides [0, 1]", {"student_logits": ones(40).expand(5, 40),
                                          "inplace": True}),
    ("teacher_logits", "6", {"teacher_logits": ones(6, 42)}),
    ("teacher_logits", "meta", {"teacher_logits": ones(5, 42, device="meta")}),
    ("token_weights", "[4]", {"token_weights": ones(4)}),
    ("token_weights", "-1", {"token_weights": -ones(5)}),
    ("temperature", "0", {"temperature": 0}),
    ("teacher_temperature", "-1", {"teacher_temperature": -1}),
    ("vocab_size", "41", {"vocab_size": 41}),
    ("reduction", "batchmean", {"reduction": "batchmean"}),
    ("normalizer", "[1]", {"normalizer": ones(1)}),
    ("impl", "cuda", {"impl": "cuda"}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "got", "change"), BAD, ids=[f"{b[0]} {b[1]}" for b in BAD])
def test_bad_input(impl: str, name: str, got: str, change: dict[str, Any]) -> None:
    good = {"student_logits": ones(5, 40), "teacher_logits": ones(5, 42), "impl": impl}
    with pytest.raises(ValueError, match=rf"^{name}: expected .*, got .*{re.escape(got)}"):
        reverse_kl(**(good | change))
