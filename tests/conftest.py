"""Runs before any test module: the Triton interpreter where there is no GPU, and fixed seeds."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Read when @triton.jit decorates, so before anything imports a kernel.
    os.environ["TRITON_INTERPRET"] = "1"

# The tensors are tiny: a second thread only waits, and burns a core that another process may need.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of the commands that tests start


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
