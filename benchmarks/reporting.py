"""What every benchmark leaves: a results file, and the cells of its Markdown tables."""

from __future__ import annotations

import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from esr_train.checkpoint import write_json
from esr_train.report import machine

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


def spread(timing: dict[str, float]) -> str:
    """Milliseconds: the median, with p20 - p80 behind it."""
    return f"{timing['median_ms']:.4g} ({timing['p20_ms']:.4g} - {timing['p80_ms']:.4g})"
