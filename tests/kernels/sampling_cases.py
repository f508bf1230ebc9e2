"""A sampling state and one step, for the tests of `sample_tokens`."""

from __future__ import annotations

from typing import Any

import torch
from kl_cases import DEVICE

from esr_kernels import SamplingState, sample_tokens

PAD = 0


def make_state(
    num_rows: int, num_tokens: int = 4, *, seed: int = 1, pad_token_id: int = PAD
) -> SamplingState:
    return SamplingState.create(
        num_rows, num_tokens, seed=seed, pad_token_id=pad_token_id, device=DEVICE
    )


def ids(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64, device=DEVICE)


def draw(
    logits: torch.Tensor, state: SamplingState, impl: str, eos: tuple[int, ...] = (), **options: Any
) -> torch.Tensor:
    """A copy of the step's tokens, [B]."""
    return sample_tokens(logits, state, eos_token_ids=ids(*eos), impl=impl, **options).clone()
