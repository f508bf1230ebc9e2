"""Options: defaults, layers, and what is refused."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from esr_train.config import TrainConfig, parse
from esr_train.errors import UserError


def test_defaults_are_the_papers(words):
    config, resume = parse([w for w in words if w.split("=")[0] in NAMES])
    assert resume is None
    assert config.rollout_tokens == 100
    assert config.per_device_train_batch_size == 16
    assert config.max_steps == 200
    assert config.save_steps == 50
    assert (config.use_peft, config.lora_r, config.lora_alpha) == (True, 32, 64)
    assert config.lora_target_modules == ["all-linear"]
    assert config.learning_rate == 5e-5
    assert config.temperature == 0.7


NAMES = ("--model_name_or_path", "--teacher_model_name_or_path", "--dataset_name")


def test_command_line_is_over_yaml_is_over_defaults(words, tmp_path):
    file = tmp_path / "options.yaml"
    # 5e-4 is a string to YAML 1.1; the option's type decides.
    file.write_text(
        "learning_rate: 5e-4\nlora_r: 7\nuse_peft: false\nbf16: null\n"
        "lora_target_modules: [q_proj, v_proj]\neos_token_ids: [2, 5]\nseed: 3\n"
    )
    config, _ = parse(["--config", str(file), *words[:4], "--seed", "9"])
    assert config.learning_rate == 5e-4
    assert config.lora_r == 7
    assert config.use_peft is False
    assert config.bf16 is None
    assert config.lora_target_modules == ["q_proj", "v_proj"]
    assert config.eos_token_ids == [2, 5]
    assert config.seed == 9
    assert config.lora_alpha == 64


def test_config_yaml_round_trips(words, tmp_path):
    config, _ = parse(words)
    file = tmp_path / "saved.yaml"
    file.write_text(config.to_yaml())
    # output_dir stays out: it is this run's alone.
    assert parse(["--config", str(file)])[0] == dataclasses.replace(config, output_dir=None)


def test_saved_paths_are_absolute(words, tmp_path, student_path, monkeypatch):
    monkeypatch.chdir(student_path.parent)
    config, _ = parse([*words, f"--model_name_or_path={student_path.name}"])
    assert config.model_name_or_path == "student"
    assert yaml.safe_load(config.to_yaml())["model_name_or_path"] == str(student_path.resolve())


def test_no_arguments_is_the_demo():
    config, _ = parse([])
    assert config.demo == "default"
    assert config.dataset_name is None
    assert Path(config.model_name_or_path).is_dir()
    assert Path(config.teacher_model_name_or_path).is_dir()
    assert parse(["--max_steps", "5"])[0] == dataclasses.replace(config, max_steps=5)


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        (["--rollout_tokens=-1"], "rollout_tokens must be 0 or more, got -1"),
        (["--rollout_tokens=11"], "rollout_tokens is 11, more than max_completion_length = 10"),
        (["--rollout_tokens=x"], "rollout_tokens"),
        (["--temperature=-0.1"], "temperature must be 0 or more"),
        (["--top_p=0"], r"top_p must be in \(0, 1\]"),
        (["--max_steps=0"], "max_steps must be above 0"),
        (["--learning_rate=0"], "learning_rate must be above 0"),
        (["--learning_rate=inf"], "learning_rate must be above 0, got inf"),
        (["--learning_rate=1e30"], "learning_rate must be at most 1"),
        (["--weight_decay=nan"], "weight_decay must be 0 or more, got nan"),
        (["--lr_scheduler_type=wavy"], "lr_scheduler_type"),
        (["--resum=x"], "unknown option --resum; did you mean resume?"),
        (["--confg=x"], "unknown option --confg; did you mean config?"),
        (["--use_peft=maybe"], "Truthy value expected"),
        (["--lerning_rate=1"], "unknown option --lerning_rate; did you mean learning_rate?"),
        (["--demo=nothing"], "demo must be one of: cross-tokenizer, default"),
        (["--use_vllm", "--rollout_engine=hf"], "use_vllm and rollout_engine hf are two engines"),
        (["--use_vllm", "--vllm_mode=server"], "vllm_mode server needs vllm_server_base_url"),
        (
            ["--use_vllm", "--vllm_mode=server", "--vllm_server_base_url=a", "--use_peft=false"],
            "vllm_mode server takes LoRA adapters only",
        ),
        (
            ["--vllm_gpu_memory_utilization=1.5"],
            "vllm_gpu_memory_utilization must be in .0, 1., got 1.5",
        ),
        (["--vllm_server_timeout=0"], "vllm_server_timeout must be above 0"),
        (["--temperature=1e-7"], "temperature must be 0 or in"),
        (["--rollout_engine=fast"], "rollout_engine"),
        (["--config=/nonexistent.yaml"], "config file /nonexistent.yaml"),
        (["--resume=/nonexistent"], "--resume /nonexistent: no config.yaml"),
    ],
)
def test_bad_options_are_named(words, extra, expected):
    with pytest.raises(UserError, match=expected):
        parse([*words, *extra])


@pytest.mark.parametrize("missing", NAMES)
def test_models_and_data_are_named_together(words, missing):
    with pytest.raises(UserError, match=f"{missing.lstrip('-')} is missing"):
        parse([word for word in words if word.split("=")[0] != missing])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rollout_token: 5", "unknown option rollout_token; did you mean rollout_tokens?"),
        ("zzz: 5", "unknown option zzz; see --help"),
        ("lora_r: {a: 1}", "lora_r must be one value"),
        ("- lora_r", "must hold 'option: value' lines"),
        ("a: b: c", "is not YAML"),
        ("rollout_tokens: ten", "rollout_tokens"),
    ],
)
def test_bad_yaml_is_named(words, tmp_path, text, expected):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=expected):
        parse([*words, f"--config={file}"])


def test_resume_keeps_the_options_of_the_run(words, tmp_path):
    config, _ = parse(words)
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    resumed, run = parse([f"--resume={tmp_path}", "--max_steps=7"])
    assert run == tmp_path
    assert resumed == dataclasses.replace(config, max_steps=7, output_dir=None)
    with pytest.raises(UserError, match="not learning_rate"):
        parse([f"--resume={tmp_path}", "--learning_rate=1"])
    with pytest.raises(UserError, match="leave --config out"):
        parse([f"--resume={tmp_path}", f"--config={tmp_path / 'config.yaml'}"])


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_schedule_that_ends_cannot_be_made_longer(words, tmp_path, schedule):
    """The first steps would have had other learning rates."""
    config, _ = parse([*words, f"--lr_scheduler_type={schedule}"])
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert parse([f"--resume={tmp_path}"])[0].max_steps == 3
    with pytest.raises(UserError, match=f"{schedule}, was made for max_steps 3"):
        parse([f"--resume={tmp_path}", "--max_steps=4"])


def test_every_option_has_a_help_text():
    for item in dataclasses.fields(TrainConfig):
        assert item.metadata["help"].endswith((".", "..."))


def test_demo_file_names_only_options():
    from esr_train.demo import DEMO_DIR

    names = {item.name for item in dataclasses.fields(TrainConfig)}
    for file in DEMO_DIR.glob("*.yaml"):
        assert set(yaml.safe_load(file.read_text())) <= names
