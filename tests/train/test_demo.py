"""The embedded demo end to end, at a few steps: the table, the picture, the run folders."""

import json
import subprocess
import sys

import pytest


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "runs"
    command = [sys.executable, "-m", "esr_train.demo", "--quick", f"--output_dir={folder}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return folder, done


def test_both_rows_are_printed_with_what_they_cost(demo):
    _, done = demo
    rows = [line.split("|")[1].strip() for line in done.stdout.splitlines() if line[:1] == "|"]
    assert rows[2:] == ["student", "ESR, 32 tokens", "full rollout"]
    widths = {line.count("|") for line in done.stdout.splitlines() if line[:1] == "|"}
    assert len(widths) == 1
    assert "x the time of ESR and scores" in done.stdout
    assert "Warning" not in done.stderr


def test_both_runs_share_all_but_the_cutoff(demo):
    folder, _ = demo
    esr = json.loads((folder / "esr" / "results.json").read_text())
    full = json.loads((folder / "full" / "results.json").read_text())
    assert (esr["rollout_tokens"], full["rollout_tokens"]) == (32, 0)
    assert esr["steps"] == full["steps"] == 3
    # The table's numbers are these files'; the first evaluation is one and the same.
    assert esr["before"]["score"] == full["before"]["score"]
    assert esr["before"]["kl_by_position"] == full["before"]["kl_by_position"]
    records = [
        [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("esr", "full")
    ]
    for short, long in zip(*records, strict=True):
        assert short["response_tokens"] <= 16 * 32 < long["response_tokens"]
    assert (
        full["phases"]["student_generation"]["seconds"]
        > 1.5 * (esr["phases"]["student_generation"]["seconds"])
    )
    assert esr["after"]["kl_inside"] < esr["before"]["kl_inside"]
    assert (folder / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "esr" / "checkpoint-3" / "adapter_model.safetensors").is_file()


def test_the_pair_of_two_tokenizers(tmp_path):
    """A few steps of `python -m esr_train --demo cross-tokenizer`."""
    words = ["--demo", "cross-tokenizer", "--max_steps=3", "--num_eval_prompts=8"]
    command = [sys.executable, "-m", "esr_train", *words, f"--output_dir={tmp_path / 'run'}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "two tokenizers (id 0 is '<|endoftext|>' for the student and '<0x00>'" in done.stderr
    rows = [line.split("|")[1].strip() for line in done.stdout.splitlines() if line[:1] == "|"]
    assert "tokens compared" in rows
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["after"]["kl_inside"] < results["before"]["kl_inside"]
    assert 0.8 < results["before"]["coverage"]["compared"] < 0.95
    assert results["before"]["coverage"]["student_mass"] > 0.99


@pytest.mark.parametrize(
    "words",
    [
        ["--rollout_tokens=0"],
        ["--num_eval_prompts=0"],
        ["--dataset_name=x.jsonl"],
        ["--resume=x"],
        ["--nonsense"],
    ],
)
def test_what_cannot_be_compared_is_refused(words, tmp_path):
    command = [sys.executable, "-m", "esr_train.demo", *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert not list(tmp_path.iterdir())
