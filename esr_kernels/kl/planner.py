"""How many rows of logits are in flight: the planner and the layout of its workspace."""

from __future__ import annotations

import math

# Below about 550 rows reading the weights no longer hides behind the GEMM on an H100; 512 rows keep
# the workspace at 0.62 GB for V = 152k and 1.07 GB for 262k. Smaller vocabularies get more rows.
MIN_DEFAULT_ROWS = 512
MAX_DEFAULT_ROWS = 2048
DEFAULT_WORKSPACE_BYTES = 600_000_000
# Rows of a GEMM tile: chunk borders between tiles leave at most one tile of the call half empty.
TILE_ROWS = 128
# Workspace rows start on a cache line whatever V is: 16-byte loads, a stride Triton specialises.
ROW_ALIGNMENT_BYTES = 128


def row_stride(vocab_size: int, itemsize: int) -> int:
    """Elements from one workspace row to the next."""
    unit = ROW_ALIGNMENT_BYTES // itemsize
    return math.ceil(vocab_size / unit) * unit


def row_strides(
    student_vocab: int, teacher_vocab: int, mapped: bool, shared: bool, itemsize: int
) -> list[int]:
    """Elements a row takes in the workspace: student, teacher and, with a map, grouped teacher.

    The grouped row has one column more, for the teacher's ids that the map leaves out. With a
    student map the grouped teacher is shared out over the teacher's logits, and the last row holds
    the peaks of the student's classes.
    """
    widths = [student_vocab, teacher_vocab]
    if mapped:
        widths.append(student_vocab + 1)
    if shared:
        widths[1] = max(teacher_vocab, student_vocab + 1)
        widths.append(student_vocab)
    return [row_stride(width, itemsize) for width in widths]


def plan_chunks(num_rows: int, row_bytes: int, max_workspace_bytes: int | None) -> list[int]:
    """Chunk borders `[0, ..., num_rows]`.

    The workspace is `rows * row_bytes`, with `row_bytes` all logits of one row: 8 B * V in float32
    (V rounded up to 32), 16 B * V in float64, more with maps. The rows of a chunk
    are capped at `max_workspace_bytes // row_bytes`, by default at what 600 MB hold but between 512
    and 2048. The fewest chunks that this allows share the rows evenly: in whole tiles of 128 rows
    when a chunk may hold four of them, else to within a row. So the last chunk is never a sliver,
    and few rows are one chunk.
    """
    if max_workspace_bytes is None:
        rows = DEFAULT_WORKSPACE_BYTES // row_bytes
        cap = min(max(rows, MIN_DEFAULT_ROWS), MAX_DEFAULT_ROWS)
    else:
        cap = max_workspace_bytes // row_bytes
    unit = TILE_ROWS if cap >= 4 * TILE_ROWS else 1
    num_tiles = math.ceil(num_rows / unit)
    num_chunks = math.ceil(num_tiles / (cap // unit))
    # The first chunks take the odd tiles: the last tile may be a partial one.
    tiles = [math.ceil(num_tiles * i / num_chunks) for i in range(num_chunks)]
    return [tile * unit for tile in tiles] + [num_rows]
