"""Tokenizers of every kind that aligning knows, trained on a text of many languages."""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA_3 = QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
SPECIALS = ["<unk>", "<s>", "</s>"]
EOS = 2

# Many languages, code and emoji; \n, \r and \t are written so.
SENTENCES = [
    line.replace("\\r\\n", "\r\n").replace("\\n", "\n").replace("\\t", "\t")
    for line in Path(__file__).with_name("sentences.txt").read_text(encoding="utf-8").splitlines()
]


@cache
def corpus(num_lines: int = 1500) -> list[str]:
    """Sentences with their words mixed, and invented words, so that many merges are worth it."""
    draw = random.Random(0)
    words = [word for sentence in SENTENCES for word in sentence.split(" ")]
    syllables = [a + b + c for a in "bdfgklmnprst" for b in "aeiou" for c in ("", "n", "r", "st")]
    lines = list(SENTENCES)
    while len(lines) < num_lines:
        invented = ["".join(draw.choices(syllables, k=draw.randint(1, 3))) for _ in range(6)]
        lines.append(" ".join(draw.sample(words, 12) + invented))
    return lines


def byte_level(
    vocab_size: int, pattern: str | None, nfc: bool = False, ignore_merges: bool = False
) -> Any:
    """GPT-2's with no pattern; Qwen's and Llama 3's with theirs."""
    backend = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    if nfc:
        backend.normalizer = normalizers.NFC()
    byte_letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    steps = [] if pattern is None else [pre_tokenizers.Split(Regex(pattern), "isolated")]
    backend.pre_tokenizer = pre_tokenizers.Sequence([*steps, byte_letters])
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=True)  # as GPT-2 and Llama 3
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(
        corpus(),
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=SPECIALS,
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    return wrap(backend)


def pieces(vocab_size: int, kind: str) -> Any:
    """BPE of pieces with byte fallback: "gemma" has no dummy prefix, "llama2" and "mistral" do."""
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    # Other letters fall back to bytes. (The trainer's own limit picks among ties by chance.)
    letters = Counter("".join(corpus()))
    common = set(sorted(letters, key=lambda letter: (-letters[letter], letter))[:120])
    lines = ["".join(filter(common.__contains__, line)) for line in corpus()]
    backend.train_from_iterator(
        lines,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=SPECIALS + byte_tokens,
            show_progress=False,
        ),
    )
    backend = plain_tokens(backend, byte_tokens)
    to_marker = normalizers.Replace(" ", "\u2581")
    decoding = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    if kind == "gemma":
        backend.normalizer = to_marker
        backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
        backend.add_tokens(["\n\n", "<think>"])
    if kind == "llama2":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), to_marker])
        backend.pre_tokenizer = None
    if kind == "mistral":
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    if kind != "gemma":
        decoding.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(decoding)
    return wrap(backend)


def unigram(vocab_size: int, byte_fallback: bool) -> Any:
    """Unigram behind NFKC, as T5's and XLM-R's families are built."""
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)] if byte_fallback else []
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.train_from_iterator(
        corpus(400),
        trainers.UnigramTrainer(
            vocab_size=vocab_size,
            special_tokens=SPECIALS + byte_tokens,
            unk_token="<unk>",
            show_progress=False,
        ),
    )
    if byte_fallback:
        backend = plain_tokens(backend, byte_tokens)
        backend.decoder = decoders.Sequence(
            [
                decoders.ByteFallback(),
                decoders.Metaspace(),
            ]
        )
    return wrap(backend)


def plain_tokens(backend: Tokenizer, tokens: list[str]) -> Tokenizer:
    """Byte tokens are pieces of the model, not tokens that a text may name."""
    parts = json.loads(backend.to_str())
    parts["added_tokens"] = [
        token for token in parts["added_tokens"] if token["content"] not in tokens
    ]
    parts["model"]["byte_fallback"] = True
    if parts["model"]["type"] == "Unigram":
        for piece in parts["model"]["vocab"]:
            if piece[0] in tokens:
                piece[1] = -20.0
    return Tokenizer.from_str(json.dumps(parts))


def wrap(backend: Tokenizer) -> Any:
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", bos_token="<s>", unk_token="<unk>"
    )


@cache
def zoo() -> dict[str, Any]:
    """By name; trained when first asked for."""
    return {
        "gpt2": byte_level(900, None),
        "qwen": byte_level(2000, QWEN, nfc=True),
        "llama3": byte_level(8000, LLAMA_3, ignore_merges=True),
        "gemma": pieces(3000, "gemma"),
        "llama2": pieces(1200, "llama2"),
        "mistral": pieces(500, "mistral"),
        "unigram": unigram(800, byte_fallback=True),
        "unknown": unigram(500, byte_fallback=False),
    }


def main(folder: str) -> None:
    """Save them all, each in a folder of its name."""
    for name, tokenizer in zoo().items():
        tokenizer.save_pretrained(Path(folder) / name)


if __name__ == "__main__":
    main(sys.argv[1])
