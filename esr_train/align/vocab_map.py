"""What the ids of two vocabularies count for, by their bytes; kept on disk."""

from __future__ import annotations

import hashlib
import os
import tempfile
import warnings
from pathlib import Path

import numpy as np

from esr_train.align.byte_tokenizer import ByteTokenizer

PROJECTIONS = ("exact", "project", "merge")
# A change of what is computed here or in `byte_tokenizer` makes another name of the file.
_VERSION = 2


def project_vocabulary(
    student: ByteTokenizer, teacher: ByteTokenizer, projection: str
) -> tuple[np.ndarray, np.ndarray | None]:
    """The student id that each teacher id counts for, and each student id; -1 for none.

    [teacher ids] and [student ids] int64, by text alone; None where a student id counts for itself.

    projection: "exact", the id of equal bytes; "project", the first token that the student writes
    the teacher's bytes with; "merge", ids whose texts begin alike count for one, the lowest student
    id of them: a student id for the first token that the teacher writes its bytes with, and a
    teacher id that no student id begins with for the first token that the student writes it with.
    """
    if projection not in PROJECTIONS:
        raise ValueError(f"projection must be one of {', '.join(PROJECTIONS)}, got {projection!r}")
    sizes = [len(teacher.token_bytes), len(student.token_bytes) if projection == "merge" else 0]
    path = _cache_file(student, teacher, projection)
    found = _read(path, sum(sizes), len(student.token_bytes))
    if found is None:
        found = _build(student, teacher, projection)
        _write(path, found)
    return found[: sizes[0]], found[sizes[0] :] if sizes[1] else None


def cache_folder() -> Path:
    """Under HF_HOME, or the user's cache."""
    home = os.environ.get("HF_HOME") or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "esr_train" / "vocab_maps"


def _build(student: ByteTokenizer, teacher: ByteTokenizer, projection: str) -> np.ndarray:
    """The teacher's ids, and with "merge" the student's behind them."""
    if projection == "exact":
        return _equal(teacher, student)
    if projection == "project":
        every = np.ones(len(teacher.token_bytes), dtype=bool)
        return _first(teacher, student, every)
    # The teacher's id that each student id begins with; equal bytes need no encoding.
    begins = _equal(student, teacher)
    begins = np.where(begins < 0, _first(student, teacher, begins < 0), begins)
    merged = np.full(len(teacher.token_bytes), -1, dtype=np.int64)
    known = np.flatnonzero(begins >= 0)[::-1]
    merged[begins[known]] = known  # of several the lowest stays
    own = np.where(begins < 0, -1, merged[begins])
    first = _first(teacher, student, merged < 0)
    merged = np.where((merged < 0) & (first >= 0), own[first], merged)
    return np.concatenate([merged, own])


def _equal(source: ByteTokenizer, target: ByteTokenizer) -> np.ndarray:
    """[source ids]: the target's id of equal bytes, -1 for none."""
    found = [target.ids_of_bytes.get(piece, -1) if piece else -1 for piece in source.token_bytes]
    return np.array(found, dtype=np.int64)


def _first(source: ByteTokenizer, target: ByteTokenizer, wanted: np.ndarray) -> np.ndarray:
    """[source ids]: the first token that the target writes the bytes with, where `wanted`."""
    found = np.full(len(source.token_bytes), -1, dtype=np.int64)
    ids = [index for index in np.flatnonzero(wanted) if source.token_bytes[index]]
    first = target.first_ids([source.token_bytes[index] for index in ids])
    found[ids] = [-1 if index is None else index for index in first]
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
