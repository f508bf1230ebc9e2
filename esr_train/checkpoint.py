"""Checkpoints and run folders: written whole or not at all, never over what is there."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from esr_train.config import TrainConfig
from esr_train.errors import UserError, first_line

CONFIG_FILE = "config.yaml"
STATE_FILE = "trainer_state.pt"


def check_new_run_folder(path: Path) -> None:
    """Raises UserError unless `path` is new or an empty folder. Touches nothing."""
    try:
        taken = path.is_dir() and any(path.iterdir())
    except OSError as error:  # a name that cannot be, a folder that may not be read
        raise _cannot_write(path, error) from error
    if taken:
        way_out = f", or go on with --resume {path}" if (path / CONFIG_FILE).is_file() else ""
        raise UserError(f"output_dir {path} exists and is not empty: name another{way_out}")
    if path.exists() and not path.is_dir():
        raise UserError(f"output_dir {path} is a file: name a folder")


@contextmanager
def new_run_folder(path: Path, config: TrainConfig) -> Iterator[None]:
    """Make the folder with its config.yaml, and hold it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_write(path, error) from error
    with held_run_folder(path):
        check_new_run_folder(path)
        try:
            write_atomically(path / CONFIG_FILE, config.to_yaml())
        except OSError as error:
            raise _cannot_write(path, error) from error
        yield


def _cannot_write(path: Path, error: OSError) -> UserError:
    return UserError(
        f"output_dir {path} cannot be written ({error.strerror}): make room, or name another"
    )


@contextmanager
def held_run_folder(path: Path) -> Iterator[None]:
    """Keep other processes out; the system lets go when this one ends, however it ends."""
    folder = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{path}: another process is training into this folder") from None
        yield
    finally:
        os.close(folder)


@contextmanager
def full_disk_names(path: Path) -> Iterator[None]:
    """Turn whatever a full disk raises in here into an OSError that names `path`."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        # torch and safetensors wrap the file system's error in their own.
        if os.strerror(errno.ENOSPC) not in f"{error} {error.__context__}":
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a file's content in one step: a reader sees the old one or the new."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with full_disk_names(path):
            partial.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, json.dumps(value, indent=2) + "\n")


def save_checkpoint(
    run: Path, step: int, model: Any, tokenizer: Any, optimizer: Any, scheduler: Any
) -> Path:
    """`checkpoint-<step>/` in the format of Transformers or PEFT, with the optimizer's state.

    Random state is not saved: every step seeds itself from (seed, step).
    """
    final = run / f"checkpoint-{step}"
    partial = run / f".{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    state = {
        "step": step,
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
    }
    try:
        with full_disk_names(final):
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            with (partial / STATE_FILE).open("wb") as file:
                torch.save(state, file)
        os.replace(partial, final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return final


def latest_checkpoint(run: Path) -> Path | None:
    """The checkpoint with the highest step, or None."""
    steps = {
        int(match[1]): path
        for path in run.iterdir()
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name))
    }
    return steps[max(steps)] if steps else None


def load_state(checkpoint: Path, optimizer: Any, scheduler: Any) -> int:
    """Restore optimizer and schedule in place; returns the number of steps done."""
    try:
        state = torch.load(checkpoint / STATE_FILE, map_location="cpu", weights_only=True)
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        return int(state["step"])
    except Exception as error:  # of torch, zipfile, pickle
        raise unreadable(checkpoint, error) from error


def unreadable(checkpoint: Path, error: Exception) -> UserError:
    return UserError(
        f"{checkpoint} cannot be read ({first_line(error)}): delete it to resume from the last "
        "one before it"
    )
