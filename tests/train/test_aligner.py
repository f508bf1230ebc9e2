"""Where two tokenizers agree: on random text, random ids and random cuts, against a slow walk."""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from slow_aligner import slow_align
from tokenizer_zoo import EOS, SENTENCES, zoo

from esr_train.align import Aligner

NASTY = [
    "e\u0301",
    "\u00e9",
    "\u1e9b\u0323",
    "\ufb01",
    "\u2460",
    "\u212b",
    "\uac00\u1100\u1161",
    "a\u0323\u0301",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467",
    "\U0001f1e9\U0001f1ea",
    "\u05e9\u05dc\u05d5\u05dd",
    "\u202eabc\u202c",
    "\r\n",
    "\n\n\n",
    "\t",
    "  ",
    "     ",
    " ",
    "\u00a0",
    "\u3000",
    "\u2581",
    "\ufffd",
    "</s>",
    "<s>",
    "<unk>",
    "<think>",
    "<0x0A>",
    "\ufeff",
    "\u200b",
    "\0",
    "\ud7a3",
    "'s",
    "123456",
]
NORMAL_FORMS = {"qwen": "NFC", "unigram": "NFKC", "unknown": "NFKC"}
MARKED = ("gemma", "llama2", "mistral", "unigram", "unknown")
PAIRS = list(
    itertools.permutations(["gpt2", "qwen", "llama3", "gemma", "llama2", "mistral", "unigram"], 2)
)
RANDOM = settings(deadline=None, max_examples=300, suppress_health_check=list(HealthCheck))

texts = st.lists(
    st.one_of(st.sampled_from(NASTY), st.sampled_from(SENTENCES), st.text(max_size=8)), max_size=6
).map("".join)


@cache
def aligner(student: str, teacher: str, starts_text: bool = True) -> Aligner:
    return Aligner(
        zoo()[student],
        zoo()[teacher],
        student_eos_token_ids=[EOS],
        teacher_eos_token_ids=[EOS],
        starts_text=starts_text,
    )


@st.composite
def responses(draw: Any, own: Aligner) -> list[int]:
    """A text's tokens, cut or ended; or any ids at all."""
    size = len(own.student.token_bytes)
    if draw(st.booleans()):
        ids = own.student.encode([draw(texts)], own.starts_text)[0]
        ids = ids[: draw(st.integers(0, len(ids)))]
    else:
        ids = draw(st.lists(st.one_of(st.integers(0, size - 1), st.integers(0, 300)), max_size=20))
    ids = [id_ for id_ in ids if id_ != EOS]
    return [*ids, EOS] if draw(st.booleans()) else ids


@cache
def byte_tokens(name: str) -> set[int]:
    """Of Unigram, which fuses what it does not know before it falls back to bytes."""
    if name != "unigram":
        return set()
    return {id_ for token, id_ in zoo()[name].get_vocab().items() if token.startswith("<0x")}


def found_pairs(alignment: Any, lengths: list[int]) -> list[Any]:
    """Per response: its pairs, and the stops of those that have some."""
    rows = [(set(), {}) for _ in lengths]
    student_first = [0, *itertools.accumulate(lengths)]
    teacher_first = [0]
    for row in alignment.teacher_response_ids.tolist():
        teacher_first.append(teacher_first[-1] + row.index(EOS) + 1)
    for a, b, c, d in zip(
        alignment.student_rows.tolist(),
        alignment.teacher_rows.tolist(),
        alignment.student_stops.tolist(),
        alignment.teacher_stops.tolist(),
        strict=True,
    ):
        row = next(i for i in range(len(lengths)) if a < student_first[i + 1])
        s, t = student_first[row], teacher_first[row]
        pair = a - s, b - t
        assert pair not in rows[row][0]
        rows[row][0].add(pair)
        assert (c == -1) == (d == -1)
        if c != -1:
            rows[row][1][pair] = c - s, d - t
    return rows


@RANDOM
@given(st.data())
def test_the_slow_walk_finds_the_same(data: Any) -> None:
    student, teacher = data.draw(st.sampled_from(PAIRS))
    own = aligner(student, teacher, data.draw(st.booleans()))
    batch = data.draw(st.lists(responses(own), min_size=1, max_size=3))
    alignment = own.align(batch)
    found = found_pairs(alignment, list(map(len, batch)))
    for response, (pairs, stops) in zip(batch, found, strict=True):
        form, marked = NORMAL_FORMS.get(teacher), teacher in MARKED
        slow = slow_align(own, response, form, marked, byte_tokens(teacher))
        if slow is not None:
            assert pairs == slow.pairs
            assert stops == slow.stops
