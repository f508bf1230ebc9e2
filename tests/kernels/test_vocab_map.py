"""Models with different tokenizers: many teacher ids may count for one student id."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kl_cases import DEVICE, DTYPES, IMPLS, check, evaluate, make_inputs
from test_token_stats import check_stats, stats_of

from esr_kernels import linear_reverse_kl
from esr_kernels.kl.group_kernels import BLOCK_SIZE, LONG_PROGRAMS
from esr_kernels.kl.kernels import STATS_BLOCK_SIZE
from esr_kernels.kl.vocab import SHORT_GROUP, make_groups

TEACHER_VOCAB, STUDENT_VOCAB = 171, 131


def make_map(
    kind: str, teacher_vocab: int = TEACHER_VOCAB, student_vocab: int = STUDENT_VOCAB
) -> torch.Tensor:
    ids = torch.arange(teacher_vocab, device=DEVICE)
    if kind == "identity":
        return torch.where(ids < student_vocab, ids, -1)
    if kind == "one id":
        return torch.where(ids == 7, 3, -1)
    if kind == "all to one":
        return torch.zeros_like(ids)
    if kind == "many long groups":  # more than there are programs for them
        return ids // (SHORT_GROUP + 1)
    if kind == "long groups":  # about SHORT_GROUP members, on both sides of it
        return (ids // SHORT_GROUP).clamp(max=student_vocab - 1) - (ids % 29 == 0).long()
    return torch.randint(-1, student_vocab // 2, (teacher_vocab,), device=DEVICE)


KINDS = ("identity", "one id", "all to one", "long groups", "many long groups", "random")
assert TEACHER_VOCAB // (SHORT_GROUP + 1) > LONG_PROGRAMS
pytestmark = pytest.mark.parametrize("impl", IMPLS)


def make_models(dtype: torch.dtype = torch.float32, **head: Any) -> Any:
    return make_inputs(5, STUDENT_VOCAB, TEACHER_VOCAB, dtype=dtype, **head)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_value_and_gradients(impl: str, kind: str, dtype: torch.dtype) -> None:
    vocab_map = make_map(kind)
    result = check(make_models(dtype, bias=True), impl, vocab_map=vocab_map)
    uncovered = torch.ones(STUDENT_VOCAB, dtype=torch.bool, device=DEVICE)
    uncovered[vocab_map[vocab_map >= 0]] = False
    assert not result["weight"][uncovered].any()
    assert not result["bias"][uncovered].any()


@pytest.mark.parametrize("kind", KINDS)
def test_statistics(impl: str, kind: str) -> None:
    inputs = make_models(softcap=3.0, scale=1.3)
    options = {"temperature": 0.7, "teacher_temperature": 1.4}
    stats = check_stats(inputs, impl, vocab_map=make_map(kind), **options)
    everything = ("all to one", "many long groups")
    assert (stats.teacher_covered < 1).all() == (kind not in everything)
    assert (stats.student_covered < 1).all() == (kind != "identity")


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("head", [{}, {"bias": True, "softcap": 3.0, "scale": 1.7}])
def test_options(impl: str, reduction: str, head: dict[str, Any]) -> None:
    inputs = make_models(**head)
    inputs.student_hidden[2] = float("nan")
    inputs.teacher_hidden[2] = float("inf")
    check(
        inputs,
        impl,
        vocab_map=make_map("random"),
        reduction=reduction,
        token_weights=torch.tensor([1.0, 2.0, 0.0, 0.5, 1.0], device=DEVICE),
        temperature=0.8,
        teacher_temperature=1.2,
        max_workspace_bytes=2 * 4 * (160 + 192 + 160),
    )


def test_more_than_a_block(impl: str) -> None:
    sizes = {"student_vocab": BLOCK_SIZE + 40, "teacher_vocab": 4 * BLOCK_SIZE + 9}
    inputs = make_inputs(2, **sizes, bias=True)
    vocab_map = make_map("random", sizes["teacher_vocab"], sizes["student_vocab"])
    vocab_map[100:2000] = BLOCK_SIZE + 39
    check(inputs, impl, vocab_map=vocab_map)


def test_masses_of_more_than_a_block(impl: str) -> None:
    inputs = make_inputs(2, 2 * STATS_BLOCK_SIZE + 9, 300, bias=True)
    assert inputs.student_head.bias is not None
    inputs.student_head.bias[STATS_BLOCK_SIZE:] += 6.0
    vocab_map = torch.randint(-1, 2 * STATS_BLOCK_SIZE, (300,), device=DEVICE)
    check_stats(inputs, impl, vocab_map=vocab_map)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_identity_is_the_common_prefix(impl: str, dtype: torch.dtype) -> None:
    inputs = make_models(dtype, bias=True)
    plain = evaluate(linear_reverse_kl, inputs, impl=impl)
    mapped = evaluate(linear_reverse_kl, inputs, impl=impl, vocab_map=make_map("identity"))
    for name in plain:
        torch.testing.assert_close(mapped[name], plain[name], rtol=1e-4, atol=1e-6, msg=name)


def test_order_of_the_teachers_ids_does_not_matter(impl: str) -> None:
    inputs = make_models()
    vocab_map = make_map("random")
    plain = evaluate(linear_reverse_kl, inputs, impl=impl, vocab_map=vocab_map)
    order = torch.randperm(TEACHER_VOCAB, device=DEVICE)
    inputs.teacher_head.weight.copy_(inputs.teacher_head.weight[order])
    other = evaluate(linear_reverse_kl, inputs, impl=impl, vocab_map=vocab_map[order])
    for name in plain:
        torch.testing.assert_close(other[name], plain[name], rtol=1e-4, atol=1e-6, msg=name)


def test_mass_far_below_the_maximum_is_kept(impl: str) -> None:
    """A group 300 nats below the row's maximum still has its own, exact log-sum-exp."""
    inputs = make_models(bias=True)
    assert inputs.teacher_head.bias is not None
    assert inputs.student_head.bias is not None
    vocab_map = make_map("random")
    inputs.teacher_head.bias[vocab_map == 4] = -300.0
    inputs.student_head.bias[4] = 8.0
    check(inputs, impl, vocab_map=vocab_map)


def test_teacher_ids_without_mass(impl: str) -> None:
    inputs = make_models(bias=True)
    assert inputs.teacher_head.bias is not None
    assert inputs.student_head.bias is not None
    vocab_map = torch.arange(TEACHER_VOCAB, device=DEVICE) // 2
    inputs.teacher_head.bias[::2] = -float("inf")
    for target in (4, vocab_map.max()):  # their members have no mass at all
        inputs.teacher_head.bias[vocab_map == target] = -float("inf")
        inputs.student_head.bias[target] = -2000.0
    check(inputs, impl, vocab_map=vocab_map)


def test_nan_is_not_swallowed(impl: str) -> None:
    inputs = make_models()
    vocab_map = make_map("long groups")
    inputs.teacher_hidden[1] = float("nan")
    stats = stats_of(inputs, impl=impl, vocab_map=vocab_map, reduction="none")
    assert stats.kl.isnan().tolist() == [False, True, False, False, False]


def test_nan_outside_the_map_shows_in_the_masses_alone(impl: str) -> None:
    inputs = make_models(bias=True)
    assert inputs.student_head.bias is not None
    assert inputs.teacher_head.bias is not None
    vocab_map = make_map("one id")
    inputs.teacher_head.bias[9] = float("nan")
    inputs.student_head.bias[4] = float("nan")
    stats = stats_of(inputs, impl=impl, vocab_map=vocab_map)
    assert stats.teacher_covered.isnan().all()
    assert stats.student_covered.isnan().all()
    assert not stats.kl.isnan().any()


def test_twice_is_bitwise_equal(impl: str) -> None:
    inputs, options = make_models(bias=True), {"impl": impl, "vocab_map": make_map("random")}
    first, second = (evaluate(linear_reverse_kl, inputs, **options) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@settings(deadline=None, max_examples=50)
@given(vocab_map=st.lists(st.integers(-1, 19), min_size=1, max_size=60))
def test_groups(impl: str, vocab_map: list[int]) -> None:
    groups = make_groups(torch.tensor(vocab_map, device=DEVICE), 20)
    offsets = groups.offsets.tolist()
    for group in range(21):
        members = groups.order[offsets[group] : offsets[group + 1]].tolist()
        counts_for = group if group < 20 else -1
        assert members == [i for i, target in enumerate(vocab_map) if target == counts_for]
    sizes = groups.offsets.diff()[groups.by_size].tolist()
    assert sizes == sorted(sizes, reverse=True)
    assert groups.num_long == sum(size > SHORT_GROUP for size in sizes)
