"""Which student id a teacher id counts for."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizer_zoo import EOS, zoo
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from esr_kernels import linear_reverse_kl
from esr_train.align import Aligner, vocab_map
from esr_train.errors import UserError

NAMES = ["gpt2", "qwen", "llama3", "gemma", "llama2", "unigram"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    return tmp_path / "esr_train" / "vocab_maps"


def aligner(student: str, teacher: str, **words: Any) -> Aligner:
    eos = {"student_eos_token_ids": [EOS], "teacher_eos_token_ids": [EOS]}
    return Aligner(zoo()[student], zoo()[teacher], **{**eos, **words})


def mapped(own: Aligner, projection: str) -> list[int]:
    sizes = len(own.student.token_bytes), len(own.teacher.token_bytes)
    return own.vocab_maps(projection, student_rows=sizes[0], teacher_rows=sizes[1])[0].tolist()


@pytest.mark.parametrize(("student", "teacher"), list(itertools.permutations(NAMES, 2)))
def test_ids_count_for_equal_bytes_or_for_the_first_token_of_them(
    student: str, teacher: str
) -> None:
    own = aligner(student, teacher)
    exact, projected = mapped(own, "exact"), mapped(own, "project")
    written = zoo()[student]  # its own encoding, behind a letter that hides a dummy prefix
    known = set(own.student.token_bytes) - {b""}
    for index, piece in enumerate(own.teacher.token_bytes):
        if not piece:
            assert exact[index] == projected[index] == (EOS if index == EOS else -1)
            continue
        assert (exact[index] >= 0) == (piece in known)
        assert exact[index] < 0 or own.student.token_bytes[exact[index]] == piece
        first = own.student.token_bytes[projected[index]] if projected[index] >= 0 else b""
        assert piece.startswith(first)
        if student == "unigram":  # its normal form may leave no way to write these bytes
            continue
        assert first
        if not piece.startswith(b" ") and piece.isascii() and student != "llama2":
            assert projected[index] == written.encode(piece.decode(), add_special_tokens=False)[0]


def test_of_equal_bytes_the_id_counts_that_is_written() -> None:
    own = aligner("gemma", "gpt2")
    letter = own.teacher.token_bytes.index(b"a")
    plain = zoo()["gemma"].convert_tokens_to_ids("a")
    assert plain != zoo()["gemma"].convert_tokens_to_ids("<0x61>")
    assert mapped(own, "exact")[letter] == mapped(own, "project")[letter] == plain


def test_half_characters_count_for_half_characters() -> None:
    own = aligner("gemma", "gpt2")
    half = own.teacher.token_bytes.index(b"\xe2")
    byte = zoo()["gemma"].convert_tokens_to_ids("<0xE2>")
    assert mapped(own, "exact")[half] == mapped(own, "project")[half] == byte
    own = aligner("llama3", "gpt2")
    first = own.student.first_ids([b"\xe4\xb8\xa4\xe4"])[0]  # a letter and a piece of the next
    assert first is not None
    assert own.student.token_bytes[first] in (b"\xe4", b"\xe4\xb8", b"\xe4\xb8\xa4")
    own = aligner("gemma", "gpt2")
    letter = own.student.encode(["\u00fc"], False)[0][0]
    assert own.student.first_ids([b"\xc3\xbc\xe4"]) == [letter]


def test_what_the_student_would_change_counts_for_nothing() -> None:
    own = aligner("unigram", "gpt2")
    index = own.teacher.token_bytes.index(b"a")
    own.teacher.token_bytes[index] = "\ufb01".encode()  # a ligature, which NFKC takes apart
    assert mapped(own, "project")[index] == -1


def test_every_eos_counts_for_the_first_of_the_students() -> None:
    own = aligner("qwen", "gpt2", student_eos_token_ids=[1, 2], teacher_eos_token_ids=[2, 0])
    assert [mapped(own, "exact")[index] for index in (0, 1, 2)] == [1, -1, 1]


def test_the_map_fits_the_heads_and_the_kernel() -> None:
    own = aligner("gpt2", "qwen")
    found, student_map = own.vocab_maps("project", student_rows=700, teacher_rows=2050)
    whole, _ = own.vocab_maps("project", student_rows=900, teacher_rows=2050)
    assert student_map is None
    assert found.shape == (2050,)
    assert found.dtype == torch.int64
    assert found[2000:].eq(-1).all()
    assert found.max() < 700 <= whole.max()
    assert torch.equal(found, whole.where(whole < 700, -1))
    shorter, _ = own.vocab_maps("project", student_rows=900, teacher_rows=1500)
    assert torch.equal(shorter, whole[:1500])
    states, heads = (
        [torch.randn(3, 4) for _ in range(2)],
        (torch.randn(900, 4), torch.randn(2050, 4)),
    )
    loss = linear_reverse_kl(states[0], heads[0], states[1], heads[1], vocab_map=whole)
    assert 0 < loss.item() < 100


def test_project_covers_what_exact_cannot() -> None:
    own = aligner("gpt2", "llama3")
    exact, projected = (np.array(mapped(own, name)) for name in ("exact", "project"))
    assert (exact < 0).sum() > 1000
    assert set(np.flatnonzero(projected < 0)) == {0, 1}  # <unk> and <s>
    assert len(np.unique(projected)) < len(projected) / 2  # several count for one


@pytest.mark.parametrize(("student", "teacher"), list(itertools.permutations(NAMES, 2)))
def test_merged_ids_begin_alike(student: str, teacher: str) -> None:
    """By the words of the contract, an id at a time."""
    own = aligner(student, teacher)
    sides = own.student, own.teacher
    sizes = [len(side.token_bytes) for side in sides]
    found = own.vocab_maps("merge", student_rows=sizes[0], teacher_rows=sizes[1])
    vocab_map, student_map = (part.tolist() for part in found)
    begins: dict[int, int] = {}  # the teacher's id that a student id begins with
    for index, piece in enumerate(sides[0].token_bytes):
        equal = sides[1].ids_of_bytes.get(piece)
        first = equal if equal is not None else sides[1].first_ids([piece])[0] if piece else None
        if first is not None:
            begins[index] = first
        elif index != EOS:
            assert student_map[index] == -1
    lowest: dict[int, int] = {}
    for index, first in begins.items():
        lowest.setdefault(first, index)
    for index, first in begins.items():
        assert student_map[index] == lowest[first]
    for index, piece in enumerate(sides[1].token_bytes):
        if index in lowest:
            assert vocab_map[index] == lowest[index]
        elif piece:
            written = sides[0].first_ids([piece])[0]
            assert vocab_map[index] == (-1 if written is None else student_map[written])
        else:
            assert vocab_map[index] == (EOS if index == EOS else -1)
    assert vocab_map[EOS] == student_map[EOS] == EOS
    if teacher != "unigram":  # which changes letters
        reached = [index for index, piece in enumerate(sides[0].token_bytes) if piece]
        counted = set(vocab_map)
        assert sum(student_map[index] in counted for index in reached) > 0.99 * len(reached)


def test_a_word_counts_for_the_piece_that_it_begins_with() -> None:
    own = aligner("llama3", "mistral")
    sizes = {side: len(getattr(own, side).token_bytes) for side in ("student", "teacher")}
    vocab_map, student_map = own.vocab_maps(
        "merge", student_rows=sizes["student"], teacher_rows=sizes["teacher"]
    )
    student, teacher = own.student, own.teacher
    word = student.encode([" numbers"], False)[0]
    pieces = teacher.encode([" numbers"], False)[0]
    assert len(word) == 1 < len(pieces)
    assert student_map[word[0]] == vocab_map[pieces[0]]
    other = student.encode([" problem"], False)[0]
    assert student_map[other[0]] != student_map[word[0]]


def test_every_eos_of_either_counts_for_one_under_merge() -> None:
    own = aligner("qwen", "gpt2", student_eos_token_ids=[1, 2], teacher_eos_token_ids=[2, 0])
    vocab_map, student_map = own.vocab_maps("merge", student_rows=2000, teacher_rows=900)
    assert vocab_map[[2, 0]].tolist() == student_map[[1, 2]].tolist() == [1, 1]
    assert vocab_map[1] == student_map[0] == -1


def test_an_eos_past_a_head_is_refused() -> None:
    own = aligner("qwen", "gpt2", student_eos_token_ids=[2, 1999])
    with pytest.raises(ValueError, match="student_rows: expected more than 1999"):
        own.vocab_maps("merge", student_rows=1500, teacher_rows=900)


def test_nothing_shared_is_refused() -> None:
    def letters(text: str) -> Any:
        backend = Tokenizer(models.BPE({"</s>": 0, **{c: i for i, c in enumerate(text, 1)}}, []))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")

    own = Aligner(
        letters("ab"), letters("cd"), student_eos_token_ids=[0], teacher_eos_token_ids=[0]
    )
    with pytest.raises(UserError, match="share no token.*choose another pair"):
        mapped(own, "exact")
    with pytest.raises(ValueError, match="be one of exact, project, merge, got 'span'"):
        mapped(own, "span")


def test_a_map_is_made_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = mapped(aligner("gpt2", "qwen"), "project")
    assert len(list(cache.iterdir())) == 1  # and no temporary file

    def build(*_: Any) -> Any:
        raise AssertionError("made anew")

    monkeypatch.setattr(vocab_map, "_build", build)
    assert mapped(aligner("gpt2", "qwen"), "project") == first
    others = [aligner("qwen", "gpt2"), aligner("gpt2", "llama3")]
    others.append(aligner("gpt2", "qwen", student_eos_token_ids=[500]))
    for own in others:
        with pytest.raises(AssertionError, match="made anew"):
            mapped(own, "project")
    with pytest.raises(AssertionError, match="made anew"):
        mapped(aligner("gpt2", "qwen"), "exact")


@pytest.mark.parametrize("damage", ["empty", "cut", "noise", "other shape", "out of range", "type"])
def test_a_broken_file_is_made_anew(cache: Path, damage: str) -> None:
    expected = mapped(aligner("gpt2", "qwen"), "project")
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    size = len(expected)
    contents = {"empty": b"", "cut": whole[: len(whole) // 2], "noise": b"\x93NUMPY not really"}
    arrays = {
        "other shape": np.zeros(size - 1, np.int64),
        "out of range": np.full(size, 900),
        "type": np.zeros(size, np.float64),
    }
    if damage in contents:
        file.write_bytes(contents[damage])
    else:
        np.save(file, arrays[damage])
    assert mapped(aligner("gpt2", "qwen"), "project") == expected
    assert file.read_bytes() == whole


def test_a_folder_that_cannot_be_written_costs_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="could not be kept.*set HF_HOME"):
        found = mapped(aligner("gpt2", "qwen"), "exact")
    assert max(found) > 0


def test_the_folder_is_the_users_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert vocab_map.cache_folder() == Path("/somewhere/esr_train/vocab_maps")
