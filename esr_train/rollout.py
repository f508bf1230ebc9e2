"""Student generation: at most N response tokens a prompt, and which of them carry loss."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import GenerationConfig


@dataclass(frozen=True)
class Sampling:
    """How the student writes. suppress_from: ids from here on are outside the common vocabulary."""

    temperature: float
    top_p: float
    top_k: int
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    suppress_from: int


class Engine(Protocol):
    """What writes rollouts. `HFEngine` is one; a faster one has the same method."""

    def generate(self, prompt_ids: Tensor, prompt_mask: Tensor, *, max_new_tokens: int) -> Tensor:
        """Responses [B, R] int64 to left-padded prompts [B, P]; anything may follow a row's EOS."""


@dataclass(frozen=True)
class Rollout:
    """A batch of truncated rollouts, padded: prompts on the left, responses on the right.

    input_ids [B, T] int64, attention_mask [B, T] bool (True on real tokens, T = P + R).
    response_mask [B, R] bool: tokens that carry loss, the EOS included, nothing after it.
    """

    input_ids: Tensor
    attention_mask: Tensor
    response_mask: Tensor

    @property
    def responses(self) -> Tensor:
        """Response tokens [B, R]; what follows an EOS is not part of the answer."""
        return self.input_ids[:, -self.response_mask.shape[1] :]

    @property
    def position_ids(self) -> Tensor:
        """[B, T], counted from each row's first real token."""
        return (self.attention_mask.cumsum(dim=1) - 1).clamp(min=0)

    @property
    def response_positions(self) -> Tensor:
        """[n]: 0 for each response's first token, in the order of `loss_rows`."""
        return self.response_mask.nonzero()[:, 1]

    def loss_rows(self, hidden: Tensor) -> Tensor:
        """The hidden states [n, D], of [B, T, D], that predict a response token."""
        num_positions = self.response_mask.shape[1]
        return hidden[:, -num_positions - 1 : -1][self.response_mask]


def make_rollout(
    prompt_ids: Tensor, prompt_mask: Tensor, responses: Tensor, eos_token_ids: tuple[int, ...]
) -> Rollout:
    """Join left-padded prompts [B, P] and responses [B, R]; what follows the first EOS is dropped.

    The EOS is found by its place, not by padding, so a pad token that equals EOS does no harm.
    """
    is_eos = torch.isin(responses, torch.tensor(eos_token_ids, device=responses.device))
    eos_before = is_eos.cumsum(dim=1) - is_eos.long()
    response_mask = eos_before == 0
    return Rollout(
        input_ids=torch.cat([prompt_ids, responses], dim=1),
        attention_mask=torch.cat([prompt_mask, response_mask], dim=1),
        response_mask=response_mask,
    )


class HFEngine:
    """`model.generate` of Transformers."""

    def __init__(self, model: Any, sampling: Sampling) -> None:
        """model: the Transformers model itself, with any adapters inside it."""
        self.model = model
        vocab_size = model.config.get_text_config().vocab_size
        words: dict[str, Any] = {"do_sample": sampling.temperature > 0}
        if sampling.temperature > 0:
            words.update(
                temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k
            )
        self.generation_config = GenerationConfig(
            eos_token_id=list(sampling.eos_token_ids),
            pad_token_id=sampling.pad_token_id,
            suppress_tokens=list(range(sampling.suppress_from, vocab_size)) or None,
            **words,
        )

    @torch.no_grad()
    def generate(self, prompt_ids: Tensor, prompt_mask: Tensor, *, max_new_tokens: int) -> Tensor:
        # generate() fills what we leave unset from the model's own generation config; a repetition
        # penalty or min_p from there would make the rollout another distribution than the loss's.
        generation_config = copy.copy(self.generation_config)
        generation_config.max_new_tokens = max_new_tokens
        own, was_training = self.model.generation_config, self.model.training
        self.model.generation_config = GenerationConfig()
        self.model.eval()
        try:
            sequences = self.model.generate(
                input_ids=prompt_ids,
                attention_mask=prompt_mask.long(),
                generation_config=generation_config,
            )
        finally:
            self.model.generation_config = own
            self.model.train(was_training)
        return sequences[:, prompt_ids.shape[1] :]
