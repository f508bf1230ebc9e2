"""What a run shows: progress while it goes, then results.json, the table and the picture."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from esr_train.checkpoint import write_atomically
from esr_train.config import TrainConfig
from esr_train.data import Prompts
from esr_train.errors import UserError, memory_named
from esr_train.eval.measure import Evaluation, evaluate
from esr_train.metrics import PHASES, PhaseMeter, total_phases
from esr_train.models import Pair
from esr_train.rollout import Engine

RESULTS_FILE = "results.json"
# Of two tokenizers, by `Coverage`'s names.
COVERAGE_LABELS = {
    "compared": "tokens compared",
    "own_spelling": "tokens as its own tokenizer cuts",
    "student_mass": "student's probability in the map",
    "teacher_mass": "teacher's probability in the map",
}


def say(text: str) -> None:
    """A line for people; stderr, so that a bar can be there too and stdout stays the tables'."""
    print(text, file=sys.stderr, flush=True)


def _bar(total: int, label: str, unit: str, initial: int = 0) -> Any:
    # A log file gets a line every ten seconds, a terminal a live bar.
    interval = 0.2 if sys.stderr.isatty() else 10.0
    return tqdm(total=total, initial=initial, desc=label, unit=unit, mininterval=interval)


class StepBar:
    """Progress of the training steps: loss, KL, tokens a second, time left, where the time goes."""

    def __init__(self, config: TrainConfig, first_step: int) -> None:
        self.every = config.logging_steps
        self.bar = _bar(config.max_steps, "train", "step", initial=first_step)

    def __enter__(self) -> StepBar:
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()

    def advance(self, record: dict[str, Any]) -> None:
        if record["step"] % self.every == 0:
            spent = {name: phase["seconds"] for name, phase in record["phases"].items()}
            total = sum(spent.values())
            shares = [f"{name.split('_')[1]} {spent.get(name, 0) / total:.0%}" for name in PHASES]
            if "coverage" in record:
                shares.insert(0, f"compared {record['coverage']['compared']:.0%}")
            self.bar.set_postfix_str(
                f"loss {record['loss']:.4f} nats/token, "
                f"KL {record['kl_per_response']:.2f} nats/response, "
                f"{record['tokens_per_second']:.0f} tokens/s, {', '.join(shares)}",
                refresh=False,
            )
        self.bar.update()


def evaluate_with_bar(
    label: str, pair: Pair, engine: Engine, prompts: Prompts, config: TrainConfig
) -> Evaluation | None:
    """`evaluate`, or None where no prompts are held out."""
    if not prompts.eval:
        return None
    total = len(prompts.eval) * config.num_eval_samples
    with memory_named("evaluation"), _bar(total, f"evaluate {label}", "response") as bar:
        return evaluate(pair, engine, prompts, config, progress=bar.update)


def announce(run: Path, config: TrainConfig, pair: Pair, prompts: Prompts, first_step: int) -> None:
    trained = sum(p.numel() for p in pair.student.parameters() if p.requires_grad)
    total = sum(p.numel() for p in pair.student.parameters())
    length = f"first {config.rollout_tokens} tokens" if config.rollout_tokens else "full rollouts"
    say(
        f"{config.model_name_or_path} <- {config.teacher_model_name_or_path}\n"
        f"  {length}, {config.max_steps} steps of "
        f"{config.per_device_train_batch_size * config.gradient_accumulation_steps} rollouts, "
        f"{'LoRA' if config.use_peft else 'full fine-tuning'} "
        f"({trained:,} of {total:,} parameters), "
        f"{str(pair.dtype).removeprefix('torch.')} on {pair.device.type}\n"
        f"  {len(prompts.train):,} training prompts, {len(prompts.eval):,} held out; "
        f"run folder {run}"
    )
    if pair.bridge:
        say(
            f"  two tokenizers ({pair.vocabulary.difference}): {config.alignment}-aligned tokens "
            f"are compared, vocabularies by {config.vocab_projection}"
        )
    if config.loss_estimator == "sampled":
        say(
            "  loss estimated from the sampled tokens: unbiased with one tokenizer, temperature 1, "
            "no top_p and no top_k"
        )
    if prompts.num_truncated:
        say(
            f"  warning: cut {prompts.num_truncated:,} prompts on the left, too long for the "
            "context"
        )
    if prompts.num_dropped:
        say(
            f"  warning: dropped {prompts.num_dropped:,} prompts, empty or too long for the context"
        )
    if first_step:
        say(f"  resuming after step {first_step}")


def evaluation_json(evaluation: Evaluation | None, config: TrainConfig) -> dict[str, Any] | None:
    """An evaluation as results.json holds it, with its KL inside and beyond N."""
    if evaluation is None:
        return None
    cutoff = config.max_new_tokens
    return {
        "kl_inside": evaluation.mean_kl(0, cutoff),
        "kl_beyond": evaluation.mean_kl(cutoff),
        **dataclasses.asdict(evaluation),
    }


def read_before(run: Path, first_step: int, config: TrainConfig) -> Evaluation | None:
    """The first evaluation of a run that is resumed. Raises UserError if nothing is left to do."""
    path = run / RESULTS_FILE
    if not path.exists():
        return None
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        before, after = results["before"], results["after"]
        evaluation = Evaluation.from_json(before) if before else None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}): delete it to resume") from error
    if after and first_step >= config.max_steps:
        raise UserError(
            f"{run} has done its {first_step} steps: raise --max_steps to go on from there"
        )
    return evaluation


def first_results(
    config: TrainConfig, before: Evaluation | None, device: torch.device
) -> dict[str, Any]:
    """results.json of a run that has not trained yet."""
    return {
        "machine": machine(device),
        "before": evaluation_json(before, config),
        "after": None,
    }


def final_results(
    config: TrainConfig,
    records: list[dict[str, Any]],
    before: Evaluation | None,
    after: Evaluation | None,
    meter: PhaseMeter,
) -> dict[str, Any]:
    """results.json of a finished run."""
    phases = total_phases(records)
    return {
        **first_results(config, before, meter.device),
        "after": evaluation_json(after, config),
        "rollout_tokens": config.rollout_tokens,
        "steps": len(records),
        "train_seconds": sum(record["seconds"] for record in records),
        "phases": phases,
        "peak_memory": {
            "gib": max(phase["peak_gib"] for phase in phases.values()),
            "baseline_gib": meter.baseline_gib,
            "measures": "allocated" if meter.device.type == "cuda" else "resident set",
        },
    }


def machine(device: torch.device) -> dict[str, Any]:
    """Where and with what a number was taken."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
        "commit": source_commit(),
    }


def source_commit() -> str | None:
    """The commit of this source, "-dirty" where it was changed; None where it is no checkout."""
    root = Path(__file__).resolve().parents[1]

    def git(*words: str) -> str:
        command = ("git", "-C", str(root), *words)
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return None  # installed inside somebody else's repository
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def print_results(results: dict[str, Any]) -> None:
    """Two Markdown tables: what the run gained, and what it cost."""
    if results["before"] and results["after"]:
        show(gain_table(results))
    show(cost_table(results))


def gain_table(results: dict[str, Any]) -> Table:
    """Score, KL, length and coverage, before and after."""
    before, after = results["before"], results["after"]
    table = markdown_table("", "before", "after")
    if before["score"] is not None:
        samples = before["num_samples"]
        table.add_row(f"accuracy, avg@{samples} (95 %)", score(before), score(after))
    cutoff = results["rollout_tokens"]
    inside = f"KL in the first {cutoff} tokens" if cutoff else "KL"
    table.add_row(f"{inside}, nats/token", kl(before["kl_inside"]), kl(after["kl_inside"]))
    if cutoff:
        beyond = [kl(row["kl_beyond"]) for row in (before, after)]
        table.add_row("KL beyond, nats/token", *beyond)
    lengths = [f"{row['mean_response_tokens']:.0f}" for row in (before, after)]
    table.add_row("response length, tokens", *lengths)
    for name, label in COVERAGE_LABELS.items():
        if before["coverage"] and name in before["coverage"]:
            shares = [f"{row['coverage'][name]:.1%}" for row in (before, after)]
            table.add_row(label, *shares)
    return table


def cost_table(results: dict[str, Any]) -> Table:
    """Seconds and peak memory of each phase."""
    memory = results["peak_memory"]
    table = markdown_table(
        "phase", "seconds", "seconds/step", f"peak memory ({memory['measures']})"
    )
    for name in PHASES:
        phase = results["phases"][name]
        table.add_row(
            name.replace("_", " "),
            f"{phase['seconds']:.1f}",
            f"{phase['seconds'] / results['steps']:.3f}",
            mib(phase["peak_gib"]),
        )
    total = results["train_seconds"]
    table.add_row("all", f"{total:.1f}", f"{total / results['steps']:.3f}", mib(memory["gib"]))
    return table


def score(evaluation: dict[str, Any]) -> str:
    low, high = evaluation["score_interval"]
    return f"{evaluation['score']:.3f} ({low:.3f} - {high:.3f})"


def kl(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def mib(gib: float) -> str:
    return f"{gib * 1024:,.0f} MiB"


def markdown_table(*columns: str) -> Table:
    table = Table(box=box.MARKDOWN)
    table.add_column(columns[0])
    for name in columns[1:]:
        table.add_column(name, justify="right")
    return table


def as_markdown(table: Table) -> str:
    """The table as text, without rich's empty lines around it."""
    console = Console(width=200)
    with console.capture() as captured:
        console.print(table)
    return captured.get().strip()


def show(table: Table) -> None:
    print(as_markdown(table) + "\n")


def save_picture(figure: Any, path: Path) -> None:
    png = io.BytesIO()
    figure.savefig(png, dpi=120, format="png")
    write_atomically(path, png.getvalue())


def three_panels() -> tuple[Any, Any]:
    """A figure of three axes in a row, made without a display or global state."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.6), layout="constrained")
    return figure, figure.subplots(1, 3)


def plot_curves(path: Path, results: dict[str, Any], records: list[dict[str, Any]]) -> None:
    """Loss and phase seconds by step, and KL by response position before and after."""
    steps = [record["step"] for record in records]
    figure, (loss_axes, time_axes, kl_axes) = three_panels()
    loss_axes.plot(steps, [record["loss"] for record in records])
    loss_axes.set(title="Reverse KL of the rollouts", xlabel="step", ylabel="nats / token")
    if min(record["loss"] for record in records) >= 0:  # an estimate may be below
        loss_axes.set_ylim(bottom=0)
    seconds = [[record["phases"][name]["seconds"] for record in records] for name in PHASES]
    time_axes.stackplot(steps, seconds, labels=[name.replace("_", " ") for name in PHASES])
    time_axes.set(title="Where a step's time goes", xlabel="step", ylabel="seconds")
    time_axes.legend(loc="upper right", fontsize="small")
    plot_profiles(kl_axes, {name: results[name] for name in ("before", "after")}, results)
    save_picture(figure, path)


def plot_profiles(axes: Any, profiles: dict[str, Any], results: dict[str, Any]) -> None:
    """KL by response position, a line for each evaluation; a dashed line at N."""
    for label, evaluation in profiles.items():
        if evaluation:
            # Positions that under 5 % of the responses reach are noise; single ones are spiky.
            profile = Evaluation.from_json(evaluation)
            counts = profile.tokens_by_position
            fewest = 0.05 * max(counts, default=0)
            reached = max((i + 1 for i, n in enumerate(counts) if n >= max(fewest, 1)), default=0)
            width = max(1, math.ceil(reached / 40))
            starts = range(0, reached, width)
            means = [profile.mean_kl(start, start + width) for start in starts]
            axes.plot([start + width / 2 for start in starts], means, label=label)
    if results["rollout_tokens"]:
        axes.axvline(
            results["rollout_tokens"], color="gray", linestyle="--", linewidth=1, label="N"
        )
    axes.set(title="Reverse KL by position", xlabel="response token", ylabel="nats")
    axes.set_ylim(bottom=0)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small")
