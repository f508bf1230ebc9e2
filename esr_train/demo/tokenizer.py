"""The demo's two tokenizers, trained on the task's text: whole words, and pieces of words.

`words` is byte-level BPE over printable ASCII, with every word of the task one token and digits
apart. `pieces` is BPE of Gemma's kind: spaces are marked, what it has no piece for falls back to
bytes. Most of its tokens are also tokens of `words`; it cuts long words ("tim" "es") and joins
what `words` has apart: both digits of a number, and a word and the mark behind it ("all.").

With both, a newline never merges with anything, so a prompt and its response tokenize the same
together and apart, and no token reaches past a word but for the space in front of it.
"""

import json

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

MAX_POSITIONS = 512  # of a prompt and its response
# More than the task needs: training stops at 240, when every word is one token.
WORDS_SIZE = 256
# Again more than it needs: training stops at 597, when no two pieces make one that is short enough.
PIECES_SIZE = 1024
# The trainer keeps pieces shorter than this, the space included.
PIECE_LIMIT = 6
SPACE = "\u2581"  # how `pieces` marks one


def train_words(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE over printable ASCII: words with their space, single digits, newline."""
    eos, pad = "<|endoftext|>", "<|pad|>"
    tokenizer = Tokenizer(models.BPE())
    words = Regex(r" ?[A-Za-z]+| ?[0-9]|#+|\n| |[^A-Za-z0-9#\n ]")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    byte_names = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    ascii_text = "\n" + "".join(map(chr, range(32, 127)))
    alphabet = sorted(set(byte_names.pre_tokenize_str(ascii_text)[0][0]))
    trainer = trainers.BpeTrainer(
        vocab_size=WORDS_SIZE,
        special_tokens=[eos, pad],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _wrap(tokenizer, eos_token=eos, pad_token=pad)


def train_pieces(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-pair pieces of at most 5 letters, numbers to 99 whole, other text as its bytes.

    The special tokens come behind the 256 bytes, at ids that `words` does not have.
    """
    specials = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    words = Regex(
        rf"{SPACE}?[A-Za-z]+[.,:]?|{SPACE}?[0-9]{{1,2}}|#+|\n|{SPACE}|[^A-Za-z0-9#\n{SPACE}]"
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(words, behavior="isolated")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=PIECES_SIZE,
        special_tokens=[*byte_tokens, *specials.values()],
        initial_alphabet=["\n", SPACE, *map(chr, range(33, 127))],
        max_token_length=PIECE_LIMIT,
        show_progress=False,
    )
    numbers = [f" {number}" for number in range(100)]
    tokenizer.train_from_iterator([*texts, *numbers], trainer)
    # The bytes are pieces of the model, not tokens that a text may name.
    parts = json.loads(tokenizer.to_str())
    parts["added_tokens"] = [t for t in parts["added_tokens"] if t["content"] not in byte_tokens]
    return _wrap(Tokenizer.from_str(json.dumps(parts)), **specials)


def _wrap(tokenizer: Tokenizer, **specials: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        padding_side="left",
        model_max_length=MAX_POSITIONS,
        **specials,
    )


TOKENIZERS = {"words": train_words, "pieces": train_pieces}
