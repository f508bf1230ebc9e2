"""What two tokenizers share: one vocabulary, or the bytes that their tokens stand for."""

from esr_train.align.aligner import Aligner, Alignment
from esr_train.align.byte_tokenizer import ByteTokenizer
from esr_train.align.vocabulary import (
    Vocabulary,
    load_eos_token_ids,
    load_vocabulary,
    tokenizer_difference,
)

__all__ = [
    "Aligner",
    "Alignment",
    "ByteTokenizer",
    "Vocabulary",
    "load_eos_token_ids",
    "load_vocabulary",
    "tokenizer_difference",
]
