"""A kernel as it is launched: what `python -m esr_kernels.aot` compiles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Variant:
    """One compilation: a type or None for every argument, and which integers divide by 16."""

    name: str
    kernel: Any
    types: dict[str, str | None]
    flags: dict[str, Any]
    unaligned: frozenset[str]
    num_warps: int
    max_registers: int | None = None  # NVIDIA only
