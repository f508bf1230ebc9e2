"""Tiny models of the architectures that ESR is for, with windows and softcaps that matter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tiny_models import SHAPE
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCAB = 300
_BASE = {**SHAPE, "vocab_size": VOCAB, "hidden_size": 32}
_GEMMA = {
    **_BASE,
    "head_dim": 8,
    "query_pre_attn_scalar": 3,
    "sliding_window": 4,
    "tie_word_embeddings": False,  # tied random weights repeat the last token for ever
}

ARCHITECTURES: dict[str, Callable[[], Any]] = {
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_BASE)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_BASE, head_dim=16)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_BASE)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**_BASE, sliding_window=4)),
    # One layer of a window and one without; softcaps of scores and logits.
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**_GEMMA, attn_logit_softcapping=2.0, final_logit_softcapping=5.0)
    ),
    # Every sixth layer is without a window.
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**{**_GEMMA, "num_hidden_layers": 6})),
}


def make_model(name: str) -> Any:
    """Weights large enough that what a token sees matters, and the next token is no toss-up."""
    torch.manual_seed(0)
    model = ARCHITECTURES[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    return model
