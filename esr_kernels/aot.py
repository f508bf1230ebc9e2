"""`python -m esr_kernels.aot [sm_90 ...]`: compile every kernel without a GPU, fail on a spill.

The variants are those that are really launched: dtypes of logits and gradient, with and without
bias, weights, softcap, statistics and vocabulary map, odd vocabularies. Prints registers, spills,
shared memory and the global loads by width.
Exit code 1 if a kernel spills or the compiler fails.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from esr_kernels.kl import group_kernels as group
from esr_kernels.kl import kernels as kl
from esr_kernels.kl.vocab import SHORT_GROUP

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_AMD_LOAD_BITS = {
    "byte": 8,
    "short": 16,
    "dword": 32,
    "dwordx2": 64,
    "dwordx3": 96,
    "dwordx4": 128,
}


@dataclass(frozen=True)
class Variant:
    """One compilation: a type or None for every argument, and which integers divide by 16."""

    name: str
    kernel: Any
    types: dict[str, str | None]
    flags: dict[str, Any]
    unaligned: frozenset[str]
    num_warps: int


@dataclass(frozen=True)
class Report:
    registers: int
    spills: int
    shared_bytes: int
    loads: Counter[int]  # global load instructions by their width in bits


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
            "BLOCK_SIZE": kl.STATS_BLOCK_SIZE if stats else kl.BLOCK_SIZE,
        }
        unaligned = {"values_ptr", "weights_ptr", "stats_ptr", "stats_stride"}
        yield Variant(
            f"reverse_kl_row ({name})",
            kl.reverse_kl_row_kernel,
            types,
            flags,
            frozenset(unaligned | ({"num_columns"} if odd else set())),
            kl.NUM_WARPS,
        )
    for name, bias, softcap in (("plain", None, False), ("bias, softcap", "bf16", True)):
        types = {
            "logits_ptr": "*fp32",
            "bias_ptr": f"*{bias}" if bias else None,
            "weights_ptr": "*fp32",
            "grouped_ptr": "*fp32",
            "inner": "fp32",
            "outer": "fp32",
        }
        types |= dict.fromkeys(("order_ptr", "offsets_ptr", "by_size_ptr", "num_long_ptr"), "*i32")
        types |= dict.fromkeys(("logits_stride", "grouped_stride", "num_groups"), "i32")
        for part, kernel, flags in (
            ("short", group.group_short_kernel, {"BLOCK_SIZE": group.BLOCK_SIZE}),
            ("long", group.group_long_kernel, {"BLOCK_SIZE": group.LONG_BLOCK_SIZE}),
        ):
            flags |= {"SOFTCAP": softcap, "SHORT": SHORT_GROUP, "PROGRAMS": group.LONG_PROGRAMS}
            yield Variant(
                f"group_{part} ({name})",
                kernel,
                types,
                {flag: value for flag, value in flags.items() if flag in kernel.arg_names},
                frozenset({"weights_ptr", "num_groups"}),
                group.NUM_WARPS,
            )


def compile_variant(variant: Variant, target: GPUTarget) -> Any:
    signature: dict[str, str] = {}
    constexprs: dict[str, Any] = dict(variant.flags)
    attrs: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, name in enumerate(variant.kernel.arg_names):
        kind = variant.types.get(name)
        if kind is None:
            signature[name] = "constexpr"
            constexprs.setdefault(name, None)
            continue
        signature[name] = kind
        if kind != "fp32" and name not in variant.unaligned:
            attrs[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=variant.kernel, signature=signature, constexprs=constexprs, attrs=attrs)
    options = {"num_warps": variant.num_warps}
    if variant.flags.get("WITH_STATS") and target.backend == "cuda":
        options |= {"maxnreg": kl.STATS_MAX_REGISTERS}
    return triton.compile(source, target=target, options=options)


def inspect(compiled: Any, target: GPUTarget) -> Report:
    if target.backend == "hip":
        return _inspect_amdgcn(compiled)
    usage = _resource_usage(compiled.asm["cubin"])
    # LOCAL is what a thread keeps in memory, STACK what it spills: neither is wanted.
    spills = int(usage["STACK"]) + int(usage["LOCAL"])
    widths = re.findall(r"ld\.global(?:\.\w+)*?(?:\.v(\d))?\.b(\d+)", compiled.asm["ptx"])
    loads = Counter(int(count or 1) * int(bits) for count, bits in widths)
    return Report(int(usage["REG"]), spills, compiled.metadata.shared, loads)


def _resource_usage(cubin: bytes) -> dict[str, str]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))


def _inspect_amdgcn(compiled: Any) -> Report:
    text = compiled.asm["amdgcn"]

    def number(name: str) -> int:
        match = re.search(rf"\.{name}:\s*(\d+)", text)
        return int(match.group(1)) if match else 0

    names = re.findall(r"(?:global|buffer)_load_(dwordx?\d?|u?short|u?byte)", text)
    loads = Counter(_AMD_LOAD_BITS[name.lstrip("u")] for name in names)
    spills = number("vgpr_spill_count") + number("sgpr_spill_count")
    return Report(number("vgpr_count"), spills, compiled.metadata.shared, loads)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m esr_kernels.aot", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="target", help=", ".join(TARGETS))
    names = parser.parse_args(arguments).targets or list(TARGETS)
    if unknown := [name for name in names if name not in TARGETS]:
        parser.error(f"target: expected one of {list(TARGETS)}, got {unknown}")
    if kl.INTERPRETED:
        parser.error("TRITON_INTERPRET is set: nothing can be compiled")
    failed = False
    for name in names:
        for variant in variants():
            report = inspect(compile_variant(variant, TARGETS[name]), TARGETS[name])
            failed |= report.spills > 0
            loads = ", ".join(f"{n} x {bits}" for bits, n in sorted(report.loads.items())[::-1])
            print(
                f"{name:7} {variant.name:52} registers {report.registers:3}  "
                f"spills {report.spills:3}  shared {report.shared_bytes:4} B  "
                f"loads {loads} bit{'  SPILLS' if report.spills else ''}"
            )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
