"""One case: every step checked and its memory taken, then all timed in turns."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch

from benchmarks.measuring import (
    FAILED,
    MEASURED,
    REFUSED,
    SKIPPED,
    Call,
    Limits,
    interleave,
    run_child,
    summary,
)
from benchmarks.step_cases import Case, Step
from benchmarks.step_providers import Models, OurStep, TRLStep, make_step
from esr_train.metrics import GIB, PHASES, release_unused


@dataclass
class Row:
    """A step of a case: as results hold it."""

    provider: str
    status: str
    reason: str | None = None  # of a status that is not "measured"
    response_tokens: int | None = None
    loss: float | None = None  # of the first step
    grad_norm: float | None = None
    # Of each phase, its highest peak beyond the models: with optimizer, decode weights and cache.
    memory_bytes: dict[str, int] | None = None
    step: dict[str, float] = field(default_factory=dict)  # median_ms, p20_ms, p80_ms
    phase_ms: dict[str, float] = field(default_factory=dict)  # medians
    ms_per_token: float | None = None  # of the longest answer: generation over its tokens
    seconds: list[float] = field(default_factory=list)  # every sample of the step
    phase_seconds: dict[str, list[float]] = field(default_factory=dict)


def measure_case(case: Case, steps: list[Step], limits: Limits) -> list[Row]:
    """A row for every step. Only one that trains, on as many tokens as it must, is timed."""
    release_unused(torch.device(case.device))
    models = Models(case, with_trl=any(step.engine == "TRL" for step in steps))
    rows: list[Row] = []
    running: dict[Step, OurStep | TRLStep] = {}
    round_seconds = 0.0
    try:
        for step in steps:
            row = Row(step.name, MEASURED)
            rows.append(row)
            try:
                round_seconds += admit(case, step, models, row, running)
            except Exception as error:  # another project's code: reported, and the others still run
                row.status, row.reason = FAILED, f"{type(error).__name__}: {error}"
                if isinstance(_first_cause(error), (torch.OutOfMemoryError, ImportError)):
                    row.status = SKIPPED
        _time(case, rows, running, round_seconds, limits)
    finally:
        for call in running.values():
            call.close()
    return rows


def admit(
    case: Case,
    step: Step,
    models: Models,
    row: Row,
    running: dict[Step, OurStep | TRLStep],
) -> float:
    """Builds, warms up and checks a step, and takes its memory; the seconds of a warm one."""
    call = make_step(case, step, models)
    try:
        first = call()
        row.response_tokens, row.loss = first["response_tokens"], first["loss"]
        row.grad_norm = first["grad_norm"]
        row.reason = problem(case, step, first)
        if row.reason is not None:
            row.status = REFUSED
            return 0.0
        second = call()
        if case.device == "cuda":
            row.memory_bytes = growth(call, second)
        elif case.memory:
            row.memory_bytes = run_child(
                "benchmarks.step_child",
                {
                    "case": dataclasses.asdict(case),
                    "step": step,
                    "threads": torch.get_num_threads(),
                },
            )
        running[step] = call
    finally:
        if step not in running:
            call.close()
    return second["seconds"]


def _first_cause(error: BaseException) -> BaseException:
    """Running out of memory is told in our words, and from TRL's thread."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def problem(case: Case, step: Step, record: dict[str, Any]) -> str | None:
    """Why a step's numbers are not to be printed."""
    loss, grad_norm = record["loss"], record["grad_norm"]
    if not math.isfinite(loss):
        return f"loss {loss}"
    if not (math.isfinite(grad_norm) and grad_norm > 0):
        return f"gradient norm {grad_norm}"
    expected = sum(case.response_lengths(step))
    if record["response_tokens"] != expected:
        return f"{record['response_tokens']} response tokens, not {expected}"
    return None


def growth(call: OurStep | TRLStep, record: dict[str, Any]) -> dict[str, int]:
    """Bytes of each phase's peak beyond what was in use when there were only the models."""
    baseline = call.meter.baseline_gib
    return {
        phase: round((record["phases"][phase]["peak_gib"] - baseline) * GIB) for phase in PHASES
    }


def _time(
    case: Case,
    rows: list[Row],
    running: dict[Step, OurStep | TRLStep],
    round_seconds: float,
    limits: Limits,
) -> None:
    records: dict[Step, list[dict[str, Any]]] = {step: [] for step in running}

    def timer(call: Call, round_: int) -> float:
        return call(round_)["seconds"]  # type: ignore[index]  # a step returns its record

    def sampled(step: Step) -> Call:
        def call(round_: int) -> dict[str, Any]:
            record = running[step]()
            records[step].append(record)
            return record

        return call

    if running:
        calls = {step: sampled(step) for step in running}
        rounds = limits.seconds, limits.min_rounds, limits.max_rounds
        interleave(calls, timer, *rounds, round_seconds)
    by_name = {row.provider: row for row in rows}
    for step, taken in records.items():
        row = by_name[step.name]
        reasons = [reason for record in taken if (reason := problem(case, step, record))]
        if reasons:
            row.status, row.reason = REFUSED, reasons[0]
            continue
        row.seconds = [record["seconds"] for record in taken]
        row.step = summary(row.seconds)
        row.phase_seconds = {
            phase: [record["phases"][phase]["seconds"] for record in taken] for phase in PHASES
        }
        row.phase_ms = {phase: 1e3 * median(row.phase_seconds[phase]) for phase in PHASES}
        row.ms_per_token = row.phase_ms["student_generation"] / max(case.response_lengths(step))
