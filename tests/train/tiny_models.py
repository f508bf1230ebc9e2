"""Tiny models of real architectures and their tokenizer, made from configs with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SHAPE = {
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


def make_tokenizer(text: str = "What is 2 + 3? Write the sum of the two numbers.") -> Any:
    """Byte-level BPE with ChatML special tokens; 0 pads, 2 (<|im_end|>) ends."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator([text] * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def save(path: Path, model: Any, tokenizer: Any) -> Path:
    model.generation_config.eos_token_id = [2, 0]
    model.generation_config.pad_token_id = 0
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def make_student() -> Any:
    """Qwen2 with 300 rows of vocabulary and sampling defaults that must not leak into rollouts."""
    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=300, hidden_size=32, tie_word_embeddings=True, **SHAPE)
    model = Qwen2ForCausalLM(config)
    model.generation_config.update(do_sample=True, top_k=2, repetition_penalty=1.5)
    return model


def make_teacher() -> Any:
    """Qwen3, wider, untied, with a vocabulary padded to 304 rows."""
    torch.manual_seed(1)
    config = Qwen3Config(
        vocab_size=304, hidden_size=40, head_dim=16, tie_word_embeddings=False, **SHAPE
    )
    model = Qwen3ForCausalLM(config)
    # Random initial logits are nearly flat: a teacher with an opinion gives a KL worth testing.
    model.lm_head.weight.data.mul_(20)
    return model
