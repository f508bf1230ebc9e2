"""How it is measured: interleaved samples of time, and the peak of memory of one call."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles
from typing import Any, TypeVar

import torch

from esr_train.metrics import peak_gib, release_unused, reset_peak

Key = TypeVar("Key", bound=Hashable)
# A timed call; its argument is the round, which picks the inputs.
Call = Callable[[int], object]

# What became of a provider on a case.
MEASURED, SKIPPED, REFUSED, FAILED = "measured", "skipped", "refused", "failed"

# Written before each GPU sample: past the L2 of any present GPU, and long enough (some 0.1 ms) for
# the host to run ahead, so that an asynchronous call is not charged for its first launch.
FLUSH_BYTES = 2**28


@dataclass(frozen=True)
class Limits:
    """seconds: of sampling a case. `children` measure memory where the device is a CPU."""

    seconds: float = 10.0
    min_rounds: int = 5
    max_rounds: int = 30
    children: Callable[[Any, Any], bool] = lambda case, provider: True


class ReplayClock:
    """Stands still, but for a sample's length while that sample is played."""

    def __init__(self) -> None:
        self.now = 0.0
        self.samples: Iterator[float] = iter(())

    def __call__(self) -> float:
        return self.now

    def play(self) -> None:
        self.now += next(self.samples)

    def replay(self, benchmark: Any, seconds: list[float]) -> None:
        """Show pytest-benchmark, whose timer this is, samples that were taken before."""
        self.samples = iter(seconds)
        benchmark.pedantic(self.play, rounds=len(seconds), iterations=1)


class CudaTimer:
    """Seconds between two events around a call, which starts from an idle GPU and a cold L2."""

    def __init__(self) -> None:
        self.flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def __call__(self, call: Call, round_: int) -> float:
        allocations = _device_allocations()
        seconds = self._once(call, round_)
        if _device_allocations() != allocations:
            # cudaMalloc, because another provider's memory had to make room: not this call's cost.
            seconds = self._once(call, round_)
        return seconds

    def _once(self, call: Call, round_: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        self.flush.zero_()
        start.record()
        call(round_)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def _device_allocations() -> int:
    return torch.cuda.memory_stats().get("num_device_alloc", 0)


def cpu_timer(call: Call, round_: int) -> float:
    start = time.perf_counter()
    call(round_)
    return time.perf_counter() - start


def interleave(
    calls: Mapping[Key, Call],
    timer: Callable[[Call, int], float],
    budget_seconds: float,
    min_rounds: int = 5,
    max_rounds: int = 30,
    round_seconds: float | None = None,
) -> dict[Key, list[float]]:
    """Seconds of every call, one sample a round; each round starts with another call.

    As many rounds as the budget holds, within the two bounds; a first, discarded one tells how
    many that are, unless `round_seconds` does. So all calls see the same drift of clocks and
    temperature.
    """
    keys = list(calls)
    gc.collect()
    gc.disable()
    try:
        if round_seconds is None:
            round_seconds = sum(timer(call, 0) for call in calls.values())
        rounds = min(max(int(budget_seconds / round_seconds), min_rounds), max_rounds)
        samples: dict[Key, list[float]] = {key: [] for key in keys}
        for round_ in range(rounds):
            start = round_ % len(keys)
            for key in keys[start:] + keys[:start]:
                samples[key].append(timer(calls[key], round_))
    finally:
        gc.enable()
    return samples


def summary(seconds: list[float]) -> dict[str, float]:
    p20, *_, p80 = quantiles(seconds, n=5, method="inclusive")
    median = quantiles(seconds, n=2, method="inclusive")[0]
    return {"median_ms": median * 1e3, "p20_ms": p20 * 1e3, "p80_ms": p80 * 1e3}


def peak_bytes(call: Call, device: torch.device) -> int:
    """What one call takes beyond what is in use before it: allocated (CUDA) or resident (CPU)."""
    release_unused(device)
    reset_peak(device)
    before = peak_gib(device)
    result = call(0)
    if device.type == "cuda":
        torch.cuda.synchronize()
    after = peak_gib(device)
    del result
    return round((after - before) * 2**30)


def run_child(module: str, request: dict[str, Any]) -> Any:
    """The JSON that `python -m module` answers to a request on stdin.

    For memory on a CPU: in a fresh process no older peak is left.
    """
    command = (sys.executable, "-W", "ignore", "-m", module)
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        command, cwd=root, input=json.dumps(request), capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"the child that measures memory failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout)
