"""How wrong each implementation of the loss is in bf16: errors against float64, by kind of input.

    python -m benchmarks.accuracy

Truth is float64 from the same, already rounded bf16 inputs. Exits with 1 if ours errs more than it
may. Writes a results file and prints two Markdown tables.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.loss_cases import TRAINING, Case, Inputs, float64_answer, make_inputs
from benchmarks.loss_providers import PROVIDERS, Provider, Tolerance, run
from benchmarks.reporting import environment, results_path, save
from esr_kernels import LMHead
from esr_train.report import as_markdown, markdown_table

# What ours may err on every kind of input but the last: at 1e4, float32 logits are 1e-3 apart.
LIMIT = Tolerance(value=1e-4, grad=3e-3)
PEAK_NATS = 20.0
SHIFT = 1e4


def noisy(noise: float) -> Callable[[Inputs], Inputs]:
    """The teacher is the student, with noise of this size beside its hidden states and weights."""

    def make(inputs: Inputs) -> Inputs:
        generator = torch.Generator(inputs.student_hidden.device).manual_seed(1)

        def shaken(tensor: torch.Tensor) -> torch.Tensor:
            values = tensor.detach().float()
            random = torch.randn(values.shape, generator=generator, device=values.device)
            return (values + noise * values.std() * random).to(tensor.dtype)

        head = LMHead(shaken(inputs.student_head.weight))
        hidden = shaken(inputs.student_hidden)
        return dataclasses.replace(inputs, teacher_hidden=hidden, teacher_head=head)

    return make


def peaked(inputs: Inputs) -> Inputs:
    """In both models the same token of each row stands 20 nats above the mean logit."""
    rows = torch.arange(inputs.student_hidden.shape[0], device=inputs.student_hidden.device)

    def peak(hidden: torch.Tensor, head: LMHead) -> torch.Tensor:
        weight = head.weight[rows].float()
        toward = PEAK_NATS * weight / weight.square().sum(dim=1, keepdim=True)
        return (hidden.detach().float() + toward).to(hidden.dtype)

    return dataclasses.replace(
        inputs,
        student_hidden=peak(inputs.student_hidden, inputs.student_head).requires_grad_(),
        teacher_hidden=peak(inputs.teacher_hidden, inputs.teacher_head),
    )


def shifted(inputs: Inputs) -> Inputs:
    """All logits of a row near +1e4, of the next near -1e4: softmax does not see it."""

    def shift(hidden: torch.Tensor, head: LMHead) -> tuple[torch.Tensor, LMHead]:
        dim = hidden.shape[1]
        # Rows that sum to zero: only the offset below meets the offset of the hidden states.
        weight = head.weight.float() - head.weight.float().mean(dim=1, keepdim=True)
        offset = weight.std() / 2
        values = hidden.detach().float() + SHIFT / (dim * offset)
        values[1::2] -= 2 * SHIFT / (dim * offset)
        return values.to(hidden.dtype), LMHead((weight + offset).to(hidden.dtype))

    student_hidden, student_head = shift(inputs.student_hidden, inputs.student_head)
    teacher_hidden, teacher_head = shift(inputs.teacher_hidden, inputs.teacher_head)
    return Inputs(student_hidden.requires_grad_(), student_head, teacher_hidden, teacher_head)


@dataclasses.dataclass(frozen=True)
class Pair:
    name: str
    make: Callable[[Inputs], Inputs]
    vocab_size: int = 32768
    limited: bool = True


PAIRS = (
    Pair("unrelated", lambda inputs: inputs),
    Pair("unrelated, V = 32003", lambda inputs: inputs, vocab_size=32003),
    Pair("10 % noise", noisy(0.10)),
    Pair("3 % noise", noisy(0.03)),
    Pair("peak of 20 nats", peaked),
    Pair("logits near +-1e4", shifted, limited=False),
)


def measure(pair: Pair, device: str, num_rows: int, dim: int) -> dict[str, Any]:
    vocab_size = pair.vocab_size
    case = Case(pair.name, num_rows, dim, dim, vocab_size, vocab_size, device=device)
    inputs = pair.make(make_inputs(case, seed=0))
    truth = float64_answer(inputs)
    rows = [_error(provider, case, inputs, truth) for provider in PROVIDERS]
    return {**dataclasses.asdict(case), "mean_kl": truth.value.item(), "rows": rows}


def _error(provider: Provider, case: Case, inputs: Inputs, truth: Any) -> dict[str, Any]:
    row: dict[str, Any] = {"provider": provider.name, "reason": provider.skip_reason(case)}
    if row["reason"] is None:
        try:
            errors = run(provider.build(case), inputs, TRAINING).errors(truth)
            row["value_error"], row["grad_error"] = errors
        except Exception as error:  # another project's code: reported, and the others still run
            row["reason"] = f"{type(error).__name__}: {error}"
    return row


def table(pairs: list[dict[str, Any]], key: str) -> str:
    """A line a provider, a column a kind of input."""
    columns = [f"{pair['name']} (KL {pair['mean_kl']:.2g})" for pair in pairs]
    made = markdown_table("", *columns)
    for rows in zip(*(pair["rows"] for pair in pairs), strict=True):
        cells = [_percent(row[key]) if key in row else "skipped" for row in rows]
        made.add_row(rows[0]["provider"], *cells)
    return as_markdown(made)


def _percent(error: float) -> str:
    return f"{100 * error:.2g} %" if error < 0.1 else f"{100 * error:.0f} %"


def excess(pairs: list[dict[str, Any]]) -> list[str]:
    """Where ours errs more than it may."""
    limited = {pair.name for pair in PAIRS if pair.limited}
    return [
        f"{row['provider']} on {pair['name']}: {row}"
        for pair in pairs
        for row in pair["rows"]
        if pair["name"] in limited and row["provider"].startswith("ours")
        # Not ">": NaN, or no result, is an excess too.
        if not (
            row.get("value_error", float("inf")) <= LIMIT.value
            and row.get("grad_error", float("inf")) <= LIMIT.grad
        )
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="errors of the loss against float64, in bf16")
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--json", type=Path, help="results file; default: a new one in results/")
    options = parser.parse_args(arguments)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    pairs = [measure(pair, device, options.rows, options.dim) for pair in PAIRS]
    path = options.json or results_path("accuracy", device)
    save(path, {**environment(device), "limit": dataclasses.asdict(LIMIT), "pairs": pairs})
    print(f"Relative L2 error of the gradient:\n\n{table(pairs, 'grad_error')}\n")
    print(f"Relative error of the mean KL:\n\n{table(pairs, 'value_error')}\n")
    reasons = {row["provider"]: row["reason"] for row in pairs[0]["rows"] if row["reason"]}
    for name, reason in reasons.items():
        print(f"skipped: {name}: {reason}")
    print(f"results: {path}")
    failures = excess(pairs)
    for failure in failures:
        print(f"too large an error: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
