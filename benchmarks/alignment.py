"""Which way of comparing two tokenizers trains best: the table that the defaults come from.

    python -m esr_train.demo.build --tokenizer pieces --output pieces
    python -m benchmarks.alignment --pieces pieces

The demo's task, both ways: a student of whole words with a teacher of pieces, and a student of
pieces with a teacher of whole words. Every variant trains from the same student, with the demo's
settings and some seeds, and is scored on the held-out problems. What is in the results file already
is not measured again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.reporting import environment, results_path, save
from esr_train.config import parse
from esr_train.demo import pieces_teacher_path, student_path, teacher_path
from esr_train.eval.measure import Evaluation
from esr_train.report import as_markdown, markdown_table
from esr_train.train import train

# alignment, vocab_projection, loss_estimator; the sampled tokens need no map.
VARIANTS = (
    ("start", "merge", "full"),
    ("span", "merge", "full"),
    ("start", "project", "full"),
    ("start", "exact", "full"),
    ("span", "project", "full"),
    ("span", "exact", "full"),
    ("start", "project", "sampled"),
    ("span", "project", "sampled"),
)


def pairs(pieces: Path) -> dict[str, tuple[Path, Path]]:
    """Student and teacher, by name."""
    return {
        "words <- pieces": (student_path(), pieces_teacher_path()),
        "pieces <- words": (pieces / "student", teacher_path()),
    }


def measure(
    models: tuple[Path, Path],
    variant: tuple[str, str, str],
    seed: int,
    before: Evaluation | None,
    words: list[str],
) -> dict[str, Any]:
    """results.json of one run, less its curves."""
    student, teacher = models
    alignment, projection, estimator = variant
    with tempfile.TemporaryDirectory() as folder:
        config, _ = parse(
            [
                "--demo=cross-tokenizer",
                f"--model_name_or_path={student}",
                f"--teacher_model_name_or_path={teacher}",
                f"--alignment={alignment}",
                f"--vocab_projection={projection}",
                f"--loss_estimator={estimator}",
                f"--seed={seed}",
                f"--output_dir={folder}/run",
                *words,
            ]
        )
        return train(config, before=before)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--pieces", type=Path, required=True, help="folder of the built pair")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--json", type=Path, help="results file; default: a new one in results/")
    parser.add_argument("options", nargs="*", help="options of python -m esr_train, behind --")
    options = parser.parse_args(arguments)
    path = options.json or results_path("alignment", "cpu")
    results: dict[str, Any] = {**environment("cpu"), "options": options.options, "runs": []}
    if path.exists():
        results["runs"] = json.loads(path.read_text(encoding="utf-8"))["runs"]
    done = {(run["pair"], *run["variant"], run["seed"]) for run in results["runs"]}
    for seed in options.seeds:
        for name, models in pairs(options.pieces).items():
            before = None
            for variant in VARIANTS:
                if (name, *variant, seed) in done:
                    continue
                found = measure(models, variant, seed, before, options.options)
                before = Evaluation.from_json(found["before"])
                kept = {key: found[key] for key in ("before", "after", "train_seconds")}
                kept["commit"] = found["machine"]["commit"]
                for row in (kept["before"], kept["after"]):
                    del row["kl_by_position"], row["tokens_by_position"]
                # Of the first variant, but for what no variant changes.
                spelling = kept["before"]["coverage"]["own_spelling"]
                kept["before"]["coverage"] = {"own_spelling": spelling}
                del kept["before"]["kl_inside"], kept["before"]["kl_beyond"]
                results["runs"].append(
                    {"pair": name, "variant": list(variant), "seed": seed, **kept}
                )
                save(path, results)
    print(table(results["runs"]))
    print(f"results: {path}")
    return 0


def table(runs: list[dict[str, Any]]) -> str:
    """A line a pair and variant: accuracy of each seed, and what became of the spelling."""
    made = markdown_table(
        "pair", "compared", "loss", "accuracy, mean", "of each seed", "own spelling", "tokens"
    )
    for name in dict.fromkeys(run["pair"] for run in runs):
        own = [run for run in runs if run["pair"] == name]
        seeds = list(dict.fromkeys(run["seed"] for run in own))
        first = [next(run["before"] for run in own if run["seed"] == seed) for seed in seeds]
        made.add_row(name, "-", "untrained", *_cells(first))
        for variant in VARIANTS:
            alignment, projection, estimator = variant
            loss = projection if estimator == "full" else estimator
            rows = [run["after"] for run in own if tuple(run["variant"]) == variant]
            if rows:
                made.add_row(name, alignment, loss, *_cells(rows))
    return as_markdown(made)


def _cells(rows: list[dict[str, Any]]) -> list[str]:
    scores = [row["score"] for row in rows]
    spelling = statistics.mean(row["coverage"]["own_spelling"] for row in rows)
    length = statistics.mean(row["mean_response_tokens"] for row in rows)
    return [
        f"{statistics.mean(scores):.3f}",
        ", ".join(f"{score:.2f}" for score in scores),
        f"{spelling:.1%}",
        f"{length:.0f}",
    ]


if __name__ == "__main__":
    sys.exit(main())
