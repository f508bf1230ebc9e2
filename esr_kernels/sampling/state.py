"""What a rollout's sampling keeps between its steps, all of it on the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from esr_kernels.checks import error

# Of each 4 * LANES columns, j, j + LANES, j + 2 * LANES and j + 3 * LANES share a Philox call. Part
# of what a seed means: another number gives other tokens.
LANES = 1024
# Logits at or beyond these count as -inf and +inf; their differences are still finite.
NO_MASS = -1e30
INFINITE = 1e30


@dataclass(frozen=True)
class SamplingState:
    """The rows of a rollout of at most R tokens. Every step writes in place, nothing is replaced.

    tokens: [B, R] int64, what each row wrote, `pad_token_id` elsewhere.
    logprobs: [B, R] float32, log-probabilities of the tokens written, 0 elsewhere.
    next_tokens: [B] int64, the last step's token of every row, pad in finished rows.
    lengths: [B] int32, tokens written, the EOS included.
    done: [B] bool, an EOS was written.
    steps: [B] int32, steps seen: the column that the next one writes, and its random counter.
    seed: [1] int64, the random key.
    """

    tokens: Tensor
    logprobs: Tensor
    next_tokens: Tensor
    lengths: Tensor
    done: Tensor
    steps: Tensor
    seed: Tensor
    pad_token_id: int

    @classmethod
    def create(
        cls,
        batch_size: int,
        max_new_tokens: int,
        *,
        seed: int | Tensor,
        pad_token_id: int,
        device: torch.device | str,
    ) -> SamplingState:
        """A state before its first step. `pad_token_id` may be an EOS id.

        Raises:
            ValueError: naming the argument, what was expected and what came.
        """
        for name, value, least in (
            ("batch_size", batch_size, 0),
            ("max_new_tokens", max_new_tokens, 1),
            ("pad_token_id", pad_token_id, 0),
        ):
            if not isinstance(value, int) or value < least:
                raise error(name, f"an int >= {least}", repr(value))
        shape = batch_size, max_new_tokens
        state = cls(
            tokens=torch.empty(shape, dtype=torch.int64, device=device),
            logprobs=torch.empty(shape, dtype=torch.float32, device=device),
            next_tokens=torch.empty(batch_size, dtype=torch.int64, device=device),
            lengths=torch.empty(batch_size, dtype=torch.int32, device=device),
            done=torch.empty(batch_size, dtype=torch.bool, device=device),
            steps=torch.empty(batch_size, dtype=torch.int32, device=device),
            seed=torch.empty(1, dtype=torch.int64, device=device),
            pad_token_id=pad_token_id,
        )
        state.reset(seed)
        return state

    def reset(self, seed: int | Tensor) -> None:
        """Back to before the first step, with another seed: an int of 64 bits, or an int64 tensor.

        In place, so a CUDA graph that captured the state goes on with it; a tensor is not read by
        the host.
        """
        _check_seed(seed)
        if isinstance(seed, Tensor):
            self.seed.copy_(seed.reshape(1))
        else:
            self.seed.fill_(seed)
        self.tokens.fill_(self.pad_token_id)
        self.next_tokens.fill_(self.pad_token_id)
        for zeroed in (self.logprobs, self.lengths, self.done, self.steps):
            zeroed.zero_()


def _check_seed(seed: Any) -> None:
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise error("seed", "one torch.int64", f"{list(seed.shape)} {seed.dtype}")
    elif not isinstance(seed, int) or not -(2**63) <= seed < 2**63:
        raise error("seed", "an int of 64 bits or a tensor of one", repr(seed))
