"""The command line as a user meets it: exit codes, one clear line, nothing half-written."""

import dataclasses
import errno
import re
import subprocess
import sys
from pathlib import Path

import pytest

from esr_train.__main__ import guarded
from esr_train.config import TrainConfig
from esr_train.errors import UserError

ROOT = Path(__file__).parents[2]


def run(*words, check=False):
    return subprocess.run(
        [sys.executable, "-m", "esr_train", *words], capture_output=True, text=True, check=check
    )


def test_a_run_from_the_shell(words, tmp_path):
    done = run(*words, "--max_steps=1", check=True)
    assert "| KL in the first 6 tokens, nats/token |" in done.stdout
    assert "| student generation |" in done.stdout
    assert "Warning" not in done.stderr
    assert "loss" in done.stderr
    assert (tmp_path / "run" / "checkpoint-1" / "adapter_config.json").is_file()

    again = run(*words)
    assert again.returncode == 2
    assert again.stdout == ""
    assert again.stderr.splitlines()[-1] == (
        f"error: output_dir {tmp_path / 'run'} exists and is not empty: name another, "
        f"or go on with --resume {tmp_path / 'run'}"
    )
    assert "Traceback" not in again.stderr

    resumed = run(f"--resume={tmp_path / 'run'}", "--max_steps=2", check=True)
    assert "resuming after step 1" in resumed.stderr


def test_bad_input_is_one_line_and_exit_code_2(words, tmp_path):
    done = run(*words, "--lora_rr=3")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.strip() == "error: unknown option --lora_rr; did you mean lora_r?"
    assert not (tmp_path / "run").exists()
    debug = run(*words, "--lora_rr=3", "--debug")
    assert debug.returncode == 1
    assert "Traceback" in debug.stderr


def test_help_names_every_option():
    done = run("--help", check=True)
    names = [item.name for item in dataclasses.fields(TrainConfig)]
    for name in (*names, "config", "resume", "debug"):
        assert f"--{name} " in done.stdout or f"--{name}," in done.stdout


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("a was\n  wrong"), 2, "error: a was wrong\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "/full/x"),
            2,
            "error: No space left on device (/full/x): make room, or choose another output_dir\n",
        ),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_what_the_user_can_mend_has_no_traceback(capsys, error, code, message):
    def command(words):
        raise error

    assert guarded(command, []) == code
    assert capsys.readouterr().err == message


def test_a_bug_keeps_its_traceback():
    def command(words):
        raise OSError(errno.EIO, "bad disk")

    with pytest.raises(OSError, match="bad disk"):
        guarded(command, [])


def test_constraints_pin_every_direct_dependency():
    """setup.py's names, less the extras that bring their own torch."""
    pinned = {
        line.split("==")[0].lower()
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    }
    from importlib.metadata import requires

    named = set()
    for requirement in requires("esr-kernels") or []:
        name = re.match(r"[\w.-]+", requirement)[0].lower()
        if name not in ("flash-attn", "vllm"):
            named.add(name)
    assert named
    assert named <= pinned
    assert "setuptools" in pinned  # builds it
