"""The benchmark of the loss, at a size that says nothing about speed."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import accuracy
from benchmarks.loss_cases import (
    CUDA_CASES,
    FORWARD,
    PASSES,
    TRAINING,
    Case,
    Inputs,
    float64_answer,
    make_inputs,
)
from benchmarks.loss_providers import EXACT, PROVIDERS, Loss, Provider, orda, run
from benchmarks.loss_report import case_json, loss_table
from benchmarks.loss_run import FLOOR, admit, measure_case
from benchmarks.measuring import (
    MEASURED,
    REFUSED,
    SKIPPED,
    Call,
    Limits,
    ReplayClock,
    interleave,
    run_child,
    summary,
)
from benchmarks.reporting import environment, save

TINY = Case("tiny", 24, 16, 20, 515, 515, dtype="float32", device="cpu")
LIMITS = Limits(seconds=0.05, max_rounds=6, children=lambda case, provider: False)
BY_NAME = {provider.name: provider for provider in PROVIDERS}
# Compiling takes longer than this test may.
QUICK = [provider for provider in PROVIDERS if provider.name != "torch.compile"]

# What other projects' code warns of is not ours to fail on.
pytestmark = pytest.mark.filterwarnings("default")


CALLS: list[str] = []


def doubled(case: Case) -> Loss:
    """A loss whose gradient is right and whose value is not."""
    right = BY_NAME["eager"].build(case)

    def loss(inputs: Inputs) -> torch.Tensor:
        CALLS.append("doubled")
        value = right(inputs)
        return value + value.detach()

    return loss


def nan(case: Case) -> Loss:
    right = BY_NAME["eager"].build(case)
    return lambda inputs: right(inputs) * float("nan")


@pytest.mark.parametrize("train_head", [False, True])
def test_a_case_is_checked_timed_and_written(tmp_path: Path, train_head: bool) -> None:
    case = replace(TINY, train_head=train_head)
    CALLS.clear()
    planted = [
        Provider("doubled", doubled, EXACT),
        Provider("NaN", nan, EXACT),
        Provider("missing", nan, EXACT, package="no_such_package"),
    ]
    rows = measure_case(case, [*QUICK, *planted], LIMITS)
    by_name = {row.provider: row for row in rows}
    assert [row.provider for row in rows] == [p.name for p in [*QUICK, *planted]] + [FLOOR]
    for name in ("ours", "ours, small memory", "eager"):
        assert by_name[name].status == MEASURED
        assert by_name[name].value_error <= EXACT.value
        assert by_name[name].grad_error <= EXACT.grad
    for name in ("doubled", "NaN"):
        assert by_name[name].status == REFUSED
        assert "KL error" in by_name[name].reason
        assert by_name[name].passes == {}
    assert CALLS == ["doubled"]  # its check, and no more
    assert by_name["missing"].status == SKIPPED
    assert by_name["missing"].reason == "package no_such_package is not installed"
    assert by_name["eager, bf16 softmax"].status == SKIPPED  # float32 is not rounded
    for name in ("TRL", "Liger chunked JSD"):
        assert by_name[name].status in (MEASURED, SKIPPED), by_name[name].reason
    for row in rows:
        assert row.status == MEASURED or row.reason, row.provider
    floor = by_name[FLOOR]
    for which in PASSES:
        assert floor.passes[which]["over_floor"] == 1.0
        ours = by_name["ours"].passes[which]
        assert ours["over_floor"] == ours["median_ms"] / floor.passes[which]["median_ms"]
        assert ours["tflops"] * 1e9 * ours["median_ms"] == pytest.approx(case.gemm_flops(which))
        rounds = {len(row.passes[which]["seconds"]) for row in rows if row.passes}
        assert len(rounds) == 1
        assert 5 <= rounds.pop() <= 6

    path = tmp_path / "new" / "loss.json"
    save(path, {**environment("cpu"), "cases": [case_json(case, rows)]})
    results = json.loads(path.read_text())
    assert results["device"]
    assert {"torch", "triton", "trl", "liger-kernel", "orda-kernel"} <= set(results["versions"])
    assert results["versions"]["torch"] == torch.__version__
    assert "commit" in results
    table = loss_table(results["cases"][0])
    assert f"| {FLOOR} " in table
    assert "doubled refused: KL error 1.0e+00" in table
    assert ("trained head" in table) == train_head


def test_a_provider_that_raises_is_reported_and_the_others_run() -> None:
    def broken(case: Case) -> Loss:
        raise RuntimeError("no such kernel")

    rows = measure_case(TINY, [Provider("broken", broken, EXACT), BY_NAME["ours"]], LIMITS)
    assert [row.status for row in rows] == ["failed", MEASURED, MEASURED]
    assert rows[0].reason == "RuntimeError: no such kernel"


def test_unequal_vocabularies_and_softcaps_are_skipped_where_they_are_not_understood() -> None:
    case = replace(TINY, teacher_vocab=520, student_softcap=10.0)
    reasons = {p.name: p.why_not(replace(case, device="cuda")) for p in PROVIDERS}
    assert reasons["TRL"] == "needs equal vocabularies, not 515 and 520"
    assert {reasons[name] for name in reasons if "Liger" in name} == {"has no softcap"}
    assert (
        BY_NAME["Liger fused JSD"].why_not(TINY) == BY_NAME["orda"].why_not(TINY) == "needs a GPU"
    )
    providers = [BY_NAME[name] for name in ("ours", "ours, small memory", "eager")]
    assert {row.status for row in measure_case(case, providers, LIMITS)} == {MEASURED}


def test_eager_runs_in_bf16_with_either_softmax() -> None:
    case = replace(TINY, dtype="bfloat16", train_head=True, student_softcap=10.0)
    providers = [BY_NAME[name] for name in ("ours", "eager", "eager, bf16 softmax")]
    rows, _ = admit(case, providers, [make_inputs(case, seed=0)], LIMITS)
    assert {row.status for row in rows} == {MEASURED}, [row.reason for row in rows]
    ours, exact, rounded = (row.grad_error for row in rows)
    assert ours < exact / 2 < rounded / 2


@pytest.mark.parametrize("name", ["Liger fused JSD", "orda"])
def test_the_calls_of_gpu_only_peers_agree_with_float64(name: str) -> None:
    """Liger in Triton's interpreter, orda by its PyTorch path: the arguments are the right ones."""
    pytest.importorskip(BY_NAME[name].package)
    if name == "orda":
        loss = orda(TINY, backend="torch")
    elif os.environ.get("TRITON_INTERPRET") == "1":
        loss = BY_NAME[name].build(TINY)
    else:
        pytest.skip("needs Triton's interpreter")
    inputs = make_inputs(TINY, seed=0)
    value_error, grad_error = run(loss, inputs, TRAINING).errors(float64_answer(inputs))
    assert value_error <= EXACT.value
    assert grad_error <= EXACT.grad


def test_the_answer_does_not_depend_on_its_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(replace(TINY, train_head=True), seed=0)
    whole = float64_answer(inputs)
    monkeypatch.setattr("benchmarks.loss_cases.ANSWER_ELEMENTS", 5 * 515)
    value_error, grad_error = float64_answer(inputs).errors(whole)
    assert value_error < 1e-14
    assert grad_error < 1e-14


def test_flops_are_those_of_the_published_floors() -> None:
    """The three GEMMs of performance targets: 2 N V (2 Ds + Dt), and dW for a trained head."""
    case = next(case for case in CUDA_CASES if case.name == "1.5B<-1.7B N=1600")
    assert case.gemm_flops(TRAINING) == 2 * 1600 * 151936 * (2 * 1536 + 2048)
    assert case.gemm_flops(FORWARD) == 2 * 1600 * 151936 * (1536 + 2048)
    more = replace(case, train_head=True).gemm_flops(TRAINING) - case.gemm_flops(TRAINING)
    assert more == 2 * 1600 * 151936 * 1536


def test_samples_are_interleaved_and_replayed() -> None:
    order = []

    def timer(call: Call, round_: int) -> float:
        call(round_)
        return 1.0

    calls = {name: lambda round_, name=name: order.append((round_, name)) for name in "abc"}
    samples = interleave(calls, timer, budget_seconds=12.0)
    assert {len(seconds) for seconds in samples.values()} == {5}  # 12 / 3, but at least 5
    assert "".join(name for _, name in order) == "abc" + "abc" + "bca" + "cab" + "abc" + "bca"
    assert [round_ for round_, _ in order[3::3]] == [0, 1, 2, 3, 4]
    numbers = summary([5.0, 1.0, 2.0, 3.0, 4.0, 6.0])
    assert numbers == {"median_ms": 3500.0, "p20_ms": 2000.0, "p80_ms": 5000.0}
    clock = ReplayClock()
    clock.samples = iter([0.5, 0.25])
    before = clock()
    clock.play()
    assert clock() - before == 0.5


def test_memory_is_the_resident_peak_of_a_child() -> None:
    """Eager holds several whole [N, V] tensors, ours one chunk of them."""
    case = Case("memory", 256, 16, 16, 32001, 32001, dtype="float32", device="cpu")
    request = {"case": case.__dict__, "provider": "eager", "threads": 1}
    logits = 4 * case.num_rows * case.vocab_size
    assert 4 * logits < run_child("benchmarks.loss_child", request) < 24 * logits


def test_a_failing_child_is_an_error_with_its_reason() -> None:
    request = {"case": TINY.__dict__, "provider": "nobody", "threads": 1}
    with pytest.raises(RuntimeError, match="nobody"):
        run_child("benchmarks.loss_child", request)


def test_accuracy_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("ours", "eager", "Liger fused JSD")
    monkeypatch.setattr(accuracy, "PROVIDERS", [BY_NAME[name] for name in names])
    pairs = [replace(pair, vocab_size=1003) for pair in accuracy.PAIRS]
    monkeypatch.setattr(accuracy, "PAIRS", pairs)
    path = tmp_path / "accuracy.json"
    arguments = ["--device", "cpu", "--rows", "32", "--dim", "64", "--json", str(path)]
    assert accuracy.main(arguments) == 0
    results = json.loads(path.read_text())
    assert {"device", "versions", "commit"} <= set(results)
    errors = {
        pair["name"]: [row.get("grad_error") for row in pair["rows"]] for pair in results["pairs"]
    }
    assert all(skipped is None for _, _, skipped in errors.values())
    ours, eager, _ = errors["3 % noise"]
    assert eager > 10 * ours
    assert errors["logits near +-1e4"][1] > 0.5
    shown = capsys.readouterr().out
    assert "skipped: Liger fused JSD: " in shown
    assert "| 3 % noise (KL " in shown

    monkeypatch.setattr(accuracy, "LIMIT", accuracy.Tolerance(value=1e-4, grad=1e-5))
    assert accuracy.main(arguments) == 1
    assert "too large an error: ours on unrelated" in capsys.readouterr().err
