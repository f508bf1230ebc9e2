"""The layers' kernels as they are launched, for the ahead-of-time report."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from esr_kernels.layers import decode_kernels, kernels
from esr_kernels.variant import Variant

_LONGS = {"rows_ptr", "slots_ptr", "first_ptr", "last_ptr"}
_FLOATS = {"eps", "offset", "scale", "softcap"}
_SUMS = {"sums_ptr", "stats_ptr", "grad_weight_ptr"}


def variants() -> Iterator[Variant]:
    """Every kernel as it is launched."""
    for dtype in ("bf16", "fp32"):
        for columns, has_residual in ((1536, True), (5120, True), (5120, False)):
            block = 2048 if columns == 1536 else 8192
            flags = {"HAS_RESIDUAL": has_residual, "BLOCK": block}
            name = f"rms_norm ({dtype}, {columns}{', residual' if has_residual else ''})"
            without = set() if has_residual else {"residual_ptr", "total_ptr"}
            warps = kernels.norm_warps(columns)
            yield _variant(name, kernels.rms_norm_kernel, dtype, flags, warps, without)
            flags = {
                "HAS_TOTAL": has_residual,
                "HAS_WEIGHT": columns != 1536,
                "BLOCK": flags["BLOCK"],
            }
            without = set() if has_residual else {"grad_total_ptr"}
            without |= set() if flags["HAS_WEIGHT"] else {"grad_weight_ptr"}
            name = name.replace("rms_norm", "rms_norm backward")
            warps = kernels.norm_warps(columns, backward=True)
            yield _variant(name, kernels.rms_norm_backward_kernel, dtype, flags, warps, without)
        for has_norms, has_rows in ((False, False), (True, True)):
            flags = {"HAS_NORMS": has_norms, "HAS_CACHE": True, "HAS_ROWS": has_rows}
            flags |= {"ONE_SLOT": not has_rows, "HALF_BLOCK": 64, "VALUE_BLOCK": 128}
            without = set() if has_norms else {"query_norm_ptr", "key_norm_ptr"}
            without |= set() if has_rows else {"rows_ptr"}
            name = f"rotate_and_store ({dtype}{', norms, rows' if has_norms else ''})"
            yield _variant(name, decode_kernels.rotate_and_store_kernel, dtype, flags, 1, without)
        for splits, limits, dim in ((4, False, 128), (1, False, 128), (16, True, 256)):
            flags = {"HAS_WINDOW": limits, "HAS_SOFTCAP": limits, "WIDE": dtype == "fp32"}
            flags |= {
                "SPLITS": splits,
                "ROWS": decode_kernels.ROWS,
                "DIM_BLOCK": dim,
                "VALUE_BLOCK": dim,
            }
            flags["SLOTS_BLOCK"] = decode_kernels.slots_block(dim, 2 if dtype == "bf16" else 4)
            without = _SUMS if splits == 1 else set()
            extra = ", window, softcap" if limits else ""
            name = f"decode_attention ({dtype}, {splits} splits of {dim}{extra})"
            yield _variant(name, decode_kernels.decode_attention_kernel, dtype, flags, 4, without)
        flags = {"SPLITS": 16, "VALUE_BLOCK": 256}
        yield _variant(f"join_splits ({dtype})", decode_kernels.join_splits_kernel, dtype, flags, 1)
        flags = {"SILU": dtype == "bf16", "BLOCK": kernels.GATED_BLOCK}
        yield _variant(f"gated ({dtype})", kernels.gated_kernel, dtype, flags, 4)
        flags["HAS_PRODUCT"] = True
        yield _variant(f"gated backward ({dtype})", kernels.gated_backward_kernel, dtype, flags, 4)
        for backward in (False, True):
            flags = {"BACKWARD": backward, "BLOCK": 64}
            name = f"rotate{' backward' if backward else ''} ({dtype})"
            yield _variant(name, kernels.rotate_kernel, dtype, flags, 1)


def _variant(
    name: str,
    kernel: Any,
    dtype: str,
    flags: dict[str, Any],
    num_warps: int,
    without: set[str] | frozenset[str] = frozenset(),
) -> Variant:
    types: dict[str, str | None] = {}
    for argument in kernel.arg_names:
        if argument in flags or argument in without:
            types[argument] = None
        elif argument in _LONGS:
            types[argument] = "*i64"
        elif argument in _SUMS:
            types[argument] = "*fp32"
        elif argument.endswith("_ptr"):
            types[argument] = f"*{dtype}"
        else:
            types[argument] = "fp32" if argument in _FLOATS else "i32"
    counts = {"group", "num_key_heads", "num_queries", "num_keys", "num_rows", "window"}
    return Variant(name, kernel, types, flags, frozenset(counts), num_warps)
