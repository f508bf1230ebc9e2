"""Loading: what is refused, and that the loss sees the logits that the model makes."""

import dataclasses

import pytest
import torch
from tiny_models import make_student, make_teacher, make_tokenizer, save
from transformers import GPT2Config, GPT2LMHeadModel

from esr_kernels import LMHead
from esr_train.align import load_vocabulary
from esr_train.errors import UserError
from esr_train.models import (
    check_lm_head,
    disable_dropout,
    load_pair,
    load_student,
    load_teacher,
)

CPU = torch.device("cpu")


def test_missing_and_wrong_folders(config, tmp_path):
    def student(path):
        return dataclasses.replace(config, model_name_or_path=str(path))

    for load in (load_vocabulary, lambda config: load_student(config, CPU)):
        with pytest.raises(UserError, match="model_name_or_path .*none: no such folder"):
            load(student(tmp_path / "none"))
        with pytest.raises(UserError, match="no config.json in it"):
            load(student(tmp_path))
    path = save(tmp_path / "m", make_student(), make_tokenizer())
    (path / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(UserError, match="model_name_or_path .* could not be loaded"):
        load_student(student(path), CPU)


def test_an_adapter_is_no_model(config, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    for role in ("model_name_or_path", "teacher_model_name_or_path"):
        named = dataclasses.replace(config, **{role: str(tmp_path)})
        with pytest.raises(UserError, match=f"^{role} .*this is an adapter, not a model; merge it"):
            load_vocabulary(named)


def test_only_the_adapters_dropout_is_active(config):
    """The student in the loss is the one that sampled, whatever its config says of dropout."""
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=2))
    model.train()
    disable_dropout(model)
    ids = torch.arange(20)[None]
    assert torch.equal(model(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
    qwen = make_student()
    for layer in qwen.model.layers:
        layer.self_attn.attention_dropout = 0.5
    qwen.train()
    disable_dropout(qwen)
    assert torch.equal(qwen(input_ids=ids).logits, qwen.eval()(input_ids=ids).logits)

    lora = load_student(dataclasses.replace(config, lora_dropout=0.25), CPU)
    rates = {m.p for n, m in lora.named_modules() if isinstance(m, torch.nn.Dropout)}
    assert rates == {0.25}
    assert lora.training


def test_only_safetensors_are_loaded(config, tmp_path):
    path = save(tmp_path / "m", make_student(), make_tokenizer())
    torch.save(make_student().state_dict(), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="could not be loaded"):
        load_student(dataclasses.replace(config, model_name_or_path=str(path)), CPU)


def test_unknown_lora_targets(config):
    named = dataclasses.replace(config, lora_target_modules=["nonsense"])
    with pytest.raises(UserError, match="lora_target_modules nonsense"):
        load_student(named, CPU)


@pytest.mark.filterwarnings("ignore:.*tie.*:UserWarning")  # peft's advice on tied weights
def test_lora_on_the_head_is_refused(config):
    named = dataclasses.replace(config, lora_target_modules=["q_proj", "lm_head"])
    with pytest.raises(UserError, match="model_name_or_path: .*acts on the LM head"):
        load_pair(named, load_vocabulary(named), CPU)


def test_what_trains(config):
    lora = load_student(config, CPU)
    trained = [name for name, p in lora.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    assert not any("lm_head" in name or "embed" in name for name in trained)
    full = load_student(dataclasses.replace(config, use_peft=False), CPU)
    assert all(p.requires_grad for p in full.parameters())
    assert not any(p.requires_grad for p in load_teacher(config, CPU).parameters())


def test_dtypes_in_bf16(config):
    config = dataclasses.replace(config, bf16=True)
    lora = load_student(config, CPU)
    dtypes = {("lora_" in name, p.dtype) for name, p in lora.named_parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}
    full = load_student(dataclasses.replace(config, use_peft=False), CPU)
    assert {p.dtype for p in full.parameters()} == {torch.float32}
    assert {p.dtype for p in load_teacher(config, CPU).parameters()} == {torch.bfloat16}


def test_logits_the_loss_would_not_see_are_refused(monkeypatch):
    model = make_teacher()
    check_lm_head(model, "teacher")
    forward = type(model).forward

    def doubled(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output.logits = output.logits * 1.1
        return output

    monkeypatch.setattr(type(model), "forward", doubled)
    with pytest.raises(UserError, match="makes its logits in a way the fused loss does not know"):
        check_lm_head(model, "teacher")


def test_pair_is_compared_on_the_common_vocabulary(config):
    vocabulary = load_vocabulary(config)
    pair = load_pair(config, vocabulary, CPU)
    assert vocabulary.size == 300
    assert LMHead.from_model(pair.teacher).weight.shape[0] == 304
    assert vocabulary.context_length == 128
    assert vocabulary.pad_token_id == 0
