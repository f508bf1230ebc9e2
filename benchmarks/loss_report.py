"""What a benchmark leaves: a results file, and Markdown tables to look at."""

from __future__ import annotations

import dataclasses
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.loss_cases import FORWARD, TRAINING, Case
from benchmarks.loss_run import Row
from esr_train.checkpoint import write_json
from esr_train.report import as_markdown, machine, markdown_table

RESULTS = Path(__file__).parent / "results"
PEERS = ("triton", "trl", "liger-kernel", "orda-kernel")


def environment(device: str) -> dict[str, Any]:
    """Machine, versions and commit."""
    found = machine(torch.device(device))
    for name in PEERS:
        try:
            found["versions"][name] = version(name)
        except PackageNotFoundError:
            found["versions"][name] = None
    if device == "cuda":
        found["versions"]["cuda"] = torch.version.cuda
    return found


def results_path(kind: str, device: str) -> Path:
    """One file a run: benchmarks/results/loss-cuda-20260131-235959.json."""
    return RESULTS / f"{kind}-{device}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}.json"


def save(path: Path, results: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, results)


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
        if row["status"] != "measured":
            others.append(f"{row['provider']} {row['status']}: {row['reason']}.")
            continue
        forward, training = row["passes"][FORWARD], row["passes"][TRAINING]
        memory = row["extra_memory_bytes"]
        table.add_row(
            row["provider"],
            _spread(forward),
            _spread(training),
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


def _spread(timing: dict[str, float]) -> str:
    return f"{timing['median_ms']:.4g} ({timing['p20_ms']:.4g} - {timing['p80_ms']:.4g})"


def _scientific(error: float | None) -> str:
    return "-" if error is None else f"{error:.1e}"
