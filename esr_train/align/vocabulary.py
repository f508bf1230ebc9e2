"""What student and teacher share of their vocabularies, found before any weight is loaded."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any

from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from esr_train.config import TrainConfig
from esr_train.errors import UserError, loading_error


@dataclass(frozen=True)
class Vocabulary:
    """What a model reads and writes.

    size: rows of the LM head that count, and no id past them is sampled: the common prefix of both
    heads where student and teacher share a tokenizer, else those that the model's own tokenizer
    knows. eos_token_ids and pad_token_id are inside it. context_length: positions that the model,
    or both, were made for, None if nothing says.
    teacher: the teacher's own, where its tokenizer is another one; difference: in what it is.
    """

    tokenizer: Any
    size: int
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    context_length: int | None
    teacher: Vocabulary | None = None
    difference: str = ""


def load_vocabulary(config: TrainConfig) -> Vocabulary:
    """Raises UserError where a model is missing or no EOS is known."""
    names = {
        "model_name_or_path": str(config.model_name_or_path),
        "teacher_model_name_or_path": str(config.teacher_model_name_or_path),
    }
    models = [
        _load(AutoConfig, role, name, "config", config).get_text_config()
        for role, name in names.items()
    ]
    tokenizers = [
        _load(AutoTokenizer, role, name, "tokenizer", config) for role, name in names.items()
    ]
    rows = [getattr(m, "unpadded_vocab_size", None) or m.vocab_size for m in models]
    limits = [getattr(model, "max_position_embeddings", None) for model in models]
    difference = tokenizer_difference(tokenizers[0], tokenizers[1], min(rows))
    if difference is None:
        if config.teacher_eos_token_ids:
            raise UserError(
                "teacher_eos_token_ids are of a teacher with another tokenizer, and these two "
                "share one: leave them out, or name the student's with eos_token_ids"
            )
        common = min((limit for limit in limits if limit), default=None)
        return _vocabulary(config, "model_name_or_path", tokenizers[0], min(rows), common)
    student, teacher = (
        _vocabulary(config, role, tokenizer, min(size, num_ids(tokenizer)), limit)
        for role, tokenizer, size, limit in zip(names, tokenizers, rows, limits, strict=True)
    )
    return replace(student, teacher=teacher, difference=difference)


def _vocabulary(
    config: TrainConfig, role: str, tokenizer: Any, size: int, context_length: int | None
) -> Vocabulary:
    eos_token_ids = load_eos_token_ids(config, size, role)
    # Pads are masked: any id will do that the model has a row for.
    pad = tokenizer.pad_token_id
    pad_token_id = pad if pad is not None and pad < size else eos_token_ids[0]
    return Vocabulary(tokenizer, size, eos_token_ids, pad_token_id, context_length)


def num_ids(tokenizer: Any) -> int:
    """One more than a tokenizer's last id."""
    return max(tokenizer.get_vocab().values()) + 1


def _load(auto: Any, role: str, name: str, what: str, config: TrainConfig) -> Any:
    try:
        return auto.from_pretrained(name, trust_remote_code=config.trust_remote_code)
    except Exception as error:  # of many types
        raise loading_error(role, name, what, error) from error


def load_eos_token_ids(
    config: TrainConfig, vocab_size: int, role: str = "model_name_or_path"
) -> tuple[int, ...]:
    """The ids that end a response: those that `config` names, or of the model's generation config.

    They are not guessed from the tokenizer: a base model's differ from its chat template's, and a
    rollout that misses its EOS trains the student never to stop.
    role: whose, "model_name_or_path" or "teacher_model_name_or_path".
    """
    option = "eos_token_ids" if role == "model_name_or_path" else "teacher_eos_token_ids"
    given = getattr(config, option)
    if given:
        for eos in given:
            if not 0 <= eos < vocab_size:
                raise UserError(f"{option} must be ids from 0 to {vocab_size - 1}, got {eos}")
        return tuple(given)
    name = getattr(config, role)
    way_out = f"name the ids that end a response with --{option}"
    try:
        eos = GenerationConfig.from_pretrained(name).eos_token_id
    except OSError as error:
        raise UserError(f"{role} {name} has no generation_config.json; {way_out}") from error
    if eos is None:
        raise UserError(f"{role} {name}: no eos_token_id in its generation config; {way_out}")
    found = eos if isinstance(eos, list) else [eos]
    known = tuple(id for id in found if 0 <= id < vocab_size)
    if not known:
        raise UserError(
            f"{role} {name}: eos_token_id {eos} of its generation config is not among the "
            f"{vocab_size} ids that count; {way_out}"
        )
    return known


def tokenizer_difference(
    student_tokenizer: Any, teacher_tokenizer: Any, vocab_size: int
) -> str | None:
    """In what the two differ; None where they are one on the first `vocab_size` ids.

    Rows past a tokenizer's last token are padding and may differ in number (151936 and 152064); so
    may added tokens at the end (Qwen3 has a few that Qwen2.5 lacks).
    """
    student, teacher = student_tokenizer.get_vocab(), teacher_tokenizer.get_vocab()
    tokens = {index: token for token, index in student.items()}
    for other, index in sorted(teacher.items(), key=itemgetter(1)):
        token = tokens.get(index, other)
        if token != other:
            return f"id {index} is {token!r} for the student and {other!r} for the teacher"
    added = set(student_tokenizer.get_added_vocab()) | set(teacher_tokenizer.get_added_vocab())
    for token, index in {**teacher, **student}.items():
        one_sided = student.get(token) != teacher.get(token)
        if (one_sided or index >= vocab_size) and token not in added:
            return f"only one of the two has {token!r} at id {index}"
    if not _same_segmentation(student_tokenizer, teacher_tokenizer):
        return "the same ids, but text is cut in another way"
    return None


def _same_segmentation(student_tokenizer: Any, teacher_tokenizer: Any) -> bool:
    student = _segmentation(student_tokenizer)
    if student == _segmentation(teacher_tokenizer):
        return True
    # Transformers rebuilds some tokenizers by the model's type, whatever their file says (Qwen2
    # gets a normalizer): what counts is whether the two files agree, so one class reads both.
    try:
        same_class = type(student_tokenizer).from_pretrained(teacher_tokenizer.name_or_path)
    except Exception:  # not a file of that class
        return False
    return student == _segmentation(same_class)


def _segmentation(tokenizer: Any) -> object:
    """What decides how text is cut, of a `tokenizers` backend; None for slow tokenizers."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    parts = json.loads(backend.to_str())
    # An unset option is saved as "" by some versions and as null by others.
    model = {key: value or None for key, value in parts["model"].items() if key != "vocab"}
    return parts["normalizer"], parts["pre_tokenizer"], model
