"""`python -m esr_train.demo`: distil the embedded pair with ESR and with full rollouts; compare.

Both runs have the same steps, prompts, seed and evaluation; only `rollout_tokens` differs. Other
options are those of `python -m esr_train`; `--quick` takes a few steps, to see that all works.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path

from esr_train.__main__ import guarded
from esr_train.config import parse
from esr_train.errors import UserError

QUICK = ("--max_steps=3", "--num_eval_prompts=8", "--num_eval_samples=2")


def compare(words: list[str]) -> None:
    """Train twice, print both rows, and leave comparison.png beside the two run folders."""
    if "--help" in words or "-h" in words:
        print(__doc__)
        return
    from esr_train.checkpoint import check_new_run_folder
    from esr_train.demo.report import plot_comparison, print_comparison
    from esr_train.eval.measure import Evaluation
    from esr_train.train import train

    quick = "--quick" in words
    words = ["--demo=default", *(QUICK if quick else ()), *(w for w in words if w != "--quick")]
    config, resume = parse(words)
    if resume:
        raise UserError("the demo compares two new runs: --resume belongs to python -m esr_train")
    if config.dataset_name:
        raise UserError("the demo has its own problems: --dataset_name is for python -m esr_train")
    if not config.rollout_tokens or not config.num_eval_prompts:
        raise UserError(
            "the demo compares the scores of a cutoff and of the full rollout: "
            "rollout_tokens and num_eval_prompts must be above 0"
        )
    folder = Path(config.output_dir or f"runs/demo-{time.strftime('%Y%m%d-%H%M%S')}")
    check_new_run_folder(folder)

    early = replace(config, output_dir=str(folder / "esr"))
    full = replace(config, output_dir=str(folder / "full"), rollout_tokens=0)
    esr = train(early)
    # One student, prompts and seed: its first evaluation serves both runs.
    results = {"esr": esr, "full": train(full, before=Evaluation.from_json(esr["before"]))}
    print_comparison(results, early)
    plot_comparison(folder / "comparison.png", results, early)
    print(f"picture: {folder / 'comparison.png'}")


if __name__ == "__main__":
    sys.exit(guarded(compare, sys.argv[1:]))
