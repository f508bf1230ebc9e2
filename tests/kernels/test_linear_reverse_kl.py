"""Value and every gradient of `linear_reverse_kl` against float64."""

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from kl_cases import (
    DEVICE,
    DTYPES,
    IMPLS,
    Inputs,
    check,
    evaluate,
    make_inputs,
    near_identical,
    workspace,
)
from numerics import relative_error
from torch._dynamo.testing import CompileCounter

from esr_kernels import LMHead, linear_reverse_kl
from esr_kernels.kl.kernels import BLOCK_SIZE
from esr_kernels.kl.reference import linear_reverse_kl_reference

pytestmark = pytest.mark.parametrize("impl", IMPLS)
HEADS = {
    "plain": {},
    "softcap": {"softcap": 3.0},
    "bias, scale": {"bias": True, "scale": 0.25, "spread": 8.0},
    "bias, softcap, scale": {"bias": True, "softcap": 5.0, "scale": 1.7},
}


def call(inputs: Inputs, **options: Any) -> torch.Tensor:
    return linear_reverse_kl(
        inputs.student_hidden,
        inputs.student_head,
        inputs.teacher_hidden,
        inputs.teacher_head,
        **options,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_heads_and_dtypes(impl: str, dtype: torch.dtype, head: dict[str, Any]) -> None:
    check(make_inputs(dtype=dtype, **head), impl)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("train_head", [False, True])
def test_reductions_take_any_upstream(
    impl: str, dtype: torch.dtype, reduction: str, train_head: bool
) -> None:
    upstream = torch.randn(7 if reduction == "none" else (), device=DEVICE)
    weights = torch.rand(7, device=DEVICE)
    check(
        make_inputs(dtype=dtype, bias=True),
        impl,
        train_head=train_head,
        upstream=upstream,
        reduction=reduction,
        token_weights=weights,
        max_workspace_bytes=workspace(3, 131),
    )


@pytest.mark.parametrize("vocab", [1, 2, 31, 32, BLOCK_SIZE - 1, BLOCK_SIZE, 2 * BLOCK_SIZE + 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_vocabulary_sizes(impl: str, vocab: int, dtype: torch.dtype) -> None:
    check(make_inputs(num_rows=3, student_vocab=vocab, teacher_vocab=vocab, dtype=dtype), impl)


@pytest.mark.parametrize(("student_vocab", "teacher_vocab"), [(131, 150), (150, 131)])
@pytest.mark.parametrize("vocab_size", [None, 97])
@pytest.mark.parametrize("bias", [False, True])
def test_padded_vocabularies(
    impl: str, student_vocab: int, teacher_vocab: int, vocab_size: int | None, bias: bool
) -> None:
    inputs = make_inputs(student_vocab=student_vocab, teacher_vocab=teacher_vocab, bias=bias)
    common = vocab_size or 131
    inputs.teacher_head.weight[common:] = float("nan")  # in neither softmax
    result = check(inputs, impl, vocab_size=vocab_size)
    assert not result["weight"][common:].any()


@pytest.mark.parametrize("num_rows", [0, 1])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_few_rows(impl: str, num_rows: int, reduction: str) -> None:
    check(make_inputs(num_rows=num_rows, bias=True), impl, reduction=reduction)


@pytest.mark.parametrize(("temperature", "teacher_temperature"), [(0.7, None), (2.0, 0.5)])
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_temperatures(
    impl: str, temperature: float, teacher_temperature: float | None, softcap: float | None
) -> None:
    options = {"temperature": temperature, "teacher_temperature": teacher_temperature}
    check(make_inputs(softcap=softcap), impl, **options)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_rows_of_weight_zero_are_not_seen(
    impl: str, reduction: str, dtype: torch.dtype, poison: float
) -> None:
    inputs = make_inputs(dtype=dtype, bias=True)
    inputs.student_hidden[2] = poison
    inputs.teacher_hidden[2] = poison
    inputs.teacher_hidden[5] = poison
    weights = torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0, 0.0, 3.0], device=DEVICE)
    result = check(inputs, impl, token_weights=weights, reduction=reduction)
    assert not result["hidden"][[2, 5]].any()


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.bfloat16])
def test_masks_are_weights(impl: str, dtype: torch.dtype) -> None:
    weights = torch.tensor([1, 0, 1, 1, 0, 1, 1], dtype=dtype, device=DEVICE)
    check(make_inputs(), impl, token_weights=weights)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_masked(impl: str, reduction: str) -> None:
    inputs = make_inputs(bias=True)
    inputs.student_hidden[:] = float("nan")
    options = {"token_weights": torch.zeros(7, device=DEVICE), "reduction": reduction}
    for name, result in evaluate(linear_reverse_kl, inputs, impl=impl, **options).items():
        assert not result.any(), name


def test_normalizer_replaces_the_sum_of_weights(impl: str) -> None:
    weights = torch.rand(7, device=DEVICE)
    normalizer = torch.tensor(53, device=DEVICE)
    check(make_inputs(bias=True), impl, token_weights=weights, normalizer=normalizer)
    none = evaluate(linear_reverse_kl, make_inputs(), impl=impl, normalizer=normalizer * 0)
    assert not any(result.any() for result in none.values())


def test_uneven_chunks_agree_with_one(impl: str) -> None:
    inputs = make_inputs(num_rows=11, bias=True, softcap=3.0)
    whole = check(inputs, impl)
    for rows in (1, 4, 5):
        parts = check(inputs, impl, max_workspace_bytes=workspace(rows, 131))
        torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)


def test_strided_inputs(impl: str) -> None:
    inputs = make_inputs(num_rows=14, student_vocab=262, student_dim=40, bias=True)
    head = inputs.student_head
    assert head.bias is not None
    strided = replace(
        inputs,
        student_hidden=inputs.student_hidden[::2, ::2],
        student_head=LMHead(head.weight.T.contiguous().T[::2, ::2], head.bias[::2]),
        teacher_hidden=inputs.teacher_hidden.T.contiguous().T[::2],
    )
    weights = torch.rand(14, device=DEVICE)[::2]
    hidden = strided.student_hidden.detach().requires_grad_()
    value = call(replace(strided, student_hidden=hidden), impl=impl, token_weights=weights)
    value.backward()
    dense = check(strided, impl, token_weights=weights)
    assert hidden.grad is not None
    torch.testing.assert_close(value.detach(), dense["value"], rtol=1e-6, atol=0)
    torch.testing.assert_close(hidden.grad, dense["hidden"], rtol=1e-5, atol=1e-7)
    upstream = torch.ones((), device=DEVICE).expand(7)  # stride 0, as .sum() sends it
    check(strided, impl, upstream=upstream, reduction="none")


@pytest.mark.parametrize("identical", [False, True])
def test_large_logits(impl: str, identical: bool) -> None:
    inputs = make_inputs(student_dim=12, spread=1e4)
    if identical:
        inputs = near_identical(inputs, noise=1e-5)
    check(inputs, impl)


def test_common_offset_costs_no_digits(impl: str) -> None:
    inputs = make_inputs(student_dim=12, bias=True)
    offset = 4096.0
    for head in (inputs.student_head, inputs.teacher_head):
        assert head.bias is not None
        head.weight.copy_((head.weight * 64).round() / 64)
        head.bias.fill_(offset)
    for hidden in (inputs.student_hidden, inputs.teacher_hidden):
        hidden.copy_((hidden * 2).round() / 2)  # so that the logits plus 4096 are exact
    plain = replace(
        inputs,
        student_head=LMHead(inputs.student_head.weight),
        teacher_head=LMHead(inputs.teacher_head.weight),
    )
    shifted, expected = check(inputs, impl), check(plain, impl)
    torch.testing.assert_close(shifted["value"], expected["value"], rtol=1e-6, atol=0)


@pytest.mark.parametrize("vocab", [131, BLOCK_SIZE + 9])
def test_ids_without_mass(impl: str, vocab: int) -> None:
    """-inf in both models, and in the teacher alone where the student's mass underflows."""
    inputs = make_inputs(student_vocab=vocab, teacher_vocab=vocab, bias=True)
    student_bias, teacher_bias = inputs.student_head.bias, inputs.teacher_head.bias
    assert student_bias is not None
    assert teacher_bias is not None
    student_bias[:40] = -float("inf")
    teacher_bias[:40] = -float("inf")
    if vocab > BLOCK_SIZE:
        student_bias[:BLOCK_SIZE] = -float("inf")
        teacher_bias[: BLOCK_SIZE - 7] = -float("inf")
    student_bias[-3:] = -2000.0
    teacher_bias[-3:] = -float("inf")
    check(inputs, impl)


def test_teacher_without_mass_ahead_of_the_students_maximum(impl: str) -> None:
    inputs = make_inputs(student_vocab=BLOCK_SIZE + 9, teacher_vocab=BLOCK_SIZE + 9, bias=True)
    assert inputs.student_head.bias is not None
    assert inputs.teacher_head.bias is not None
    inputs.teacher_head.bias[:100] = -float("inf")
    inputs.student_head.bias[-5:] = 3000.0
    check(inputs, impl)


@pytest.mark.parametrize("noise", [0.1, 0.03])
def test_gradient_of_a_near_identical_pair(impl: str, noise: float) -> None:
    dtype = torch.bfloat16
    if impl == "triton" and DEVICE == "cpu":
        dtype = torch.float16  # the interpreter truncates what it stores in bf16
    inputs = near_identical(make_inputs(8, 4096, student_dim=256, dtype=dtype), noise)
    actual = check(inputs, impl, train_head=False)
    truth = evaluate(linear_reverse_kl_reference, inputs.to(torch.float64), train_head=False)
    assert relative_error(actual["hidden"], truth["hidden"]) <= 0.003
    assert relative_error(actual["value"], truth["value"]) <= 0.001


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_twice_is_bitwise_equal(impl: str, reduction: str) -> None:
    inputs = make_inputs(bias=True)
    options = {"impl": impl, "reduction": reduction, "max_workspace_bytes": workspace(3, 131)}
    first, second = (evaluate(linear_reverse_kl, inputs, **options) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_backward_twice(impl: str, reduction: str, dtype: torch.dtype) -> None:
    inputs, leaves = make_inputs(bias=True, dtype=dtype).leaves(train_head=True)
    value = call(inputs, impl=impl, reduction=reduction)
    upstream = torch.full_like(value, 2.0)
    tensors = list(leaves.values())
    first = torch.autograd.grad(value, tensors, upstream, retain_graph=True)
    second = torch.autograd.grad(value, tensors, upstream)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    assert torch.equal(upstream, torch.full_like(value, 2.0))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("train_head", [False, True])
def test_second_derivatives_are_refused(impl: str, reduction: str, train_head: bool) -> None:
    inputs, leaves = make_inputs().leaves(train_head)
    value = call(inputs, impl=impl, reduction=reduction).sum()
    with pytest.raises(RuntimeError, match="^linear_reverse_kl: its gradient cannot be different"):
        torch.autograd.grad(value, list(leaves.values()), create_graph=True)


@pytest.mark.parametrize("leaf", ["hidden", "weight", "bias"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_each_leaf_alone(impl: str, leaf: str, reduction: str) -> None:
    inputs, leaves = make_inputs(bias=True).leaves(train_head=True)
    everything = torch.autograd.grad(
        call(inputs, impl=impl, reduction=reduction).sum(), list(leaves.values())
    )
    for name, tensor in leaves.items():
        tensor.requires_grad_(name == leaf)
    (alone,) = torch.autograd.grad(
        call(inputs, impl=impl, reduction=reduction).sum(), [leaves[leaf]]
    )
    assert torch.equal(alone, everything[list(leaves).index(leaf)])


def test_teacher_weights_and_normalizer_get_no_gradient(impl: str) -> None:
    inputs, _ = make_inputs().leaves(train_head=False)
    extra = [inputs.teacher_hidden, inputs.teacher_head.weight, torch.rand(7, device=DEVICE)]
    extra.append(torch.tensor(3.0, device=DEVICE))
    for tensor in extra:
        tensor.requires_grad_()
    call(inputs, impl=impl, token_weights=extra[2], normalizer=extra[3]).backward()
    assert all(tensor.grad is None for tensor in extra)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast_changes_nothing(impl: str, reduction: str) -> None:
    inputs = make_inputs(bias=True)
    plain = evaluate(linear_reverse_kl, inputs, impl=impl, reduction=reduction)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        autocast = evaluate(linear_reverse_kl, inputs, impl=impl, reduction=reduction)
    assert all(torch.equal(plain[name], autocast[name]) for name in plain)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo's
def test_opaque_to_torch_compile(impl: str) -> None:
    counter = CompileCounter()
    compiled = torch.compile(lambda inputs: call(inputs, impl=impl) * 2, backend=counter)
    frames = []
    for num_rows in (7, 9, 12, 5):
        inputs, leaves = make_inputs(num_rows).leaves(train_head=True)
        expected = torch.autograd.grad(call(inputs, impl=impl) * 2, list(leaves.values()))
        actual = torch.autograd.grad(compiled(inputs), list(leaves.values()))
        assert all(torch.equal(x, y) for x, y in zip(actual, expected, strict=True))
        frames.append(counter.frame_count)
    assert frames[1] == frames[-1], "recompiled for another number of rows"


def test_no_grad_gives_the_same_value(impl: str) -> None:
    inputs, _ = make_inputs().leaves(train_head=True)
    with torch.no_grad():
        value = call(inputs, impl=impl)
    assert not value.requires_grad
    assert torch.equal(value, call(inputs, impl=impl))


def test_models_of_different_dtypes(impl: str) -> None:
    inputs = replace(
        make_inputs(),
        teacher_hidden=make_inputs(dtype=torch.bfloat16).teacher_hidden,
        teacher_head=make_inputs(dtype=torch.bfloat16).teacher_head,
    )
    check(inputs, impl)


def test_small_gradients_survive_fp16_under_a_gradient_scaler(impl: str) -> None:
    inputs = make_inputs(dtype=torch.float16, bias=True)
    normalizer = torch.tensor(1e8, device=DEVICE)
    upstream = torch.tensor(2.0**16, device=DEVICE)
    check(inputs, impl, normalizer=normalizer, upstream=upstream)


def test_sums_over_rows_above_what_fp16_holds(impl: str) -> None:
    """Of the head's gradient; their mean is what fp16 must hold."""
    inputs = make_inputs(num_rows=4, student_vocab=2, teacher_vocab=2, dtype=torch.float16)
    inputs.student_hidden.copy_(torch.full_like(inputs.student_hidden, 5000.0))
    inputs.student_head.weight.zero_()
    inputs.teacher_hidden.copy_(inputs.teacher_hidden[:1].expand(4, -1) * 8)
    check(inputs, impl)


def test_nan_is_not_swallowed(impl: str) -> None:
    inputs = make_inputs()
    inputs.student_hidden[3] = float("nan")
    values = call(inputs, impl=impl, reduction="none")
    assert values[3].isnan()
    assert values.isnan().sum() == 1


def test_weight_tensor_is_a_head(impl: str) -> None:
    inputs = make_inputs()
    arguments = (inputs.student_hidden, inputs.student_head.weight)
    arguments += (inputs.teacher_hidden, inputs.teacher_head.weight)
    assert torch.equal(linear_reverse_kl(*arguments, impl=impl), call(inputs, impl=impl))


@pytest.mark.slow
def test_real_vocabulary(impl: str) -> None:
    inputs = make_inputs(6, 151936, 151936, dtype=torch.float16)
    check(inputs, impl, max_workspace_bytes=workspace(4, 151936))


@pytest.mark.gpu
def test_bf16_at_real_sizes(impl: str) -> None:
    inputs = near_identical(make_inputs(1100, 32003, student_dim=512, dtype=torch.bfloat16))
    check(inputs, impl)


def test_import_leaves_triton_alone(impl: str) -> None:
    code = (
        "import sys, torch, esr_kernels; assert 'triton' not in sys.modules; x = torch.ones(2, 3);"
        f"esr_kernels.linear_reverse_kl(x, x, x, x, impl={impl!r});"
        f"assert ('triton' in sys.modules) == ({impl!r} == 'triton')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
