"""Classes that ids of both models count for: the loss is the KL over them."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from kl_cases import DEVICE, DTYPES, IMPLS, Inputs, check, evaluate, make_inputs
from test_token_stats import check_stats, stats_of
from torch._dynamo.testing import CompileCounter

from esr_kernels import linear_reverse_kl
from esr_kernels.kl.group_kernels import (
    BLOCK_SIZE,
    LONG_BLOCK_SIZE,
    LONG_PROGRAMS,
    triton_group,
    triton_share,
)
from esr_kernels.kl.reference import linear_reverse_kl_reference
from esr_kernels.kl.rows import Activation
from esr_kernels.kl.vocab import SHORT_GROUP, Share, make_classes, torch_group, torch_share

TEACHER_VOCAB, STUDENT_VOCAB = 171, 171
Maps = dict[str, torch.Tensor]


def make_maps(
    kind: str, teacher_vocab: int = TEACHER_VOCAB, student_vocab: int = STUDENT_VOCAB
) -> Maps:
    """Many ids of either model in a class, some classes that only one of them reaches."""
    student_ids = torch.arange(student_vocab, device=DEVICE)
    vocab_map = torch.randint(-1, student_vocab // 3, (teacher_vocab,), device=DEVICE)
    student_map = torch.randint(-1, student_vocab // 2, (student_vocab,), device=DEVICE)
    if kind == "identity":
        student_map = student_ids
    elif kind == "all in one class":
        student_map = torch.full_like(student_ids, 5)
        vocab_map[7] = 5
    elif kind == "mostly none":
        student_map = torch.where(student_ids % 40 == 3, student_ids // 40, -1)
        vocab_map[:4] = torch.arange(4)
    elif kind == "long classes":  # about SHORT_GROUP members, on both sides of it
        student_map = (student_ids // SHORT_GROUP) - (student_ids % 29 == 0).long()
    elif kind == "many long classes":  # more than there are programs for them
        student_map = student_ids // (SHORT_GROUP + 1)
        vocab_map = torch.randint(0, 19, (teacher_vocab,), device=DEVICE)
    return {"vocab_map": vocab_map, "student_map": student_map}


KINDS = (
    "identity",
    "all in one class",
    "mostly none",
    "long classes",
    "many long classes",
    "random",
)
assert STUDENT_VOCAB // (SHORT_GROUP + 1) > LONG_PROGRAMS
pytestmark = pytest.mark.parametrize("impl", IMPLS)


def make_models(dtype: torch.dtype = torch.float32, **head: Any) -> Inputs:
    return make_inputs(5, STUDENT_VOCAB, TEACHER_VOCAB, dtype=dtype, **head)


def common(maps: Maps) -> torch.Tensor:
    """Is it a class that both reach? By student id."""
    vocab_map, student_map = maps["vocab_map"], maps["student_map"]
    return (student_map >= 0) & torch.isin(student_map, vocab_map)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_value_and_gradients(impl: str, kind: str, dtype: torch.dtype) -> None:
    maps = make_maps(kind)
    inputs = make_models(dtype, bias=True)
    if kind == "all in one class":  # The truth is 0, and so is what eager errs.
        result = evaluate(linear_reverse_kl, inputs, impl=impl, **maps)
        assert all(x.abs().max() < 2e-6 for x in result.values())
        return
    result = check(inputs, impl, **maps)
    assert not result["weight"][~common(maps)].any()
    assert not result["bias"][~common(maps)].any()
    assert result["bias"][common(maps)].all()


@pytest.mark.parametrize("kind", KINDS)
def test_statistics(impl: str, kind: str) -> None:
    inputs, maps = make_models(bias=True, softcap=3.0, scale=1.3), make_maps(kind)
    options = {"temperature": 0.7, "teacher_temperature": 1.4}
    stats = check_stats(inputs, impl, **maps, **options)
    assert (stats.teacher_covered < 1).all() == (kind != "many long classes")
    assert (stats.student_covered < 1).all() == (kind not in ("all in one class", KINDS[4]))


@pytest.mark.parametrize(
    ("reduction", "train_head"), [("mean", True), ("sum", False), ("none", False), ("none", True)]
)
def test_options(impl: str, reduction: str, train_head: bool) -> None:
    inputs = make_models(bias=True, softcap=3.0, scale=1.7)
    inputs.student_hidden[2] = float("nan")
    inputs.teacher_hidden[2] = float("inf")
    options = make_maps("random") | {
        "reduction": reduction,
        "token_weights": torch.tensor([1.0, 2.0, 0.0, 0.5, 1.0], device=DEVICE),
        "temperature": 0.8,
        "teacher_temperature": 1.2,
    }
    upstream = torch.rand(5, device=DEVICE) if reduction == "none" else None
    cap = 2 * 4 * 4 * 192  # two rows
    check(inputs, impl, train_head, upstream, cap, **options)
    stats = check_stats(inputs, impl, **options)
    assert not any(field[2] for field in stats)


@pytest.mark.parametrize(("teacher_vocab", "student_vocab"), [(150, 171), (171, 150), (192, 192)])
def test_vocabularies_of_any_size(impl: str, teacher_vocab: int, student_vocab: int) -> None:
    """The shared-out row is one longer than the student's; the teacher's may be shorter."""
    inputs = make_inputs(5, student_vocab, teacher_vocab)
    maps = make_maps("random", teacher_vocab, student_vocab)
    check(inputs, impl, max_workspace_bytes=3 * 16 * 224, **maps)
    check_stats(inputs, impl, **maps)


def test_classes_of_thousands(impl: str) -> None:
    student_vocab = BLOCK_SIZE + 3 * LONG_BLOCK_SIZE + 40
    inputs = make_inputs(2, student_vocab, BLOCK_SIZE + 9, bias=True)
    maps = make_maps("random", BLOCK_SIZE + 9, student_vocab)
    maps["student_map"][30 : 30 + 2 * LONG_BLOCK_SIZE] = 7
    maps["student_map"][-LONG_BLOCK_SIZE:] = 2 * BLOCK_SIZE
    maps["vocab_map"][5:900] = 2 * BLOCK_SIZE
    maps["vocab_map"][-1] = 7
    check(inputs, impl, **maps)
    check_stats(inputs, impl, **maps)


def test_the_last_column_in_a_block_of_its_own(impl: str) -> None:
    check_stats(make_inputs(2, BLOCK_SIZE, 40), impl, **make_maps("random", 40, BLOCK_SIZE))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_class_an_id_is_the_vocabulary_map_alone(impl: str, dtype: torch.dtype) -> None:
    inputs, maps = make_models(dtype, bias=True), make_maps("identity")
    alone = evaluate(linear_reverse_kl, inputs, impl=impl, vocab_map=maps["vocab_map"])
    both = evaluate(linear_reverse_kl, inputs, impl=impl, **maps)
    for name in alone:
        torch.testing.assert_close(both[name], alone[name], rtol=1e-4, atol=1e-6, msg=name)


def test_the_name_of_a_class_does_not_matter(impl: str) -> None:
    inputs, maps = make_models(bias=True), make_maps("random")
    plain = evaluate(linear_reverse_kl, inputs, impl=impl, **maps)
    names = torch.cat([torch.randperm(STUDENT_VOCAB), torch.tensor([-1])]).to(DEVICE)
    renamed = {name: names[ids] for name, ids in maps.items()}
    other = evaluate(linear_reverse_kl, inputs, impl=impl, **renamed)
    for name in plain:
        torch.testing.assert_close(other[name], plain[name], rtol=1e-4, atol=1e-6, msg=name)


def with_bias(inputs: Inputs, student: torch.Tensor, teacher: torch.Tensor) -> Inputs:
    heads = inputs.student_head, inputs.teacher_head
    return replace(
        inputs,
        student_head=replace(heads[0], bias=student),
        teacher_head=replace(heads[1], bias=teacher),
    )


@pytest.mark.parametrize("depth", [20.0, 300.0, 1e4, 3e6, 1e9, 1e30])
def test_a_class_far_below_the_maximum(impl: str, depth: float) -> None:
    """Where the student has no mass, nothing but the teacher's whole mass counts, of all depths."""
    inputs, maps = make_models(), make_maps("random")
    student, teacher = torch.zeros(2, STUDENT_VOCAB, device=DEVICE)
    maps["student_map"][:12] = 4
    maps["student_map"][12:15] = 9
    maps["vocab_map"][:4] = torch.tensor([4, 9, 9, 9], device=DEVICE)
    student[(maps["student_map"] == 4) | (maps["student_map"] == 9)] = -depth
    teacher[:4] = 6.0
    inputs = with_bias(inputs, student, teacher)
    check(inputs, impl, **maps)
    stats = stats_of(inputs, impl=impl, **maps)
    truth = stats_of(inputs.to(torch.float64), **maps)
    torch.testing.assert_close(stats.kl.double(), truth.kl, rtol=1e-5, atol=1e-6)
    covered = stats.teacher_covered.double()
    torch.testing.assert_close(covered, truth.teacher_covered, rtol=1e-5, atol=1e-6)


def test_a_class_whose_student_ids_are_masked(impl: str) -> None:
    inputs, maps = make_models(), make_maps("random")
    maps["student_map"][:12] = 4
    maps["vocab_map"][:1] = 4
    student, teacher = torch.zeros(2, STUDENT_VOCAB, device=DEVICE)
    student[40:50] = -1e30  # and single members
    student[maps["student_map"] == 4] = -1e30
    teacher[0] = 6.0
    low = with_bias(inputs, student, teacher)
    expected = check(low, impl, **maps)
    masked = student.masked_fill(student < 0, -torch.inf)
    actual = evaluate(linear_reverse_kl, with_bias(inputs, masked, teacher), impl=impl, **maps)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_a_class_without_mass_in_the_teacher(impl: str) -> None:
    inputs, maps = make_models(), make_maps("random")
    maps["vocab_map"][5:7] = 4
    maps["student_map"][5:8] = 4
    student, teacher = torch.zeros(2, STUDENT_VOCAB, device=DEVICE)
    teacher[maps["vocab_map"] == 4] = -torch.inf
    student[maps["student_map"] == 4] = -2000.0
    inputs = with_bias(inputs, student, teacher)
    check(inputs, impl, **maps)
    student[maps["student_map"] == 4] = -torch.inf  # nor in the student
    result = evaluate(linear_reverse_kl, with_bias(inputs, student, teacher), impl=impl, **maps)
    assert all(x.isfinite().all() for x in result.values())


@pytest.mark.parametrize("shift", [0.0, 1e4, -1e4])
def test_large_logits(impl: str, shift: float) -> None:
    inputs = make_inputs(5, STUDENT_VOCAB, TEACHER_VOCAB, bias=True, spread=1e4 if not shift else 2)
    for head in (inputs.student_head, inputs.teacher_head):
        assert head.bias is not None
        head.bias.add_(shift)
    check(inputs, impl, **make_maps("random"))


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_nan_is_not_swallowed(impl: str, who: str) -> None:
    inputs, maps = make_models(), make_maps("long classes")
    getattr(inputs, f"{who}_hidden")[1] = float("nan")
    stats = stats_of(inputs, impl=impl, reduction="none", **maps)
    assert stats.kl.isnan().tolist() == [False, True, False, False, False]


@pytest.mark.parametrize("of_class", [3, 6])  # a short one, a long one
@pytest.mark.parametrize("who", ["student", "teacher"])
def test_nan_of_one_id(impl: str, who: str, of_class: int) -> None:
    inputs, maps = make_models(), make_maps("random")
    maps["student_map"][20 : 20 + of_class**2] = of_class
    maps["vocab_map"][20 : 20 + of_class**2] = of_class
    biases = torch.zeros(2, STUDENT_VOCAB, device=DEVICE)
    biases[0 if who == "student" else 1, 21] = float("nan")
    stats = stats_of(with_bias(inputs, *biases), impl=impl, **maps)
    assert stats.kl.isnan().all()


@pytest.mark.parametrize("student_class", [-1, 170])
def test_nan_outside_the_classes_shows_in_the_masses_alone(impl: str, student_class: int) -> None:
    """Class 170 is the student's alone, 169 the teacher's."""
    inputs, maps = make_models(), make_maps("random")
    biases = torch.zeros(2, STUDENT_VOCAB, device=DEVICE)
    maps["student_map"][0] = student_class
    maps["vocab_map"][9] = 169 if student_class >= 0 else -1
    biases[0, 0] = biases[1, 9] = float("nan")
    stats = stats_of(with_bias(inputs, *biases), impl=impl, **maps)
    assert stats.teacher_covered.isnan().all()
    assert stats.student_covered.isnan().all()
    assert not stats.kl.isnan().any()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_twice_is_bitwise_equal(impl: str, reduction: str) -> None:
    inputs = make_models(bias=True)
    options: dict[str, Any] = {"impl": impl, "reduction": reduction} | make_maps("random")
    first, second = (evaluate(linear_reverse_kl, inputs, **options) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo's
def test_opaque_to_torch_compile(impl: str) -> None:
    inputs, maps = make_models(), make_maps("random")

    def value(inputs: Inputs, maps: Maps) -> torch.Tensor:
        sides = inputs.student_hidden, inputs.student_head
        teacher = inputs.teacher_hidden, inputs.teacher_head
        return linear_reverse_kl(*sides, *teacher, impl=impl, reduction="none", **maps).sum() * 2

    compiled = torch.compile(value, backend=CompileCounter())
    inputs, leaves = inputs.leaves(train_head=True)
    tensors = list(leaves.values())
    expected = torch.autograd.grad(value(inputs, maps), tensors)
    actual = torch.autograd.grad(compiled(inputs, maps), tensors)
    assert all(torch.equal(x, y) for x, y in zip(actual, expected, strict=True))


@st.composite
def problems(draw: st.DrawFn) -> tuple[Maps, Inputs, float]:
    student_vocab, teacher_vocab = draw(st.integers(1, 14)), draw(st.integers(1, 40))
    ids = st.integers(-1, draw(st.integers(0, student_vocab - 1)))
    maps = {
        "vocab_map": draw(st.lists(ids, min_size=teacher_vocab, max_size=teacher_vocab)),
        "student_map": draw(st.lists(ids, min_size=student_vocab, max_size=student_vocab)),
    }
    assume((set(maps["vocab_map"]) & set(maps["student_map"])) - {-1})
    torch.manual_seed(draw(st.integers(0, 1000)))
    spread = draw(st.sampled_from([0.5, 4.0, 20.0]))
    inputs = make_inputs(
        3,
        student_vocab,
        teacher_vocab,
        4,
        3,
        bias=draw(st.booleans()),
        softcap=draw(st.sampled_from([None, 2.5])),
        spread=spread,
    )
    return {name: torch.tensor(x, device=DEVICE) for name, x in maps.items()}, inputs, spread


@settings(deadline=None, max_examples=40)
@given(
    problem=problems(),
    weights=st.lists(st.sampled_from([0.0, 0.5, 3.0]), min_size=3, max_size=3),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    temperature=st.sampled_from([0.7, 1.0]),
)
def test_any_maps(
    impl: str,
    problem: tuple[Maps, Inputs, float],
    weights: list[float],
    reduction: str,
    temperature: float,
) -> None:
    maps, inputs, spread = problem
    options: dict[str, Any] = {
        "token_weights": torch.tensor(weights, device=DEVICE),
        "reduction": reduction,
        "temperature": temperature,
        **maps,
    }
    exact = inputs.to(torch.float64)
    truth = evaluate(linear_reverse_kl_reference, exact, **options)
    stats = stats_of(exact, **options)
    if impl == "torch":
        actual = evaluate(linear_reverse_kl, exact, impl=impl, **options)
        for name, expected in truth.items():
            torch.testing.assert_close(actual[name], expected, rtol=1e-9, atol=1e-11, msg=name)
        kl = stats_of(exact, impl=impl, **options)
        for name in ("kl", "student_entropy", "teacher_entropy", "teacher_covered"):
            value, expected = getattr(kl, name), getattr(stats, name)
            torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-11, msg=name)
    actual = evaluate(linear_reverse_kl, inputs, impl=impl, **options)
    # What logits round to grows with their spread, and meets weights that do.
    tolerance = {"rtol": 1e-4, "atol": 1e-5 * (1 + spread**2)}
    for name, expected in truth.items():
        torch.testing.assert_close(actual[name].double(), expected, **tolerance, msg=name)


def test_what_a_share_step_writes(impl: str) -> None:
    """Not the student's logits and, in Triton, no row of weight 0: nobody reads it."""
    maps = make_maps("long classes")
    groups, classes = make_classes(maps["vocab_map"], maps["student_map"], STUDENT_VOCAB)
    assert classes is not None
    logits = torch.randn(3, STUDENT_VOCAB, device=DEVICE)
    weights = torch.tensor([1.0, 0.0, 2.0], device=DEVICE)
    grouped, peaks, shared = torch.full((3, 3, STUDENT_VOCAB + 1), 7.0, device=DEVICE)
    group, share = (torch_group, torch_share) if impl == "torch" else (triton_group, triton_share)
    group(logits.clone(), grouped, Activation(), weights, groups)
    student = Activation(logits[0].clone(), 3.0, 1.7, 0.8)
    before = logits.clone()
    share(logits, Share(student, classes, weights, grouped, peaks[:, :-1], shared))
    assert torch.equal(logits, before)
    assert (shared[[0, 2]] != 7).all()
    if impl == "triton":
        assert all((written[1] == 7).all() for written in (grouped, peaks, shared))


@settings(deadline=None, max_examples=30)
@given(
    vocab_map=st.lists(st.integers(-1, 9), min_size=1, max_size=60),
    student_map=st.lists(st.integers(-1, 9), min_size=10, max_size=10),
)
def test_classes(impl: str, vocab_map: list[int], student_map: list[int]) -> None:
    maps = (torch.tensor(ids, device=DEVICE) for ids in (vocab_map, student_map))
    groups, classes = make_classes(*maps, 10)
    both = set(vocab_map) & set(student_map)
    assert classes is not None
    assert classes.class_of.tolist() == [i if i in both else -1 for i in student_map]
    for own, ids in ((groups, vocab_map), (classes.groups, student_map)):
        offsets = own.offsets.tolist()
        for group in range(10):
            members = own.order[offsets[group] : offsets[group + 1]].tolist()
            expected = [at for at, i in enumerate(ids) if i == group and i in both]
            assert members == expected
    assert sorted(classes.groups.by_size.tolist()) == list(range(10))
    sizes = classes.groups.offsets.diff()[:10]
    assert classes.groups.num_long == (sizes > SHORT_GROUP).sum()
