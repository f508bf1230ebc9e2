"""Which student id a teacher id counts for, by the bytes of both; kept on disk."""

from __future__ import annotations

import hashlib
import os
import tempfile
import warnings
from pathlib import Path

import numpy as np

from esr_train.align.byte_tokenizer import ByteTokenizer

PROJECTIONS = ("exact", "project")
# A change of what is computed here or in `byte_tokenizer` makes another name of the file.
_VERSION = 1


def project_vocabulary(
    student: ByteTokenizer, teacher: ByteTokenizer, projection: str
) -> np.ndarray:
    """[teacher ids] int64: the student id each counts for, -1 for none, by text alone.

    projection: "exact", the id of equal bytes; "project", the first token that the student writes
    the teacher's bytes with.
    """
    if projection not in PROJECTIONS:
        raise ValueError(f"projection must be one of {', '.join(PROJECTIONS)}, got {projection!r}")
    size = len(teacher.token_bytes)
    path = _cache_file(student, teacher, projection)
    found = _read(path, size, len(student.token_bytes))
    if found is None:
        found = _build(student, teacher, projection)
        _write(path, found)
    return found


def cache_folder() -> Path:
    """Under HF_HOME, or the user's cache."""
    home = os.environ.get("HF_HOME") or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "esr_train" / "vocab_maps"


def _build(student: ByteTokenizer, teacher: ByteTokenizer, projection: str) -> np.ndarray:
    found = np.full(len(teacher.token_bytes), -1, dtype=np.int64)
    ids = [index for index, piece in enumerate(teacher.token_bytes) if piece]
    pieces = [teacher.token_bytes[index] for index in ids]
    if projection == "exact":
        found[ids] = [student.ids_of_bytes.get(piece, -1) for piece in pieces]
    else:
        found[ids] = [-1 if first is None else first for first in student.first_ids(pieces)]
    return found


def _cache_file(student: ByteTokenizer, teacher: ByteTokenizer, projection: str) -> Path:
    # EOS ids are no text whatever the files say of them.
    parts = [
        part
        for side in (student, teacher)
        for part in (side.fingerprint, ",".join(map(str, sorted(side.no_text))))
    ]
    key = hashlib.sha256("\n".join([str(_VERSION), *parts]).encode()).hexdigest()
    return cache_folder() / f"{projection}-{key[:32]}.npy"


def _read(path: Path, size: int, student_size: int) -> np.ndarray | None:
    """None if there is no such file, or not one that `_write` wrote whole."""
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    if not isinstance(found, np.ndarray) or found.shape != (size,) or found.dtype != np.int64:
        return None
    return found if found.min(initial=-1) >= -1 and found.max(initial=-1) < student_size else None


def _write(path: Path, found: np.ndarray) -> None:
    """All of it or nothing: other processes may read and write the same file."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            try:
                np.save(file, found)
                file.close()
                os.replace(file.name, path)
            except OSError:
                os.unlink(file.name)
                raise
    except OSError as error:
        warnings.warn(
            f"the vocabulary map could not be kept in {path.parent} ({error.strerror}); every run "
            "will make it anew: set HF_HOME to a folder that can be written",
            stacklevel=3,
        )
