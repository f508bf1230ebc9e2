"""`python -m esr_train align`."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import tokenizer_zoo

from esr_train.__main__ import main

DOCUMENT = Path(__file__).parents[2] / "docs" / "alignment.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("zoo")
    tokenizer_zoo.main(str(path))
    return path


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["esr_train", "align", *map(str, words)])
    return main()


def test_the_documented_example_is_what_the_command_prints(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    document = DOCUMENT.read_text(encoding="utf-8")
    text, command, printed = re.findall(
        r"```text\n(.*?)```.*?```bash\n(.*?)```.*?```console\n(.*?)```", document, re.DOTALL
    )[0]
    (tmp_path / "response.txt").write_bytes(text.rstrip("\n").encode())
    words = command.splitlines()[-1].replace("zoo/", f"{folder}/").split()
    assert words[:4] == ["python", "-m", "esr_train", "align"]
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, *words[4:]) == 0
    assert capsys.readouterr().out == printed


def test_a_token_without_a_shape_is_escaped(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "text").write_bytes(b"the\r\nthe \xf0\x9f\xa6\x84 caf\xc3\xa9e\xcc\x81")
    words = ["--student", folder / "gpt2", "--teacher", folder / "unknown"]
    assert run(monkeypatch, *words, "--text", tmp_path / "text") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("22 bytes, ")
    shown = [line for line in lines if line[:2] in ("= ", "> ", "x ") and "same" not in line]
    assert "= \\r|\\n" in shown
    assert any("\\xf0" in line and "<special>" in line for line in shown)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--text": "absent"}, "error: text absent: No such file"),
        ({"--text": "latin"}, "error: text latin: not UTF-8 text (invalid continuation byte); "),
        ({"--student": "./absent"}, "error: student ./absent: no such folder"),
        ({"--teacher": "bare"}, "error: teacher bare: its tokenizer has no eos_token; name one"),
    ],
)
def test_what_cannot_be_read_is_named(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text").write_text("the", encoding="utf-8")
    Path("latin").write_bytes(b"caf\xe9 au")
    bare = tokenizer_zoo.byte_level(300, None)
    bare.eos_token = None
    bare.save_pretrained("bare")
    options = {"--student": folder / "gpt2", "--teacher": folder / "qwen", "--text": "text"}
    words = [word for option in {**options, **change}.items() for word in option]
    assert run(monkeypatch, *words) == 2
    assert message in capsys.readouterr().err
