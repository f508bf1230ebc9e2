"""The loss: time, peak extra memory and error of every provider on every case.

    python -m pytest benchmarks -k loss

A case is measured as a whole, all providers in turns, when its first benchmark runs. What
pytest-benchmark then sees of a provider are those samples, played on a clock of our own: its table
and `--benchmark-json` hold what was measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

from benchmarks.loss_cases import PASSES, Case
from benchmarks.loss_run import MEASURED, SKIPPED

if TYPE_CHECKING:
    from benchmarks.conftest import LossRun


class ReplayClock:
    """Stands still, but for a sample's length while that sample is played."""

    def __init__(self) -> None:
        self.now = 0.0
        self.samples: Iterator[float] = iter(())

    def __call__(self) -> float:
        return self.now

    def play(self) -> None:
        self.now += next(self.samples)


CLOCK = ReplayClock()


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("which", PASSES)
def test_loss(case: Case, provider: str, which: str, loss_run: LossRun, benchmark: Any) -> None:
    row = loss_run.row(case, provider)
    if row.status == SKIPPED:
        pytest.skip(f"{provider}: {row.reason}")
    if row.status != MEASURED:
        pytest.fail(f"{provider} {row.status}: {row.reason}")
    timing = row.passes[which]
    seconds = timing["seconds"]
    benchmark.group = f"{case.name}, {which}"
    benchmark.extra_info.update(
        {name: value for name, value in timing.items() if name != "seconds"},
        extra_memory_bytes=row.extra_memory_bytes,
        value_error=row.value_error,
        grad_error=row.grad_error,
    )
    CLOCK.samples = iter(seconds)
    benchmark.pedantic(CLOCK.play, rounds=len(seconds), iterations=1)
