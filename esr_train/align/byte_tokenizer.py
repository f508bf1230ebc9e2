"""A tokenizer as bytes: what each id stands for, and text to ids with no control token in it."""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Collection, Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from esr_train.errors import UserError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
# Around a Unigram piece's name, so that no text is cut into that piece.
_UNREADABLE = "\U0010ffff"


def _byte_alphabet() -> dict[int, str]:
    """The letter that GPT-2's byte-level BPE writes for each byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable}
    return letters | {byte: chr(256 + rank) for rank, byte in enumerate(others)}


BYTE_LETTERS = _byte_alphabet()
# The way back, by latin-1. Letters that are no byte's become one that latin-1 lacks.
_LETTER_BYTES = dict.fromkeys(range(256), "\uffff") | {
    ord(letter): chr(byte) for byte, letter in BYTE_LETTERS.items()
}


class ByteTokenizer:
    """Bytes of every id, and encoding, of a tokenizer with a `tokenizers` backend.

    token_bytes: a list, bytes of each id; b"" for the ids in no_text and for holes.
    no_text: special tokens and the unknown token. Added tokens that are not special (Gemma's
    newlines, <think>) stand for what they spell.
    drops_first_space: decoding drops the space that a text's first token begins with.
    byte_level: byte-level BPE, as opposed to pieces with a marker for the space.
    """

    def __init__(self, tokenizer: Any, role: str, no_text: Collection[int] = ()) -> None:
        """role: "student" or "teacher", for messages. no_text: further ids that are no text.

        Raises UserError for a tokenizer whose bytes are not known, with the way out.
        """
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise UserError(
                f"the {role}'s tokenizer ({type(tokenizer).__name__}) has no tokenizer.json behind "
                "it, which aligning needs: convert it to a fast one (AutoTokenizer with "
                "use_fast=True), save that to the model's folder and name the folder"
            )
        self.role = role
        self._parts = _plain_parts(backend, no_text)
        self.no_text = _no_text(self._parts) | set(no_text)
        steps = list(_steps(self._parts["decoder"], "decoders"))
        kinds = [step["type"] for step in steps]
        self.byte_level = "ByteLevel" in kinds
        markers = [marker for marker in map(_space_marker, steps) if marker]
        if not self.byte_level and (len(markers) != 1 or set(kinds) - _PIECE_DECODERS):
            raise UserError(
                f"the {role}'s tokenizer decodes by {', '.join(kinds) or 'nothing'}, so the bytes "
                "of its tokens are not known; aligning knows byte-level BPE (Qwen, Llama 3, GPT-2) "
                "and pieces that mark the space (Gemma, Llama 2, Mistral): choose such a model"
            )
        self._marker = markers[0] if markers else ""
        self.drops_first_space = not self.byte_level and any(map(_drops_first_space, steps))
        self.token_bytes = self._read_token_bytes("ByteFallback" in kinds)
        # One empty entry more, for the ids that only pad the LM head.
        widths = [*map(len, self.token_bytes), 0]
        self._widths = np.array(widths, dtype=np.int64)
        self._firsts = np.cumsum(self._widths) - self._widths
        self._blob = np.frombuffer(b"".join(self.token_bytes), dtype=np.uint8)

    def _read_token_bytes(self, byte_fallback: bool) -> list[bytes]:
        added = {token["id"]: token for token in self._parts["added_tokens"]}
        pieces = _pieces(self._parts["model"])
        size = max([*pieces, *added], default=-1) + 1
        found = [b""] * size
        self._byte_ids: list[int] = []
        for index, piece in pieces.items():
            byte = _BYTE_TOKEN.fullmatch(piece) if byte_fallback else None
            if index in self.no_text:
                continue
            if byte:
                self._byte_ids.append(index)
                found[index] = bytes([int(byte[1], 16)])
            elif self.byte_level:
                found[index] = _letters_to_bytes(piece)
            else:
                found[index] = piece.replace(self._marker, " ").encode()
        for index, token in added.items():
            if index not in self.no_text and index not in pieces:
                found[index] = token["content"].encode()
        return found

    def writes(self, index: int) -> bool:
        """Whether text may be cut into this id."""
        added = {token["id"]: token["special"] for token in self._parts["added_tokens"]}
        return not added.get(index, index in _no_text(self._parts))

    @cached_property
    def fingerprint(self) -> str:
        """Equal for tokenizers that behave alike here."""
        text = json.dumps(self._parts, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def spell(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Bytes of the ids [n] one after another, uint8, and the width of each, [n] int64."""
        ids = np.minimum(ids, len(self.token_bytes))
        widths = self._widths[ids]
        ends = np.cumsum(widths)
        shift = np.repeat(self._firsts[ids] - (ends - widths), widths)
        return self._blob[shift + np.arange(len(shift))], widths

    def encode(self, texts: Sequence[str], starts_text: bool) -> list[list[int]]:
        """Ids of each text; nothing in it is read as a special token.

        starts_text: as the tokenizer begins a text, with its dummy prefix if it has one. Otherwise
        as it goes on with one.
        """
        backend = self._backend if starts_text else self._continuing
        encodings = backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def offsets(self, text: str, starts_text: bool) -> np.ndarray:
        """The letters of `text` that each token claims to come from, [n, 2] int64: first, stop."""
        backend = self._backend if starts_text else self._continuing
        offsets = backend.encode(text, add_special_tokens=False).offsets
        return np.array(offsets, dtype=np.int64).reshape(-1, 2)

    def adds_space(self, text: str, starts_text: bool) -> bool:
        """Whether `encode` puts a dummy prefix in front of `text`."""
        if not text or not starts_text:
            return False
        normalizer = self._parts["normalizer"]
        if any(step["type"] == "Prepend" for step in _steps(normalizer, "normalizers")):
            return True
        if self._backend.normalizer is not None:
            text = self._backend.normalizer.normalize_str(text)
        for step in _steps(self._parts["pre_tokenizer"], "pretokenizers"):
            if step["type"] == "Metaspace" and step["prepend_scheme"] != "never":
                return not text.startswith((" ", step["replacement"]))
            if step["type"] == "ByteLevel" and step["add_prefix_space"]:
                return not text.startswith(" ")
        return False

    def first_ids(self, pieces: Sequence[bytes]) -> list[int | None]:
        """The first token of each piece, as this tokenizer writes it inside a text.

        None where that does not spell the piece's beginning.
        """
        found: list[int | None] = [None] * len(pieces)
        texts: dict[int, str] = {}
        for index, piece in enumerate(pieces):
            try:
                texts[index] = piece.decode()
            except UnicodeDecodeError as error:
                if self.byte_level:  # no text, so nothing but the merges can cut it
                    letters = "".join(map(BYTE_LETTERS.__getitem__, piece))
                    tokens = self._continuing.model.tokenize(letters)
                    found[index] = tokens[0].id if tokens else None
                elif error.start:
                    texts[index] = piece[: error.start].decode()
                else:
                    found[index] = self.ids_of_bytes.get(piece[:1])
        encoded = self.encode(list(texts.values()), starts_text=False)
        for index, ids in zip(texts, encoded, strict=True):
            found[index] = ids[0] if ids else None
        for index, id_ in enumerate(found):
            if id_ is not None and not (
                self.token_bytes[id_] and pieces[index].startswith(self.token_bytes[id_])
            ):
                found[index] = None
        return found

    @cached_property
    def ids_of_bytes(self) -> dict[bytes, int]:
        """An id for each of the byte strings that tokens stand for.

        Of several the one that encoding writes: an added token before a piece of the model, and
        that before a byte token.
        """
        added = [token["id"] for token in self._parts["added_tokens"]]
        order = [*self._byte_ids, *_pieces(self._parts["model"]), *added]
        byte_ids = set(self._byte_ids)
        found = {self.token_bytes[index]: index for index in self._byte_ids}
        found |= {self.token_bytes[index]: index for index in order if index not in byte_ids}
        found.pop(b"", None)
        return found

    @cached_property
    def _backend(self) -> Tokenizer:
        return _build(self._parts)

    @cached_property
    def _continuing(self) -> Tokenizer:
        """The same without a dummy prefix."""
        parts = {
            **self._parts,
            "normalizer": _without_prefix(self._parts["normalizer"]),
            "pre_tokenizer": _without_prefix(self._parts["pre_tokenizer"]),
        }
        return self._backend if parts == self._parts else _build(parts)


def _plain_parts(backend: Tokenizer, no_text: Collection[int]) -> dict[str, Any]:
    """The tokenizer's file, without what adds to the text's own tokens."""
    parts: dict[str, Any] = json.loads(backend.to_str())
    for token in parts["added_tokens"]:
        token["special"] = token["special"] or token["id"] in no_text
    # The post-processor would also move offsets past spaces.
    return {**parts, "truncation": None, "padding": None, "post_processor": None}


def _no_text(parts: dict[str, Any]) -> set[int]:
    model = parts["model"]
    ids = {token["id"] for token in parts["added_tokens"] if token["special"]}
    if model.get("unk_token") in model["vocab"]:
        ids.add(model["vocab"][model["unk_token"]])
    if model.get("unk_id") is not None:
        ids.add(model["unk_id"])
    return ids


def _build(parts: dict[str, Any]) -> Tokenizer:
    parts = {**parts, "added_tokens": copy.deepcopy(parts["added_tokens"])}
    if parts["model"]["type"] == "Unigram":
        # Its search knows no special pieces: "</s>" in a text would become the token.
        hidden = {token["id"] for token in parts["added_tokens"] if token["special"]}
        pieces = [
            [_UNREADABLE + piece if index in hidden else piece, score]
            for index, (piece, score) in enumerate(parts["model"]["vocab"])
        ]
        parts["model"] = {**parts["model"], "vocab": pieces}
        for token in parts["added_tokens"]:
            if token["special"]:
                token["content"] = _UNREADABLE + token["content"]
    backend = Tokenizer.from_str(json.dumps(parts))
    backend.encode_special_tokens = True
    return backend


def _pieces(model: dict[str, Any]) -> dict[int, str]:
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        return {index: piece for piece, index in vocab.items()}
    return {index: piece for index, (piece, _) in enumerate(vocab)}


def _letters_to_bytes(piece: str) -> bytes:
    try:
        return piece.translate(_LETTER_BYTES).encode("latin-1")
    except UnicodeEncodeError:  # not of the alphabet: the decoder takes it as it is
        return piece.encode()


# Decoders of pieces that mark the space, as they are found in one list.
_PIECE_DECODERS = {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}


def _steps(part: dict[str, Any] | None, name: str) -> Iterator[dict[str, Any]]:
    """A part of a tokenizer's file and what it is a sequence of."""
    if part is None:
        return
    if part["type"] != "Sequence":
        yield part
        return
    for step in part[name]:
        yield from _steps(step, name)


def _space_marker(decoder: dict[str, Any]) -> str | None:
    if decoder["type"] == "Metaspace":
        return str(decoder["replacement"])
    if decoder["type"] == "Replace" and decoder["content"] == " ":
        return decoder["pattern"].get("String")
    return None


def _drops_first_space(decoder: dict[str, Any]) -> bool:
    if decoder["type"] == "Metaspace":
        return decoder["prepend_scheme"] != "never"
    return decoder["type"] == "Strip" and decoder["content"] == " " and decoder["start"] > 0


def _without_prefix(part: Any) -> Any:
    """A normalizer or pre-tokenizer that puts no space in front of a text."""
    if part is None or part["type"] == "Prepend":
        return None
    part = dict(part)
    if part["type"] == "Metaspace":
        part["prepend_scheme"] = "never"
    if part["type"] == "ByteLevel":
        part["add_prefix_space"] = False
    for name in ("normalizers", "pretokenizers"):
        if name in part:
            part[name] = [kept for kept in map(_without_prefix, part[name]) if kept is not None]
    return part
