"""The PyTorch path in float64: gradcheck, and equal to the reference to the last digits."""

from typing import Any

import pytest
import torch
from kl_cases import DEVICE, evaluate, make_inputs

from esr_kernels import linear_reverse_kl
from esr_kernels.kl.reference import linear_reverse_kl_reference

OPTIONS: list[dict[str, Any]] = [
    {},
    {"reduction": "sum", "vocab_size": 11},
    {"reduction": "none", "temperature": 0.7, "teacher_temperature": 1.9},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradcheck(options: dict[str, Any], softcap: float | None) -> None:
    sizes = {"num_rows": 3, "student_vocab": 13, "teacher_vocab": 17, "student_dim": 4}
    inputs = make_inputs(**sizes, dtype=torch.float64, bias=True, softcap=softcap, scale=1.3)
    inputs, leaves = inputs.leaves(train_head=True)
    weights = torch.tensor([0.5, 0.0, 2.0], device=DEVICE)

    def function(*_: torch.Tensor) -> torch.Tensor:
        return linear_reverse_kl(
            inputs.student_hidden,
            inputs.student_head,
            inputs.teacher_hidden,
            inputs.teacher_head,
            token_weights=weights,
            impl="torch",
            max_workspace_bytes=2 * 16 * 16,
            **options,
        )

    assert torch.autograd.gradcheck(function, tuple(leaves.values()))


@pytest.mark.parametrize("options", OPTIONS)
def test_equals_the_reference(options: dict[str, Any]) -> None:
    inputs = make_inputs(dtype=torch.float64, bias=True, softcap=2.0)
    actual = evaluate(linear_reverse_kl, inputs, impl="torch", **options)
    truth = evaluate(linear_reverse_kl_reference, inputs, **options)
    assert actual["value"].dtype == torch.float64
    torch.testing.assert_close(actual, truth, rtol=1e-11, atol=1e-13)
