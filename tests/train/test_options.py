"""Every option reaches what it is for; what a run reports is what happened."""

import dataclasses
import gzip
import json
import subprocess
from pathlib import Path

import pytest
import torch
from torch.optim import AdamW

from esr_train import models
from esr_train import train as train_module
from esr_train.align import load_vocabulary
from esr_train.align import vocabulary as align_vocabulary
from esr_train.data import load_prompts
from esr_train.errors import UserError
from esr_train.eval.measure import evaluate
from esr_train.metrics import PhaseMeter
from esr_train.models import load_pair, load_student, transformer
from esr_train.rollout import GraphEngine, HFEngine
from esr_train.train import make_engine, make_optimizer, sampling, train, train_step

CPU = torch.device("cpu")


def changed(config, **changes):
    return dataclasses.replace(config, **changes)


def make_step(config):
    """(pair, optimizer, a function that takes one step and gives its record)."""
    torch.manual_seed(0)
    vocabulary = load_vocabulary(config)
    prompts = load_prompts(config, vocabulary, 100)
    pair = load_pair(config, vocabulary, CPU)
    engine = make_engine(config, pair, Path("unused"))
    optimizer, scheduler = make_optimizer(config, pair)

    def step(number=0):
        meter = PhaseMeter(CPU)
        return train_step(number, config, pair, engine, prompts, optimizer, scheduler, meter)

    return pair, optimizer, step


class Spy:
    """Calls through, and keeps the keyword arguments of every call."""

    def __init__(self, function):
        self.function, self.calls = function, []

    def __call__(self, *args, **kwargs):
        self.calls.append(kwargs)
        return self.function(*args, **kwargs)


def test_sampling_options_reach_the_engine(config):
    vocabulary = load_vocabulary(config)
    model = load_student(changed(config, use_peft=False), CPU)
    given = changed(config, temperature=0.3, top_p=0.9, top_k=7)
    generation = HFEngine(model, sampling(given, vocabulary)).generation_config
    assert (generation.temperature, generation.top_p, generation.top_k) == (0.3, 0.9, 7)
    assert generation.do_sample
    assert generation.eos_token_id == [2, 0]
    assert generation.pad_token_id == 0
    greedy = HFEngine(model, sampling(changed(config, temperature=0.0), vocabulary))
    assert not greedy.generation_config.do_sample
    narrow = dataclasses.replace(vocabulary, size=290)
    suppressed = HFEngine(model, sampling(config, narrow)).generation_config.suppress_tokens
    assert suppressed == list(range(290, 300))


def test_engine_options_reach_the_run(config, monkeypatch):
    pair = load_pair(config, load_vocabulary(config), CPU)
    assert isinstance(make_engine(config, pair, Path("run")), GraphEngine)
    assert isinstance(
        make_engine(changed(config, rollout_engine="hf"), pair, Path("run")), HFEngine
    )
    seen = []
    monkeypatch.setattr(
        "esr_train.vllm_engine.VLLMEngine", lambda *args, **words: seen.append((args, words))
    )
    given = changed(
        config,
        use_vllm=True,
        vllm_mode="server",
        vllm_server_base_url="http://localhost:1",
        vllm_server_timeout=7.0,
        vllm_gpu_memory_utilization=0.5,
        vllm_max_model_length=99,
        trust_remote_code=True,
    )
    make_engine(given, pair, Path("run"))
    ((student, words, name), options) = seen[0]
    assert student is pair.student
    assert words == sampling(given, pair.vocabulary)
    assert name == given.model_name_or_path
    assert options == {
        "mode": "server",
        "dtype": torch.float32,
        "gpu_memory_utilization": 0.5,
        "max_model_len": 99,
        "trust_remote_code": True,
        "server_base_url": "http://localhost:1",
        "server_timeout": 7.0,
        "adapter_dir": Path("run"),
    }


def test_a_missing_vllm_is_said_before_anything_trains(config):
    with pytest.raises(UserError, match="package vllm is not installed"):
        train(changed(config, use_vllm=True))


@pytest.mark.parametrize(("max_steps", "traced"), [(5, {2, 3, 4}), (2, {2}), (1, {1})])
def test_a_trace_of_three_steps(config, max_steps, traced):
    train(changed(config, profile=True, max_steps=max_steps, num_eval_prompts=0))
    with gzip.open(Path(config.output_dir) / "trace.json.gz") as file:
        events = json.load(file)["traceEvents"]
    names = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    assert names.count("student_generation") == len(traced)
    assert {"teacher_scoring", "student_training"} <= set(names)
    if max_steps > 1:
        steps = {int(n.split("#")[1]) + 1 for n in names if n.startswith("ProfilerStep#")}
        assert steps - {max_steps + 1} == traced  # which begins, and has nothing in it


def test_optimizer_and_schedule(config):
    given = changed(
        config, learning_rate=0.01, weight_decay=0.3, lr_scheduler_type="linear", warmup_steps=2
    )
    pair, optimizer, step = make_step(given)
    assert isinstance(optimizer, AdamW)
    assert optimizer.defaults["weight_decay"] == 0.3
    assert optimizer.defaults["lr"] == 0.01
    trained = {id(p) for p in pair.student.parameters() if p.requires_grad}
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == trained
    rates = [step(number)["learning_rate"] for number in range(3)]
    assert rates == pytest.approx([0.0, 0.005, 0.01])


@pytest.mark.parametrize("limit", [1e-3, 0.0])
def test_the_gradient_is_clipped(config, limit):
    _, optimizer, step = make_step(changed(config, max_grad_norm=limit))
    norms = []

    def keep(optimizer, *_):
        gradients = [p.grad.norm() for p in optimizer.param_groups[0]["params"]]
        norms.append(torch.stack(gradients).norm().item())

    optimizer.register_step_pre_hook(keep)
    record = step()
    assert record["grad_norm"] > 1e-3  # what it was before clipping
    assert norms == [pytest.approx(limit or record["grad_norm"], rel=1e-3)]


def test_lora_options(config):
    given = changed(
        config, lora_r=3, lora_alpha=5, lora_dropout=0.25, lora_target_modules=["q_proj", "up_proj"]
    )
    lora = load_student(given, CPU).peft_config["default"]
    assert (lora.r, lora.lora_alpha, lora.lora_dropout) == (3, 5, 0.25)
    assert lora.target_modules == {"q_proj", "up_proj"}


@pytest.mark.parametrize("trust", [False, True])
def test_loading_options(config, monkeypatch, trust):
    spies = []
    for module, name in (
        (models, "AutoModelForCausalLM"),
        (align_vocabulary, "AutoTokenizer"),
        (align_vocabulary, "AutoConfig"),
    ):
        spy = Spy(getattr(module, name).from_pretrained)
        monkeypatch.setattr(getattr(module, name), "from_pretrained", spy)
        spies.append(spy)
    given = changed(config, attn_implementation="eager", trust_remote_code=trust)
    pair = load_pair(given, load_vocabulary(given), CPU)
    for spy in spies:
        ours = spy.calls[:2]  # Transformers calls AutoConfig again by itself
        assert [call["trust_remote_code"] for call in ours] == [trust, trust]
    assert all(call["use_safetensors"] is True for call in spies[0].calls)
    for model in (pair.student, pair.teacher):
        assert transformer(model).config._attn_implementation == "esr_eager"


def test_a_hub_data_set_is_named_in_full(config, monkeypatch):
    import datasets

    seen = []

    def load_dataset(*args, **kwargs):
        seen.append((args, kwargs))
        return datasets.Dataset.from_dict({"question": ["one", "two"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    given = changed(
        config,
        dataset_name="someone/numbers",
        dataset_config="hard",
        dataset_train_split="train[:2]",
        prompt_column="question",
    )
    prompts = load_prompts(given, load_vocabulary(given), 100)
    assert seen == [(("someone/numbers", "hard"), {"split": "train[:2]"})]
    assert len(prompts.train) == 2


def test_checkpoints_come_every_save_steps_and_at_the_end(config, tmp_path):
    train(changed(config, save_steps=2, max_steps=3, num_eval_prompts=0))
    saved = {path.name for path in (tmp_path / "run").glob("checkpoint-*")}
    assert saved == {"checkpoint-2", "checkpoint-3"}


def test_the_bar_is_told_every_logging_steps(config, capsys, tmp_path):
    train(changed(config, logging_steps=2, num_eval_prompts=0))
    assert "nats/token" in capsys.readouterr().err
    train(changed(config, logging_steps=5, num_eval_prompts=0, output_dir=str(tmp_path / "b")))
    assert "nats/token" not in capsys.readouterr().err


def test_bf16_computes_in_bf16(config):
    """Autocast and a bfloat16 base change the numbers, a little, and both train."""
    losses = {}
    for use_peft in (True, False):
        for bf16 in (True, False):
            given = changed(config, bf16=bf16, use_peft=use_peft)
            pair, optimizer, step = make_step(given)
            seen = []
            layer = pair.student_layers.layers[0]

            def mlp(hidden, compute=layer.mlp, seen=seen):
                seen.append((output := compute(hidden)).dtype)
                return output

            layer.mlp = mlp
            record = step()
            expected = torch.bfloat16 if bf16 else torch.float32
            assert set(seen) == {expected}
            assert record["grad_norm"] > 0
            losses[use_peft, bf16] = record["loss"]
            trained = [p.dtype for p in optimizer.param_groups[0]["params"]]
            assert set(trained) == {torch.float32}
    for use_peft in (True, False):
        assert losses[use_peft, True] != losses[use_peft, False]


def test_a_step_says_what_it_did(config):
    _, _, step = make_step(config)
    record = step(4)
    assert record["step"] == 5
    assert record["kl_per_response"] == pytest.approx(
        record["loss"] * record["response_tokens"] / 4
    )
    rate = record["response_tokens"] / record["seconds"]
    assert record["tokens_per_second"] == pytest.approx(rate)


def float64_profile(pair, engine, prompts, config):
    """KL sums and counts by position from whole float64 logits, a prompt and a sample at a time."""
    sums, counts = [0.0] * 99, [0] * 99
    torch.manual_seed(config.seed)
    batch = [ids for ids in prompts.eval for _ in range(config.num_eval_samples)]
    width = max(map(len, batch))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in batch])
    mask = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in batch])
    responses = engine.generate(ids, mask, max_new_tokens=config.max_completion_length)
    for prompt, response in zip(batch, responses.tolist(), strict=True):
        kept = response
        for place, token in enumerate(response):
            if token in pair.vocabulary.eos_token_ids:
                kept = response[: place + 1]
                break
        logprobs = []
        for model in (pair.student, pair.teacher):
            logits = model(input_ids=torch.tensor([prompt + kept])).logits.double()
            logits = logits[0, len(prompt) - 1 : -1, : pair.vocabulary.size]
            logprobs.append(logits.log_softmax(-1))
        own, reference = logprobs
        for place, value in enumerate((own.exp() * (own - reference)).sum(-1).tolist()):
            sums[place] += value
            counts[place] += 1
    return sums, counts


@torch.no_grad()
def test_evaluation_is_the_kl_of_whole_responses(config):
    """Beyond the cutoff too, with responses of several lengths, each position on its own."""
    given = changed(
        config, num_eval_samples=5, max_completion_length=9, eos_token_ids=list(range(40)),
        lora_dropout=0.5,
    )  # fmt: skip
    vocabulary = load_vocabulary(given)
    prompts = load_prompts(given, vocabulary, 100)
    pair = load_pair(given, vocabulary, CPU)
    engine = make_engine(given, pair, Path("unused"))
    for name, parameter in pair.student.named_parameters():
        if "lora_B" in name:  # dropout in the evaluation would show, and old weights
            parameter.normal_(std=0.5)
    found = evaluate(pair, engine, prompts, given)
    assert not engine.sessions  # an evaluation's cache is nothing to train beside
    assert pair.student.training
    pair.student.eval()
    sums, counts = float64_profile(pair, engine, prompts, given)
    reached = sum(count > 0 for count in counts)
    assert found.tokens_by_position == counts[:reached]
    assert counts[0] == 15
    assert 0 < counts[8] < 15
    expected = [total / count for total, count in zip(sums, counts, strict=True) if count]
    assert found.kl_by_position == pytest.approx(expected, rel=1e-4)
    assert found.mean_response_tokens == pytest.approx(sum(counts) / 15)
    assert found.mean_kl(0, 6) == pytest.approx(sum(sums[:6]) / sum(counts[:6]), rel=1e-4)
    assert found.mean_kl(6) == pytest.approx(sum(sums[6:]) / sum(counts[6:]), rel=1e-4)


def test_results_split_the_kl_at_the_cutoff(config, tmp_path):
    results = train(changed(config, max_steps=1, rollout_tokens=4))
    for evaluation in (results["before"], results["after"]):
        kl, tokens = evaluation["kl_by_position"], evaluation["tokens_by_position"]
        assert len(kl) > 6
        for name, part in (("kl_inside", slice(0, 4)), ("kl_beyond", slice(4, None))):
            total = sum(a * b for a, b in zip(kl[part], tokens[part], strict=True))
            assert evaluation[name] == pytest.approx(total / sum(tokens[part]))
    machine = json.loads((tmp_path / "run" / "results.json").read_text())["machine"]
    assert machine["versions"]["torch"] == torch.__version__
    assert machine["threads"] == torch.get_num_threads()


@torch.no_grad()
def test_every_response_is_graded_once_as_text_up_to_its_eos(config):
    given = changed(config, num_eval_samples=4, per_device_eval_batch_size=5)
    vocabulary = load_vocabulary(given)
    prompts = load_prompts(given, vocabulary, 100)
    pair = load_pair(given, vocabulary, CPU)

    class Scripted:
        """Answers "a<eos>b" and "b<eos>b" in turn."""

        def __init__(self):
            self.count = 0

        def update_weights(self):
            self.count = 0

        def release(self):
            pass

        def generate(self, prompt_ids, prompt_mask, *, max_new_tokens):
            a, b = (vocabulary.tokenizer(letter)["input_ids"][0] for letter in "ab")
            rows = []
            for _ in prompt_ids:
                rows.append([a if self.count % 4 == 0 else b, 2, b])
                self.count += 1
            return torch.tensor(rows)

    texts = []

    def grade(index, text):
        texts.append((index, text))
        return text == "a"

    found = evaluate(pair, Scripted(), dataclasses.replace(prompts, grade=grade), given)
    assert texts == [(i // 4, "a" if i % 4 == 0 else "b") for i in range(12)]
    assert found.score == 0.25
    assert found.score_interval[0] < 0.25 < found.score_interval[1]
    assert found.mean_response_tokens == 2


def test_two_processes_do_not_share_a_run_folder(config, tmp_path, monkeypatch):
    """The second is refused while the first trains, and can go on once it is gone."""
    from esr_train.checkpoint import held_run_folder
    from esr_train.errors import UserError

    train(changed(config, num_eval_prompts=0, max_steps=1))
    run = tmp_path / "run"
    longer = changed(config, num_eval_prompts=0, max_steps=2)
    with held_run_folder(run), pytest.raises(UserError, match="another process is training"):
        train(longer, run)
    assert train(longer, run)["steps"] == 2


@pytest.mark.parametrize("broken", ["trainer_state.pt", "adapter_model.safetensors"])
def test_a_broken_checkpoint_is_named(config, tmp_path, broken):
    from esr_train.errors import UserError

    train(changed(config, num_eval_prompts=0, max_steps=1))
    run = tmp_path / "run"
    (run / "checkpoint-best").mkdir()
    (run / "checkpoint-1" / broken).write_bytes(b"broken")
    with pytest.raises(UserError, match="checkpoint-1 cannot be read .*: delete it to resume"):
        train(changed(config, num_eval_prompts=0, max_steps=2), run)


def test_broken_results_are_named(config, tmp_path):
    from esr_train.errors import UserError

    train(changed(config, num_eval_prompts=0, max_steps=1))
    (tmp_path / "run" / "results.json").write_text("{")
    with pytest.raises(UserError, match="results.json cannot be read .*: delete it to resume"):
        train(changed(config, num_eval_prompts=0, max_steps=2), tmp_path / "run")


def test_an_interrupt_says_how_to_go_on(config, tmp_path, monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(train_module, "train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(changed(config, num_eval_prompts=0))
    assert f"--resume {tmp_path / 'run'} goes on" in capsys.readouterr().err


def test_pictures_show_the_numbers(config):
    """Not only a PNG: the lines are the losses, the seconds and the profile."""
    from esr_train.report import plot_profiles, three_panels

    evaluation = {
        "score": None, "score_interval": None, "num_prompts": 2, "num_samples": 1,
        "mean_response_tokens": 60.0, "seconds": 1.0,
        "kl_by_position": [float(i) for i in range(60)], "tokens_by_position": [40] * 59 + [1],
    }  # fmt: skip
    _, (axes, _, _) = three_panels()
    plot_profiles(axes, {"before": evaluation, "after": None}, {"rollout_tokens": 6})
    line, cutoff = axes.get_lines()
    assert cutoff.get_xdata()[0] == 6
    assert line.get_label() == "before"
    assert line.get_xdata().tolist()[:2] == [1.0, 3.0]  # bins of two positions
    assert line.get_ydata().tolist()[:2] == [0.5, 2.5]
    assert len(line.get_xdata()) == 30  # the position that one response reaches is left out


def test_the_commit_is_that_of_the_source_or_none(tmp_path, monkeypatch):
    from esr_train import report

    source = Path(report.__file__)
    found = report.source_commit()
    head = subprocess.run(
        ["git", "-C", str(source.parent), "rev-parse", "HEAD"],
        capture_output=True, text=True, check=False,
    ).stdout.strip()  # fmt: skip
    assert (found or "").removesuffix("-dirty") == head
    # Installed inside somebody else's repository: their commit is not ours.
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    installed = tmp_path / "site-packages" / "esr_train" / "report.py"
    monkeypatch.setattr(report, "__file__", str(installed))
    installed.parent.mkdir(parents=True)
    assert report.source_commit() is None
