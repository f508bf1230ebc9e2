"""The loss: a case as results hold it, and its Markdown table."""

from __future__ import annotations

import dataclasses
from typing import Any

from benchmarks.loss_cases import FORWARD, TRAINING, Case
from benchmarks.loss_run import Row
from benchmarks.measuring import MEASURED
from benchmarks.reporting import spread
from esr_train.report import as_markdown, markdown_table


def case_json(case: Case, rows: list[Row]) -> dict[str, Any]:
    return {**dataclasses.asdict(case), "rows": [dataclasses.asdict(row) for row in rows]}


def loss_table(case: dict[str, Any]) -> str:
    """A case of a results file as Markdown: medians, with p20 - p80 behind them."""
    table = markdown_table(
        "provider",
        "forward, ms",
        "forward + backward, ms",
        "/ GEMMs",
        "TFLOP/s",
        "extra MiB",
        "KL error",
        "gradient error",
    )
    others = []
    for row in case["rows"]:
        if row["status"] != MEASURED:
            others.append(f"{row['provider']} {row['status']}: {row['reason']}.")
            continue
        forward, training = row["passes"][FORWARD], row["passes"][TRAINING]
        memory = row["extra_memory_bytes"]
        table.add_row(
            row["provider"],
            spread(forward),
            spread(training),
            f"{training['over_floor']:.2f}",
            f"{training['tflops']:.3g}",
            "-" if memory is None else f"{memory / 2**20:,.0f}",
            _scientific(row["value_error"]),
            _scientific(row["grad_error"]),
        )
    return "\n\n".join([title(case), as_markdown(table), *([" ".join(others)] if others else [])])


def title(case: dict[str, Any]) -> str:
    vocab = case["student_vocab"]
    if case["teacher_vocab"] != vocab:
        vocab = f"{vocab} / {case['teacher_vocab']}"
    return (
        f"**{case['name']}**: V = {vocab}, D = {case['student_dim']} / {case['teacher_dim']}, "
        f"{case['dtype']}, {'trained' if case['train_head'] else 'frozen'} head"
    )


def _scientific(error: float | None) -> str:
    return "-" if error is None else f"{error:.1e}"
