"""The row and group kernels as they are launched, for the ahead-of-time report."""

from __future__ import annotations

from collections.abc import Iterator

from esr_kernels.kl import group_kernels as group
from esr_kernels.kl import kernels
from esr_kernels.kl.vocab import SHORT_GROUP
from esr_kernels.variant import Variant

_STRIDES = ("student_stride", "teacher_stride", "grad_stride", "num_columns", "num_readable")
_FACTORS = ("student_inner", "student_outer", "teacher_inner", "teacher_outer")


def variants() -> Iterator[Variant]:
    """Every kernel as it is launched."""
    # name, logits, gradient, bias, softcap, vocabulary map, statistics, V not a multiple of 16
    for name, logits, grad, bias, softcap, mapped, stats, odd in (
        ("bf16", "fp32", "bf16", None, False, False, False, False),
        ("bf16, odd V", "fp32", "bf16", None, False, False, False, True),
        ("bf16, bias, softcap", "fp32", "bf16", "bf16", True, False, False, False),
        ("bf16, statistics", "fp32", "bf16", None, False, False, True, False),
        ("bf16, bias, softcap, statistics", "fp32", "bf16", "bf16", True, False, True, False),
        ("bf16, map", "fp32", "bf16", None, False, True, False, False),
        ("bf16, map, statistics, odd V", "fp32", "bf16", None, False, True, True, True),
        ("fp16", "fp32", "fp16", None, False, False, False, False),
        ("fp32", "fp32", "fp32", None, False, False, False, False),
        ("fp32, bias, softcap, odd V", "fp32", "fp32", "fp32", True, False, False, True),
        ("fp32, map, softcap, statistics", "fp32", "fp32", "fp32", True, True, True, False),
        ("no gradient", "fp32", None, None, False, False, False, False),
        ("no gradient, softcap", "fp32", None, None, True, False, False, False),
        ("no gradient, statistics", "fp32", None, None, False, False, True, False),
        ("no gradient, map, statistics", "fp32", None, None, False, True, True, False),
        ("logits bf16", "bf16", "bf16", None, False, False, False, False),
        ("logits bf16, statistics", "bf16", "bf16", None, False, False, True, False),
        ("logits fp16", "fp16", "fp16", None, False, False, False, False),
        ("logits fp32", "fp32", "fp32", None, False, False, False, False),
        ("logits bf16, no gradient", "bf16", None, None, False, False, False, False),
    ):
        types: dict[str, str | None] = dict.fromkeys(_STRIDES, "i32")
        types |= dict.fromkeys(_FACTORS, "fp32")
        types |= {
            "student_ptr": f"*{logits}",
            "teacher_ptr": "*fp32" if mapped else f"*{logits}",
            "grad_ptr": f"*{grad}" if grad else None,
            "student_bias_ptr": f"*{bias}" if bias else None,
            "teacher_bias_ptr": f"*{bias}" if bias and not mapped else None,
            "weights_ptr": "*fp32" if odd or stats or grad is None else None,
            "values_ptr": "*fp32",
            "stats_ptr": "*fp32" if stats else None,
            "stats_stride": "i32",
        }
        flags = {
            "STUDENT_SOFTCAP": softcap,
            "TEACHER_SOFTCAP": softcap and not mapped,
            "MAPPED": mapped,
            "WITH_GRAD": grad is not None,
            "WITH_STATS": stats,
            "BLOCK_SIZE": kernels.STATS_BLOCK_SIZE if stats else kernels.BLOCK_SIZE,
        }
        unaligned = {"values_ptr", "weights_ptr", "stats_ptr", "stats_stride"}
        yield Variant(
            f"reverse_kl_row ({name})",
            kernels.reverse_kl_row_kernel,
            types,
            flags,
            frozenset(unaligned | ({"num_columns"} if odd else set())),
            kernels.NUM_WARPS,
            kernels.STATS_MAX_REGISTERS if stats else None,
        )
    for name, bias, softcap, shares in (
        ("plain", None, False, False),
        ("bias, softcap", "bf16", True, False),
        ("plain", None, False, True),
        ("bias, softcap", "bf16", True, True),
    ):
        whose = "student's, " if shares else ""
        types = {
            "logits_ptr": "*fp32",
            "bias_ptr": f"*{bias}" if bias else None,
            "weights_ptr": "*fp32",
            "grouped_ptr": "*fp32",
            "teacher_ptr": "*fp32" if shares else None,
            "inner": "fp32",
            "outer": "fp32",
        }
        types |= dict.fromkeys(("order_ptr", "offsets_ptr", "by_size_ptr", "num_long_ptr"), "*i32")
        strides = ("logits_stride", "grouped_stride", "teacher_stride", "num_groups")
        types |= dict.fromkeys(strides, "i32")
        for part, kernel, flags in (
            ("short", group.group_short_kernel, {"BLOCK_SIZE": group.BLOCK_SIZE}),
            ("long", group.group_long_kernel, {"BLOCK_SIZE": group.LONG_BLOCK_SIZE}),
        ):
            flags |= {"SOFTCAP": softcap, "SHORT": SHORT_GROUP, "PROGRAMS": group.LONG_PROGRAMS}
            yield Variant(
                f"group_{part} ({whose}{name})",
                kernel,
                types,
                {flag: value for flag, value in flags.items() if flag in kernel.arg_names},
                frozenset({"weights_ptr", "num_groups"}),
                group.NUM_WARPS,
            )
        if not shares:
            continue
        types |= dict.fromkeys(("peaks_ptr", "shared_ptr"), "*fp32") | {"class_of_ptr": "*i32"}
        types |= dict.fromkeys(("peaks_stride", "shared_stride", "num_columns"), "i32")
        yield Variant(
            f"share ({name})",
            group.share_kernel,
            types,
            {"SOFTCAP": softcap, "BLOCK_SIZE": group.BLOCK_SIZE},
            frozenset({"weights_ptr", "num_columns"}),
            group.NUM_WARPS,
        )
