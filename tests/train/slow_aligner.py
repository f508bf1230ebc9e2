"""Alignment byte by byte, one response at a time: what the fast one must find."""

from __future__ import annotations

import itertools
import unicodedata
from dataclasses import dataclass
from typing import Any

MARKER = "\u2581"


@dataclass
class Slow:
    """pairs: (student token, teacher token) that start together; stops: of some pairs, the two
    ends of the shortest runs that spell the same."""

    text: str
    pairs: set[tuple[int, int]]
    stops: dict[tuple[int, int], tuple[int, int]]


def slow_align(
    aligner: Any, response: list[int], form: str | None, marker: bool, byte_tokens: set[int]
) -> Slow | None:
    """form: the teacher's Unicode normal form. marker: it reads U+2581 as a space. byte_tokens: its
    ids that, one after another, come from letters that it took together.

    None where the text is beyond this one's model of a normalizer.
    """
    ended = bool(response) and response[-1] in aligner.student_eos_token_ids
    pieces = [aligner.student.token_bytes[id_] for id_ in response]
    raw = b"".join(pieces)
    text, places = read(raw, cut=not ended)
    dummy = aligner.starts_text and aligner.student.drops_first_space and raw[:1] == b" "
    if dummy:
        text = text[1:]
    shift = 0 if dummy else 1
    end = 1 + len(text.encode())

    student: dict[int, tuple[int | None, int | None]] = {}
    at = 0
    for index, piece in enumerate(pieces):
        if piece:
            bounds = [places.get(at), places.get(at + len(piece))]
            first, stop = [None if place is None else place + shift for place in bounds]
            student[index] = first, stop
        at += len(piece)
    if ended:
        student[len(response) - 1] = end, end + 1

    ids = aligner.teacher.encode([text], aligner.starts_text)[0]
    teacher_pieces = [aligner.teacher.token_bytes[id_] for id_ in ids]
    teacher = place_teacher(text, teacher_pieces, [id_ in byte_tokens for id_ in ids], form, marker)
    if teacher is None:
        return None
    teacher[len(ids)] = end, end + 1
    teacher_pieces.append(b"\0")
    if ended:
        pieces[-1] = b"\0"

    pairs, stops = set(), {}
    for mark in range(end + 1):
        here = [index for index, (first, _) in student.items() if first == mark]
        there = [index for index, (first, _) in teacher.items() if first == mark]
        if here and there:
            pair = here[0], there[0]
            pairs.add(pair)
            found = shortest_run(pair, student, teacher, pieces, teacher_pieces)
            if found:
                stops[pair] = found
    return Slow(text, pairs, stops)


def read(raw: bytes, cut: bool) -> tuple[str, dict[int, int]]:
    """The text, and the place in its bytes of each byte boundary of `raw` that it keeps."""
    text, places, at, size = "", {0: 0}, 0, 0
    while at < len(raw):
        width = letter_width(raw, at)
        if width:
            for offset in range(width + 1):
                places[at + offset] = size + offset
            text += raw[at : at + width].decode()
            at, size = at + width, size + width
            continue
        stop = at
        while stop < len(raw) and not letter_width(raw, stop):
            stop += 1
        tail = unfinished(raw) if cut and stop == len(raw) else len(raw)
        replaced = raw[at : min(stop, tail)].decode(errors="replace")
        text, size = text + replaced, size + len(replaced.encode())
        places[min(stop, tail)] = size
        at = stop
    return text, places


def letter_width(raw: bytes, at: int) -> int:
    for width in range(1, 5):
        try:
            if len(raw[at : at + width].decode()) == 1 and at + width <= len(raw):
                return width
        except UnicodeDecodeError:
            pass
    return 0


def unfinished(raw: bytes) -> int:
    """Where a character begins that the end cuts off; the length if there is none."""
    for at in range(max(0, len(raw) - 3), len(raw)):
        for count in (1, 2, 3):
            for rest in itertools.product((0x80, 0x90, 0xBF), repeat=count):
                if letter_width(raw[at:] + bytes(rest), 0) == len(raw) - at + count:
                    return at
    return len(raw)


def place_teacher(
    text: str, pieces: list[bytes], is_byte: list[bool], form: str | None, marker: bool
) -> dict[int, tuple[int | None, int | None]] | None:
    """Marks of the teacher's tokens: the text's first byte is at 1, a dummy prefix at 0."""
    raw = b"".join(pieces)
    parts = [part for chunk in chunks(text, form) for part in changed_parts(chunk, form, marker)]
    written = b"".join(after for _, after in parts)
    if raw == b" " + written:
        parts.insert(0, (b" ", b" "))
        own = source = 0
    elif raw == written:
        own, source = 0, 1
    else:
        return None
    # Places where both sides have the edge of a part; the teacher's tokens between two of them
    # are kept together.
    edges = {own: source}
    kept = {}
    for before, after in parts:
        kept[own] = (before == after, before, source)
        own, source = own + len(after), source + len(before)
        edges[own] = source

    bounds = list(itertools.accumulate(map(len, pieces), initial=0))
    inside_run = {
        bounds[index] for index in range(1, len(pieces)) if is_byte[index - 1] and is_byte[index]
    }
    cuts = sorted(set(bounds) & set(edges) - inside_run)
    marks = {cut: edges[cut] for cut in cuts}
    for first, stop in itertools.pairwise(cuts):
        inside = [kept[byte] for byte in range(first, stop) if byte in kept]
        if all(same for same, _, _ in inside):
            for byte in range(first, stop):
                marks[byte] = edges[first] + byte - first
    return {
        index: (marks.get(first), marks.get(stop))
        for index, (first, stop) in enumerate(itertools.pairwise(bounds))
        if stop > first
    }


def chunks(text: str, form: str | None) -> list[str]:
    """What a normal form changes independently of the rest."""
    found: list[str] = []
    for letter in text:
        if form and found and not independent(found[-1], letter, form):
            found[-1] += letter
        else:
            found.append(letter)
    return found


def independent(before: str, letter: str, form: Any) -> bool:
    def normal(part: str) -> str:
        return unicodedata.normalize(form, part)

    first = unicodedata.normalize("NFKD", letter)[0]
    return not unicodedata.combining(first) and normal(before + letter) == normal(before) + normal(
        letter
    )


def changed_parts(chunk: str, form: Any, marker: bool) -> list[tuple[bytes, bytes]]:
    """(before, after), split off what stays at both ends."""
    after = unicodedata.normalize(form, chunk) if form else chunk
    if marker:
        after = after.replace(MARKER, " ")
    if after == chunk:
        return [(letter.encode(), letter.encode()) for letter in chunk]
    head = 0
    while head < min(len(chunk), len(after)) and chunk[head] == after[head]:
        head += 1
    tail = 0
    while tail < min(len(chunk), len(after)) - head and chunk[-1 - tail] == after[-1 - tail]:
        tail += 1
    middle = chunk[head : len(chunk) - tail], after[head : len(after) - tail]
    same = [(letter.encode(), letter.encode()) for letter in chunk]
    return [*same[:head], (middle[0].encode(), middle[1].encode()), *same[len(chunk) - tail :]]


def shortest_run(
    pair: tuple[int, int],
    student: dict[int, Any],
    teacher: dict[int, Any],
    student_pieces: list[bytes],
    teacher_pieces: list[bytes],
) -> tuple[int, int] | None:
    """The stops of the shortest runs of tokens that end together, if they spell the same."""
    ends = {stop: index + 1 for index, (_, stop) in teacher.items() if index >= pair[1]}
    ends.pop(None, None)
    for index in range(pair[0], len(student_pieces)):
        stop = student.get(index, (None, None))[1]
        if stop in ends:
            runs = student_pieces[pair[0] : index + 1], teacher_pieces[pair[1] : ends[stop]]
            same = b"".join(runs[0]) == b"".join(runs[1]) and all(runs[0])
            return (index + 1, ends[stop]) if same else None
    return None
