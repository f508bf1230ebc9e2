"""The demo's table and picture: the same steps with a cutoff and without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from esr_train.config import TrainConfig
from esr_train.eval.measure import Evaluation
from esr_train.metrics import PHASES
from esr_train.report import (
    kl,
    markdown_table,
    mib,
    plot_profiles,
    save_picture,
    score,
    show,
    three_panels,
)


def comparison_table(results: dict[str, dict[str, Any]]) -> Table:
    """A row each for the untrained student, ESR and the full rollout."""
    esr, full = results["esr"], results["full"]
    cutoff = esr["rollout_tokens"]
    table = markdown_table(
        "",
        f"accuracy, avg@{esr['before']['num_samples']} (95 %)",
        f"KL, first {cutoff}",
        "KL beyond",
        *(f"{name.replace('_', ' ')}, s" for name in PHASES),
        "all steps, s",
        "memory growth",
    )
    table.add_row("student", *_quality(esr["before"], cutoff), *["-"] * 5)
    for name, result in {f"ESR, {cutoff} tokens": esr, "full rollout": full}.items():
        table.add_row(name, *_quality(result["after"], cutoff), *_cost(result))
    return table


def print_comparison(results: dict[str, dict[str, Any]], config: TrainConfig) -> None:
    """The table, and which of the two scored more at what cost."""
    esr, full = results["esr"], results["full"]
    show(comparison_table(results))
    ratio = full["train_seconds"] / esr["train_seconds"]
    gap = full["after"]["score"] - esr["after"]["score"]
    verdict = f"{abs(gap):.3f} {'higher' if gap > 0 else 'lower'}" if gap else "the same"
    print(
        f"{esr['steps']} steps of {config.per_device_train_batch_size} rollouts each, "
        f"{esr['before']['num_prompts']} held-out problems. The full rollout took {ratio:.1f}x the "
        f"time of ESR and scores {verdict}."
    )


def _quality(evaluation: dict[str, Any], cutoff: int) -> list[str]:
    profile = Evaluation.from_json(evaluation)
    return [score(evaluation), kl(profile.mean_kl(0, cutoff)), kl(profile.mean_kl(cutoff))]


def _cost(result: dict[str, Any]) -> list[str]:
    memory = result["peak_memory"]
    seconds = [result["phases"][name]["seconds"] for name in PHASES]
    return [
        *(f"{value:.1f}" for value in seconds),
        f"{result['train_seconds']:.1f}",
        mib(memory["gib"] - memory["baseline_gib"]),
    ]


def plot_comparison(path: Path, results: dict[str, dict[str, Any]], config: TrainConfig) -> None:
    """Accuracy with its interval, KL by position, and seconds by phase, of ESR and full rollout."""
    cutoff = config.rollout_tokens
    esr, full = results["esr"], results["full"]
    evaluations = {
        "student": esr["before"],
        f"ESR, {cutoff} tokens": esr["after"],
        "full rollout": full["after"],
    }
    figure, (score_axes, kl_axes, time_axes) = three_panels()
    for index, (name, evaluation) in enumerate(evaluations.items()):
        mean, (low, high) = evaluation["score"], evaluation["score_interval"]
        score_axes.bar(name, mean, yerr=[[mean - low], [high - mean]], capsize=4, color=f"C{index}")
    score_axes.set(title="Accuracy on held-out problems (95 %)", ylabel="avg@k", ylim=(0, 1))
    plot_profiles(kl_axes, evaluations, esr)
    names = list(evaluations)[1:]
    bottom = [0.0, 0.0]
    for index, phase in enumerate(PHASES):
        seconds = [result["phases"][phase]["seconds"] for result in (esr, full)]
        label = phase.replace("_", " ")
        time_axes.bar(names, seconds, bottom=bottom, label=label, color=f"C{index + 3}")
        bottom = [low + more for low, more in zip(bottom, seconds, strict=True)]
    time_axes.set(title=f"Time of {esr['steps']} steps", ylabel="seconds")
    time_axes.legend(fontsize="small")
    save_picture(figure, path)
