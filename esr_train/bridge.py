"""A rollout as each model reads it, and which of its rows are compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from esr_kernels import RolloutBatch, TokenStats, rollout_batch
from esr_train.align.aligner import Aligner, Alignment
from esr_train.align.vocabulary import Vocabulary
from esr_train.config import TrainConfig
from esr_train.data import Prompts, pad_left
from esr_train.errors import UserError

# A run that compares less than this share of its tokens, for so many steps, is stopped.
LEAST_COVERAGE = 0.2
LOW_STEPS = 10


@dataclass(frozen=True)
class Rollout:
    """What the student wrote, as it and as the teacher reads it.

    student, teacher: one object where they share a tokenizer.
    aligned: the rows of their `targets` that are compared, on their device; None: all.
    coverage: shares of the response tokens, by name; None of one tokenizer.
    """

    student: RolloutBatch
    teacher: RolloutBatch
    aligned: Alignment | None = None
    coverage: dict[str, float] | None = None

    @property
    def num_compared(self) -> int:
        """Rows that carry loss; what it is divided by."""
        return len(self.student.targets if self.aligned is None else self.aligned.student_rows)

    def spans(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Runs of tokens, of student and teacher, that spell the same text.

        [m] int64 each: student's first and stop, teacher's first and stop; a token each of one
        tokenizer. Of a rollout that was read for the sampled estimator, which compares them.
        """
        if self.aligned is None:
            first = torch.arange(len(self.student.targets), device=self.student.targets.device)
            return first, first + 1, first, first + 1
        own = self.aligned
        return own.student_rows, own.student_stops, own.teacher_rows, own.teacher_stops


class Bridge:
    """From a student to a teacher with another tokenizer.

    vocab_map, student_map: for `linear_reverse_kl`.
    """

    def __init__(
        self,
        config: TrainConfig,
        vocabulary: Vocabulary,
        prompts: Prompts,
        device: torch.device,
    ) -> None:
        """Raises UserError where the tokenizers cannot be aligned."""
        assert vocabulary.teacher is not None
        self.teacher = vocabulary.teacher
        self.alignment = config.alignment
        self.teacher_prompts = prompts.teacher_ids
        sides = (vocabulary, vocabulary.teacher)
        eos = [turn_end_first(side) if prompts.templated else side.eos_token_ids for side in sides]
        self.eos_token_id = eos[1][0]
        self.aligner = Aligner(
            vocabulary.tokenizer,
            self.teacher.tokenizer,
            student_eos_token_ids=eos[0],
            teacher_eos_token_ids=eos[1],
            starts_text=prompts.templated,
        )
        self._own = self.aligner.own()
        past = self.aligner.teacher.token_bytes[self.teacher.size :]
        if any(past):
            name = next(piece for piece in past if piece)
            raise UserError(
                f"the teacher's tokenizer may write {name.decode(errors='replace')!r}, whose id is "
                f"past the {self.teacher.size} rows of its LM head: take that token out of its "
                "tokenizer.json, or choose another teacher"
            )
        rows = {"student_rows": vocabulary.size, "teacher_rows": self.teacher.size}
        vocab_map, student_map = self.aligner.vocab_maps(config.vocab_projection, **rows)
        self.vocab_map = vocab_map.to(device)
        self.student_map = None if student_map is None else student_map.to(device)

    def read(self, batch: RolloutBatch, estimator: str = "full") -> Rollout:
        """The student's batch as the teacher reads it: its prompts, and its spelling of the text.

        estimator: "sampled" compares runs of tokens, where they are settled; "full" the tokens.
        Response tokens that the teacher's context has no place for are not compared.
        """
        prompts, responses = _split(batch)
        teacher_prompts = [self.teacher_prompts[tuple(prompt)] for prompt in prompts]
        aligned = self.aligner.align(responses)
        spelled = self._own.align(responses).span_coverage
        if self.teacher.context_length is not None:
            lengths = torch.tensor([len(prompt) for prompt in teacher_prompts])
            aligned = aligned.cut(self.teacher.context_length - lengths)
        device = batch.targets.device
        teacher = rollout_batch(
            *pad_left(teacher_prompts, self.teacher.pad_token_id, device),
            aligned.teacher_response_ids.to(device),
            eos_token_ids=[self.eos_token_id],
        )
        coverage = {
            "start_aligned": aligned.start_coverage,
            "span_aligned": aligned.span_coverage,
            "own_spelling": spelled,
        }
        if self.alignment == "span":
            aligned = aligned.select(aligned.span_aligned)
        num_tokens = len(aligned.student_rows)
        if estimator == "sampled":
            aligned = aligned.select(aligned.settled)
            num_tokens = int((aligned.student_stops - aligned.student_rows).sum())
        coverage["compared"] = num_tokens / max(aligned.num_student_tokens, 1)
        return Rollout(batch, teacher, aligned.to(device), coverage)


def make_bridge(
    config: TrainConfig, vocabulary: Vocabulary, prompts: Prompts, device: torch.device
) -> Bridge | None:
    """None where student and teacher share a tokenizer."""
    return Bridge(config, vocabulary, prompts, device) if vocabulary.teacher else None


def turn_end_first(vocabulary: Vocabulary) -> tuple[int, ...]:
    """The EOS ids, the one first that the chat template puts behind an answer.

    A model may have others (Gemma's <eos> beside <end_of_turn>), which its answers never end with.
    """
    tokenizer, ids = vocabulary.tokenizer, vocabulary.eos_token_ids
    answer = "This is the answer"
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception:  # Jinja's and the template's own: it is for prompts alone
        return ids
    behind = tokenizer(text.rpartition(answer)[2], add_special_tokens=False)["input_ids"]
    end = next((id for id in behind if id in ids), ids[0])
    return (end, *(id for id in ids if id != end))


def _split(batch: RolloutBatch) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts and responses, as lists of ids."""
    ids, bounds = batch.input_ids.tolist(), batch.cu_seqlens.tolist()
    prompts, responses = [], []
    for first, stop, length in zip(
        bounds[:-1], bounds[1:], batch.response_lengths.tolist(), strict=True
    ):
        prompts.append(ids[first : stop - length])
        responses.append(ids[stop - length : stop])
    return prompts, responses


class Coverage:
    """How much of what the student writes is compared: shares over several rollouts.

    Of the response tokens: compared, start_aligned, span_aligned, own_spelling (cut as the
    student's own tokenizer would cut the text). Of the probability at the compared ones:
    student_mass, teacher_mass, inside the vocabulary map.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Any] = {}  # numbers, or on the device
        self._num_tokens = self._num_compared = 0

    def add(self, rollout: Rollout, stats: TokenStats | None) -> None:
        """One more rollout. stats: of its loss, None where it has none."""
        if rollout.coverage is None:
            return
        num_tokens = len(rollout.student.targets)
        self._num_tokens += num_tokens
        for name, share in rollout.coverage.items():
            self._add(name, share * num_tokens)
        if stats is not None:
            self._num_compared += rollout.num_compared
            self._add("student_mass", stats.student_covered.sum())
            self._add("teacher_mass", stats.teacher_covered.sum())

    def _add(self, name: str, value: Any) -> None:
        self._sums[name] = self._sums.get(name, 0.0) + value

    def shares(self) -> dict[str, float]:
        return {
            name: float(total) / max(self._num_compared if "mass" in name else self._num_tokens, 1)
            for name, total in self._sums.items()
        }


def coverage_error(records: Sequence[dict[str, Any]]) -> str | None:
    """Why to stop a run whose last steps compared too little. records: its metrics lines."""
    last = [r["coverage"]["compared"] for r in records[-LOW_STEPS:] if "coverage" in r]
    if len(last) < LOW_STEPS or max(last) >= LEAST_COVERAGE:
        return None
    return (
        f"under {LEAST_COVERAGE:.0%} of the response tokens were compared in each of the last "
        f"{LOW_STEPS} steps ({last[-1]:.1%} in the last one): the two tokenizers seldom stand at "
        "the same place. `python -m esr_train align` shows what blocks them; --alignment start "
        "compares more than span: start a new run with it, or with a teacher whose tokenizer is "
        "nearer. The last checkpoint is of this step"
    )
