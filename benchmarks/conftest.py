"""Options of `pytest benchmarks`, and what it prints and writes at the end."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.loss_cases import CPU_CASES, CPU_FULL_CASE, CUDA_CASES, Case
from benchmarks.loss_providers import PROVIDERS
from benchmarks.loss_report import case_json, environment, loss_table, results_path, save
from benchmarks.loss_run import FLOOR, Limits, Row, measure_case

_TABLES = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("benchmarks")
    group.addoption("--device", choices=("auto", "cpu", "cuda"), default="auto")
    group.addoption("--cpu-full", action="store_true", help="also N=1600, V=151936 on the CPU")
    group.addoption("--json", metavar="PATH", help="results file; default: a new one in results/")
    group.addoption("--seconds", type=float, default=10.0, help="sampling a case; default 10")
    group.addoption("--max-minutes", type=float, help="start no further case after these")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_TABLES] = []


def cases(config: pytest.Config) -> list[Case]:
    device = config.getoption("--device")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        return list(CUDA_CASES)
    return [*CPU_CASES, *([CPU_FULL_CASE] if config.getoption("--cpu-full") else [])]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        chosen = cases(metafunc.config)
        metafunc.parametrize("case", chosen, ids=[case.name for case in chosen])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            # Other projects' code runs here: their warnings are shown, not failures.
            item.add_marker(pytest.mark.filterwarnings("default"))


class LossRun:
    """The rows of the cases: a case is measured as a whole when its first row is asked for."""

    def __init__(self, request: pytest.FixtureRequest) -> None:
        config = request.config
        self.items = request.session.items
        self.tables = config.stash[_TABLES]
        self.limits = Limits(seconds=config.getoption("--seconds"))
        minutes = config.getoption("--max-minutes")
        self.deadline = time.monotonic() + 60 * minutes if minutes else float("inf")
        device = cases(config)[0].device
        self.path = Path(config.getoption("--json") or results_path("loss", device))
        self.results: dict[str, Any] = {**environment(device), "cases": []}
        self.rows: dict[Case, dict[str, Row]] = {}

    def row(self, case: Case, provider: str) -> Row:
        if case not in self.rows:
            if time.monotonic() > self.deadline:
                pytest.skip("--max-minutes are over")
            self._measure(case)
        return self.rows[case][provider]

    def _measure(self, case: Case) -> None:
        callspecs = [getattr(item, "callspec", None) for item in self.items]
        params = [callspec.params for callspec in callspecs if callspec is not None]
        wanted = {chosen["provider"] for chosen in params if chosen.get("case") == case}
        providers = [provider for provider in PROVIDERS if provider.name in wanted]
        rows = measure_case(case, providers, self.limits)
        self.rows[case] = {row.provider: row for row in rows}
        self.results["cases"].append(case_json(case, rows))
        self.tables.append(loss_table(self.results["cases"][-1]))
        save(self.path, self.results)  # after every case: a run that is cut off leaves the rest


@pytest.fixture(scope="session")
def loss_run(request: pytest.FixtureRequest) -> Iterator[LossRun]:
    run = LossRun(request)
    yield run
    if run.rows:
        run.tables.append(f"results: {run.path}")


@pytest.fixture(params=[*(provider.name for provider in PROVIDERS), FLOOR])
def provider(request: pytest.FixtureRequest) -> str:
    return request.param


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    for table in config.stash[_TABLES]:
        terminalreporter.write_line("\n" + table)
