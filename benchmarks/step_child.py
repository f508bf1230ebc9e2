"""Resident memory of the phases of one step, on a CPU: the case in on stdin, bytes out."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import torch

from benchmarks.step_cases import Case, Step
from benchmarks.step_providers import Models, make_step
from benchmarks.step_run import growth
from esr_train.metrics import release_unused


def main() -> None:
    request = json.load(sys.stdin)
    torch.set_num_threads(request["threads"])
    step = Step(*request["step"])
    case = Case(**request["case"] | {"steps": (step,)})
    with_trl = step.engine == "TRL"
    # What is loaded once, code above all, is no part of a step's memory: a tiny one goes first.
    tiny = replace(case, pair="tiny", prompt_lengths=(3, 4), answer_lengths=(2, 3))
    warm_up = make_step(tiny, step._replace(rollout_tokens=0), Models(tiny, with_trl))
    warm_up()
    warm_up.close()
    del warm_up
    models = Models(case, with_trl)
    release_unused(torch.device(case.device))
    call = make_step(case, step, models)
    call()  # the optimizer's state is there from the second step on
    print(json.dumps(growth(call, call())))
    call.close()


if __name__ == "__main__":
    main()
