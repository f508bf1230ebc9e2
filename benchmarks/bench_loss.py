"""The loss: time, peak extra memory and error of every provider on every case.

    python -m pytest benchmarks -k loss

A case is measured as a whole, all providers in turns, when its first benchmark runs. What
pytest-benchmark then sees of a provider are those samples, played on a clock of our own: its table
and `--benchmark-json` hold what was measured.
"""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.loss_cases import CPU_CASES, CPU_FULL_CASE, CUDA_CASES, PASSES, Case
from benchmarks.loss_providers import PROVIDERS
from benchmarks.loss_report import case_json, loss_table
from benchmarks.loss_run import FLOOR, Row, measure_case
from benchmarks.measuring import Limits, ReplayClock
from benchmarks.session import Kind, Session

CLOCK = ReplayClock()


def cases(config: pytest.Config, device: str) -> list[Case]:
    if device == "cuda":
        return list(CUDA_CASES)
    return [*CPU_CASES, *([CPU_FULL_CASE] if config.getoption("--cpu-full") else [])]


def measure(case: Case, names: list[str], limits: Limits) -> list[Row]:
    return measure_case(case, [each for each in PROVIDERS if each.name in names], limits)


KIND = Kind(
    name="loss",
    cases=cases,
    providers=lambda case: [*(provider.name for provider in PROVIDERS), FLOOR],
    measure=measure,
    case_json=case_json,
    table=loss_table,
)


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("which", PASSES)
def test_loss(case: Case, provider: str, which: str, measured: Session, benchmark: Any) -> None:
    row = measured.row(case, provider)
    timing = row.passes[which]
    benchmark.group = f"{case.name}, {which}"
    benchmark.extra_info.update(
        {name: value for name, value in timing.items() if name != "seconds"},
        extra_memory_bytes=row.extra_memory_bytes,
        value_error=row.value_error,
        grad_error=row.grad_error,
    )
    CLOCK.replay(benchmark, timing["seconds"])
