"""One training step: time and peak memory by phase, ESR against full rollout and against TRL.

    python -m pytest benchmarks -k step

As in `bench_loss`, a case is measured as a whole and its samples are replayed.
"""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.measuring import Limits, ReplayClock
from benchmarks.session import Kind, Session
from benchmarks.step_cases import CPU_CASES, CUDA_CASES, Case
from benchmarks.step_report import case_json, step_table
from benchmarks.step_run import Row, measure_case

CLOCK = ReplayClock()


def measure(case: Case, names: list[str], limits: Limits) -> list[Row]:
    return measure_case(case, [step for step in case.steps if step.name in names], limits)


KIND = Kind(
    name="step",
    cases=lambda config, device: list(CUDA_CASES if device == "cuda" else CPU_CASES),
    providers=lambda case: [step.name for step in case.steps],
    measure=measure,
    case_json=case_json,
    table=step_table,
    min_rounds=3,
)


@pytest.mark.benchmark(timer=CLOCK)
def test_step(case: Case, provider: str, measured: Session, benchmark: Any) -> None:
    row = measured.row(case, provider)
    benchmark.group = case.name
    benchmark.extra_info.update(
        row.step,
        phase_ms=row.phase_ms,
        ms_per_token=row.ms_per_token,
        memory_bytes=row.memory_bytes,
        response_tokens=row.response_tokens,
    )
    CLOCK.replay(benchmark, row.seconds)
