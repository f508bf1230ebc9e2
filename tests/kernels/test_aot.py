"""Every kernel compiles for every target: no spill, 16-byte loads of the logits."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest
import torch
from kl_cases import DEVICE, make_inputs

from esr_kernels import aot, linear_reverse_kl
from esr_kernels.kl import group_kernels, kernels

CODE = """
import json
from esr_kernels import aot
target = aot.TARGETS[{target!r}]
for variant in aot.variants():
    compiled = aot.compile_variant(variant, target)
    report = aot.inspect(compiled, target)
    ptx = compiled.asm.get("ptx", "")
    shared = report.shared_bytes
    print(json.dumps([variant.name, report.registers, report.spills, shared, report.loads, ptx]))
"""


@pytest.mark.parametrize(
    "target",
    [
        "sm_90",
        pytest.param("sm_80", marks=pytest.mark.slow),
        pytest.param("sm_100", marks=pytest.mark.slow),
        pytest.param("gfx942", marks=pytest.mark.slow),
    ],
)
def test_compiles_without_spills(target: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", CODE.format(target=target)],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(reports) == 70
    nvidia = target != "gfx942"
    for name, registers, spills, shared, loads, ptx in reports:
        assert spills == 0, name
        assert registers <= 128, name  # two programs of 256 threads on an SM at the least
        if name.startswith("sample_tokens"):
            check_sampling(name, shared, loads, nvidia)
            continue
        if not name.startswith("reverse_kl_row"):
            continue  # a gather, or single tokens
        # 16 columns a thread of two rows on NVIDIA and 8 on AMD, the teacher's again for its rank,
        # or both again for the gradient.
        vectors = 8 if nvidia else 4
        if "no gradient" not in name:
            vectors *= 2
        elif "statistics" in name:
            vectors = vectors * 3 // 2
        if "statistics" in name:  # with half the columns
            vectors //= 2
        if "logits bf16" in name or "logits fp16" in name:
            vectors //= 2
        # AMD's 512 threads have four 16-bit columns each of a block of statistics: 8 bytes.
        halved = not nvidia and name.endswith("(logits bf16, statistics)")
        assert loads.get("64" if halved else "128", 0) >= (vectors * 2 if halved else vectors), name
        if "odd V" not in name:
            # What is left are scalars: the weight, the mass outside the map.
            narrow = sum(n for width, n in loads.items() if int(width) < 64)
            assert narrow <= 2, name
        if not nvidia:
            continue
        # The gradient overwrites what was read: not through the read-only cache, and a barrier
        # between loads and stores, which the interpreter would not miss.
        assert "ld.global.nc" not in ptx, name
        steps = re.findall(r"(ld|st)\.global|(bar)\.sync", ptx)
        order = " ".join(global_ or barrier for global_, barrier in steps)
        pattern = r"ld .*bar (st ?)+$" if "statistics" in name else r"(ld ){4}.*ld bar (st ?)+$"
        assert "no gradient" in name or re.search(pattern, order), name


def check_sampling(name: str, shared: int, loads: dict[str, int], nvidia: bool) -> None:
    # Four or, greedy, eight columns a thread of a tile on NVIDIA, half of that on AMD.
    bits = 64 if nvidia else 32
    bits *= (2 if "fp32" in name else 1) * (2 if "greedy" in name else 1)
    # Of both bodies; with an odd V only the loop's, as the tail is masked.
    assert loads.get(str(min(bits, 128)), 0) >= (4 if "odd V" in name else 8), name
    # A word a warp for the last reductions: no noise moves between threads.
    assert shared <= 64, name


# What a kernel's compilation depends on beside types and the caller's options.
SIZES = ("WITH_STATS", "BLOCK_SIZE", "SHORT", "PROGRAMS")


class Launches:
    """Stands for a kernel; the sizes, warps and limits on registers it was launched with."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.seen: set[Any] = set()

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **options: Any) -> None:
            flags = {n: x for n, x in options.items() if n in self.kernel.arg_names}
            self.seen.add(key(flags, options["num_warps"], options.get("maxnreg")))
            self.kernel[grid](*arguments, **flags)

        return launch


def key(flags: dict[str, Any], num_warps: int, max_registers: int | None) -> Any:
    return *(flags.get(name) for name in SIZES), num_warps, max_registers


def test_what_is_compiled_is_what_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = {}
    for module, name in (
        (kernels, "reverse_kl_row_kernel"),
        (group_kernels, "group_short_kernel"),
        (group_kernels, "group_long_kernel"),
        (group_kernels, "share_kernel"),
    ):
        launched[name] = Launches(getattr(module, name))
        monkeypatch.setattr(module, name, launched[name])
    inputs = make_inputs(2, 67, 67)
    sides = inputs.student_hidden, inputs.student_head, inputs.teacher_hidden, inputs.teacher_head
    vocab_map = torch.arange(67, device=DEVICE) // 2
    for stats in (False, True):
        maps = {"vocab_map": vocab_map, "student_map": vocab_map if stats else None}
        linear_reverse_kl(*sides, **maps, return_stats=stats, impl="triton")
    monkeypatch.undo()
    for launches in launched.values():
        compiled = [v for v in aot.variants() if v.kernel is launches.kernel]
        assert launches.seen == {key(v.flags, v.num_warps, v.max_registers) for v in compiled}


def test_a_spill_fails_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def report(spills: int) -> Any:
        return lambda *_: aot.Report(64, spills, 0, Counter({128: 16}))

    monkeypatch.setattr(aot, "INTERPRETED", False)
    monkeypatch.setattr(aot, "compile_variant", lambda *_: None)
    monkeypatch.setattr(aot, "inspect", report(0))
    assert aot.main(["sm_80", "gfx942"]) == 0
    monkeypatch.setattr(aot, "inspect", report(8))
    assert aot.main(["sm_90"]) == 1


def test_unknown_target_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        aot.main(["sm_13"])
    assert "target: expected one of" in capsys.readouterr().err
