"""Every kernel compiles for Ampere and Hopper: no spill, 16-byte loads of the logits."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest

from esr_kernels import aot

CODE = """
import json
from esr_kernels import aot
target = aot.TARGETS[{target!r}]
for variant in aot.variants():
    compiled = aot.compile_variant(variant, target)
    report = aot.inspect(compiled, target)
    ptx = compiled.asm["ptx"]
    print(json.dumps([variant.name, report.registers, report.spills, report.loads, ptx]))
"""


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
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
    assert len(reports) == 8
    for name, registers, spills, loads, ptx in reports:
        assert spills == 0, name
        assert registers <= 128, name  # two programs of 256 threads on an SM at the least
        # 16 columns a thread of two rows, in one pass or two
        assert loads["128"] >= (8 if "no gradient" in name else 16), name
        # The gradient overwrites what was read: not through the read-only cache, and a barrier
        # between loads and stores, which the interpreter would not miss.
        assert "ld.global.nc" not in ptx, name
        steps = re.findall(r"(ld|st)\.global|(bar)\.sync", ptx)
        order = " ".join(global_ or barrier for global_, barrier in steps)
        assert "no gradient" in name or re.search(r"(ld ){8}.*\bld bar (st ?)+$", order), name


def test_a_spill_fails_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def report(spills: int) -> Any:
        return lambda *_: aot.Report(64, spills, 0, Counter({128: 16}))

    monkeypatch.setattr(aot.kl, "INTERPRETED", False)
    monkeypatch.setattr(aot, "compile_variant", lambda *_: None)
    monkeypatch.setattr(aot, "inspect", report(0))
    assert aot.main(["sm_80", "gfx942"]) == 0
    monkeypatch.setattr(aot, "inspect", report(8))
    assert aot.main(["sm_90"]) == 1


def test_unknown_target_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        aot.main(["sm_13"])
    assert "target: expected one of" in capsys.readouterr().err
