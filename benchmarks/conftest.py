"""Options of `pytest benchmarks`, and what it prints and writes at the end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.session import Session, device

_TABLES = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("benchmarks")
    group.addoption("--device", choices=("auto", "cpu", "cuda"), default="auto")
    group.addoption("--cpu-full", action="store_true", help="loss: also N=1600, V=151936 on a CPU")
    group.addoption("--json", metavar="PATH", help="results file; default: a new one in results/")
    group.addoption("--seconds", type=float, default=10.0, help="sampling a case; default 10")
    group.addoption("--max-minutes", type=float, help="start no further case after these")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_TABLES] = []


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test a case and provider; a module's KIND says which there are."""
    kind = getattr(metafunc.module, "KIND", None)
    if kind is None:
        return
    chosen = [
        pytest.param(case, provider, id=f"{case.name}-{provider}")
        for case in kind.cases(metafunc.config, device(metafunc.config))
        for provider in kind.providers(case)
    ]
    metafunc.parametrize(("case", "provider"), chosen)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            # Other projects' code runs here: their warnings are shown, not failures.
            item.add_marker(pytest.mark.filterwarnings("default"))


@pytest.fixture(scope="module")
def measured(request: pytest.FixtureRequest) -> Iterator[Session]:
    tables = request.config.stash[_TABLES]
    session = Session(request, request.module.KIND, tables)
    yield session
    if session.rows:
        tables.append(f"results: {session.path}")


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    for table in config.stash[_TABLES]:
        terminalreporter.write_line("\n" + table)
