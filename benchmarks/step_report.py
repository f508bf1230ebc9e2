"""The step: a case as results hold it, and its Markdown tables."""

from __future__ import annotations

import dataclasses
from typing import Any

from benchmarks.measuring import MEASURED
from benchmarks.reporting import spread
from benchmarks.step_cases import Case, Step
from benchmarks.step_run import Row
from esr_train.metrics import PHASES
from esr_train.report import as_markdown, markdown_table


def case_json(case: Case, rows: list[Row]) -> dict[str, Any]:
    return {
        **dataclasses.asdict(case),
        "steps": [step.name for step in case.steps],
        "rows": [dataclasses.asdict(row) for row in rows],
        "compared": compared(case, rows),
    }


def compared(case: Case, rows: list[Row]) -> dict[str, list[dict[str, Any]]]:
    """Each number of ESR (our decoder), own full rollout and TRL at the same N; and over ESR's.

    Empty where ESR or both others are missing.
    """
    measured = {row.provider: row for row in rows if row.status == MEASURED}
    cutoff = max(step.rollout_tokens for step in case.steps)
    esr = measured.get(Step("graph", cutoff).name)
    others = {
        "full": measured.get(Step("graph", 0).name),
        "TRL": measured.get(Step("TRL", cutoff).name),
    }
    if not cutoff or esr is None:
        return {}
    columns = {"ESR": esr, **{name: row for name, row in others.items() if row is not None}}
    if len(columns) == 1:
        return {}
    found: dict[str, list[dict[str, Any]]] = {}
    numbers = {name: _numbers(row) for name, row in columns.items()}
    for what, value in numbers["ESR"].items():
        found[what] = [
            {"whose": name, "value": values[what], "over_ESR": values[what] / value}
            for name, values in numbers.items()
            if what in values
        ]
    return found


def _numbers(row: Row) -> dict[str, float]:
    found = {"step, ms": row.step["median_ms"], "generation, ms a token": row.ms_per_token or 0.0}
    found |= {f"{_words(phase)}, ms": row.phase_ms[phase] for phase in PHASES}
    memory = row.memory_bytes or {}
    return found | {f"{_words(phase)}, MiB": memory[phase] / 2**20 for phase in memory}


def step_table(case: dict[str, Any]) -> str:
    """A case of a results file as Markdown: every step, then ESR / full / TRL side by side."""
    table = markdown_table(
        "step",
        "whole, ms",
        "generation, ms a token",
        *(f"{_words(phase)}, ms" for phase in PHASES),
        "peak MiB of the phases",
        "response tokens",
    )
    others = []
    for row in case["rows"]:
        if row["status"] != MEASURED:
            others.append(f"{row['provider']} {row['status']}: {row['reason']}.")
            continue
        memory = row["memory_bytes"]
        table.add_row(
            row["provider"],
            spread(row["step"]),
            f"{row['ms_per_token']:.3g}",
            *(f"{row['phase_ms'][phase]:.4g}" for phase in PHASES),
            " / ".join(f"{memory[phase] / 2**20:,.0f}" for phase in PHASES) if memory else "-",
            f"{row['response_tokens']:,}",
        )
    parts = [title(case), as_markdown(table), *([" ".join(others)] if others else [])]
    if case["compared"]:
        parts.append(compared_table(case["compared"]))
    return "\n\n".join(parts)


def compared_table(compared: dict[str, list[dict[str, Any]]]) -> str:
    whose = [entry["whose"] for entry in next(iter(compared.values()))]
    ratios = [f"{name} / ESR" for name in whose[1:]]
    table = markdown_table(" / ".join(whose), *whose, *ratios)
    for what, entries in compared.items():
        values = [f"{entry['value']:,.4g}" for entry in entries]
        over = [f"{entry['over_ESR']:.2f}" for entry in entries[1:]]
        table.add_row(what, *values, *over)
    return as_markdown(table)


def title(case: dict[str, Any]) -> str:
    answers, prompts = case["answer_lengths"], case["prompt_lengths"]
    length = f"{min(answers)}" if min(answers) == max(answers) else f"{min(answers)}-{max(answers)}"
    return (
        f"**{case['name']}**: batch {len(prompts)}, prompts of {min(prompts)}-{max(prompts)} "
        f"tokens, whole answers of {length}, {case['dtype']}"
        + (", gradient checkpointing" if case["gradient_checkpointing"] else "")
    )


def _words(phase: str) -> str:
    return phase.replace("_", " ")
