"""Prompts: from a file or the Hub, through the chat template, to padded token ids."""

from __future__ import annotations

import codecs
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from esr_train.align import Vocabulary
from esr_train.config import TrainConfig
from esr_train.demo import task as demo_task
from esr_train.errors import UserError, first_line

# Prompts the demo trains on; 60 steps of 16 never see one twice.
DEMO_TRAIN_PROMPTS = 4096


@dataclass(frozen=True)
class Prompts:
    """Tokenized prompts of a run.

    train, eval: lists of token ids. grade: (index of the eval prompt, response text) -> right or
    wrong, or None where the data has no answers. num_dropped: prompts that are empty or too long
    for the context. num_truncated: too long ones that were cut instead. num_repeated: prompts that
    were there before. templated: they end where a chat's answer begins.
    teacher_ids: a prompt as a teacher with another tokenizer reads it, by the student's ids.
    """

    train: list[list[int]]
    eval: list[list[int]]
    grade: Callable[[int, str], bool] | None
    num_dropped: int = 0
    num_truncated: int = 0
    num_repeated: int = 0
    templated: bool = False
    teacher_ids: dict[tuple[int, ...], list[int]] = field(default_factory=dict)


def load_prompts(
    config: TrainConfig,
    vocabulary: Vocabulary,
    max_prompt_tokens: int,
    max_teacher_prompt_tokens: int = sys.maxsize,
) -> Prompts:
    """The prompts that `config` names, of so many tokens at most.

    Raises UserError where none are left to train on.
    """
    tokenizer, teacher = vocabulary.tokenizer, vocabulary.teacher
    if config.dataset_name is None:
        # Another seed than the corpus the two models were made from; the test split is disjoint.
        train = demo_task.make_problems("train", DEMO_TRAIN_PROMPTS, seed=config.seed + 1)
        held_out = demo_task.make_problems("test", config.num_eval_prompts)
        texts = [problem.prompt for problem in (*train, *held_out)]
        encoded = encode_prompts(texts, tokenizer, False)
        return Prompts(
            train=encoded[: len(train)],
            eval=encoded[len(train) :],
            grade=lambda index, text: demo_task.grade(text, held_out[index].answer),
            teacher_ids=_by_student_ids(
                encoded, encode_prompts(texts, teacher.tokenizer, False, "teacher")
            )
            if teacher
            else {},
        )

    rows = read_prompts(config)
    templated = is_templated(rows, tokenizer, config.apply_chat_template)
    encoded = encode_prompts(rows, tokenizer, templated)
    _check_ids(config, encoded, vocabulary, "student")
    teacher_ids: dict[tuple[int, ...], list[int]] = {}
    if teacher:
        read = encode_prompts(rows, teacher.tokenizer, templated, "teacher")
        _check_ids(config, read, teacher, "teacher")
        teacher_ids = _by_student_ids(encoded, read)
    num_truncated = 0
    if config.long_prompts == "truncate":
        if teacher:
            raise UserError(
                "long_prompts truncate cuts at a token, and the teacher's tokenizer has others: "
                "use long_prompts drop, or shorten the prompts"
            )
        num_truncated = sum(len(ids) > max_prompt_tokens for ids in encoded)
        encoded = [ids[-max_prompt_tokens:] for ids in encoded]
    # Once each: a repeated prompt would be trained on and held out.
    different = list(dict.fromkeys(map(tuple, encoded)))
    kept = [
        list(ids)
        for ids in different
        if 0 < len(ids) <= max_prompt_tokens
        and 0 < len(teacher_ids.get(ids, ids)) <= max_teacher_prompt_tokens
    ]
    if not kept:
        raise UserError(
            f"dataset_name {config.dataset_name}: each of its {len(encoded)} prompts is empty or "
            f"longer than the {max_prompt_tokens} tokens that the context leaves; lower "
            "max_completion_length"
        )
    # At most a tenth is held out, so a small data set still trains on its prompts.
    num_eval = min(config.num_eval_prompts, len(kept) // 10)
    order = prompt_order(len(kept), 0, len(kept), config.seed)
    return Prompts(
        train=[kept[index] for index in order[num_eval:]],
        eval=[kept[index] for index in order[:num_eval]],
        grade=None,
        num_dropped=len(different) - len(kept),
        num_truncated=num_truncated,
        num_repeated=len(encoded) - len(different),
        templated=templated,
        teacher_ids=teacher_ids,
    )


def _check_ids(
    config: TrainConfig, encoded: list[list[int]], vocabulary: Vocabulary, role: str
) -> None:
    for number, ids in enumerate(encoded, 1):
        if max(ids, default=0) >= vocabulary.size:
            token = vocabulary.tokenizer.convert_ids_to_tokens(max(ids))
            raise UserError(
                f"dataset_name {config.dataset_name}, prompt {number}: the {role}'s token "
                f"{token!r} is id {max(ids)}, past the {vocabulary.size} ids that count"
            )


def _by_student_ids(
    encoded: list[list[int]], read: list[list[int]]
) -> dict[tuple[int, ...], list[int]]:
    """The first of several prompts that the student cannot tell apart."""
    found: dict[tuple[int, ...], list[int]] = {}
    for own, other in zip(encoded, read, strict=True):
        found.setdefault(tuple(own), other)
    return found


def read_prompts(config: TrainConfig) -> list[Any]:
    """The prompt column: all strings, or all lists of {"role", "content"} messages."""
    name, column = str(config.dataset_name), config.prompt_column
    path = Path(name)
    if path.suffix in (".jsonl", ".parquet") and not path.is_file():
        raise UserError(f"dataset_name {name}: no such file")
    jsonl = path.suffix == ".jsonl"
    rows = dict(read_jsonl(path, column)) if jsonl else dict(_load_dataset(config, column))
    if not rows:
        raise UserError(f"dataset_name {name}: no prompts in it")
    kind = type(next(iter(rows.values())))
    for place, prompt in rows.items():
        if not isinstance(prompt, (str, list)) or type(prompt) is not kind:
            raise UserError(
                f"{name}, {place}: column {column} must hold strings only, or lists of messages "
                f"only; here is a {type(prompt).__name__}"
            )
    return list(rows.values())


def read_jsonl(path: Path, column: str) -> Iterator[tuple[str, Any]]:
    """("line n", value) of one column of a JSON-lines file; empty lines are skipped."""
    try:
        lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).splitlines()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path}, line {number}: not UTF-8 text ({error.reason}); re-encode the file"
            ) from error
        except (json.JSONDecodeError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: expected a JSON object")
        if column not in row:
            raise UserError(f"{path}, line {number}: {_missing_column(column, list(row))}")
        yield f"line {number}", row[column]


def _load_dataset(config: TrainConfig, column: str) -> Iterator[tuple[str, Any]]:
    from datasets import load_dataset

    name = str(config.dataset_name)
    try:
        if Path(name).suffix == ".parquet":
            dataset = load_dataset("parquet", data_files=name, split="train")
        else:
            dataset = load_dataset(name, config.dataset_config, split=config.dataset_train_split)
    except Exception as error:  # datasets raises many types, down to pyarrow's
        raise UserError(
            f"dataset_name {name} could not be loaded ({first_line(error)}): expected a .jsonl or "
            ".parquet file or the name of a data set on the Hub"
        ) from error
    if column not in dataset.column_names:
        raise UserError(f"dataset_name {name}: {_missing_column(column, dataset.column_names)}")
    for number, value in enumerate(dataset[column], 1):
        yield f"row {number}", value


def _missing_column(column: str, columns: list[str]) -> str:
    return f"no column {column}; it has {', '.join(columns) or 'none'} (set prompt_column)"


def is_templated(prompts: list[Any], tokenizer: Any, apply_chat_template: bool | None) -> bool:
    """Whether prompts, all strings or all lists of messages, go through a chat template."""
    if not all(isinstance(prompt, str) for prompt in prompts):
        return True
    return bool(tokenizer.chat_template if apply_chat_template is None else apply_chat_template)


def encode_prompts(
    prompts: list[Any], tokenizer: Any, templated: bool, role: str = "student"
) -> list[list[int]]:
    """Token ids of the prompts, all strings or all lists of messages, ready for an answer.

    role: whose tokenizer it is, for messages.
    """
    if not templated:
        return _tokenize(prompts, tokenizer, add_special_tokens=True)
    if not tokenizer.chat_template:
        raise UserError(
            f"the {role}'s tokenizer has no chat template, which prompts made of messages need: "
            "use string prompts with apply_chat_template false, or add a chat_template.jinja to "
            "the model's folder"
        )
    prompts = [
        [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        for prompt in prompts
    ]
    texts = []
    for number, messages in enumerate(prompts, 1):
        try:
            texts.append(
                tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            )
        except Exception as error:  # Jinja's and the template's own
            raise UserError(
                f"prompt {number}: the {role}'s chat template refused it ({error}): change the "
                "messages, or the template in the model's folder"
            ) from error
    # The template writes the special tokens itself.
    return _tokenize(texts, tokenizer, add_special_tokens=False)


def _tokenize(texts: list[str], tokenizer: Any, add_special_tokens: bool) -> list[list[int]]:
    for number, text in enumerate(texts, 1):
        if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
            raise UserError(f"prompt {number} holds half a character (a lone surrogate): mend it")
    if not texts:
        return []
    return list(tokenizer(texts, add_special_tokens=add_special_tokens)["input_ids"])


def mix_seed(seed: int, index: int) -> int:
    """A seed for the index-th of a series; those of nearby seeds do not overlap."""
    return (seed * 1_000_003 + index) % 2**63


def prompt_order(num_prompts: int, start: int, count: int, seed: int) -> list[int]:
    """Indices of draws start .. start + count, shuffled anew each epoch, from `seed` alone."""
    indices: list[int] = []
    while len(indices) < count:
        epoch, offset = divmod(start + len(indices), num_prompts)
        generator = torch.Generator().manual_seed(mix_seed(seed, epoch))
        order = torch.randperm(num_prompts, generator=generator).tolist()
        indices += order[offset : offset + count - len(indices)]
    return indices


def pad_left(
    prompts: list[list[int]], pad_token_id: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """prompt_ids [B, P] int64 and prompt_mask [B, P] bool, padded on the left."""
    width = max(map(len, prompts))
    ids = [[pad_token_id] * (width - len(prompt)) + prompt for prompt in prompts]
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    mask = torch.arange(width) >= (width - lengths)[:, None]
    return torch.tensor(ids).to(device), mask.to(device)
