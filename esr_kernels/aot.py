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

from esr_kernels.kl import variants as kl
from esr_kernels.launch import INTERPRETED
from esr_kernels.layers import variants as layers
from esr_kernels.rollout import variants as rollout
from esr_kernels.sampling import variants as sampling
from esr_kernels.variant import Variant

OPERATIONS = (kl, layers, rollout, sampling)
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
class Report:
    registers: int
    spills: int
    shared_bytes: int
    loads: Counter[int]  # global load instructions by their width in bits


def variants() -> Iterator[Variant]:
    """Every kernel as it is launched."""
    for operation in OPERATIONS:
        yield from operation.variants()


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
    if variant.max_registers and target.backend == "cuda":
        options["maxnreg"] = variant.max_registers
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
    if INTERPRETED:
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
