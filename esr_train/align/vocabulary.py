"""What student and teacher share of their vocabularies, found before any weight is loaded."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from esr_train.config import TrainConfig
from esr_train.errors import UserError, loading_error

_ADVICE = (
    "student and teacher must share one tokenizer, up to padding of the vocabulary, for now; "
    "choose a teacher of the same family"
)


@dataclass(frozen=True)
class Vocabulary:
    """What both models read and write.

    size: the common prefix of their LM heads, in rows; both softmaxes run over it, and no other id
    is sampled. eos_token_ids and pad_token_id are inside it. context_length: positions that both
    models were made for, None if neither says.
    """

    tokenizer: Any
    size: int
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    context_length: int | None


def load_vocabulary(config: TrainConfig) -> Vocabulary:
    """Raises UserError where a model is missing, the tokenizers differ or no EOS is known."""
    names = {
        "model_name_or_path": str(config.model_name_or_path),
        "teacher_model_name_or_path": str(config.teacher_model_name_or_path),
    }
    student, teacher = (
        _load(AutoConfig, role, name, "config", config).get_text_config()
        for role, name in names.items()
    )
    tokenizer, teacher_tokenizer = (
        _load(AutoTokenizer, role, name, "tokenizer", config) for role, name in names.items()
    )
    rows = [getattr(m, "unpadded_vocab_size", None) or m.vocab_size for m in (student, teacher)]
    size = common_vocab_size(tokenizer, teacher_tokenizer, *rows)
    eos_token_ids = load_eos_token_ids(config, size)
    pad = tokenizer.pad_token_id
    limits = [getattr(model, "max_position_embeddings", None) for model in (student, teacher)]
    return Vocabulary(
        tokenizer,
        size,
        eos_token_ids,
        # Pads are masked: any id will do that both models have a row for.
        pad if pad is not None and pad < size else eos_token_ids[0],
        min((limit for limit in limits if limit), default=None),
    )


def _load(auto: Any, role: str, name: str, what: str, config: TrainConfig) -> Any:
    try:
        return auto.from_pretrained(name, trust_remote_code=config.trust_remote_code)
    except Exception as error:  # of many types
        raise loading_error(role, name, what, error) from error


def load_eos_token_ids(config: TrainConfig, vocab_size: int) -> tuple[int, ...]:
    """The ids that end a response: `eos_token_ids`, or those of the student's generation config.

    They are not guessed from the tokenizer: a base model's differ from its chat template's, and a
    rollout that misses its EOS trains the student never to stop.
    """
    if config.eos_token_ids:
        for eos in config.eos_token_ids:
            if not 0 <= eos < vocab_size:
                raise UserError(
                    f"eos_token_ids must be ids of both models, 0 to {vocab_size - 1}, got {eos}"
                )
        return tuple(config.eos_token_ids)
    name = str(config.model_name_or_path)
    way_out = "name the ids that end a response with --eos_token_ids"
    try:
        eos = GenerationConfig.from_pretrained(name).eos_token_id
    except OSError as error:
        raise UserError(
            f"model_name_or_path {name} has no generation_config.json; {way_out}"
        ) from error
    if eos is None:
        raise UserError(
            f"model_name_or_path {name}: no eos_token_id in its generation config; {way_out}"
        )
    found = eos if isinstance(eos, list) else [eos]
    known = tuple(id for id in found if 0 <= id < vocab_size)
    if not known:
        raise UserError(
            f"model_name_or_path {name}: eos_token_id {eos} of its generation config is not among "
            f"the {vocab_size} ids that both models have; {way_out}"
        )
    return known


def common_vocab_size(
    student_tokenizer: Any, teacher_tokenizer: Any, student_rows: int, teacher_rows: int
) -> int:
    """Common prefix of the two LM heads, in rows (151936 of 151936 and 152064).

    Rows past a tokenizer's last token are padding and may differ in number; so may added tokens at
    the end (Qwen3 has a few that Qwen2.5 lacks). Raises UserError on different tokenizers.
    """
    student, teacher = student_tokenizer.get_vocab(), teacher_tokenizer.get_vocab()
    vocab_size = min(student_rows, teacher_rows)
    teacher_tokens = {index: token for token, index in teacher.items()}
    for token, index in student.items():
        other = teacher_tokens.get(index)
        if other is not None and other != token:
            raise UserError(
                f"different tokenizers: id {index} is {token!r} for the student and {other!r} for "
                f"the teacher; {_ADVICE}"
            )
    added = set(student_tokenizer.get_added_vocab()) | set(teacher_tokenizer.get_added_vocab())
    for token, index in {**teacher, **student}.items():
        one_sided = student.get(token) != teacher.get(token)
        if (one_sided or index >= vocab_size) and token not in added:
            raise UserError(
                f"different tokenizers: only one of the two has {token!r} at id {index}; {_ADVICE}"
            )
    if not _same_segmentation(student_tokenizer, teacher_tokenizer):
        raise UserError(
            f"different tokenizers: the same ids, but text is cut in another way; {_ADVICE}"
        )
    return vocab_size


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
