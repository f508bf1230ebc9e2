"""The planner, and what a call runs and leaves out."""

from itertools import pairwise
from math import ceil
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kl_cases import IMPLS, evaluate, make_inputs
from torch.utils._python_dispatch import TorchDispatchMode

from esr_kernels import linear_reverse_kl
from esr_kernels.kl import checks
from esr_kernels.kl import options as options_module
from esr_kernels.kl.planner import plan_chunks, row_stride


def sizes(borders: list[int]) -> list[int]:
    return [stop - start for start, stop in pairwise(borders)]


@settings(deadline=None)
@given(
    num_rows=st.integers(0, 30_000),
    vocab_size=st.integers(1, 300_000),
    rows=st.none() | st.integers(1, 5000),
)
def test_chunks_cover_the_rows_within_the_cap(
    num_rows: int, vocab_size: int, rows: int | None
) -> None:
    row_bytes = 8 * row_stride(vocab_size, 4)
    borders = plan_chunks(num_rows, row_bytes, None if rows is None else rows * row_bytes)
    chunks = sizes(borders)
    cap = rows or min(max(600_000_000 // row_bytes, 512), 2048)
    assert borders[0] == 0
    assert borders[-1] == num_rows
    assert sum(chunks) == num_rows
    if num_rows:
        assert 0 < min(chunks) <= max(chunks) == chunks[0] <= cap
        unit = 128 if cap >= 512 else 1
        assert len(chunks) == ceil(ceil(num_rows / unit) / (cap // unit))  # the fewest
        assert max(chunks) - min(chunks) < 2 * unit  # no sliver


def test_default_chunks() -> None:
    row_bytes = 8 * 151936
    assert sizes(plan_chunks(1600, row_bytes, None)) == [512, 384, 384, 320]
    assert sizes(plan_chunks(100, row_bytes, None)) == [100]
    assert 512 * row_bytes <= 0.7e9
    assert 512 * 8 * 262144 <= 1.2e9


class Operators(TorchDispatchMode):
    """The names of the operators that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("impl", IMPLS)
def test_a_frozen_head_costs_no_gradient_of_it(impl: str) -> None:
    inputs = make_inputs(num_rows=3, student_vocab=512, teacher_vocab=511, student_dim=100)
    for train_head, expected in ((True, True), (False, False)):
        with Operators() as seen:
            evaluate(linear_reverse_kl, inputs, train_head=train_head, impl=impl)
        made = {"aten.addmm.out", "aten.zeros_like.default"} & seen.names
        assert bool(made) == expected


@pytest.mark.parametrize("maps", [(), ("vocab_map",), ("vocab_map", "student_map")])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_host_never_waits(
    reduction: str, maps: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (checks, options_module):
        monkeypatch.setattr(module, "sees_values", lambda _: False)  # as on a GPU
    inputs = make_inputs(bias=True, softcap=2.0)
    options: dict[str, Any] = {"reduction": reduction, "token_weights": torch.rand(7)}
    options |= {name: torch.randint(-1, 131, (131,)) for name in maps}
    with Operators() as seen:
        evaluate(linear_reverse_kl, inputs, impl="torch", **options)
    synchronising = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal.")
    assert not [name for name in seen.names if any(word in name for word in synchronising)]
