"""`python -m esr_train align`: how two tokenizers cut one text, and where they agree."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from esr_train.align.aligner import Aligner
from esr_train.align.vocab_map import PROJECTIONS, project_vocabulary
from esr_train.errors import UserError, loading_error

SAME, OTHER_PIECES, CHANGED = "=", ">", "x"
WIDTH = 96
MOST_BLOCKING = 10


@dataclass(frozen=True)
class Run:
    """Tokens of both sides from one common start to the next.

    kind: SAME, one token each with the same bytes; OTHER_PIECES, the same bytes; or CHANGED.
    """

    kind: str
    student: tuple[str, ...]
    teacher: tuple[str, ...]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m esr_train align",
        description="Show how two tokenizers cut a text, where they agree and what blocks it.",
    )
    parser.add_argument("--student", required=True, help="model folder or name on the Hub")
    parser.add_argument("--teacher", required=True, help="model folder or name on the Hub")
    parser.add_argument("--text", required=True, type=Path, help="file with a response, UTF-8")
    parser.add_argument("--debug", action="store_true", help="show where an error came from")
    return parser


def show(words: list[str]) -> None:
    """Print the alignment that the command line asks for."""
    options = make_parser().parse_args(words)
    try:
        text = options.text.read_bytes().decode("utf-8")
    except OSError as error:
        raise UserError(f"text {options.text}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"text {options.text}: not UTF-8 text ({error.reason}); re-encode the file"
        ) from error
    student, teacher = _load("student", options.student), _load("teacher", options.teacher)
    aligner = Aligner(
        student,
        teacher,
        student_eos_token_ids=[student.eos_token_id],
        teacher_eos_token_ids=[teacher.eos_token_id],
    )
    print("\n".join(report(aligner, text)))


def _load(role: str, name: str) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # of many types
        raise loading_error(role, name, "tokenizer", error) from error
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"{role} {name}: its tokenizer has no eos_token; name one in tokenizer_config.json"
        )
    return tokenizer


def report(aligner: Aligner, text: str) -> list[str]:
    """Lines: coverage, both segmentations side by side, and what keeps them apart."""
    ids = aligner.student.encode([text], aligner.starts_text)[0]
    alignment = aligner.align([ids])
    num_teacher = alignment.teacher_response_ids.shape[1] - 1
    runs = find_runs(aligner, ids)
    starts, spans = len(alignment.student_rows), int(alignment.span_aligned.sum())
    lines = [
        f"{len(text.encode())} bytes, {_count(len(ids), 'student token')}, "
        f"{_count(num_teacher, 'teacher token')}",
        f"start-aligned: {_share(starts, len(ids))} student tokens",
        f"span-aligned:  {_share(spans, len(ids))} student tokens",
    ]
    pieces = [sum(map(bool, side.token_bytes)) for side in (aligner.student, aligner.teacher)]
    for projection in PROJECTIONS:
        of_teacher, of_student = project_vocabulary(aligner.student, aligner.teacher, projection)
        reached = of_teacher >= 0
        if of_student is None:
            counted = len(np.unique(of_teacher[reached]))
        else:
            counted = int(np.isin(of_student, of_teacher[reached]).sum())
            reached &= np.isin(of_teacher, of_student)
        name = f"{projection}:".ljust(len("start-aligned:"))
        lines.append(
            f"{name} {_share(counted, pieces[0])} student ids and "
            f"{_share(int(reached.sum()), pieces[1])} teacher ids count"
        )
    lines += [
        "",
        f"{SAME} the same token   {OTHER_PIECES} the same text in other pieces, student <> teacher"
        f"   {CHANGED} text that changed",
        *_layout(runs),
    ]
    blocking = Counter(run for run in runs if run.kind != SAME)
    if blocking:
        lines += ["", f"what blocks it most ({_count(blocking.total(), 'place')} in all):"]
        lines += [
            f"{count:5} x  {_both(run)}" for run, count in blocking.most_common(MOST_BLOCKING)
        ]
    return lines


def find_runs(aligner: Aligner, ids: Sequence[int]) -> list[Run]:
    """One response, cut where both sides have a token that starts there; no run but the first may
    lack such a start."""
    alignment = aligner.align([ids])
    # The last id closes the row; the text's own end is a start of it.
    teacher_ids = alignment.teacher_response_ids[0].tolist()[:-1]
    students = [0, *alignment.student_rows.tolist(), len(ids)]
    teachers = [0, *alignment.teacher_rows.tolist(), len(teacher_ids)]
    stops = [-1, *alignment.student_stops.tolist()]
    spans = [False, *alignment.span_aligned.tolist()]
    runs = []
    for index, same in enumerate(spans):
        student = ids[students[index] : students[index + 1]]
        teacher = teacher_ids[teachers[index] : teachers[index + 1]]
        if not student and not teacher:
            continue
        kind = SAME if same else OTHER_PIECES if stops[index] >= 0 else CHANGED
        runs.append(
            Run(
                kind,
                tuple(visible(aligner.student.token_bytes[id_]) for id_ in student),
                tuple(visible(aligner.teacher.token_bytes[id_]) for id_ in teacher),
            )
        )
    return runs


def visible(piece: bytes) -> str:
    """A token on one line: a dot for a space, escapes for what has no shape."""
    if not piece:
        return "<special>"
    text = piece.decode(errors="backslashreplace")
    shown = (letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
    return "".join(shown).replace(" ", "\u00b7")


def _layout(runs: list[Run]) -> list[str]:
    lines: list[str] = []
    for run in runs:
        if run.kind != SAME:
            lines.append(f"{run.kind} {_both(run)}")
        elif lines and lines[-1][0] == SAME and len(lines[-1]) + len(run.student[0]) < WIDTH:
            lines[-1] += f"|{run.student[0]}"
        else:
            lines.append(f"{SAME} {run.student[0]}")
    return lines


def _both(run: Run) -> str:
    return f"{'|'.join(run.student) or 'nothing'}  <>  {'|'.join(run.teacher) or 'nothing'}"


def _share(count: int, total: int) -> str:
    return f"{count} of {total} ({100 * count / max(total, 1):.1f} %)"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
