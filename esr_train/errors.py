"""The error that a user can act on."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


class UserError(Exception):
    """One line that names what was wrong and the way out; the command line exits with 2 on it."""


def first_line(error: BaseException) -> str:
    """Of a library's message, which may be a page."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# What makes each part of a run smaller, for the message when its memory runs out.
_SMALLER_STEP = (
    "per_device_train_batch_size (and raise gradient_accumulation_steps by as much), or "
    "rollout_tokens (in full rollouts max_completion_length)"
)
_LESS_MEMORY = {
    "student_generation": _SMALLER_STEP,
    "teacher_scoring": _SMALLER_STEP,
    "student_training": f"{_SMALLER_STEP}, or set gradient_checkpointing",
    "evaluation": "per_device_eval_batch_size, or max_completion_length",
}
_BYTES = {"B": 1, "bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@contextmanager
def memory_named(part: str) -> Iterator[None]:
    """Turn an out-of-memory error in here into one that says where, by how much, and the way out.

    part: a phase of the step, or "evaluation".
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        # The CPU's allocator has no error class of its own.
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in text:
            raise
        raise UserError(
            f"{part} ran out of memory{_shortage(text)}. Lower {_LESS_MEMORY[part]}"
        ) from error


def _shortage(text: str) -> str:
    """What an allocator's message says of the sizes."""
    asked = _amount(r"[Tt]ri(?:ed|ng) to allocate ([\d.]+) (\w+)", text)
    free = _amount(r"of which ([\d.]+) (\w+) is free", text)
    if asked is None:
        return ""
    sizes = f": {_gib(asked)} asked for"
    if free is None:
        return sizes
    if free < asked:
        return f"{sizes}, {_gib(free)} free, {_gib(asked - free)} too little"
    return f"{sizes}, {_gib(free)} free in pieces (try PYTORCH_ALLOC_CONF=expandable_segments:True)"


def _amount(pattern: str, text: str) -> float | None:
    match = re.search(pattern, text)
    return float(match[1]) * _BYTES[match[2]] if match and match[2] in _BYTES else None


def _gib(count: float) -> str:
    return f"{count / 2**30:,.2f} GiB"


def loading_error(role: str, name: str, what: str, error: Exception) -> UserError:
    """`what` of the model that option `role` calls `name` could not be loaded, and why."""
    path = Path(name)
    if path.is_absolute() or name.startswith((".", "~")) or path.exists():
        if not path.is_dir():
            return UserError(f"{role} {name}: no such folder")
        if (path / "adapter_config.json").is_file():
            return UserError(
                f"{role} {name}: this is an adapter, not a model; merge it into its base model "
                "(PeftModel.merge_and_unload) and save that"
            )
        if not (path / "config.json").is_file():
            return UserError(
                f"{role} {name}: no config.json in it; expected a saved model's folder"
            )
    return UserError(
        f"{role} {name}: its {what} could not be loaded ({first_line(error)}); "
        "expected a local folder or the id of a model on the Hub"
    )
