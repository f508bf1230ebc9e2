"""A tiny student, its teacher and a file of prompts, made once a session."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_models import make_student, make_teacher, make_tokenizer, save

from esr_train.config import TrainConfig, parse


@pytest.fixture(scope="session")
def student_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("models") / "student", make_student(), make_tokenizer())


@pytest.fixture(scope="session")
def teacher_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("models") / "teacher", make_teacher(), make_tokenizer())


@pytest.fixture(scope="session")
def prompts_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    rows = [{"prompt": f"What is {i} + {i * i}?"} for i in range(30)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def words(student_path: Path, teacher_path: Path, prompts_path: Path, tmp_path: Path) -> list[str]:
    """A command line that trains the tiny pair for three steps into tmp_path/run."""
    return [
        f"--model_name_or_path={student_path}",
        f"--teacher_model_name_or_path={teacher_path}",
        f"--dataset_name={prompts_path}",
        f"--output_dir={tmp_path / 'run'}",
        "--rollout_tokens=6",
        "--max_completion_length=10",
        "--max_steps=3",
        "--per_device_train_batch_size=4",
        "--learning_rate=1e-3",
        "--lora_r=4",
    ]


@pytest.fixture
def config(words: list[str]) -> TrainConfig:
    return parse(words)[0]
