"""The loop: its gradient against the formula in float64, whole runs, resuming, what is written."""

import dataclasses
import errno
import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from esr_kernels import LMHead
from esr_train import checkpoint as checkpoint_module
from esr_train.align import load_vocabulary
from esr_train.config import parse
from esr_train.data import load_prompts, mix_seed
from esr_train.errors import UserError
from esr_train.eval.measure import evaluate
from esr_train.metrics import PHASES, PhaseMeter
from esr_train.models import load_pair, transformer
from esr_train.train import (
    generate,
    make_engine,
    make_optimizer,
    max_prompt_tokens,
    step_batches,
    train,
    train_step,
)

CPU = torch.device("cpu")


def set_up(config):
    torch.manual_seed(config.seed)
    vocabulary = load_vocabulary(config)
    prompts = load_prompts(config, vocabulary, max_prompt_tokens(config, vocabulary))
    pair = load_pair(config, vocabulary, CPU)
    return pair, prompts, make_engine(config, pair, Path("unused"))


def float64_gradients(pair, rollouts):
    """Loss and gradients of sum KL / response tokens, from whole float64 logits of both models."""
    student, teacher = pair.student.double(), pair.teacher.double()
    student.zero_grad()
    total, tokens = 0.0, 0
    for rollout in rollouts:
        # A sequence at a time: neither packed nor padded.
        bounds = rollout.cu_seqlens.tolist()
        for (first, last), length in zip(pairwise(bounds), rollout.response_lengths, strict=True):
            ids = rollout.input_ids[None, first:last]
            own, reference = (
                model(input_ids=ids)
                .logits[0, -length - 1 : -1, : pair.vocabulary.size]
                .log_softmax(-1)
                for model in (transformer(student), transformer(teacher))
            )
            total = total + (own.exp() * (own - reference)).sum()
            tokens += int(length)
    loss = total / tokens
    loss.backward()
    gradients = {n: p.grad for n, p in student.named_parameters() if p.grad is not None}
    return loss.detach(), gradients


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_peft": False},
        {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "use_peft": False},
        {"rollout_tokens": 0},
        {"rollout_tokens": 1},
    ],
    ids=["lora", "full", "accumulation", "checkpointing", "checkpointing-full", "no-cutoff", "N=1"],
)
def test_gradient_of_a_step_is_the_papers(config, changes):
    # EOS likely enough that lengths differ, so a mean of batch means would be wrong.
    config = dataclasses.replace(
        config, temperature=1.0, max_grad_norm=0.0, eos_token_ids=list(range(60)), **changes
    )
    pair, prompts, engine = set_up(config)
    for name, parameter in pair.student.named_parameters():
        if "lora_B" in name:  # zero at the start, which would leave lora_A without gradient
            parameter.data.normal_(std=0.1)
    optimizer, scheduler = make_optimizer(config, pair)
    found = {}

    def keep(_optimizer, _args, _kwargs):
        found.update(
            (n, p.grad.clone()) for n, p in pair.student.named_parameters() if p.requires_grad
        )

    hook = optimizer.register_step_pre_hook(keep)
    torch.manual_seed(mix_seed(config.seed, 0))
    engine.update_weights()
    rollouts = [
        generate(pair, engine, batch, config.max_new_tokens)
        for batch in step_batches(0, config, prompts)
    ]
    before = {n: p.detach().clone() for n, p in pair.student.named_parameters()}
    record = train_step(0, config, pair, engine, prompts, optimizer, scheduler, PhaseMeter(CPU))
    hook.remove()
    pair.student.load_state_dict(before, strict=False)

    lengths = torch.cat([rollout.response_lengths for rollout in rollouts])
    assert record["response_tokens"] == lengths.sum()
    assert lengths.max() <= config.max_new_tokens
    if config.max_new_tokens > 1:
        assert len(lengths.unique()) > 1
    loss, gradients = float64_gradients(pair, rollouts)
    assert record["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert set(found) == set(gradients)
    assert loss > 0.1
    for name, gradient in gradients.items():
        scale = gradient.norm().clamp(min=1e-9)
        assert (found[name] - gradient).norm() / scale < 1e-4, name


def without_times(text):
    """Metrics lines less what no two runs share."""
    timed = ("seconds", "tokens_per_second", "phases")
    return [
        {k: v for k, v in json.loads(line).items() if k not in timed} for line in text.splitlines()
    ]


def test_a_users_run(words, config, tmp_path, student_path):
    """LoRA on real architectures: trains, saves, and the adapter loads in plain PEFT."""
    results = train(config)
    run = tmp_path / "run"
    assert yaml.safe_load((run / "config.yaml").read_text())["lora_r"] == 4
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3]
    for record in records:
        assert 0 < record["loss"] < 100
        assert record["grad_norm"] > 0
        assert 4 <= record["response_tokens"] <= 24
        assert set(record["phases"]) == set(PHASES)
        assert all(phase["seconds"] > 0 for phase in record["phases"].values())
        assert sum(p["seconds"] for p in record["phases"].values()) <= record["seconds"]
    assert json.loads((run / "results.json").read_text()) == json.loads(json.dumps(results))
    assert results["steps"] == 3
    for evaluation in (results["before"], results["after"]):
        assert evaluation["num_prompts"] == 3
        assert evaluation["score"] is None
        assert evaluation["kl_inside"] > 0
        assert len(evaluation["kl_by_position"]) <= 10
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not list(run.glob(".*"))

    base = AutoModelForCausalLM.from_pretrained(student_path)
    plain = PeftModel.from_pretrained(base, run / "checkpoint-3")
    tokenizer = AutoTokenizer.from_pretrained(run / "checkpoint-3")
    lora_b = [p for n, p in plain.named_parameters() if "lora_B" in n]
    assert len(lora_b) == 14  # seven linear layers, twice
    assert all(p.abs().max() > 0 for p in lora_b)
    ids = tokenizer("What is 2?", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        changed = plain(input_ids=ids).logits
        with plain.disable_adapter():
            assert not torch.equal(plain(input_ids=ids).logits, changed)


@pytest.mark.parametrize("use_peft", [True, False])
def test_resuming_gives_the_uninterrupted_numbers(config, tmp_path, use_peft, monkeypatch):
    whole = dataclasses.replace(
        config, use_peft=use_peft, lr_scheduler_type="linear", lora_dropout=0.1, max_steps=4
    )
    cut = dataclasses.replace(whole, output_dir=str(tmp_path / "cut"), save_steps=2)
    train(whole)

    from esr_train import train as module

    real_step = module.train_step

    def killed_at_the_fourth(step, *rest):
        if step == 3:
            raise KeyboardInterrupt
        return real_step(step, *rest)

    monkeypatch.setattr(module, "train_step", killed_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        train(cut)
    monkeypatch.undo()
    run = tmp_path / "cut"
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 3
    assert json.loads((run / "results.json").read_text())["after"] is None
    resumed, folder = parse([f"--resume={run}"])
    assert resumed == dataclasses.replace(cut, output_dir=None)
    results = train(resumed, folder)

    lines = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("run", "cut")]
    assert without_times(lines[0]) == without_times(lines[1])
    file = "adapter_model.safetensors" if use_peft else "model.safetensors"
    weights = [(tmp_path / name / "checkpoint-4" / file).read_bytes() for name in ("run", "cut")]
    assert weights[0] == weights[1]
    first = json.loads((tmp_path / "run" / "results.json").read_text())
    for name in ("before", "after"):
        assert results[name]["kl_by_position"] == first[name]["kl_by_position"]
    with pytest.raises(UserError, match="has done its 4 steps: raise --max_steps"):
        train(resumed, folder)


def test_full_fine_tuning_saves_a_plain_model(config, tmp_path):
    train(dataclasses.replace(config, use_peft=False, num_eval_prompts=0, bf16=True, max_steps=1))
    saved = tmp_path / "run" / "checkpoint-1"
    model = AutoModelForCausalLM.from_pretrained(saved)
    assert model.generation_config.repetition_penalty == 1.5  # the student's own, not ours
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["before"] is None
    assert results["after"] is None


def test_same_seed_same_numbers_other_seed_other_numbers(config, tmp_path):
    lines = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        output = str(tmp_path / name)
        train(dataclasses.replace(config, output_dir=output, seed=seed, num_eval_prompts=0))
        lines.append(without_times((tmp_path / name / "metrics.jsonl").read_text()))
    assert lines[0] == lines[1]
    assert lines[0] != lines[2]


def test_training_lowers_the_kl(config):
    config = dataclasses.replace(
        config, max_steps=40, learning_rate=1e-2, per_device_train_batch_size=8, use_peft=False
    )
    results = train(config)
    assert results["after"]["kl_inside"] < 0.8 * results["before"]["kl_inside"]


def test_evaluation_is_repeatable_and_leaves_the_random_state(config):
    pair, prompts, engine = set_up(config)
    state = torch.random.get_rng_state()
    first = evaluate(pair, engine, prompts, config)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(123)
    second = evaluate(pair, engine, prompts, config)
    assert first.kl_by_position == second.kl_by_position
    assert first.tokens_by_position[0] == 3
    everything = first.mean_kl(0)
    weights = first.tokens_by_position
    parts = [first.mean_kl(0, 4), first.mean_kl(4)]
    shares = [sum(weights[:4]) / sum(weights), sum(weights[4:]) / sum(weights)]
    assert everything == pytest.approx(sum(p * s for p, s in zip(parts, shares, strict=True)))
    assert first.mean_kl(10) is None


def test_a_run_folder_is_never_overwritten(config, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "precious").write_text("mine")
    with pytest.raises(UserError, match="run exists and is not empty: name another$"):
        train(config)
    assert [path.name for path in run.iterdir()] == ["precious"]
    with pytest.raises(UserError, match="precious is a file: name a folder"):
        train(dataclasses.replace(config, output_dir=str(run / "precious")))
    with pytest.raises(UserError, match="cannot be written"):
        train(dataclasses.replace(config, output_dir=str(run / "precious" / "run")))
    with pytest.raises(UserError, match="cannot be written"):
        train(dataclasses.replace(config, output_dir=str(run / ("x" * 300))))


@pytest.mark.parametrize("where", ["model", "state"])
def test_a_failed_save_leaves_nothing_half_written(config, tmp_path, monkeypatch, where):
    def full_disk(self, path):
        path.mkdir()
        (path / "adapter_config.json").write_text("{")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    train(dataclasses.replace(config, max_steps=1))
    run = tmp_path / "run"
    if where == "state":
        real_save = torch.save

        def save_to_full_disk(state, file):
            with open("/dev/full", "wb") as full:  # a device on which every write fails
                real_save(state, full)

        monkeypatch.setattr(checkpoint_module.torch, "save", save_to_full_disk)
    else:
        monkeypatch.setattr(PeftModel, "save_pretrained", full_disk)
    with pytest.raises(OSError, match="No space left") as caught:
        train(dataclasses.replace(config, max_steps=2), run)
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(run / "checkpoint-2")
    assert [path.name for path in run.glob("*checkpoint*")] == ["checkpoint-1"]
    assert not list(run.glob(".*"))
    monkeypatch.undo()
    train(dataclasses.replace(config, max_steps=2), run)
    assert (run / "checkpoint-2").is_dir()


def test_a_loss_that_is_not_finite_stops_before_the_weights(config, monkeypatch):
    pair, prompts, engine = set_up(config)
    optimizer, scheduler = make_optimizer(config, pair)
    pair.teacher.lm_head.weight.data[5] = float("nan")
    before = [p.detach().clone() for p in pair.student.parameters()]
    with pytest.raises(UserError, match="step 1: loss nan"):
        train_step(0, config, pair, engine, prompts, optimizer, scheduler, PhaseMeter(CPU))
    assert all(torch.equal(a, b) for a, b in zip(before, pair.student.parameters(), strict=True))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"max_completion_length": 128}, "max_completion_length is 128.*context of 128"),
        ({"max_completion_length": 200, "num_eval_prompts": 0, "rollout_tokens": 150}, "rollout_t"),
        ({"dataset_name": "/nonexistent.jsonl"}, "no such file"),
    ],
)
def test_bad_settings_stop_before_a_run_folder_exists(config, tmp_path, changes, expected):
    with pytest.raises(UserError, match=expected):
        train(dataclasses.replace(config, **changes))
    assert not (tmp_path / "run").exists()


def test_only_the_response_rows_reach_the_head(config, monkeypatch):
    """The prompt's rows are most of a batch; a fused loss that sees them is wasted."""
    from esr_train import models

    seen = []

    def spy(student_hidden, *args, **kwargs):
        seen.append(len(student_hidden))
        return real(student_hidden, *args, **kwargs)

    real = models.linear_reverse_kl
    monkeypatch.setattr(models, "linear_reverse_kl", spy)
    train(dataclasses.replace(config, num_eval_prompts=0))
    lines = Path(config.output_dir, "metrics.jsonl").read_text().splitlines()
    assert seen == [json.loads(line)["response_tokens"] for line in lines]


def test_gradient_checkpointing_recomputes(config):
    config = dataclasses.replace(config, gradient_checkpointing=True)
    pair, prompts, engine = set_up(config)
    calls = []
    layer = pair.student_layers.layers[0]

    def mlp(hidden, compute=layer.mlp):
        calls.append(torch.is_grad_enabled())
        return compute(hidden)

    layer.mlp = mlp
    train_step(0, config, pair, engine, prompts, *make_optimizer(config, pair), PhaseMeter(CPU))
    # Once forward, and once more in backward; it is the student's twin that generates.
    assert calls == [True] * 2


def test_heads_of_the_pair_are_plain(config):
    pair, _, _ = set_up(config)
    head = LMHead.from_model(pair.student)
    assert not head.weight.requires_grad
    assert head.weight.data_ptr() == transformer(pair.student).lm_head.weight.data_ptr()
