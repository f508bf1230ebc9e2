"""What is measured: pairs of models, prompts, how long the answers are, and whose step it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from esr_train.align import Vocabulary
from esr_train.config import TrainConfig

PAD, EOS = 0, 1  # ids that no prompt holds

_QWEN = {"vocab_size": 151936, "max_position_embeddings": 32768}
_QWEN3 = {**_QWEN, "model_type": "qwen3", "num_key_value_heads": 8, "head_dim": 128}


def _small_pair(
    vocab_size: int, hidden_size: int, num_layers: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The first pair's architectures and proportions: a teacher of 4/3 the student's width."""
    common = {
        "vocab_size": vocab_size,
        "max_position_embeddings": 4096,
        "num_hidden_layers": num_layers,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    }
    teacher_size = hidden_size * 4 // 3
    student = {
        "model_type": "qwen2",
        "hidden_size": hidden_size,
        "num_attention_heads": 6,
        "intermediate_size": hidden_size * 35 // 6,
    }
    teacher = {
        "model_type": "qwen3",
        "hidden_size": teacher_size,
        "num_attention_heads": 8,
        "head_dim": teacher_size // 8,
        "intermediate_size": teacher_size * 3,
    }
    return {**common, **student}, {**common, **teacher}


# Options of the Transformers configurations, student and teacher.
PAIRS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "1.5B<-1.7B": (
        {  # Qwen2.5-Math-1.5B
            **_QWEN,
            "model_type": "qwen2",
            "hidden_size": 1536,
            "num_hidden_layers": 28,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "intermediate_size": 8960,
            "tie_word_embeddings": True,
        },
        {
            **_QWEN3,
            "hidden_size": 2048,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "intermediate_size": 6144,
            "tie_word_embeddings": True,
        },
    ),
    "4B<-14B": (
        {
            **_QWEN3,
            "hidden_size": 2560,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "intermediate_size": 9728,
            "tie_word_embeddings": True,
        },
        {
            **_QWEN3,
            "hidden_size": 5120,
            "num_hidden_layers": 40,
            "num_attention_heads": 40,
            "intermediate_size": 17408,
            "tie_word_embeddings": False,
        },
    ),
    "small": _small_pair(vocab_size=4096, hidden_size=192, num_layers=4),
    "tiny": _small_pair(vocab_size=96, hidden_size=24, num_layers=1),
}


class Step(NamedTuple):
    """Our trainer's step, with one of its engines, or TRL's. rollout_tokens 0: full rollout."""

    engine: str  # "graph", "hf" or "TRL"
    rollout_tokens: int

    @property
    def name(self) -> str:
        length = f"N={self.rollout_tokens}" if self.rollout_tokens else "full"
        return f"{'TRL' if self.engine == 'TRL' else f'ours, {self.engine}'}, {length}"


@dataclass(frozen=True)
class Case:
    """Steps on the same models, prompts and answers.

    prompt_lengths, answer_lengths: tokens of each row of the batch. An answer ends with its EOS at
    its length, or before, without one, where the rollout is cut off. memory: whether it is taken;
    on a CPU each step then runs in a process of its own too.
    """

    name: str
    pair: str
    prompt_lengths: tuple[int, ...]
    answer_lengths: tuple[int, ...]
    steps: tuple[Step, ...]
    dtype: str = "bfloat16"
    device: str = "cuda"
    gradient_checkpointing: bool = False
    memory: bool = True

    @property
    def vocab_size(self) -> int:
        return PAIRS[self.pair][0]["vocab_size"]

    @property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary(None, self.vocab_size, (EOS,), PAD, None)

    def response_lengths(self, step: Step) -> list[int]:
        """What each row of the batch must come to."""
        cutoff = step.rollout_tokens or max(self.answer_lengths)
        return [min(length, cutoff) for length in self.answer_lengths]

    def prompts(self) -> list[list[int]]:
        generator = torch.Generator().manual_seed(0)
        return [
            torch.randint(2, self.vocab_size, (length,), generator=generator).tolist()
            for length in self.prompt_lengths
        ]

    def config(self, step: Step) -> TrainConfig:
        """The paper's settings, but for a temperature of 1: TRL has one for sampling and loss."""
        return TrainConfig(
            model_name_or_path=self.pair,
            teacher_model_name_or_path=self.pair,
            dataset_name="random",
            rollout_tokens=step.rollout_tokens,
            max_completion_length=max(self.answer_lengths),
            temperature=1.0,
            per_device_train_batch_size=len(self.prompt_lengths),
            bf16=self.dtype == "bfloat16",
            gradient_checkpointing=self.gradient_checkpointing,
        )


def ragged(batch_size: int, mean: int) -> tuple[int, ...]:
    """Prompt lengths between 1/2 and 3/2 of `mean`, evenly."""
    generator = torch.Generator().manual_seed(1)
    spread = torch.linspace(0.5, 1.5, batch_size)
    return tuple((mean * spread[torch.randperm(batch_size, generator=generator)]).int().tolist())


def long_tail(batch_size: int, median: int, longest: int) -> tuple[int, ...]:
    """Answer lengths, drawn from a log-normal distribution and cut at `longest`."""
    generator = torch.Generator().manual_seed(9)  # a draw that reaches the cut
    lengths = median * (0.7 * torch.randn(batch_size, generator=generator)).exp()
    return tuple(lengths.int().clamp(1, longest).tolist())


def _each_engine(rollout_tokens: int) -> tuple[Step, ...]:
    return tuple(Step(engine, rollout_tokens) for engine in ("graph", "hf", "TRL"))


_PROMPTS = ragged(16, 200)
_FULL = (1530,) * 16
_TAIL = long_tail(16, median=1150, longest=4096)
_FULL_STEP = (Step("graph", 0),)
_SMALL, _LARGE = "1.5B<-1.7B", "4B<-14B"

# The most telling first: what a time limit cuts off is the end.
CUDA_CASES = (
    Case(f"{_SMALL} 1530 tokens", _SMALL, _PROMPTS, _FULL, _each_engine(100) + _FULL_STEP),
    Case(
        f"{_LARGE} 1530 tokens",
        _LARGE,
        _PROMPTS,
        _FULL,
        _each_engine(100) + _FULL_STEP,
        gradient_checkpointing=True,
    ),
    Case(f"{_SMALL} long tail", _SMALL, _PROMPTS, _TAIL, (Step("graph", 100), *_FULL_STEP)),
    Case(f"{_SMALL} N=50", _SMALL, _PROMPTS, _FULL, _each_engine(50)),
    Case(f"{_SMALL} N=200", _SMALL, _PROMPTS, _FULL, _each_engine(200)),
    Case(
        f"{_SMALL} 1530 tokens by generate",
        _SMALL,
        _PROMPTS,
        _FULL,
        (Step("hf", 0), Step("TRL", 0)),
    ),
    Case(
        f"{_SMALL} long tail by generate", _SMALL, _PROMPTS, _TAIL, (Step("hf", 0), Step("TRL", 0))
    ),
)

# On a CPU all lengths are shorter, in the same proportions: N = 100 becomes 16, a half the batch.
_CPU_PROMPTS = ragged(8, 32)
_CPU_FULL = (15 * 16,) * 8
_CPU_TAIL = long_tail(8, median=184, longest=655)


def _cpu_case(name: str, answers: tuple[int, ...], steps: tuple[Step, ...], memory: bool) -> Case:
    return Case(name, "small", _CPU_PROMPTS, answers, steps, "float32", "cpu", memory=memory)


CPU_CASES = (
    _cpu_case("small 240 tokens", _CPU_FULL, _each_engine(16) + _FULL_STEP, True),
    _cpu_case("small long tail", _CPU_TAIL, (Step("graph", 16), *_FULL_STEP), True),
    _cpu_case("small N=8", _CPU_FULL, _each_engine(8), False),
    _cpu_case("small N=32", _CPU_FULL, _each_engine(32), False),
    _cpu_case("small 240 tokens by generate", _CPU_FULL, (Step("hf", 0), Step("TRL", 0)), False),
)
