"""Peak resident memory of one provider on one case, on a CPU: the case in on stdin, bytes out."""

from __future__ import annotations

import json
import sys

import torch

from benchmarks.loss_cases import TRAINING, Case, make_inputs
from benchmarks.loss_providers import PROVIDERS, run
from benchmarks.measuring import peak_bytes


def main() -> None:
    request = json.load(sys.stdin)
    torch.set_num_threads(request["threads"])
    case = Case(**request["case"])
    provider = {provider.name: provider for provider in PROVIDERS}[request["provider"]]
    loss, inputs = provider.build(case), make_inputs(case, seed=0)
    run(loss, inputs, TRAINING)  # what loads or compiles once is no part of a call's memory
    print(peak_bytes(lambda _: run(loss, inputs, TRAINING), torch.device(case.device)))


if __name__ == "__main__":
    main()
