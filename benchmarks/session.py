"""What a run of `pytest benchmarks` measures, prints and writes, one benchmark or another."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.measuring import MEASURED, SKIPPED, Limits
from benchmarks.reporting import environment, results_path, save


@dataclass(frozen=True)
class Kind:
    """A benchmark: its cases on a device, whom each one measures, and how.

    A case has a `name`, a row a `provider`, a `status` and the `reason` of it. measure: (case,
    names of the providers, seconds) -> rows.
    """

    name: str
    cases: Callable[[pytest.Config, str], list[Any]]
    providers: Callable[[Any], list[str]]
    measure: Callable[[Any, list[str], Limits], list[Any]]
    case_json: Callable[[Any, list[Any]], dict[str, Any]]
    table: Callable[[dict[str, Any]], str]
    min_rounds: int = 5


def device(config: pytest.Config) -> str:
    chosen = config.getoption("--device")
    return ("cuda" if torch.cuda.is_available() else "cpu") if chosen == "auto" else chosen


class Session:
    """The rows of the cases: a case is measured as a whole when its first row is asked for."""

    def __init__(self, request: pytest.FixtureRequest, kind: Kind, tables: list[str]) -> None:
        config = request.config
        self.kind = kind
        self.items = request.session.items
        self.tables = tables
        self.limits = Limits(config.getoption("--seconds"), min_rounds=kind.min_rounds)
        minutes = config.getoption("--max-minutes")
        self.deadline = time.monotonic() + 60 * minutes if minutes else float("inf")
        self.path = Path(config.getoption("--json") or results_path(kind.name, device(config)))
        self.results: dict[str, Any] = {**environment(device(config)), "cases": []}
        self.rows: dict[Any, dict[str, Any]] = {}

    def row(self, case: Any, provider: str) -> Any:
        """A measured row; skips or fails the test where there is none."""
        if case not in self.rows:
            if time.monotonic() > self.deadline:
                pytest.skip("--max-minutes are over")
            self._measure(case)
        row = self.rows[case][provider]
        if row.status == SKIPPED:
            pytest.skip(f"{provider}: {row.reason}")
        if row.status != MEASURED:
            pytest.fail(f"{provider} {row.status}: {row.reason}")
        return row

    def _measure(self, case: Any) -> None:
        callspecs = [getattr(item, "callspec", None) for item in self.items]
        params = [callspec.params for callspec in callspecs if callspec is not None]
        wanted = {chosen["provider"] for chosen in params if chosen.get("case") == case}
        providers = [name for name in self.kind.providers(case) if name in wanted]
        rows = self.kind.measure(case, providers, self.limits)
        self.rows[case] = {row.provider: row for row in rows}
        self.results["cases"].append(self.kind.case_json(case, rows))
        self.tables.append(self.kind.table(self.results["cases"][-1]))
        save(self.path, self.results)  # after every case: a run that is cut off leaves the rest
