"""Where two tokenizers agree: on random text, random ids and random cuts, against a slow walk."""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from slow_aligner import slow_align
from tokenizer_zoo import EOS, SENTENCES, zoo
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from esr_kernels import rollout_batch
from esr_train.align import Aligner
from esr_train.errors import UserError

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
NAMES = ["gpt2", "qwen", "llama3", "gemma", "llama2", "mistral", "unigram", "unknown"]
PAIRS = list(itertools.permutations(NAMES[:-1], 2))
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


def runs_of(alignment: Any) -> list[list[int]]:
    """(student row, teacher row, student stop, teacher stop) of each aligned position."""
    rows = alignment.student_rows, alignment.teacher_rows
    stops = alignment.student_stops, alignment.teacher_stops
    return torch.stack([*rows, *stops], dim=1).tolist()


def found_pairs(alignment: Any, lengths: list[int]) -> list[Any]:
    """Per response: its pairs, and the stops of those that have some."""
    rows = [(set(), {}) for _ in lengths]
    student_first = [0, *itertools.accumulate(lengths)]
    teacher_first = [0]
    for row in alignment.teacher_response_ids.tolist():
        teacher_first.append(teacher_first[-1] + row.index(EOS) + 1)
    for a, b, c, d in runs_of(alignment):
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


def spelled(own: Aligner, batch: list[list[int]]) -> list[tuple[bytes, ...]]:
    """For each aligned position: the text before it and of the runs, the student's and the
    teacher's; one response at a time, a dummy prefix left out."""
    found = []
    for response in batch:
        alignment = own.align([response])
        student = [own.student.token_bytes[id_] for id_ in response]
        ids = alignment.teacher_response_ids[0].tolist()
        teacher = [own.teacher.token_bytes[id_] for id_ in ids]
        for a, b, c, d in runs_of(alignment):
            runs = (student[a:c], teacher[b:d]) if c >= 0 else ([], [])
            found.append(tuple(map(b"".join, (student[:a], teacher[:b], *runs))))
    return found


@RANDOM
@given(st.data())
def test_aligned_tokens_follow_the_same_text_and_runs_spell_it(data: Any) -> None:
    """To the letter, where the teacher keeps its text and the student writes text."""
    student, teacher = data.draw(st.sampled_from(PAIRS))
    own = aligner(student, teacher, starts_text=False)
    text = data.draw(texts.filter(lambda text: "\u2581" not in text))
    ids = own.student.encode([text], False)[0]
    cut = ids[: data.draw(st.integers(0, len(ids)))]
    for before, other, run, other_run in spelled(own, [cut, [*ids, EOS]]):
        assert run == other_run
        if teacher not in NORMAL_FORMS:
            assert before == other


@RANDOM
@given(st.data())
def test_what_a_tokenizer_does_not_know_loses_its_own_place(data: Any) -> None:
    """No byte fallback: unknown letters become a token that stands for nothing."""
    own = aligner("gpt2", "unknown")
    for _, _, run, other_run in spelled(own, [data.draw(responses(own))]):
        assert run == other_run


@RANDOM
@given(st.sampled_from(NAMES), texts)
def test_token_bytes_are_what_decoding_says(name: str, text: str) -> None:
    own = aligner(name, "gpt2").student
    ids = own.encode([text], True)[0]
    spelling = b"".join(own.token_bytes[id_] for id_ in ids)
    decoded = zoo()[name].decode(ids, skip_special_tokens=True).encode()
    assert decoded in (spelling, spelling.removeprefix(b" ") if own.drops_first_space else b"\xff")


def test_bytes_of_single_tokens() -> None:
    gemma, gpt2 = aligner("gemma", "gpt2").student, aligner("gemma", "gpt2").teacher
    vocab, size = zoo()["gemma"].get_vocab(), len(zoo()["gemma"])
    expected = {"<0xE2>": b"\xe2", "\u2581the": b" the", "\n\n": b"\n\n", "<think>": b"<think>"}
    for token, piece in {**expected, "</s>": b"", "<unk>": b""}.items():
        assert gemma.token_bytes[vocab[token]] == piece
    spelling, widths = gemma.spell(np.array([vocab["\u2581the"], size + 5, EOS, vocab["<0xE2>"]]))
    assert (spelling.tobytes(), widths.tolist()) == (b" the\xe2", [4, 0, 0, 1])
    vocab = zoo()["gpt2"].get_vocab()
    assert gpt2.token_bytes[vocab["\u0120the"]] == b" the"
    assert gpt2.token_bytes[vocab["\u00e2"]] == b"\xe2"
    assert sorted(piece for piece in gpt2.token_bytes if len(piece) == 1) == [
        bytes([byte]) for byte in range(256)
    ]


@pytest.mark.parametrize("teacher", NAMES)
def test_special_tokens_in_a_text_are_text(teacher: str) -> None:
    own = aligner("gpt2", teacher)
    ids = own.student.encode(["a </s> b<s><unk> c"], True)[0]
    *written, last = own.align([ids]).teacher_response_ids[0].tolist()
    assert last == EOS
    unknown = {0} if teacher == "unknown" else set()
    assert not set(written) & own.teacher.no_text - unknown


def pairs_of(own: Aligner, response: list[int]) -> list[tuple[bytes, bytes, bool]]:
    """The aligned tokens' bytes, and whether they end together; EOS is b""."""
    alignment = own.align([response])
    ids = alignment.teacher_response_ids[0].tolist()
    return [
        (own.student.token_bytes[response[a]], own.teacher.token_bytes[ids[b]], same)
        for a, b, same in zip(
            alignment.student_rows.tolist(),
            alignment.teacher_rows.tolist(),
            alignment.span_aligned.tolist(),
            strict=True,
        )
    ]


def test_a_dummy_prefix_costs_its_own_position_on_one_side_and_none_on_both() -> None:
    def pairs(student: str, teacher: str, text: str, starts_text: bool = True) -> Any:
        own = aligner(student, teacher, starts_text)
        return pairs_of(own, own.student.encode([text], starts_text)[0])

    word = (b" the", b" the", True)
    assert pairs("llama2", "llama2", "the the") == [word, word]
    # " the" of a dummy prefix is not the other's "the": only the second word is the same.
    assert pairs("llama2", "gemma", "the the") == [word]
    assert pairs("gpt2", "llama2", "the the")[-1] == word
    assert pairs("gpt2", "llama2", "the the")[0][0] != b"the"
    # In the middle of a text nothing is put in front.
    assert pairs("gpt2", "llama2", " the", starts_text=False) == [word]
    assert pairs("llama2", "gpt2", " the", starts_text=False) == [word]
    assert pairs("llama2", "gpt2", "the", starts_text=False)[0][0] != b" the"


def test_eos_aligns_with_eos_and_a_cut_with_none() -> None:
    own = Aligner(
        zoo()["gpt2"], zoo()["qwen"], student_eos_token_ids=[1, EOS], teacher_eos_token_ids=[0, 1]
    )
    ids = own.student.encode(["the"], True)[0]
    alignment = own.align([ids, [*ids, EOS], [*ids, 1], [EOS], []])
    assert alignment.teacher_response_ids[:, -1].tolist() == [0] * 5  # the teacher's first one
    assert alignment.teacher_response_ids[3:].eq(0).all()
    ends = [len(ids) * 2, len(ids) * 3 + 1, len(ids) * 3 + 2]
    assert alignment.student_rows.tolist()[-4:] == [ends[0], *alignment.student_rows.tolist()[-3:]]
    aligned = set(alignment.student_rows[alignment.span_aligned].tolist())
    assert set(ends) <= aligned
    assert alignment.num_student_tokens == 3 * len(ids) + 3


def test_a_special_token_in_a_response_is_passed_over() -> None:
    own = aligner("gpt2", "llama3")
    the, number = (own.student.encode([text], True)[0] for text in (" the", " number"))
    plain = own.align([[*the, *number]])
    alignment = own.align([[*the, 1, *number]])
    assert torch.equal(alignment.teacher_response_ids, plain.teacher_response_ids)
    rows = plain.student_rows
    assert torch.equal(alignment.student_rows, rows + (rows >= len(the)))
    assert alignment.span_aligned.tolist() == plain.span_aligned.tolist()
    # No run goes through it: its own log-probability has no counterpart.
    own = aligner("mistral", "llama3", starts_text=False)
    start, *rest = own.student.encode([" numbers"], False)[0]
    assert own.teacher.encode([" numbers"], False)[0] == own.teacher.first_ids([b" numbers"])
    assert own.align([[start, *rest]]).student_stops[0] == 1 + len(rest)
    assert own.align([[start, 1, *rest]]).student_stops[0] == -1


def test_a_cut_character_is_left_out_and_a_broken_one_replaced() -> None:
    own = aligner("mistral", "gpt2", starts_text=False)
    ids = own.student.encode(["a\U0001f469"], False)[0]
    assert len(ids) == 5  # one and its four bytes
    cut = own.align([ids[:4]])
    assert cut.teacher_response_ids.tolist() == [[*own.teacher.encode(["a"], False)[0], EOS]]
    # What follows the text follows it on both sides, whatever it is.
    assert (cut.student_rows.tolist(), cut.teacher_rows.tolist()) == ([0, 1], [0, 1])
    assert cut.student_stops.tolist() == [1, -1]
    assert (cut.start_coverage, cut.span_coverage) == (2 / 4, 1 / 4)
    broken = own.align([[*ids[:4], ids[0], EOS]])
    text = own.teacher.encode(["a\ufffda"], False)[0]
    assert broken.teacher_response_ids.tolist() == [[*text, EOS]]
    assert broken.student_rows.tolist() == [0, 1, 4, 5]
    assert broken.student_stops.tolist() == [1, -1, 5, 6]


def test_text_that_a_normalizer_changes_loses_its_own_positions() -> None:
    own = aligner("gpt2", "qwen")
    pairs = pairs_of(own, own.student.encode(["the cafe\u0301 the"], True)[0])
    assert (b" the", b" the", True) in pairs
    assert (b"\xcc", b"\xc3", True) not in pairs
    before = own.align([own.student.encode(["the cafe the"], True)[0]])
    assert before.span_aligned[-1]


def test_a_dummy_prefix_survives_a_change_behind_it() -> None:
    own = aligner("llama2", "llama2")
    vocab = zoo()["llama2"].get_vocab()
    marker = [vocab[f"<0x{byte:02X}>"] for byte in "\u2581".encode()]  # read as a space
    ids = own.student.encode(["the"], True)[0]
    assert pairs_of(own, [*ids, *marker, *ids])[0] == (b" the", b" the", True)


def test_the_teachers_batch_is_a_rollout_batch() -> None:
    """Rows of both sides index the targets of `rollout_batch`."""
    own = aligner("llama3", "gemma")
    batch = [own.student.encode([text], True)[0] for text in SENTENCES[:4]]
    batch = [[*batch[0], EOS], batch[1][:9], [], [*batch[3], EOS]]
    alignment = own.align(batch)
    prompts, mask = torch.ones(4, 2, dtype=torch.int64), torch.ones(4, 2, dtype=torch.bool)
    width = max(map(len, batch))
    responses = torch.full((4, width), EOS)
    for row, ids in enumerate(batch):
        responses[row, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
    student = rollout_batch(prompts, mask, responses, eos_token_ids=[EOS])
    # Rows without EOS got one: leave them out of the targets again.
    ended = torch.tensor([True, False, False, True])
    real = (student.targets != EOS) | ended[student.sequence_ids]
    teacher = rollout_batch(prompts, mask, alignment.teacher_response_ids, eos_token_ids=[EOS])
    targets, sequences = student.targets[real], student.sequence_ids[real]
    assert len(targets) == alignment.num_student_tokens
    pairs = alignment.student_rows, alignment.teacher_rows
    assert torch.equal(sequences[pairs[0]], teacher.sequence_ids[pairs[1]])
    assert len(pairs[0]) > 30
    for a, b in zip(targets[pairs[0]].tolist(), teacher.targets[pairs[1]].tolist(), strict=True):
        assert own.student.token_bytes[a][:1] == own.teacher.token_bytes[b][:1]


def test_no_responses() -> None:
    alignment = aligner("gpt2", "qwen").align([])
    assert alignment.teacher_response_ids.shape[0] == 0
    assert (alignment.start_coverage, alignment.span_coverage) == (0, 0)


def test_tokenizers_whose_bytes_are_not_known_are_refused() -> None:
    eos: dict[str, Any] = {"student_eos_token_ids": [EOS], "teacher_eos_token_ids": [EOS]}
    good = zoo()["gpt2"]

    class SlowTokenizer:
        pass

    with pytest.raises(UserError, match=r"the teacher's tokenizer \(SlowTokenizer\) has no tok"):
        Aligner(good, SlowTokenizer(), **eos)
    words = Tokenizer(models.WordPiece({"<unk>": 0, "</s>": 1}, unk_token="<unk>"))
    words.decoder = decoders.WordPiece()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>")
    with pytest.raises(UserError, match="student's tokenizer decodes by WordPiece, so .*choose"):
        Aligner(wrapped, good, **eos)
    words.decoder = None
    wrapped = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>")
    with pytest.raises(UserError, match="the student's tokenizer decodes by nothing, so"):
        Aligner(wrapped, good, **eos)
    with pytest.raises(UserError, match="the teacher has no EOS id"):
        Aligner(good, good, student_eos_token_ids=[EOS], teacher_eos_token_ids=[])
