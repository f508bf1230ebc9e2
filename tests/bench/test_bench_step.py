"""The benchmark of the step: that its numbers mean what they say, at a size without any speed."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks import step_run
from benchmarks.measuring import FAILED, MEASURED, REFUSED, SKIPPED, Limits, run_child
from benchmarks.reporting import environment, save
from benchmarks.step_cases import CUDA_CASES, EOS, PAIRS, Case, Step, long_tail
from benchmarks.step_providers import Models, OurStep, make_step
from benchmarks.step_report import case_json, step_table
from benchmarks.step_run import growth, measure_case, problem
from esr_train.errors import UserError
from esr_train.metrics import PHASES, PhaseMeter

pytest.importorskip("trl")

ANSWERS = (9, 2, 5, 1)
ENGINES = ("graph", "hf", "TRL")
STEPS = (*(Step(engine, 4) for engine in ENGINES), Step("graph", 0))
TINY = Case("tiny", "tiny", (3, 7, 4, 5), ANSWERS, STEPS, "float32", "cpu", memory=False)
LIMITS = Limits(seconds=0.01, min_rounds=3)

# What other projects' code warns of is not ours to fail on.
pytestmark = pytest.mark.filterwarnings("default")


def seen_by(step, case=TINY):
    """Sorted prompts, and responses in the order of the rows, of a step's second turn."""
    call = make_step(case, step, Models(case, with_trl=step.engine == "TRL"))
    if step.engine == "TRL":
        record = call(), call()
        inputs = call.inputs
        prompts, responses = (
            [row[seen.bool()].tolist() for row, seen in zip(ids, mask, strict=True)]
            for ids, mask in (
                (inputs["prompt_ids"], inputs["prompt_mask"]),
                (inputs["completion_ids"], inputs["completion_mask"]),
            )
        )
    else:
        seen, generate = [], call.engine.generate

        def spy(prompt_ids, prompt_mask, *, max_new_tokens):
            written = generate(prompt_ids, prompt_mask, max_new_tokens=max_new_tokens)
            seen.append((prompt_ids, prompt_mask, written))
            return written

        call.engine.generate = spy
        record = call(), call()
        ids, mask, written = seen[-1]
        prompts = [row[real].tolist() for row, real in zip(ids, mask, strict=True)]
        lengths = case.response_lengths(step)
        responses = [row[:n].tolist() for row, n in zip(written, lengths, strict=True)]
        assert written.shape[1] == max(lengths)
    call.close()
    assert record[-1]["response_tokens"] == sum(map(len, responses))
    return prompts, responses


@pytest.mark.parametrize("rollout_tokens", [4, 0])
def test_all_see_the_same_prompts_and_answers_of_the_planted_lengths(rollout_tokens):
    seen = [seen_by(Step(engine, rollout_tokens)) for engine in ENGINES]
    cutoff = rollout_tokens or max(ANSWERS)
    for prompts, responses in seen:
        assert sorted(prompts) == sorted(TINY.prompts())
        # TRL shuffles its rows once they are written.
        assert sorted(map(len, responses)) == sorted(min(n, cutoff) for n in ANSWERS)
        for response in responses:
            ends = [token == EOS for token in response]
            assert not any(ends[:-1])
            assert ends[-1] == (len(response) < cutoff or not rollout_tokens)
    for prompts, responses in seen[:2]:
        assert prompts == seen[0][0]
        assert [len(response) for response in responses] == [min(n, cutoff) for n in ANSWERS]


def test_a_case_is_measured_and_written(tmp_path):
    rows = measure_case(TINY, list(STEPS), LIMITS)
    assert [row.status for row in rows] == [MEASURED] * 4, [row.reason for row in rows]
    assert [row.response_tokens for row in rows] == [4 + 2 + 4 + 1] * 3 + [9 + 2 + 5 + 1]
    # The same weights to begin with, and the same loss: means of a few tokens that are sampled.
    assert [row.loss for row in rows[:3]] == pytest.approx([rows[0].loss] * 3, rel=0.3)
    for row, longest in zip(rows, (4, 4, 4, 9), strict=True):
        assert len(row.seconds) == 3
        assert row.step["median_ms"] == pytest.approx(1e3 * sorted(row.seconds)[1])
        assert row.ms_per_token == row.phase_ms["student_generation"] / longest
        phases = zip(*(row.phase_seconds[phase] for phase in PHASES), strict=True)
        shares = [sum(parts) / whole for parts, whole in zip(phases, row.seconds, strict=True)]
        # The phases are the step, but for a pause of a busy machine between them.
        assert 0.5 < max(shares) <= 1.001
    path = tmp_path / "step.json"
    save(path, {**environment("cpu"), "cases": [case_json(TINY, rows)]})
    case = json.loads(path.read_text())["cases"][0]
    esr, full, trl = case["compared"]["step, ms"]
    assert [entry["whose"] for entry in (esr, full, trl)] == ["ESR", "full", "TRL"]
    assert esr["value"] == rows[0].step["median_ms"]
    assert full["over_ESR"] == rows[3].step["median_ms"] / rows[0].step["median_ms"]
    assert trl["over_ESR"] == rows[2].step["median_ms"] / rows[0].step["median_ms"]
    table = step_table(case)
    assert "| ESR / full / TRL " in table
    assert "prompts of 3-7 tokens, whole answers of 1-9" in table


def record(**changed):
    return {"loss": 1.0, "grad_norm": 0.1, "response_tokens": 11} | changed


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({}, None),
        ({"loss": math.nan}, "loss nan"),
        ({"grad_norm": math.inf}, "gradient norm inf"),
        ({"grad_norm": 0.0}, "gradient norm 0.0"),
        ({"response_tokens": 12}, "12 response tokens, not 11"),
    ],
)
def test_what_did_not_train_is_refused(changed, reason):
    assert problem(TINY, STEPS[0], record(**changed)) == reason


@pytest.mark.parametrize("when", [0, 3])
def test_a_refused_step_is_not_timed_and_the_others_are(monkeypatch, when):
    """At its first turn, or in the midst of the timed ones."""
    turns = []

    def turned(call):
        answer = call()
        turns.append(answer)
        return answer | {"loss": math.nan} if len(turns) == when + 1 else answer

    def make(case, step, models):
        call = make_step(case, step, models)
        if step.engine != "hf":
            return call
        doctored = SimpleNamespace(meter=call.meter, close=call.close)
        return type("Doctored", (), {"__call__": lambda self: turned(call), **vars(doctored)})()

    monkeypatch.setattr(step_run, "make_step", make)
    rows = measure_case(TINY, [STEPS[1], STEPS[0]], LIMITS)
    assert [(row.status, row.reason) for row in rows] == [(REFUSED, "loss nan"), (MEASURED, None)]
    assert rows[0].step == {}
    assert "hf, N=4 refused: loss nan." in step_table(case_json(TINY, rows))
    assert case_json(TINY, rows)["compared"] == {}


@pytest.mark.parametrize(
    ("cause", "status"),
    [(torch.OutOfMemoryError("2 GiB"), SKIPPED), (ValueError("no"), FAILED)],
)
def test_running_out_of_memory_is_a_skip_and_other_errors_are_failures(monkeypatch, cause, status):
    def raising(*_):
        raise UserError("student_generation ran out") from cause

    monkeypatch.setattr(OurStep, "__call__", raising)
    (row,) = measure_case(TINY, [STEPS[0]], LIMITS)
    assert (row.status, row.reason) == (status, "UserError: student_generation ran out")


def test_an_error_in_the_thread_of_trl_comes_out():
    call = make_step(TINY, STEPS[2], Models(TINY, with_trl=True))
    call()
    call._trainer._compute_loss = lambda *_: 1 / 0
    with pytest.raises(RuntimeError, match="ended before its step") as raised:
        call()
    assert isinstance(raised.value.__cause__, ZeroDivisionError)
    call.close()


def test_memory_is_each_phase_s_growth_over_the_models():
    """Of a child; a whole answer's training keeps more states than a short one's."""
    case = replace(TINY, pair="small", prompt_lengths=(8,) * 4, answer_lengths=(120,) * 4)

    def measured(rollout_tokens):
        request = {"case": case.__dict__, "step": Step("graph", rollout_tokens), "threads": 1}
        return run_child("benchmarks.step_child", request)

    short, long = measured(2), measured(0)
    assert set(short) == set(long) == set(PHASES)
    # A token's states: 4 layers, each of some 40 widths of 192 and 3 of 1120, in float32.
    states = 4 * 118 * 4 * (4 * (20 * 192 + 3 * 1120))
    assert 0.3 * states < long["student_training"] - short["student_training"] < 5 * states


def test_a_phase_s_peak_sees_what_it_allocates():
    meter = PhaseMeter(torch.device("cpu"))
    kept = []
    for phase, mib in zip(PHASES, (40, 0, 80), strict=True):
        with meter(phase):
            kept.append(torch.ones(mib * 2**18))
            kept.clear()
    grown = growth(SimpleNamespace(meter=meter), {"phases": meter.take()})
    assert [round(grown[phase] / 2**20) for phase in PHASES] == pytest.approx([40, 0, 80], abs=12)


def test_the_cases_are_the_real_models():
    """Parameters as published, in thousand millions; a tied LM head counts once."""
    from transformers import AutoConfig, AutoModelForCausalLM

    counts = []
    for pair in ("1.5B<-1.7B", "4B<-14B"):
        for options in PAIRS[pair]:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**options))
            counts.append(round(sum(weight.numel() for weight in model.parameters()) / 1e9, 2))
    assert counts == [1.54, 1.72, 4.02, 14.77]
    assert all(len(case.prompt_lengths) == 16 for case in CUDA_CASES)
    tail = long_tail(16, median=1150, longest=4096)
    assert max(tail) == 4096
    assert 900 < sorted(tail)[8] < 1400
