"""What the documents tell people to run is run here, or parsed by what would run it."""

import dataclasses
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from esr_train.align.show import make_parser
from esr_train.config import parse
from esr_train.data import read_prompts

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md")])


def blocks(language: str) -> list[tuple[str, str]]:
    """(document:line, code) of every fenced block of a language."""
    found = []
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        for match in re.finditer(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            line = text[: match.start()].count("\n") + 1
            found.append((f"{path.name}:{line}", match[1]))
    return found


def shell_commands() -> list[tuple[str, str]]:
    return [
        (place, line.split("#")[0].strip())
        for place, code in blocks("bash")
        for line in code.replace("\\\n", " ").splitlines()
        if line.split("#")[0].strip()
    ]


def ids(cases: list[tuple[str, str]]) -> list[str]:
    return [place for place, _ in cases]


@pytest.mark.parametrize(("place", "code"), blocks("python"), ids=ids(blocks("python")))
def test_python_examples_run(place, code, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))  # what they cache
    exec(compile(code, place, "exec"), {})


@pytest.fixture
def documented_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with the files that the commands name, as the documents show or imply them."""
    monkeypatch.chdir(tmp_path)
    for _, code in blocks("yaml"):
        name = code.split(":")[0].removeprefix("# ")  # the first line is "# name.yaml: ..."
        Path(name).write_text(code, encoding="utf-8")
    Path("prompts.jsonl").write_text(dict(blocks("json")).popitem()[1], encoding="utf-8")
    run = Path("runs/math-1.5b")
    run.mkdir(parents=True)
    options = ["--model_name_or_path=a", "--teacher_model_name_or_path=b", "--dataset_name=c.jsonl"]
    (run / "config.yaml").write_text(parse(options)[0].to_yaml(), encoding="utf-8")


@pytest.mark.parametrize(("place", "command"), shell_commands(), ids=ids(shell_commands()))
@pytest.mark.usefixtures("documented_files")
def test_shell_commands_are_real(place, command):
    words = shlex.split(command)
    if words[0] == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert words[1] in targets
    elif words[:4] == ["python", "-m", "esr_train", "align"]:
        make_parser().parse_args(words[4:])
    elif words[:3] == ["python", "-m", "esr_train"]:
        config, _ = parse(words[3:])
        if config.dataset_name == "prompts.jsonl":
            assert len(read_prompts(dataclasses.replace(config, prompt_column="prompt"))) > 0
    elif words[:3] == ["python", "-m", "pytest"]:
        # Exit code 5, "no tests collected", is a command that would measure nothing.
        collect = [sys.executable, *words[1:], "--collect-only", "-q"]
        done = subprocess.run(collect, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    elif words[:2] == ["python", "-m"]:
        module = ROOT / words[2].replace(".", "/")
        assert module.with_suffix(".py").exists() or (module / "__main__.py").exists()
    else:
        assert words[0] == "pip", f"{place}: nothing checks {command!r}"


def test_the_headline_figures_are_those_of_the_results_files():
    """Each number of the README's demo table stands in the committed results it came from."""
    from esr_train.demo.report import comparison_table
    from esr_train.report import as_markdown

    folder = ROOT / "benchmarks" / "results" / "demo-cpu"
    results = {name: json.loads((folder / f"{name}.json").read_text()) for name in ("esr", "full")}
    table = as_markdown(comparison_table(results))
    assert table in (ROOT / "README.md").read_text(encoding="utf-8")
    for result in results.values():
        assert re.fullmatch("[0-9a-f]{40}", result["machine"]["commit"])  # of a clean checkout


def test_the_cross_tokenizer_figures_are_those_of_the_results_file():
    from esr_train.report import as_markdown, gain_table

    path = ROOT / "benchmarks" / "results" / "demo-cross-tokenizer-cpu.json"
    results = json.loads(path.read_text())
    assert as_markdown(gain_table(results)) in (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.fullmatch("[0-9a-f]{40}", results["machine"]["commit"])


def test_the_table_of_two_tokenizers_is_that_of_the_results_file():
    from benchmarks.alignment import VARIANTS, table

    results = json.loads((ROOT / "benchmarks" / "results" / "alignment-cpu.json").read_text())
    document = (ROOT / "docs" / "alignment.md").read_text(encoding="utf-8")
    assert table(results["runs"]) in document
    assert len(results["runs"]) >= 2 * 3 * len(VARIANTS)
    assert all(re.fullmatch("[0-9a-f]{40}", run["commit"]) for run in results["runs"])


def test_the_steps_figures_are_those_of_the_results_file():
    from benchmarks.step_report import compared_table

    results = json.loads((ROOT / "benchmarks" / "results" / "step-cpu.json").read_text())
    assert compared_table(results["cases"][0]["compared"]) in (ROOT / "README.md").read_text()
    assert re.fullmatch("[0-9a-f]{40}", results["commit"])


def test_the_figures_of_a_gpu_are_those_of_the_results_files():
    from benchmarks.loss_report import loss_table
    from benchmarks.step_report import compared_table

    folder = ROOT / "benchmarks" / "results"
    step, loss, accuracy = (
        json.loads((folder / f"{name}-cuda.json").read_text())
        for name in ("step", "loss", "accuracy")
    )
    assert compared_table(step["cases"][0]["compared"]) in (ROOT / "README.md").read_text()
    assert loss_table(loss["cases"][0]) in (ROOT / "docs" / "benchmarking.md").read_text()
    for results in (step, loss, accuracy):
        assert re.fullmatch("[0-9a-f]{40}", results["commit"])
        assert results["device"] == "NVIDIA H200"


def test_links_inside_the_project_exist():
    for path in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (path.parent / target).exists(), f"{path.name}: {target}"
