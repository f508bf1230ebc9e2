"""Where student and teacher stand at the same place of one text, found by its bytes.

A response is the student's tokens; its text, written anew by the teacher's tokenizer, is the
teacher's. Both sides' token boundaries are put on one ruler, a mark for each byte: in front of the
text one for a dummy space that a tokenizer may begin with, behind it one for EOS. Boundaries on the
same mark agree. Boundaries inside text that one side does not keep have no mark, and nothing else
moves: text that changes on the way loses its own positions only.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from esr_train.align.byte_tokenizer import ByteTokenizer
from esr_train.align.spelling import LOST, Spelled, readable
from esr_train.align.vocab_map import project_vocabulary
from esr_train.errors import UserError

# In letters. What is longer, or has no spaces as Chinese, is cut there.
LONGEST_WORD = 32


@dataclass(frozen=True)
class Alignment:
    """The teacher's tokens of a batch of responses, and where the two sides agree.

    teacher_response_ids: [B, R] int64. A row is closed by EOS, whatever the student's ended with,
    and filled up with it, so `rollout_batch(prompts, mask, teacher_response_ids,
    eos_token_ids=[that EOS])` keeps of it what counts.
    student_rows, teacher_rows: [m] int64, the start-aligned positions: both tokens begin at the
    same byte. Indices into the `targets` of the student's `RolloutBatch`, and of the teacher's.
    student_stops, teacher_stops: [m] int64. student_rows[i] .. student_stops[i] is the shortest run
    of tokens from there that spells the same bytes as teacher_rows[i] .. teacher_stops[i]; -1 where
    there is none, because the text is cut or changed.
    settled: [m] bool: that run is there, and ends before the last word of a response that was cut:
    what is left of a word, the teacher spells otherwise than the whole.
    num_student_tokens: response tokens in all, aligned or not.
    """

    teacher_response_ids: Tensor
    student_rows: Tensor
    teacher_rows: Tensor
    student_stops: Tensor
    teacher_stops: Tensor
    settled: Tensor
    num_student_tokens: int

    def cut(self, num_tokens: Tensor) -> Alignment:
        """With at most num_tokens [B] teacher tokens a row, EOS for the last; others are lost."""
        ids = self.teacher_response_ids
        # A row's length is up to its EOS, which closes the longest row and fills up the others.
        eos = ids[:, -1:]
        lengths = (ids == eos).int().argmax(dim=1) + 1
        if (lengths <= num_tokens).all():
            return self
        sequences = torch.repeat_interleave(torch.arange(len(ids)), lengths)[self.teacher_rows]
        kept_lengths = torch.minimum(lengths, num_tokens)
        first = (lengths.cumsum(0) - lengths)[sequences]
        new_first = (kept_lengths.cumsum(0) - kept_lengths)[sequences]
        stop = torch.where(lengths > num_tokens, num_tokens - 1, lengths)[sequences]
        kept = self.teacher_rows - first < stop
        whole = (self.teacher_stops >= 0) & (self.teacher_stops - first <= stop)
        moved = new_first - first
        closed = torch.arange(ids.shape[1]) >= (kept_lengths - 1)[:, None]
        cut = replace(
            self,
            teacher_response_ids=ids.where(~closed, eos)[:, : kept_lengths.max()],
            teacher_rows=self.teacher_rows + moved,
            student_stops=self.student_stops.where(whole, LOST),
            teacher_stops=(self.teacher_stops + moved).where(whole, LOST),
            settled=self.settled & whole,
        )
        return cut.select(kept)

    def select(self, kept: Tensor) -> Alignment:
        """The aligned positions where `kept` [m] bool holds."""
        return self._each(lambda rows: rows[kept])

    def to(self, device: torch.device) -> Alignment:
        """With the positions on another device; the teacher's ids stay."""
        return self._each(lambda rows: rows.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Alignment:
        return replace(
            self,
            student_rows=change(self.student_rows),
            teacher_rows=change(self.teacher_rows),
            student_stops=change(self.student_stops),
            teacher_stops=change(self.teacher_stops),
            settled=change(self.settled),
        )

    @property
    def span_aligned(self) -> Tensor:
        """[m] bool: the two tokens also end at the same byte."""
        student = self.student_stops - self.student_rows == 1
        return student & (self.teacher_stops - self.teacher_rows == 1)

    @property
    def start_coverage(self) -> float:
        """Share of the response tokens that are start-aligned; 0 of none."""
        return len(self.student_rows) / max(self.num_student_tokens, 1)

    @property
    def span_coverage(self) -> float:
        return int(self.span_aligned.sum()) / max(self.num_student_tokens, 1)


class Aligner:
    """Aligns what a student writes with how its teacher would have written it."""

    def __init__(
        self,
        student_tokenizer: Any,
        teacher_tokenizer: Any,
        *,
        student_eos_token_ids: Sequence[int],
        teacher_eos_token_ids: Sequence[int],
        starts_text: bool = True,
    ) -> None:
        """Read both tokenizers. Raises UserError where their bytes or EOS are not known.

        eos_token_ids: what ends a response, at least one id a side. Any of one side stands for any
        of the other; the teacher's first one is what is written.
        starts_text: a response begins a text of its own, as a chat's turn does: a tokenizer with a
        dummy prefix has it in front of the response. False: it goes on with the prompt's text.
        """
        for role, ids in (("student", student_eos_token_ids), ("teacher", teacher_eos_token_ids)):
            if not ids:
                raise UserError(f"the {role} has no EOS id; name those that end its responses")
        self.student = ByteTokenizer(student_tokenizer, "student", student_eos_token_ids)
        self.teacher = ByteTokenizer(teacher_tokenizer, "teacher", teacher_eos_token_ids)
        if self.teacher.writes(teacher_eos_token_ids[0]):
            name = teacher_tokenizer.convert_ids_to_tokens(teacher_eos_token_ids[0])
            raise UserError(
                f"the teacher's EOS {name!r} is ordinary text, which would end its responses in "
                "the middle: name its special token first with --teacher_eos_token_ids"
            )
        self.student_eos_token_ids = tuple(student_eos_token_ids)
        self.teacher_eos_token_ids = tuple(teacher_eos_token_ids)
        self.starts_text = starts_text

    def own(self) -> Aligner:
        """The student's tokenizer against itself: how much of a response is spelled as it would."""
        own = copy.copy(self)
        own.teacher, own.teacher_eos_token_ids = self.student, self.student_eos_token_ids
        return own

    def align(self, response_ids: Sequence[Sequence[int]]) -> Alignment:
        """Align responses, token ids up to and with EOS, or cut before one.

        A cut response is read up to its last whole character. No loop over tokens.
        """
        student = Spelled(self.student, response_ids)
        texts: list[str] = []
        text_marks = []  # of each text's first byte
        changes = []
        stumps = []
        size = 0
        for row, response in enumerate(response_ids):
            raw = student.raw(row)
            ended = len(response) > 0 and response[-1] in self.student_eos_token_ids
            text, marks, replaced = readable(raw, cut=not ended)
            dummy = self.starts_text and self.student.drops_first_space and raw.startswith(b" ")
            first_mark = size if dummy else size + 1
            student.place(row, first_mark, marks)
            changes += [(first_mark + first, first_mark + stop) for first, stop in replaced]
            texts.append(text[1:] if dummy else text)
            text_marks.append(size + 1)
            size += len(texts[-1].encode()) + 3
            if ended:
                student.close(row, size - 2)
            else:
                stumps.append((size - 2 - _last_word(texts[-1]), size))
        changed, in_stump = (np.zeros(size, dtype=bool) for _ in range(2))
        for mask, stretches in ((changed, changes), (in_stump, stumps)):
            for first, stop in stretches:
                mask[first:stop] = True

        eos = self.teacher_eos_token_ids[0]
        encoded = self.teacher.encode(texts, self.starts_text)
        teacher = Spelled(self.teacher, [[*ids, eos] for ids in encoded])
        for row, (text, mark) in enumerate(zip(texts, text_marks, strict=True)):
            raw, expected = teacher.raw(row), text.encode()
            if raw == expected:
                teacher.place(row, mark)
            elif raw == b" " + expected:
                teacher.place(row, mark - 1)
            else:
                offsets = self.teacher.offsets(text, self.starts_text)
                prefixed = self.teacher.adds_space(text, self.starts_text)
                teacher.place_by_claims(row, mark, text, offsets, prefixed, changed)
            teacher.close(row, mark + len(expected))

        # The walk: a slot for each mark, written from the teacher's side, read from the student's.
        rows_at, stops_at = (np.full(size, LOST, dtype=np.int64) for _ in range(2))
        known = np.flatnonzero(teacher.starts >= 0)
        rows_at[teacher.starts[known]] = known
        known = np.flatnonzero(teacher.ends >= 0)
        stops_at[teacher.ends[known]] = known + 1

        known = np.flatnonzero(student.starts >= 0)
        student_rows = known[rows_at[student.starts[known]] >= 0]
        teacher_rows = rows_at[student.starts[student_rows]]
        student_stops, teacher_stops = _stops(student, student_rows, stops_at, changed)
        settled = student_stops >= 0
        settled[settled] = ~in_stump[student.ends[student_stops[settled] - 1]]
        return Alignment(
            teacher_response_ids=torch.from_numpy(teacher.padded(eos)),
            student_rows=torch.from_numpy(student_rows),
            teacher_rows=torch.from_numpy(teacher_rows),
            student_stops=torch.from_numpy(student_stops),
            teacher_stops=torch.from_numpy(teacher_stops),
            settled=torch.from_numpy(settled),
            num_student_tokens=len(student.ids),
        )

    def vocab_maps(
        self, projection: str, *, student_rows: int, teacher_rows: int
    ) -> tuple[Tensor, Tensor | None]:
        """`vocab_map` [teacher_rows], `student_map` [student_rows] of `linear_reverse_kl`, int64.

        The student id that each id counts for, -1 for none; None: each student id for itself.

        projection: "merge": ids whose texts begin alike count for one (" times", and " tim" of a
        teacher who writes " tim|es"). "project": a teacher's id counts for the first token that the
        student writes its bytes with. "exact": for the id of the same bytes. EOS counts for EOS.
        student_rows, teacher_rows: of the LM heads. Cached on disk by the tokenizers' contents.
        Raises UserError if no text is shared, ValueError if an EOS id is past a head.
        """
        of_teacher, of_student = project_vocabulary(self.student, self.teacher, projection)
        eos = self.student_eos_token_ids[0]
        vocab_map = _fitted(of_teacher, teacher_rows, student_rows)
        if not (vocab_map >= 0).any():
            raise UserError(
                "student and teacher share no token, so nothing can be distilled between them: "
                "choose another pair"
            )
        # One student EOS takes the mass of all.
        for ids, num_rows, role in (
            (self.teacher_eos_token_ids, teacher_rows, "teacher"),
            (self.student_eos_token_ids, student_rows, "student"),
        ):
            if max(ids) >= num_rows:
                raise ValueError(
                    f"{role}_rows: expected more than {max(ids)}, an EOS id of the {role}, "
                    f"got {num_rows}"
                )
        vocab_map[list(self.teacher_eos_token_ids)] = eos
        if of_student is None:
            return vocab_map, None
        student_map = _fitted(of_student, student_rows, student_rows)
        student_map[list(self.student_eos_token_ids)] = eos
        return vocab_map, student_map


def _fitted(ids: np.ndarray, num_rows: int, limit: int) -> Tensor:
    """[num_rows]: `ids`, and -1 past them; -1 too for those from `limit` on."""
    found = torch.full((num_rows,), -1, dtype=torch.int64)
    count = min(len(ids), num_rows)
    found[:count] = torch.from_numpy(ids[:count])
    found[found >= limit] = -1
    return found


def _last_word(text: str) -> int:
    """Bytes of the last word, without the space before it; of a text without spaces, some."""
    last = text[-LONGEST_WORD:]
    return len(last[max(map(last.rfind, " \n\t")) + 1 :].encode())


def _stops(
    student: Spelled, student_rows: np.ndarray, stops_at: np.ndarray, changed: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """For each aligned token the stops, of both sides, of the shortest runs that spell the same."""
    known = np.flatnonzero(student.ends >= 0)
    common = known[stops_at[student.ends[known]] >= 0]
    marks = student.ends[common]
    begins = student.starts[student_rows]
    nearest = np.searchsorted(marks, begins, side="right")
    found = np.flatnonzero(nearest < len(marks))
    nearest = nearest[found]
    # In the same response, no changed byte on the way and no token without text.
    num_changed = np.append(0, np.cumsum(changed))
    num_empty = np.append(0, np.cumsum(student.empty))
    last, first = common[nearest], student_rows[found]
    whole = (
        (student.sequence_ids[last] == student.sequence_ids[first])
        & (num_changed[marks[nearest]] == num_changed[begins[found]])
        & (num_empty[last] == num_empty[first])
    )
    student_stops, teacher_stops = (np.full(len(student_rows), LOST) for _ in range(2))
    student_stops[found[whole]] = last[whole] + 1
    teacher_stops[found[whole]] = stops_at[marks[nearest[whole]]]
    return student_stops, teacher_stops
