"""Clocks, peaks, intervals, and the log that resumes."""

import json
import time

import pytest
import torch

from esr_train.errors import UserError, memory_named
from esr_train.eval.measure import mean_interval
from esr_train.metrics import MetricsLog, PhaseMeter, total_phases

CPU = torch.device("cpu")


def test_phase_meter_adds_seconds_and_keeps_the_highest_peak():
    meter = PhaseMeter(CPU)
    with meter("student_generation"):
        time.sleep(0.05)
    with meter("student_training"):
        block = torch.ones(64 * 2**20)  # 256 MiB, written
        del block
    with meter("student_generation"):
        time.sleep(0.05)
    taken = meter.take()
    assert 0.1 <= taken["student_generation"]["seconds"] < 1
    growth = taken["student_training"]["peak_gib"] - meter.baseline_gib
    assert 0.24 < growth < 0.5
    assert taken["student_generation"]["peak_gib"] - meter.baseline_gib < 0.1
    assert meter.take() == {}


def test_total_phases():
    def record(seconds, peak):
        phase = {"seconds": seconds, "peak_gib": peak}
        return {
            "phases": dict.fromkeys(
                ("student_generation", "teacher_scoring", "student_training"), phase
            )
        }

    total = total_phases([record(1.0, 3.0), record(2.0, 1.0)])
    assert total["teacher_scoring"] == {"seconds": 3.0, "peak_gib": 3.0}


def test_metrics_log_drops_what_a_resume_does_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    for step in range(1, 4):
        log.append({"step": step})
    resumed = MetricsLog(path, keep_steps=2)
    resumed.append({"step": 3, "again": True})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == resumed.records == [{"step": 1}, {"step": 2}, {"step": 3, "again": True}]


@pytest.mark.parametrize(
    ("means", "expected"),
    [
        # Wilson's published example values: 10 of 20, 0 of 10, 10 of 10.
        ([1.0] * 10 + [0.0] * 10, (0.2993, 0.7007)),
        ([0.0] * 10, (0.0, 0.2775)),
        ([1.0] * 10, (0.7225, 1.0)),
    ],
)
def test_interval_of_independent_draws_is_wilsons(means, expected):
    assert mean_interval(means, 1) == pytest.approx(expected, abs=1e-4)


def test_an_interval_never_counts_more_draws_than_there_were():
    """Eight problems of two samples that happen to agree: no more sure than 16 draws."""
    assert mean_interval([0.5] * 7 + [1.0], 2) == pytest.approx((0.3318, 0.7690), abs=0.01)


def test_interval_covers_the_truth_as_often_as_it_says():
    """Problems differ in difficulty and have four samples each, as avg@4 has."""
    generator = torch.Generator().manual_seed(0)
    covered, trials = 0, 400
    for _ in range(trials):
        difficulty = torch.rand(60, generator=generator) ** 2  # mean 1/3
        draws = torch.bernoulli(difficulty[:, None].expand(-1, 4), generator=generator)
        low, high = mean_interval(draws.mean(1).tolist(), 4)
        covered += low <= 1 / 3 <= high
    assert 0.92 <= covered / trials <= 0.98


def test_memory_that_runs_out_names_the_phase_and_the_way_out():
    meter = PhaseMeter(CPU)
    with (
        pytest.raises(UserError, match=r"^student_training ran out of memory: 1,048,576.00 GiB "
                      r"asked for\. Lower per_device_train_batch_size .*gradient_checkpointing$"),
        meter("student_training"),
    ):  # fmt: skip
        torch.empty(2**50, dtype=torch.int8)
    with pytest.raises(RuntimeError, match="^a bug$"), meter("student_training"):
        raise RuntimeError("a bug")


@pytest.mark.parametrize(
    ("free", "expected"),
    [
        ("1.50 GiB", "2.25 GiB asked for, 1.50 GiB free, 0.75 GiB too little. Lower per_device"),
        ("512.00 MiB", "2.25 GiB asked for, 0.50 GiB free, 1.75 GiB too little."),
        ("3.00 GiB", "3.00 GiB free in pieces (try PYTORCH_ALLOC_CONF=expandable_segments:True)."),
    ],
)  # fmt: skip
def test_by_how_much_a_gpu_is_too_small(free, expected):
    error = torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.25 GiB. GPU 0 has a total capacity of 79.11 GiB "
        f"of which {free} is free. Including non-PyTorch memory, this process has 77.6 GiB"
    )
    with pytest.raises(UserError) as raised, memory_named("evaluation"):
        raise error
    assert expected in str(raised.value)
