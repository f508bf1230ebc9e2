"""A real TRL DistillationTrainer, trained with its own loss and with ours."""

import copy
import re
import subprocess
import sys
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from numerics import relative_error
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    TrainerCallback,
)

from esr_kernels import linear_reverse_kl
from esr_kernels.integrations.trl import use_in_trl

trl = pytest.importorskip("trl")
peft = pytest.importorskip("peft")
datasets = pytest.importorskip("datasets")

pytestmark = [
    # TRL 1.16 uses names that transformers 5.23 renames.
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning"),
]
VOCAB = 48
STEPS, ACCUMULATION = 3, 2
# Both losses read the same float32 hidden states; they differ by the order of float32 sums over 48
# ids, and so by some roundings of 6e-8. Gradients go on through two float32 layers of the model:
# TRL's lie up to 6e-6 from float64, ours up to 2e-6.
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 5e-7, 1e-5
ENTROPY_TOLERANCE = 5e-6  # TRL subtracts two float32 terms of a peaked student's logits
LOGGED = {"loss": LOSS_TOLERANCE, "entropy": ENTROPY_TOLERANCE, "grad_norm": GRADIENT_TOLERANCE}
SHAPE = {
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}


def make_tokenizer(num_words=VOCAB):
    words = ["<pad>", "<eos>", *(f"w{i}" for i in range(2, num_words))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "w2"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>", padding_side="left"
    )


def make_model(model_class, config_class, seed, vocab_size=VOCAB, **options):
    torch.manual_seed(seed)
    config = config_class(vocab_size=vocab_size, **SHAPE, **options)
    model = model_class(config)
    # Flat random logits would give a KL of nothing.
    model.get_output_embeddings().weight.data.mul_(20)
    model.generation_config.eos_token_id = [1, *range(20, 28)]  # so that completions end early
    return model


def make_student(vocab_size=VOCAB):
    options = {"hidden_size": 16, "tie_word_embeddings": True}
    return make_model(Qwen2ForCausalLM, Qwen2Config, 0, vocab_size, **options)


def make_softcapped_student():
    options = {"hidden_size": 16, "head_dim": 8, "final_logit_softcapping": 3.0}
    return make_model(Gemma3ForCausalLM, Gemma3TextConfig, 0, **options)


def make_lora_student():
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    return peft.get_peft_model(make_student(), config)


def make_teacher(vocab_size=VOCAB):
    options = {"hidden_size": 24, "head_dim": 12, "tie_word_embeddings": False}
    return make_model(Qwen3ForCausalLM, Qwen3Config, 1, vocab_size, **options)


def make_scaled_teacher():
    return make_model(CohereForCausalLM, CohereConfig, 1, hidden_size=24, logit_scale=0.5)


def make_trainer(folder, student, teacher, cls=None, **options):
    settings = {
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": ACCUMULATION,
        "max_steps": STEPS,
        "max_completion_length": 10,
        "temperature": 0.7,
        "optim": "sgd",  # Adam would turn the rounding of a gradient near 0 into a whole step
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "bf16": False,
        "dataloader_pin_memory": False,
    }
    prompts = ["w3 w4", "w5 w6 w7 w8", "w9", "w10 w11 w12", "w13 w14", "w15 w16 w17 w18 w19"] * 3
    return (cls or trl.DistillationTrainer)(
        model=student,
        teacher_model=teacher,
        args=trl.DistillationConfig(str(folder), **settings | options),
        train_dataset=datasets.Dataset.from_dict({"prompt": prompts}),
        processing_class=make_tokenizer(),
    )


@dataclass
class Record(TrainerCallback):
    """What a run did, one entry a micro-batch or an optimizer step, and what float64 says to it."""

    completions: list = field(default_factory=list)
    losses: list = field(default_factory=list)
    entropies: list = field(default_factory=list)
    gradients: list = field(default_factory=list)
    true_sums: list = field(default_factory=list)  # of the KL of a micro-batch's tokens
    token_counts: list = field(default_factory=list)
    true_gradients: list = field(default_factory=list)

    def attach(self, trainer):
        self.trainer, self.compute_loss = trainer, trainer._compute_loss
        self.teacher = copy.deepcopy(trainer.teacher_model).double()
        self.window = []
        trainer._compute_loss = self
        trainer.add_callback(self)
        return self

    def __call__(self, student, inputs, num_items_in_batch):
        double = copy.deepcopy(student).double()
        true_sum, num_tokens = reverse_kl_sum(
            double, self.teacher, inputs, self.trainer.temperature
        )
        true_sum.backward()
        self.window.append((double, num_tokens))
        self.true_sums.append(true_sum.item())
        self.token_counts.append(num_tokens)
        loss, entropy, count = self.compute_loss(student, inputs, num_items_in_batch)
        assert count == num_tokens
        assert not entropy.requires_grad
        self.completions.append(inputs["completion_ids"].tolist())
        self.losses.append(loss.item())
        self.entropies.append(entropy.item())
        return loss, entropy, count

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        total = sum(num_tokens for _, num_tokens in self.window)
        self.gradients.append(gradient_of(model))
        self.true_gradients.append(sum(gradient_of(m) for m, _ in self.window) / total)
        self.window = []

    def true_losses(self):
        """With TRL's divisor: the tokens of all micro-batches of an optimizer step."""
        steps = [self.token_counts[i : i + ACCUMULATION] for i in range(0, 6, ACCUMULATION)]
        divisors = [sum(steps[i // ACCUMULATION]) for i in range(6)]
        return [kl / divisor for kl, divisor in zip(self.true_sums, divisors, strict=True)]


def gradient_of(model):
    """Of all trainable parameters, flat; a copy."""
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def reverse_kl_sum(student, teacher, inputs, temperature):
    """By the definition, from the models' own logits: their softcap, their scale, their head."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    attention_mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    start = inputs["prompt_ids"].shape[1] - 1
    # As TRL: no position_ids, so left padding counts.
    arguments = {"input_ids": ids, "attention_mask": attention_mask, "use_cache": False}
    s, t = (model(**arguments).logits[:, start:-1] / temperature for model in (student, teacher))
    vocab = min(s.shape[-1], t.shape[-1])
    s, t = s[..., :vocab].log_softmax(-1), t[..., :vocab].log_softmax(-1).detach()
    mask = inputs["completion_mask"].bool()
    return (s.exp() * (s - t)).sum(-1)[mask].sum(), int(mask.sum())


def train(trainer):
    record = Record().attach(trainer)
    trainer.train()
    assert [len(x) for x in (record.losses, record.gradients)] == [STEPS * ACCUMULATION, STEPS]
    assert len(set(record.token_counts)) > 1, "micro-batches of one size do not test the divisor"
    record.log = [line for line in trainer.state.log_history if "loss" in line]
    return record


def assert_exact(record):
    """Loss of every micro-batch and gradient of every step, against float64."""
    assert record.losses == pytest.approx(record.true_losses(), rel=LOSS_TOLERANCE)
    for gradient, true in zip(record.gradients, record.true_gradients, strict=True):
        assert relative_error(gradient, true) < GRADIENT_TOLERANCE


def train_both_ways(folder, make_student, make_teacher, **options):
    records = []
    for attach in (lambda trainer: None, use_in_trl):
        trainer = make_trainer(folder, make_student(), make_teacher(), **options)
        attach(trainer)
        records.append(train(trainer))
    theirs, ours = records
    assert ours.completions == theirs.completions
    return theirs, ours


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        (make_student, make_teacher),
        (make_softcapped_student, make_scaled_teacher),
        (make_lora_student, make_teacher),
    ],
    ids=["full", "softcap-and-scale", "lora"],
)
def test_trains_as_with_the_loss_of_trl(tmp_path, student, teacher):
    theirs, ours = train_both_ways(tmp_path, student, teacher)
    assert_exact(ours)
    assert ours.losses == pytest.approx(theirs.losses, rel=LOSS_TOLERANCE)
    for gradient, other in zip(ours.gradients, theirs.gradients, strict=True):
        assert relative_error(gradient, other.double()) < GRADIENT_TOLERANCE
    assert ours.entropies == pytest.approx(theirs.entropies, rel=ENTROPY_TOLERANCE)
    for key, tolerance in LOGGED.items():
        expected = [line[key] for line in theirs.log]
        assert [line[key] for line in ours.log] == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize(("student_rows", "teacher_rows"), [(48, 60), (60, 48)])
def test_padded_vocabularies_that_trl_refuses(tmp_path, student_rows, teacher_rows):
    student, teacher = make_student(student_rows), make_teacher(teacher_rows)
    with pytest.raises(ValueError, match="vocab_size"):
        make_trainer(tmp_path, student, teacher)
    trainer = make_trainer(tmp_path, student, None)
    use_in_trl(trainer, teacher, teacher_tokenizer=make_tokenizer())
    record = train(trainer)
    assert_exact(record)
    assert max(max(row) for batch in record.completions for row in batch) < VOCAB
    weight = teacher.get_output_embeddings().weight
    assert weight.grad is None
    assert not teacher.training


def test_a_wider_student_samples_none_of_the_ids_that_the_teacher_lacks(tmp_path):
    trainer = make_trainer(tmp_path, make_student(60), None)
    trainer.generation_config.suppress_tokens = [5]
    use_in_trl(trainer, make_teacher())
    assert trainer.generation_config.suppress_tokens == [5, *range(48, 60)]


@pytest.mark.parametrize("num_words", [VOCAB - 1, VOCAB + 2])
def test_either_tokenizer_may_have_tokens_of_its_own(tmp_path, num_words):
    trainer = make_trainer(tmp_path, make_student(), make_teacher())
    use_in_trl(trainer, teacher_tokenizer=make_tokenizer(num_words))


def test_the_last_token_must_have_a_row_in_both_heads(tmp_path):
    trainer = make_trainer(tmp_path, make_student(), None)
    with pytest.raises(ValueError, match="got 47 rows and 48 of the student.* ids up to 47"):
        use_in_trl(trainer, make_teacher(VOCAB - 1))


def test_the_teacher_builds_no_graph(tmp_path, monkeypatch):
    seen = []

    def spy(student_hidden, student_head, teacher_hidden, teacher_head, **options):
        seen.append((student_hidden.requires_grad, teacher_hidden.requires_grad))
        sides = student_hidden, student_head, teacher_hidden, teacher_head
        return linear_reverse_kl(*sides, **options)

    monkeypatch.setattr("esr_kernels.integrations.trl.linear_reverse_kl", spy)
    trainer = make_trainer(tmp_path, make_student(), make_teacher())
    trainer.teacher_model.requires_grad_(True)
    use_in_trl(trainer)
    trainer._compute_loss(trainer.model, make_batch(), None)
    assert seen == [(True, False)]


def make_batch():
    return {
        "prompt_ids": torch.tensor([[0, 3, 4], [5, 6, 7]]),
        "prompt_mask": torch.tensor([[0, 1, 1], [1, 1, 1]]),
        "completion_ids": torch.randint(2, VOCAB, (2, 4)),
        "completion_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
        "num_items_in_batch": 99,  # the loss goes by its argument
    }


def test_both_models_read_what_goes_with_the_text(tmp_path):
    trainer = make_trainer(tmp_path, make_student(), make_teacher())
    use_in_trl(trainer)
    inputs = make_batch() | {"pixel_values": torch.ones(2, 3), "advantages": torch.ones(2)}
    seen = []

    def hidden_states(model, input_ids, attention_mask, logits_to_keep, pixel_values=None):
        seen.append(pixel_values)
        return torch.zeros(2, logits_to_keep, model.config.hidden_size)

    trainer._get_last_hidden_state = hidden_states
    trainer._compute_loss(trainer.model, inputs, None)
    assert [x is inputs["pixel_values"] for x in seen] == [True, True]


@pytest.mark.parametrize("num_items", [None, 7, torch.tensor(5.0)])
@pytest.mark.parametrize("masked", ["padding", "tool-results", "all"])
def test_masks_and_divides_as_trl(tmp_path, num_items, masked):
    """Without a count, as in evaluation, by the tokens at hand."""
    trainer = make_trainer(tmp_path, make_student(), make_teacher())
    use_in_trl(trainer)
    inputs = make_batch()
    inputs["completion_mask"] *= masked != "all"
    if masked == "tool-results":
        inputs["tool_mask"] = torch.tensor([[1, 0, 0, 1], [1, 1, 1, 1]])
    student = trainer.model
    actual = trainer._compute_loss(student, inputs, num_items)
    expected = trl.DistillationTrainer._compute_loss(trainer, student, inputs, num_items)
    for ours, theirs, tolerance in zip(
        actual, expected, (LOSS_TOLERANCE, ENTROPY_TOLERANCE, 0), strict=True
    ):
        assert ours.shape == theirs.shape == ()
        assert ours.item() == pytest.approx(theirs.item(), rel=tolerance)


def test_bfloat16_autocast_of_float32_weights(tmp_path):
    """TRL's default. Both round hidden states and heads, and keep float32 logits."""
    trainer = make_trainer(tmp_path, make_student(), make_teacher())
    use_in_trl(trainer)
    student, inputs = trainer.model, make_batch()
    results = []
    for compute in (trainer._compute_loss, partial(trl.DistillationTrainer._compute_loss, trainer)):
        student.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss, _, _ = compute(student, inputs, None)
        loss.backward()
        results.append((loss.item(), gradient_of(student)))
    (loss, gradient), (their_loss, their_gradient) = results
    unrounded, num_tokens = reverse_kl_sum(
        student, trainer.teacher_model, inputs, trainer.temperature
    )
    assert loss != pytest.approx(unrounded.item() / num_tokens, rel=1e-5), "no autocast, no test"
    assert loss == pytest.approx(their_loss, rel=LOSS_TOLERANCE)
    # Each rounds the gradient to bfloat16 on its way, at its own places: 2**-9 on either side.
    assert relative_error(gradient, their_gradient.double()) < 2**-8


class OtherLossTrainer(trl.DistillationTrainer):
    def compute_loss(self, *args, **kwargs):
        raise NotImplementedError


def make_lora_head_teacher():
    return peft.get_peft_model(make_teacher(), peft.LoraConfig(target_modules=["lm_head"]))


def other_tokenizer():
    words = {f"v{i}": i for i in range(VOCAB)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, "v0")))


@pytest.mark.parametrize(
    ("options", "call", "message"),
    [
        ({"beta": 0.5}, {}, r"expected DistillationConfig(beta=1.0), the reverse KL, got 0.5"),
        ({"cls": OtherLossTrainer}, {}, "expected a trl.DistillationTrainer, or a subclass"),
        ({"teacher": None}, {}, "teacher_model: expected a model"),
        ({}, {"teacher_model": make_teacher}, "teacher_model: expected None"),
        (
            {"teacher": None},
            {"teacher_model": make_lora_head_teacher},
            "adapter ['default'] (Linear) acts on the LM head",
        ),
        (
            {},
            {"teacher_tokenizer": other_tokenizer},
            "expected the tokens of the trainer's tokenizer",
        ),
        (
            {"teacher": None},
            {"teacher_model": lambda: make_teacher(40)},
            "got 40 rows and 48 of the student, whose tokenizer uses ids up to 47",
        ),
    ],
    ids=["beta", "class", "no-teacher", "two-teachers", "head-adapter", "tokenizer", "vocabulary"],
)
def test_refuses_what_it_cannot_reproduce(tmp_path, options, call, message):
    options = {"teacher": make_teacher(), **options}
    trainer = make_trainer(tmp_path, make_student(), **options)
    with pytest.raises(ValueError, match=re.escape(message)):
        use_in_trl(trainer, **{name: make() for name, make in call.items()})
    assert "_compute_loss" not in vars(trainer)


def test_refuses_other_versions_launchers_and_generators(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="got object"):
        use_in_trl(object())
    trainer = make_trainer(tmp_path, make_student(60), None)
    monkeypatch.setattr(trainer, "use_vllm", True)
    with pytest.raises(ValueError, match="expected use_vllm=False"):
        use_in_trl(trainer, make_teacher())
    monkeypatch.setattr(trainer.args, "deepspeed_plugin", SimpleNamespace(zero_stage=3))
    with pytest.raises(ValueError, match="got ZeRO-3"):
        use_in_trl(trainer, make_teacher())
    monkeypatch.setattr(trl, "__version__", "1.17.0")
    with pytest.raises(ValueError, match="trl: expected version 1.16, got 1.17.0"):
        use_in_trl(trainer, make_teacher())


def test_importing_the_integrations_imports_neither_project():
    code = (
        "import sys, esr_kernels.integrations.liger, esr_kernels.integrations.trl\n"
        "print([name for name in sys.modules if name.split('.')[0] in ('trl', 'liger_kernel')])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"
