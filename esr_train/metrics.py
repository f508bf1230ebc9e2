"""What a step cost and what it gave: phase clocks, peak memory, metrics.jsonl."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.profiler import profile, record_function, schedule

from esr_train.checkpoint import full_disk_names, write_atomically
from esr_train.errors import memory_named

# The paper's three phases of a step.
PHASES = ("student_generation", "teacher_scoring", "student_training")
GIB = 2**30
TRACE_FILE = "trace.json.gz"


def reset_peak(device: torch.device) -> None:
    """Start a new peak: allocated on CUDA, resident set on Linux; no other system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif os.access("/proc/self/clear_refs", os.W_OK):
        Path("/proc/self/clear_refs").write_text("5")


def release_unused(device: torch.device) -> None:
    """Hand back what the allocators hold on to, so that a peak is not an earlier phase's."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's; musl has none
        if trim:
            trim(0)


def peak_gib(device: torch.device) -> float:
    """Peak since `reset_peak`, GiB: allocated memory on CUDA, else the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    status = Path("/proc/self/status")
    if status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (GIB if sys.platform == "darwin" else 2**20)


class PhaseMeter:
    """Seconds and peak memory of each phase. Work on a GPU is waited for at the phase's two ends.

    baseline_gib: what was in use before the first phase, the models above all.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        release_unused(device)
        reset_peak(device)
        self.baseline_gib = peak_gib(device)
        self.seconds: dict[str, float] = {}
        self.peak_gib: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self._synchronize()
        reset_peak(self.device)
        start = time.perf_counter()
        with memory_named(phase), record_function(phase):
            yield
            self._synchronize()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start
        self.peak_gib[phase] = max(self.peak_gib.get(phase, 0.0), peak_gib(self.device))

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def take(self) -> dict[str, dict[str, float]]:
        """The phases since the last call, {phase: {"seconds", "peak_gib"}}."""
        taken = {
            phase: {"seconds": round(seconds, 6), "peak_gib": round(self.peak_gib[phase], 6)}
            for phase, seconds in self.seconds.items()
        }
        self.seconds, self.peak_gib = {}, {}
        return taken


def total_phases(records: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Phases of a whole run from its metrics lines: seconds added up, highest peak."""
    return {
        phase: {
            "seconds": sum(record["phases"][phase]["seconds"] for record in records),
            "peak_gib": max(record["phases"][phase]["peak_gib"] for record in records),
        }
        for phase in PHASES
    }


def step_profiler(path: Path | None, num_steps: int) -> AbstractContextManager[Any]:
    """A profiler to `step()` behind each training step, or of None where `path` is.

    It writes a trace of three steps, the phases marked; the first step, which compiles and
    captures, is left out if there are more.
    """
    if path is None:
        return nullcontext()
    return profile(
        schedule=schedule(wait=0, warmup=1, active=3, repeat=1) if num_steps > 1 else None,
        on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(path)),
    )


class MetricsLog:
    """`metrics.jsonl`, a line a step."""

    def __init__(self, path: Path, keep_steps: int = 0) -> None:
        """keep_steps: lines to keep of a run that is resumed after so many; what follows goes."""
        self.path = path
        self.records = [json.loads(line) for line in self._lines()[:keep_steps]]
        write_atomically(path, "".join(json.dumps(record) + "\n" for record in self.records))

    def _lines(self) -> list[str]:
        return self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []

    def append(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        with full_disk_names(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
