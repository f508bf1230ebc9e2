"""Measure a student on held-out prompts: avg@k, and reverse KL by response position."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch

from esr_kernels import RolloutBatch, rollout_batch
from esr_train.bridge import Coverage
from esr_train.config import TrainConfig
from esr_train.data import Prompts, pad_left
from esr_train.models import Pair
from esr_train.rollout import Engine


@dataclass(frozen=True)
class Evaluation:
    """avg@k with its 95 % interval (None without a grader), and the KL profile.

    kl_by_position[t]: mean reverse KL, nats a token, of the t-th response token over the
    tokens_by_position[t] responses that reach it; with two tokenizers, and of coverage's masses,
    over the compared tokens alone. coverage: shares by name; None of one tokenizer.
    """

    score: float | None
    score_interval: tuple[float, float] | None
    num_prompts: int
    num_samples: int
    mean_response_tokens: float
    kl_by_position: list[float]
    tokens_by_position: list[int]
    seconds: float
    coverage: dict[str, float] | None = None

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> Evaluation:
        """Of `results.json`, which holds more than the fields."""
        names = {item.name for item in fields(cls)}
        return cls(**{name: value for name, value in saved.items() if name in names})

    def mean_kl(self, start: int, stop: int | None = None) -> float | None:
        """Mean KL a token over positions start .. stop; None where no response reaches."""
        weights = self.tokens_by_position[start:stop]
        total = sum(kl * n for kl, n in zip(self.kl_by_position[start:stop], weights, strict=True))
        return total / sum(weights) if sum(weights) else None


def mean_interval(means: list[float], num_samples: int) -> tuple[float, float]:
    """95 % interval of avg@k from each problem's mean score in [0, 1] over `num_samples` draws.

    Wilson's interval at the number of independent draws that the spread between problems implies,
    at most the real one: right for correlated samples of one problem, and no point at 0 or 1.
    """
    count, mean = len(means), sum(means) / len(means)
    variance = sum((value - mean) ** 2 for value in means) / count
    draws: float = count  # all right or all wrong: one draw a problem, to be safe
    if variance:
        draws = min(count * num_samples, count * mean * (1 - mean) / variance)
    z = 1.959964
    center = (mean + z**2 / (2 * draws)) / (1 + z**2 / draws)
    half = z / (1 + z**2 / draws) * math.sqrt(mean * (1 - mean) / draws + z**2 / (4 * draws**2))
    return max(0.0, center - half), min(1.0, center + half)


@torch.no_grad()
def evaluate(
    pair: Pair,
    engine: Engine,
    prompts: Prompts,
    config: TrainConfig,
    progress: Callable[[int], None] = lambda count: None,
) -> Evaluation:
    """Sample `num_eval_samples` whole responses a held-out prompt; grade them and take their KL.

    The same draws whenever it is called with one seed; the caller's random state is left as it was.
    `progress` is told the size of each finished batch.
    """
    start = time.perf_counter()
    vocabulary = pair.vocabulary
    profile = torch.zeros(2, config.max_completion_length, dtype=torch.float64, device=pair.device)
    right = [0] * len(prompts.eval)
    num_tokens = 0
    coverage = Coverage()
    work = [index for index in range(len(prompts.eval)) for _ in range(config.num_eval_samples)]
    with (
        _eval_mode(pair.student),
        torch.random.fork_rng(devices=[pair.device] if pair.device.type == "cuda" else []),
    ):
        torch.manual_seed(config.seed)
        engine.update_weights()
        for first in range(0, len(work), config.per_device_eval_batch_size):
            batch = work[first : first + config.per_device_eval_batch_size]
            ids, mask = pad_left(
                [prompts.eval[i] for i in batch], vocabulary.pad_token_id, pair.device
            )
            responses = engine.generate(ids, mask, max_new_tokens=config.max_completion_length)
            written = rollout_batch(ids, mask, responses, eos_token_ids=vocabulary.eos_token_ids)
            rollout = pair.read(written)
            kl, stats = pair.reverse_kl(rollout, pair.score(rollout), reduction="none")
            positions = written.response_positions
            if rollout.aligned:
                positions = positions[rollout.aligned.student_rows]
            profile.index_add_(1, positions, torch.stack([kl, torch.ones_like(kl)]).double())
            coverage.add(rollout, stats)
            num_tokens += len(written.targets)
            if prompts.grade:
                for index, text in zip(batch, _texts(written, vocabulary.tokenizer), strict=True):
                    right[index] += prompts.grade(index, text)
            progress(len(batch))
        engine.release()

    reached = int((profile[1] > 0).nonzero().max()) + 1 if profile[1].any() else 0
    kl_sum, tokens = profile[:, :reached]
    means = [count / config.num_eval_samples for count in right]
    return Evaluation(
        score=sum(means) / len(means) if prompts.grade else None,
        score_interval=mean_interval(means, config.num_eval_samples) if prompts.grade else None,
        num_prompts=len(prompts.eval),
        num_samples=config.num_eval_samples,
        mean_response_tokens=num_tokens / len(work),
        kl_by_position=(kl_sum / tokens.clamp(min=1)).tolist(),
        tokens_by_position=tokens.long().tolist(),
        seconds=time.perf_counter() - start,
        coverage=coverage.shares() if pair.bridge else None,
    )


@contextmanager
def _eval_mode(model: torch.nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _texts(rollout: RolloutBatch, tokenizer: Any) -> list[str]:
    """Each response as text, up to its EOS."""
    answers = rollout.targets.split(rollout.response_lengths.tolist())
    return list(tokenizer.batch_decode(answers, skip_special_tokens=True))
