"""One case: every provider checked against float64, then all timed in turns, with the floor."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from benchmarks.loss_cases import (
    FORWARD,
    PASSES,
    TRAINING,
    Case,
    Inputs,
    float64_answer,
    make_inputs,
)
from benchmarks.loss_providers import Loss, Provider, run
from benchmarks.measuring import (
    FAILED,
    MEASURED,
    REFUSED,
    SKIPPED,
    Call,
    CudaTimer,
    Limits,
    cpu_timer,
    interleave,
    peak_bytes,
    run_child,
    summary,
)

FLOOR = "bare GEMMs"


@dataclass
class Row:
    """A provider on a case: as results hold it."""

    provider: str
    status: str
    reason: str | None = None  # of a status that is not "measured"
    tolerance: dict[str, float] | None = None
    value_error: float | None = None  # relative, as the tolerance
    grad_error: float | None = None
    setup_seconds: float | None = None  # first call: imports, compilation, autotuning
    extra_memory_bytes: int | None = None  # of forward + backward
    passes: dict[str, dict[str, Any]] = field(default_factory=dict)


def measure_case(case: Case, providers: Sequence[Provider], limits: Limits) -> list[Row]:
    """A row for every provider and the floor. Only a provider that agrees with float64 is timed."""
    # The weights of two sets are past any L2; on a CPU one set is far past the last-level cache.
    sets = [make_inputs(case, seed) for seed in range(2 if case.device == "cuda" else 1)]
    rows, losses = admit(case, providers, sets, limits)
    calls: dict[tuple[str, str], Call] = {
        (name, which): partial(_call, loss, sets, which)
        for name, loss in losses.items()
        for which in PASSES
    }
    floor = Floor(case)
    calls |= {(FLOOR, which): partial(floor, sets, which) for which in PASSES}
    timer = CudaTimer() if case.device == "cuda" else cpu_timer
    samples = interleave(calls, timer, limits.seconds, limits.min_rounds, limits.max_rounds)
    rows.append(Row(FLOOR, MEASURED))
    for row in rows:
        if row.status == MEASURED:
            row.passes = {which: _timing(case, row.provider, which, samples) for which in PASSES}
    return rows


def admit(
    case: Case, providers: Sequence[Provider], sets: list[Inputs], limits: Limits
) -> tuple[list[Row], dict[str, Loss]]:
    """Builds, checks and warms up each provider, and takes its memory."""
    truth = float64_answer(sets[0])
    rows, losses = [], {}
    for provider in providers:
        reason = provider.skip_reason(case)
        if reason is not None:
            rows.append(Row(provider.name, SKIPPED, reason))
            continue
        tolerance = provider.tolerance(case)
        row = Row(provider.name, MEASURED, tolerance=dataclasses.asdict(tolerance))
        rows.append(row)
        try:
            start = time.perf_counter()
            loss = provider.build(case)
            answer = run(loss, sets[0], TRAINING)
            row.value_error, row.grad_error = answer.errors(truth)
            row.setup_seconds = time.perf_counter() - start
            # Not "error > tolerance": NaN must be refused too.
            if not (row.value_error <= tolerance.value and row.grad_error <= tolerance.grad):
                row.status = REFUSED
                row.reason = (
                    f"KL error {row.value_error:.1e}, gradient error {row.grad_error:.1e}; "
                    f"tolerated {tolerance.value:.0e}, {tolerance.grad:.0e}"
                )
                continue
            for inputs in sets:
                for which in PASSES:
                    run(loss, inputs, which)
            row.extra_memory_bytes = _memory(case, provider, loss, sets[0], limits)
        except torch.cuda.OutOfMemoryError:
            row.status, row.reason = SKIPPED, "out of memory"
        except Exception as error:  # another project's code: reported, and the others still run
            row.status, row.reason = FAILED, f"{type(error).__name__}: {error}"
        else:
            losses[provider.name] = loss
    return rows, losses


def _memory(
    case: Case, provider: Provider, loss: Loss, inputs: Inputs, limits: Limits
) -> int | None:
    if case.device == "cuda":
        return peak_bytes(lambda _: run(loss, inputs, TRAINING), torch.device(case.device))
    if not limits.children(case, provider):
        return None
    return run_child(
        "benchmarks.loss_child",
        {
            "case": dataclasses.asdict(case),
            "provider": provider.name,
            "threads": torch.get_num_threads(),
        },
    )


def _call(loss: Loss, sets: list[Inputs], which: str, round_: int) -> None:
    run(loss, sets[round_ % len(sets)], which)


class Floor:
    """The GEMMs of a case alone, into buffers that exist: float32 out, all rows at once.

    Student logits and teacher logits; for a gradient dHidden, and dW of a head that trains.
    """

    def __init__(self, case: Case) -> None:
        def buffer(*shape: int) -> torch.Tensor:
            return torch.empty(*shape, dtype=torch.float32, device=case.device)

        self.vocab_size = case.vocab_size
        self.logits = buffer(case.num_rows, case.vocab_size)
        # Random, as multiplying zeros draws less power and runs at higher clocks.
        self.grad = torch.randn_like(self.logits, dtype=case.torch_dtype)
        self.grad_hidden = buffer(case.num_rows, case.student_dim)
        self.grad_weight = buffer(case.vocab_size, case.student_dim) if case.train_head else None

    def __call__(self, sets: list[Inputs], which: str, round_: int) -> None:
        inputs = sets[round_ % len(sets)]
        with torch.no_grad():
            student_weight = inputs.student_head.weight[: self.vocab_size]
            teacher_weight = inputs.teacher_head.weight[: self.vocab_size]
            _mm(self.logits, inputs.student_hidden, student_weight.T)
            _mm(self.logits, inputs.teacher_hidden, teacher_weight.T)
            if which == FORWARD:
                return
            _mm(self.grad_hidden, self.grad, student_weight)
            if self.grad_weight is not None:
                _mm(self.grad_weight, self.grad.T, inputs.student_hidden)


def _mm(out: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    if left.dtype == out.dtype:
        torch.mm(left, right, out=out)
    else:
        torch.mm(left, right, out_dtype=out.dtype, out=out)


def _timing(
    case: Case, provider: str, which: str, samples: dict[tuple[str, str], list[float]]
) -> dict[str, Any]:
    seconds = samples[provider, which]
    numbers = summary(seconds)
    floor_ms = summary(samples[FLOOR, which])["median_ms"]
    return {
        **numbers,
        "over_floor": numbers["median_ms"] / floor_ms,
        "tflops": case.gemm_flops(which) / numbers["median_ms"] / 1e9,
        "seconds": seconds,
    }
