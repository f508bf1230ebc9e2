"""Aligning a batch of responses with what the teacher would have written, beside TRL's GOLD.

    python -m pytest benchmarks -k align

Both start from the student's token ids and end with the token runs that spell the same bytes; both
re-encode the text with the teacher's tokenizer. GOLD's is what its trainer does with a batch of
rollouts (offsets of the student's tokens, `build_teacher_inputs_from_texts`, and the walk of
`ULDLoss`), for the byte-level pairs that it accepts. The floor is decoding and encoding alone. No
two rounds see the same text.

And making the vocabulary maps of two vocabularies of real sizes, nothing being kept on disk yet.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from esr_train.align import Aligner
from esr_train.align.vocab_map import PROJECTIONS

EOS = 2
ROUNDS = 20
WARM_UP = 3
QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA_3 = QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


def sentences(seed: int) -> Iterator[str]:
    """Invented words by Zipf's law, numbers, punctuation, and some letters past ASCII."""
    draw = random.Random(seed)
    syllables = [a + b + c for a in "bdfghklmnprstvw" for b in "aeiou\u00e9\u4e24" for c in "nrstl"]
    words = ["".join(random.Random(i).choices(syllables, k=1 + i % 4)) for i in range(20000)]
    weights = list(itertools.accumulate(1 / (1 + rank) for rank in range(len(words))))
    while True:
        chosen = draw.choices(words, cum_weights=weights, k=draw.randint(6, 20))
        yield f"{' '.join(chosen)}, {draw.randint(0, 9999)} + {draw.randint(0, 99)}.\n"


@cache
def tokenizer(kind: str, num_sentences: int = 30000) -> Any:
    """30,000 tokens of Qwen's or Llama 3's kind, 20,000 of Gemma's, or what the sentences give."""
    pieces = kind == "gemma"
    backend = Tokenizer(models.BPE(unk_token="<unk>" if pieces else None, byte_fallback=pieces))
    if pieces:
        backend.normalizer = normalizers.Replace(" ", "\u2581")
        backend.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")
        backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse()])
    else:
        pattern = Regex(QWEN if kind == "qwen" else LLAMA_3)
        letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        split = pre_tokenizers.Split(pattern, "isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, letters])
        backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=20000 if pieces else 30000,
        special_tokens=["<unk>", "<pad>", "</s>"],
        initial_alphabet=[] if pieces else sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    seed = ("qwen", "llama3", "gemma").index(kind)
    backend.train_from_iterator(itertools.islice(sentences(seed), num_sentences), trainer)
    if pieces:
        backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")  # Gemma's own
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def batches(student: Any, num_tokens: int, count: int) -> list[list[list[int]]]:
    """`count` batches of 16 responses of `num_tokens` each."""
    source = sentences(99)
    made = []
    for _ in range(count * 16):
        ids: list[int] = []
        while len(ids) < num_tokens:
            ids += student.backend_tokenizer.encode(next(source), add_special_tokens=False).ids
        made.append(ids[:num_tokens])
    return [made[first : first + 16] for first in range(0, len(made), 16)]


def ours(student: Any, teacher: Any) -> Any:
    eos: dict[str, Any] = {"student_eos_token_ids": [EOS], "teacher_eos_token_ids": [EOS]}
    return Aligner(student, teacher, **eos).align


def gold(student: Any, teacher: Any) -> Any:
    """The runs of TRL 1.16's experimental GOLD trainer, a response at a time as there."""
    trainer = pytest.importorskip("trl.experimental.gold.gold_trainer")

    def align(responses: list[list[int]]) -> list[Any]:
        rows = []
        for ids in responses:
            stop, offsets = 0, []
            for token in ids:
                start = stop
                stop += trainer.piece_byte_len(student.convert_ids_to_tokens([token])[0])
                offsets.append((start, stop))
            rows.append(offsets)
        texts = student.batch_decode(responses, skip_special_tokens=True)
        made = trainer.build_teacher_inputs_from_texts(teacher, [""] * len(texts), texts)
        walk = trainer.ULDLoss._align_by_byte_offsets
        return [
            walk(row, offsets[labels != -100].tolist())
            for row, offsets, labels in zip(rows, made[3], made[1], strict=True)
        ]

    return align


def floor(student: Any, teacher: Any) -> Any:
    """Decoding and encoding alone, by `tokenizers`: nobody is faster."""

    def write_anew(responses: list[list[int]]) -> Any:
        texts = student.backend_tokenizer.decode_batch(responses, skip_special_tokens=True)
        return teacher.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)

    return write_anew


PAIRS = [("qwen", "llama3"), ("llama3", "qwen"), ("gemma", "qwen"), ("qwen", "gemma")]
ALIGNERS = {"esr": ours, "trl-gold": gold, "floor": floor}
CASES = [
    (name, *pair)
    for pair in PAIRS
    for name in ALIGNERS
    if name != "trl-gold" or "gemma" not in pair  # it refuses what is not byte-level
]


@pytest.mark.parametrize("num_tokens", [100, 1530])
@pytest.mark.parametrize(("name", "student", "teacher"), CASES)
def test_align(name: str, student: str, teacher: str, num_tokens: int, benchmark: Any) -> None:
    align = ALIGNERS[name](tokenizer(student), tokenizer(teacher))
    work = batches(tokenizer(student), num_tokens, ROUNDS + WARM_UP)
    for batch in work[:WARM_UP]:
        align(batch)
    left = iter(work[WARM_UP:])
    benchmark.group = f"16 x {num_tokens} tokens, {student} -> {teacher}"
    benchmark.pedantic(align, setup=lambda: ((next(left),), {}), rounds=ROUNDS)


def large_tokenizer(num_tokens: int, seed: int) -> Any:
    """Byte-level BPE of invented words of up to three syllables; seeds draw different ones."""
    syllables = [a + b for a in "bcdfghjklmnprstvwz" for b in "aeiouy"]
    merges = [(syllable[0], syllable[1]) for syllable in syllables]
    merges += [("\u0120", syllable) for syllable in syllables]
    starts = [mark + syllable for syllable in syllables for mark in ("", "\u0120")]
    for _ in range(2):
        longer = list(itertools.product(starts, syllables))
        random.Random(seed).shuffle(longer)
        merges += longer[: num_tokens - 300 - len(merges)]
        starts = [first + second for first, second in longer]
    tokens = ["<unk>", "<pad>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens += [first + second for first, second in merges]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    backend = Tokenizer(models.BPE(vocab, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


@cache
def large_pair() -> tuple[Any, Any]:
    """As large as Qwen's and Gemma's."""
    return large_tokenizer(151_000, seed=0), large_tokenizer(256_000, seed=1)


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_align_vocabularies(
    projection: str, benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading both tokenizers included."""
    student, teacher = large_pair()

    def maps() -> Any:
        aligner = Aligner(
            student, teacher, student_eos_token_ids=[EOS], teacher_eos_token_ids=[EOS]
        )
        return aligner.vocab_maps(projection, student_rows=151_936, teacher_rows=262_144)

    folders = (str(tmp_path / str(number)) for number in range(3))
    benchmark.group = "vocabulary maps, 151k and 256k ids"
    benchmark.pedantic(maps, setup=lambda: monkeypatch.setenv("HF_HOME", next(folders)), rounds=3)
