"""A student and a teacher with two tokenizers: what is compared, its gradient, whole runs."""

from __future__ import annotations

import dataclasses
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import CHAT_TEMPLATE, SHAPE, make_tokenizer, save
from tokenizer_zoo import EOS, zoo
from transformers import (
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from esr_kernels import rollout_batch
from esr_train import bridge as bridge_module
from esr_train import train as train_module
from esr_train.align import Aligner, Vocabulary, load_vocabulary
from esr_train.bridge import LOW_STEPS, Bridge, coverage_error, make_bridge, turn_end_first
from esr_train.config import TrainConfig
from esr_train.data import load_prompts
from esr_train.errors import UserError
from esr_train.eval.measure import evaluate
from esr_train.metrics import PhaseMeter
from esr_train.models import Pair, load_pair, transformer
from esr_train.train import generate, make_engine, make_optimizer, train, train_step

CPU = torch.device("cpu")
TEACHER_ROWS = 3010  # more than the tokenizer has ids


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))


@pytest.fixture(scope="session")
def other_teacher_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher with a tokenizer of Gemma's kind and a chat template of its own."""
    tokenizer = zoo()["gemma"]
    tokenizer.chat_template = CHAT_TEMPLATE.replace("<|im_start|>", "<s>").replace(
        "<|im_end|>\n", "</s>"
    )
    torch.manual_seed(3)
    config = Qwen3Config(
        vocab_size=TEACHER_ROWS, hidden_size=40, head_dim=16, tie_word_embeddings=False, **SHAPE
    )
    model = Qwen3ForCausalLM(config)
    model.lm_head.weight.data.mul_(20)
    path = save(tmp_path_factory.mktemp("models") / "gemma", model, tokenizer)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": EOS}))
    return path


@pytest.fixture
def two(config: TrainConfig, other_teacher_path: Path) -> TrainConfig:
    return dataclasses.replace(
        config, teacher_model_name_or_path=str(other_teacher_path), temperature=1.0
    )


def set_up(config: TrainConfig) -> tuple[Pair, Any, Any]:
    torch.manual_seed(config.seed)
    vocabulary = load_vocabulary(config)
    prompts = load_prompts(config, vocabulary, 100, 100)
    pair = load_pair(config, vocabulary, CPU, None, make_bridge(config, vocabulary, prompts, CPU))
    return pair, prompts, make_engine(config, pair, Path("unused"))


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def text_before(tokenizer: Any, ids: list[int]) -> bytes:
    return b"".join(tokenizer.token_bytes[index] for index in ids)


def log_probs(model: Any, batch: Any, size: int) -> list[torch.Tensor]:
    """Of each response position [V], a sequence at a time, in float64."""
    found = []
    bounds = batch.cu_seqlens.tolist()
    for (first, last), length in zip(
        pairwise(bounds), batch.response_lengths.tolist(), strict=True
    ):
        logits = model(input_ids=batch.input_ids[None, first:last]).logits[0, :, :size]
        found += list(logits[-length - 1 : -1].log_softmax(-1))
    return found


def covered(own: torch.Tensor, other: torch.Tensor, bridge: Bridge) -> torch.Tensor:
    """Reverse KL over what ids of both count for, by the words of the contract."""
    student_map = torch.arange(len(own)) if bridge.student_map is None else bridge.student_map
    shared = set(student_map.tolist()) & set(bridge.vocab_map.tolist()) - {-1}
    masses = [
        torch.stack([values.exp()[counts_for == index].sum() for index in sorted(shared)])
        for values, counts_for in ((own, student_map), (other, bridge.vocab_map))
    ]
    student, teacher = (mass / mass.sum() for mass in masses)
    return (student * (student / teacher).log()).sum()


@pytest.mark.parametrize("use_peft", [True, False])
@pytest.mark.parametrize(
    ("alignment", "projection", "estimator"),
    [
        ("start", "merge", "full"),
        ("start", "project", "full"),
        ("span", "exact", "full"),
        ("start", "merge", "sampled"),
        ("span", "merge", "sampled"),
    ],
)
def test_the_gradient_of_a_step(
    two: TrainConfig, alignment: Any, projection: Any, estimator: Any, use_peft: bool
) -> None:
    """Against float64, a sequence at a time, over two batches of unequal coverage."""
    config = dataclasses.replace(
        two,
        alignment=alignment,
        vocab_projection=projection,
        loss_estimator=estimator,
        use_peft=use_peft,
        gradient_accumulation_steps=2,
        max_grad_norm=0.0,
        eos_token_ids=list(range(2, 60)),
    )
    pair, prompts, engine = set_up(config)
    assert pair.bridge is not None
    for name, parameter in pair.student.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    optimizer, scheduler = make_optimizer(config, pair)
    found: dict[str, Any] = {}
    hook = optimizer.register_step_pre_hook(
        lambda *_: found.update(
            (n, p.grad.clone()) for n, p in pair.student.named_parameters() if p.grad is not None
        )
    )
    before = {n: p.detach().clone() for n, p in pair.student.named_parameters()}
    record = train_step(0, config, pair, engine, prompts, optimizer, scheduler, PhaseMeter(CPU))
    hook.remove()
    pair.student.load_state_dict(before, strict=False)
    torch.manual_seed(train_module.mix_seed(config.seed, 0))
    engine.update_weights()
    rollouts = [
        pair.read(generate(pair, engine, batch, config.max_new_tokens), estimator)
        for batch in train_module.step_batches(0, config, prompts)
    ]

    student, teacher = transformer(pair.student).double(), pair.teacher.double()
    pair.student.zero_grad()
    total, count = torch.zeros((), dtype=torch.float64), 0
    for rollout in rollouts:
        own = log_probs(student, rollout.student, pair.vocabulary.size)
        other = log_probs(teacher, rollout.teacher, pair.vocabulary.teacher.size)
        rows = rollout.aligned
        assert rows is not None
        for pairing in zip(
            rows.student_rows, rows.teacher_rows, rows.student_stops, rows.teacher_stops,
            strict=True,
        ):  # fmt: skip
            row, teacher_row, stop, teacher_stop = map(int, pairing)
            count += 1
            if estimator == "full":
                total = total + covered(own[row], other[teacher_row], pair.bridge)
            elif stop >= 0:
                ids, teacher_ids = rollout.student.targets, rollout.teacher.targets
                written = sum(own[i][ids[i]] for i in range(row, stop))
                difference = (
                    written
                    - sum(other[i][teacher_ids[i]] for i in range(teacher_row, teacher_stop))
                ).detach()
                total = total + difference * written + difference - (difference * written).detach()
    loss = total / count
    loss.backward()
    assert 0 < count < sum(len(r.student.targets) for r in rollouts)
    assert record["loss"] == pytest.approx(loss.item(), rel=1e-4)
    gradients = {n: p.grad for n, p in pair.student.named_parameters() if p.grad is not None}
    assert set(found) == set(gradients)
    for name, gradient in gradients.items():
        scale = gradient.norm().clamp(min=1e-9)
        assert (found[name] - gradient).norm() / scale < 1e-3, name


def test_the_teacher_reads_the_same_text_behind_its_own_prompt(two: TrainConfig) -> None:
    pair, prompts, engine = set_up(two)
    assert pair.bridge is not None
    sides = pair.bridge.aligner.student, pair.bridge.aligner.teacher
    torch.manual_seed(1)
    batch = generate(pair, engine, prompts.train[:8], 20)
    rollout = pair.read(batch)
    aligned = rollout.aligned
    assert aligned is not None
    tokenizer = pair.vocabulary.teacher.tokenizer
    for index, (first, last) in enumerate(pairwise(rollout.teacher.cu_seqlens.tolist())):
        length = int(rollout.teacher.response_lengths[index])
        question = tokenizer.decode(rollout.teacher.input_ids[first : last - length])
        assert question.startswith("<s>user\nWhat is")
        assert question.endswith("</s><s>assistant\n")
    for row, teacher_row in zip(aligned.student_rows, aligned.teacher_rows, strict=True):
        sequence = batch.sequence_ids[row]
        assert sequence == rollout.teacher.sequence_ids[teacher_row]
        texts = []
        for side, own, at in (
            (sides[0], batch, int(row)),
            (sides[1], rollout.teacher, int(teacher_row)),
        ):
            start = at - int(own.response_positions[at])
            spelled = text_before(side, own.targets[start:at].tolist())
            texts.append(spelled.decode(errors="replace"))
        assert texts[0] == texts[1]


@pytest.mark.parametrize("use_peft", [True, False])
@pytest.mark.parametrize("rollout_tokens", [6, 0])
def test_a_whole_run(
    two: TrainConfig, tmp_path: Path, use_peft: bool, rollout_tokens: int, capsys: Any
) -> None:
    config = dataclasses.replace(two, use_peft=use_peft, rollout_tokens=rollout_tokens)
    results = train(config)
    said = capsys.readouterr().err
    assert "two tokenizers (id 0 is '<|endoftext|>' for the student and '<unk>'" in said
    for record in metrics(tmp_path / "run"):
        assert record["grad_norm"] > 0
        coverage = record["coverage"]
        assert set(coverage) == {
            "compared", "start_aligned", "span_aligned", "own_spelling", "student_mass",
            "teacher_mass",
        }  # fmt: skip
        assert all(0 < share <= 1 for share in coverage.values())
        assert coverage["span_aligned"] <= coverage["start_aligned"] == coverage["compared"]
    for name in ("before", "after"):
        assert results[name]["kl_inside"] > 0
        assert set(results[name]["coverage"]) == set(coverage)
    assert (tmp_path / "run/curves.png").exists()


def test_resuming_gives_the_uninterrupted_numbers(two: TrainConfig, tmp_path: Path) -> None:
    train(dataclasses.replace(two, max_steps=4))
    cut = dataclasses.replace(two, max_steps=2, output_dir=str(tmp_path / "cut"))
    train(cut)
    train(dataclasses.replace(cut, max_steps=4), resume=tmp_path / "cut")
    for one, other in zip(metrics(tmp_path / "run"), metrics(tmp_path / "cut"), strict=True):
        for name in ("loss", "grad_norm", "coverage", "response_tokens"):
            assert one[name] == other[name]


@torch.no_grad()
def test_the_evaluation_is_over_the_compared_tokens(two: TrainConfig) -> None:
    config = dataclasses.replace(two, alignment="span", max_completion_length=20)
    pair, prompts, engine = set_up(config)
    read = pair.bridge.read
    seen = []
    pair.bridge.read = lambda batch, *_: seen.append(read(batch)) or seen[-1]
    found = evaluate(pair, engine, prompts, config)
    assert sum(found.tokens_by_position) == sum(r.num_compared for r in seen)
    assert found.mean_response_tokens * 3 == sum(len(r.student.targets) for r in seen)
    assert sum(found.tokens_by_position) < found.mean_response_tokens * 3
    counts = torch.zeros(20)
    for rollout in seen:
        places = rollout.student.response_positions[rollout.aligned.student_rows]
        counts += places.bincount(minlength=20)
    assert found.tokens_by_position == counts[: len(found.tokens_by_position)].tolist()
    assert found.coverage["compared"] == pytest.approx(found.coverage["span_aligned"])


def test_a_batch_without_an_aligned_token_adds_nothing(
    two: TrainConfig, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    config = dataclasses.replace(two, gradient_accumulation_steps=2)
    pair, prompts, engine = set_up(config)
    assert pair.bridge is not None
    optimizer, scheduler = make_optimizer(config, pair)
    arguments = (config, pair, engine, prompts, optimizer, scheduler, PhaseMeter(CPU))
    train_step(0, *arguments)  # moments of the optimizer, which would move weights by themselves
    real = Bridge.read
    count = iter(range(100))

    def nothing(bridge: Bridge, batch: Any, *estimator: Any) -> Any:
        rollout = real(bridge, batch)
        none = torch.zeros(len(rollout.aligned.student_rows), dtype=torch.bool)
        shares = {**rollout.coverage, "compared": 0.0}
        return dataclasses.replace(rollout, aligned=rollout.aligned.select(none), coverage=shares)

    def every_second(bridge: Bridge, batch: Any, *estimator: Any) -> Any:
        return (nothing if next(count) % 2 else real)(bridge, batch)

    before = [p.detach().clone() for p in pair.student.parameters()]
    monkeypatch.setattr(Bridge, "read", nothing)
    record = train_step(1, *arguments)
    assert record["loss"] == record["grad_norm"] == record["coverage"]["compared"] == 0
    assert all(torch.equal(a, b) for a, b in zip(before, pair.student.parameters(), strict=True))
    assert capsys.readouterr().err.count("step 2: no token of a batch is aligned") == 2
    monkeypatch.setattr(Bridge, "read", every_second)
    record = train_step(2, *arguments)
    assert record["loss"] > 0
    assert 0 < record["coverage"]["compared"] < record["coverage"]["start_aligned"]


def test_a_run_of_low_coverage_stops_and_loses_nothing(
    two: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bridge_module, "LEAST_COVERAGE", 1.01)
    config = dataclasses.replace(two, max_steps=30, num_eval_prompts=0)
    with pytest.raises(UserError, match=r"were compared in each of the last 10 steps.*esr_train"):
        train(config)
    assert len(metrics(tmp_path / "run")) == LOW_STEPS
    assert (tmp_path / f"run/checkpoint-{LOW_STEPS}").is_dir()


def test_coverage_must_be_low_ten_times_on_end() -> None:
    def records(*shares: float) -> list[dict[str, Any]]:
        return [{"coverage": {"compared": share}} for share in shares]

    assert coverage_error(records(*[0.1] * 9)) is None
    assert coverage_error(records(*[0.1] * 9, 0.3)) is None
    assert coverage_error(records(0.1, 0.3, *[0.1] * 9)) is None
    assert coverage_error(records(0.3, *[0.1] * 9, 0.15))
    assert coverage_error(records(*[0.2] * 10)) is None
    assert coverage_error([{"loss": 1.0}] * 20) is None


def test_own_spelling_is_the_share_of_tokens_that_the_tokenizer_would_write() -> None:
    tokenizer = zoo()["qwen"]
    aligner = Aligner(
        tokenizer, zoo()["gemma"], student_eos_token_ids=[EOS], teacher_eos_token_ids=[EOS]
    )
    whole = tokenizer("The sum of the two numbers", add_special_tokens=False)["input_ids"]
    letters = [tokenizer.convert_tokens_to_ids(letter) for letter in ("\u0120", "t", "h", "e")]
    assert aligner.own().align([[*whole, EOS]]).span_coverage == 1
    written = aligner.own().align([[*whole, *letters]])
    assert written.span_coverage == len(whole) / (len(whole) + 4)


def test_a_context_that_is_too_short_loses_its_positions_only() -> None:
    words = {"student_eos_token_ids": [EOS], "teacher_eos_token_ids": [EOS]}
    aligner = Aligner(zoo()["llama3"], zoo()["mistral"], **words)
    texts = ["The sum of 1730 and 2 is 1732.", "42", "Der Fuchs springt \u00fcber alle Hunde hier"]
    rows = [[*zoo()["llama3"].encode(text, add_special_tokens=False), EOS] for text in texts]
    whole = aligner.align(rows)
    lengths = [len([*aligner.teacher.encode([text], True)[0], EOS]) for text in texts]
    starts = [sum(lengths[:i]) for i in range(3)]
    assert whole.cut(torch.tensor(lengths)) is whole
    limits = [torch.full((3,), limit) for limit in range(1, max(lengths))]
    for limit in (*limits, torch.tensor([3, 100, 9]), torch.tensor([100, 1, 2])):
        cut = aligner.align(rows).cut(limit)
        kept_lengths = [min(n, most) for n, most in zip(lengths, limit.tolist(), strict=True)]
        new_starts = [sum(kept_lengths[:i]) for i in range(3)]
        # Of a row that is cut the last token is EOS, which nothing is aligned with.
        last = [n if n == kept else kept - 1 for n, kept in zip(lengths, kept_lengths, strict=True)]
        expected = []
        for row, teacher_row, stop, teacher_stop in zip(
            whole.student_rows.tolist(), whole.teacher_rows.tolist(),
            whole.student_stops.tolist(), whole.teacher_stops.tolist(), strict=True,
        ):  # fmt: skip
            sequence = max(i for i in range(3) if starts[i] <= teacher_row)
            if teacher_row - starts[sequence] >= last[sequence]:
                continue
            moved = new_starts[sequence] - starts[sequence]
            reached = teacher_stop >= 0 and teacher_stop - starts[sequence] <= last[sequence]
            stops = (stop, teacher_stop + moved) if reached else (-1, -1)
            expected.append((row, teacher_row + moved, *stops))
        names = ("student_rows", "teacher_rows", "student_stops", "teacher_stops")
        found = list(zip(*(getattr(cut, name).tolist() for name in names), strict=True))
        assert found == expected
        batch = rollout_batch(
            torch.ones(3, 1, dtype=torch.int64), torch.ones(3, 1, dtype=torch.bool),
            cut.teacher_response_ids, eos_token_ids=[EOS],
        )  # fmt: skip
        assert batch.response_lengths.tolist() == kept_lengths


def test_a_long_response_fits_the_teachers_context(two: TrainConfig) -> None:
    pair, prompts, engine = set_up(two)
    assert pair.bridge is not None
    longest = max(len(ids) for ids in prompts.teacher_ids.values())
    pair.bridge.teacher = dataclasses.replace(pair.bridge.teacher, context_length=longest + 4)
    batch = generate(pair, engine, prompts.train[:4], 30)
    rollout = pair.read(batch)
    assert rollout.teacher.max_seqlen <= longest + 4
    assert 0 < rollout.num_compared < len(batch.targets)
    assert rollout.aligned.teacher_rows.max() < len(rollout.teacher.targets)


def test_the_eos_that_the_template_writes_comes_first() -> None:
    tokenizer = make_tokenizer()
    vocabulary = Vocabulary(tokenizer, 300, (0, 5, 2), 0, None)
    assert turn_end_first(vocabulary) == (2, 0, 5)
    assert turn_end_first(dataclasses.replace(vocabulary, eos_token_ids=(0, 5))) == (0, 5)
    tokenizer.chat_template = CHAT_TEMPLATE + "<|endoftext|>"  # as Phi-3's
    assert turn_end_first(vocabulary) == (2, 0, 5)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}"
        "{{ '<|endoftext|>' if m.role == 'user' else '<|im_end|>' }}{% endfor %}"
    )
    assert turn_end_first(vocabulary) == (2, 0, 5)
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    assert turn_end_first(vocabulary) == (0, 5, 2)


def test_prompts_are_dropped_that_are_too_long_for_either(two: TrainConfig) -> None:
    vocabulary = load_vocabulary(two)
    lengths = [len(ids) for ids in load_prompts(two, vocabulary, 100, 100).teacher_ids.values()]
    kept = load_prompts(two, vocabulary, 100, max(lengths) - 1)
    assert kept.num_dropped == lengths.count(max(lengths)) > 0
    assert load_prompts(two, vocabulary, 100, 100).num_dropped == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"long_prompts": "truncate"}, "cuts at a token, and the teacher's tokenizer has others"),
        ({"teacher_eos_token_ids": [4000]}, "teacher_eos_token_ids must be ids from 0 to 30"),
        ({"max_completion_length": 200}, "student or teacher has a context of 128 tokens"),
        ({"teacher_eos_token_ids": [500]}, "the teacher's EOS '.+' is ordinary text"),
    ],
)
def test_options_that_cannot_be(two: TrainConfig, changes: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        train(dataclasses.replace(two, **changes))
    assert not Path(str(two.output_dir)).exists()


def test_options_of_two_tokenizers_are_refused_for_one(config: TrainConfig) -> None:
    with pytest.raises(UserError, match="these two share one"):
        train(dataclasses.replace(config, teacher_eos_token_ids=[2]))
    with pytest.raises(UserError, match="needs rollouts that are sampled"):
        dataclasses.replace(config, loss_estimator="sampled", temperature=0.0)


def test_a_token_past_the_teachers_head_is_refused(
    two: TrainConfig, other_teacher_path: Path, tmp_path: Path
) -> None:
    path = teacher_copy(other_teacher_path, tmp_path / "teacher")
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.add_tokens([f"<extra{i}>" for i in range(TEACHER_ROWS + 1 - len(tokenizer))])
    tokenizer.save_pretrained(path)
    with pytest.raises(
        UserError, match=rf"may write '<extra\d+>', .* past the {TEACHER_ROWS} rows"
    ):
        train(dataclasses.replace(two, teacher_model_name_or_path=str(path)))


def test_the_last_word_of_a_cut_response_is_not_settled() -> None:
    """The teacher spells what is left of it in pieces that it would not have written."""
    words = {"student_eos_token_ids": [EOS], "teacher_eos_token_ids": [EOS]}
    aligner = Aligner(zoo()["mistral"], zoo()["llama3"], **words)
    encode = zoo()["mistral"].encode
    whole = encode("The sum of the two numbers is 1730", add_special_tokens=False)
    full = aligner.align([[*whole, EOS]])
    assert torch.equal(full.settled, full.student_stops >= 0)
    spelled = [
        full.teacher_response_ids[0, first:stop].tolist()
        for first, stop in zip(full.teacher_rows, full.teacher_stops, strict=True)
    ]
    runs = dict(zip(full.student_rows.tolist(), spelled, strict=True))
    dropped = 0
    for length in range(1, len(whole)):
        # Behind another response, so that rows are no positions.
        cut = aligner.align([[*whole, EOS], whole[:length]])
        own = cut.student_rows > len(whole)
        begin = int((cut.teacher_response_ids[0] == EOS).int().argmax()) + 1
        for row, stop, first, last, settled in zip(
            *(part[own].tolist() for part in (cut.student_rows, cut.student_stops,
              cut.teacher_rows, cut.teacher_stops, cut.settled)), strict=True,
        ):  # fmt: skip
            ids = cut.teacher_response_ids[1, first - begin : last - begin].tolist()
            if settled:
                assert runs[row - len(whole) - 1] == ids
            dropped += stop >= 0 and not settled
    assert dropped > len(whole) / 2


def test_the_sampled_estimator_compares_settled_runs(two: TrainConfig) -> None:
    pair, prompts, engine = set_up(two)
    batch = generate(pair, engine, prompts.train[:8], 12)
    everything, rollout = pair.read(batch), pair.read(batch, "sampled")
    assert rollout.aligned is not None
    assert everything.aligned is not None
    assert rollout.aligned.settled.all()
    assert 0 < rollout.num_compared == int(everything.aligned.settled.sum())
    assert rollout.num_compared < everything.num_compared
    first, stop, _, _ = rollout.spans()
    assert rollout.coverage["compared"] == int((stop - first).sum()) / len(batch.targets)


@pytest.mark.parametrize("alignment", ["start", "span"])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_padded_batches_give_the_same_step(
    two: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alignment: Any, softcap: Any
) -> None:
    if softcap:
        torch.manual_seed(0)
        words = {"head_dim": 8, "final_logit_softcapping": softcap, "eos_token_id": 2}
        model = Gemma2ForCausalLM(Gemma2Config(vocab_size=300, hidden_size=32, **SHAPE, **words))
        path = save(tmp_path / "gemma2", model, make_tokenizer())
        two = dataclasses.replace(two, model_name_or_path=str(path))
    config = dataclasses.replace(two, alignment=alignment)
    records = []
    for reason in (None, "for a test"):
        if reason:
            monkeypatch.setattr("esr_train.models.enable_packing", lambda model: "for a test")
            monkeypatch.setattr("warnings.warn", lambda *_, **__: None)
        pair, prompts, engine = set_up(config)
        steps = config, pair, engine, prompts, *make_optimizer(config, pair), PhaseMeter(CPU)
        records.append(train_step(0, *steps))
    for name in ("loss", "grad_norm"):
        assert records[0][name] == pytest.approx(records[1][name], rel=1e-4)
    assert records[0]["coverage"] == pytest.approx(records[1]["coverage"], rel=1e-4)


@pytest.mark.parametrize("use_peft", [True, False])
def test_the_sampled_estimator_of_one_tokenizer(config: TrainConfig, use_peft: bool) -> None:
    given = dataclasses.replace(
        config, loss_estimator="sampled", use_peft=use_peft, temperature=1.0, max_grad_norm=0.0
    )
    pair, prompts, engine = set_up(given)
    for name, parameter in pair.student.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    rollout = pair.read(generate(pair, engine, prompts.train[:6], 8))
    pair.sampled_reverse_kl(rollout, pair.score(rollout)).sum().backward()
    found = {n: p.grad.clone() for n, p in pair.student.named_parameters() if p.grad is not None}
    pair.student.zero_grad()
    size, targets = pair.vocabulary.size, rollout.student.targets
    own = log_probs(transformer(pair.student).double(), rollout.student, size)
    other = log_probs(pair.teacher.double(), rollout.student, size)
    terms = [
        (mine[i] - theirs[i]).detach() * mine[i]
        for mine, theirs, i in zip(own, other, targets, strict=True)
    ]
    torch.stack(terms).sum().backward()
    expected = {n: p.grad for n, p in pair.student.named_parameters() if p.grad is not None}
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-3 * gradient.norm() + 1e-8, name


def test_a_run_of_which_nothing_is_compared_still_ends(
    two: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Bridge.read

    def nothing(bridge: Bridge, batch: Any, *estimator: Any) -> Any:
        rollout = real(bridge, batch)
        none = torch.zeros(len(rollout.aligned.student_rows), dtype=torch.bool)
        shares = {**rollout.coverage, "compared": 0.0}
        return dataclasses.replace(rollout, aligned=rollout.aligned.select(none), coverage=shares)

    monkeypatch.setattr(Bridge, "read", nothing)
    results = train(dataclasses.replace(two, max_steps=LOW_STEPS))
    assert results["after"]["coverage"]["compared"] == 0
    assert results["after"]["kl_inside"] is None
    assert (tmp_path / "run/curves.png").exists()


def teacher_copy(source: Path, target: Path) -> Path:
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def test_a_teacher_without_a_template_or_an_eos(
    two: TrainConfig, other_teacher_path: Path, tmp_path: Path
) -> None:
    path = teacher_copy(other_teacher_path, tmp_path / "teacher")
    named = dataclasses.replace(two, teacher_model_name_or_path=str(path))
    (path / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="the teacher's tokenizer has no chat template"):
        train(named)
    plain = dataclasses.replace(named, apply_chat_template=False, max_steps=1, num_eval_prompts=0)
    train(plain)
    (path / "generation_config.json").unlink()
    with pytest.raises(UserError, match="teacher_model_name_or_path .*--teacher_eos_token_ids"):
        load_vocabulary(named)
    assert load_vocabulary(
        dataclasses.replace(named, teacher_eos_token_ids=[EOS])
    ).teacher.eos_token_ids == (EOS,)
