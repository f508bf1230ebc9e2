"""`LMHead.from_model` gives the logits of `model(...)`, or refuses the model."""

from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import transformers
from kl_cases import workspace

from esr_kernels import LMHead, linear_reverse_kl

VOCAB, DIM = 64, 16
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": DIM,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# The config's class, what it changes, and the expected (softcap, scale).
MODELS: dict[str, tuple[str, dict[str, Any], float | None, float]] = {
    "llama": ("LlamaConfig", {}, None, 1.0),
    "qwen2": ("Qwen2Config", {}, None, 1.0),
    "qwen3": ("Qwen3Config", {"head_dim": 8}, None, 1.0),
    "gemma2": ("Gemma2Config", {"head_dim": 8}, 30.0, 1.0),
    "gemma2, low cap": ("Gemma2Config", {"head_dim": 8, "final_logit_softcapping": 0.1}, 0.1, 1.0),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 8}, None, 1.0),
    "gemma3, cap": ("Gemma3TextConfig", {"head_dim": 8, "final_logit_softcapping": 0.2}, 0.2, 1.0),
    "granite": ("GraniteConfig", {"logits_scaling": 8.0}, None, 0.125),
    "cohere": ("CohereConfig", {"logit_scale": 0.0625}, None, 0.0625),
    "phi": ("PhiConfig", {}, None, 1.0),  # its head has a bias
}
CASES = [
    (model, tied)
    for model in MODELS
    for tied in (False, True)
    if not (model == "phi" and tied)  # the bias
]


def make_model(name: str = "llama", tied: bool = False) -> Any:
    config_class, changes, _, _ = MODELS[name]
    config = getattr(transformers, config_class)(**SIZES | changes, tie_word_embeddings=tied)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    if (bias := model.get_output_embeddings().bias) is not None:
        torch.nn.init.normal_(bias)
    return model


def lora(**options: Any) -> peft.LoraConfig:
    return peft.LoraConfig(r=2, init_lora_weights=False, **options)


def assert_same_logits(model: Any) -> LMHead:
    """The head's logits from the last hidden states are the model's; returns the head."""
    token_ids = torch.randint(3, VOCAB, (2, 6))
    head = LMHead.from_model(model)
    with torch.no_grad():
        output = model(input_ids=token_ids, output_hidden_states=True)
        logits = head.logits(output.hidden_states[-1])
    torch.testing.assert_close(logits, output.logits, rtol=1e-5, atol=1e-6)
    return head


@pytest.mark.parametrize(("name", "tied"), CASES)
@pytest.mark.parametrize("wrapped", [False, True])
def test_architectures(name: str, tied: bool, wrapped: bool) -> None:
    model = make_model(name, tied)
    weight = model.get_output_embeddings().weight
    assert (weight is model.get_input_embeddings().weight) == tied
    if wrapped:
        model = peft.get_peft_model(model, lora(target_modules=["q_proj", "v_proj"]))
    head = assert_same_logits(model)
    assert head.weight is weight
    assert head.weight.requires_grad == (not wrapped)
    assert (head.softcap, head.scale) == MODELS[name][2:]


def test_loss_from_a_model_trains_its_head_and_body() -> None:
    student, teacher = make_model("granite"), make_model("gemma2")
    token_ids = torch.randint(3, VOCAB, (1, 6))
    student_hidden = student.model(token_ids).last_hidden_state[0]
    with torch.no_grad():
        teacher_hidden = teacher.model(token_ids).last_hidden_state[0]
    heads = LMHead.from_model(student), LMHead.from_model(teacher)
    value = linear_reverse_kl(
        student_hidden,
        heads[0],
        teacher_hidden,
        heads[1],
        max_workspace_bytes=workspace(4, VOCAB),
    )
    value.backward()
    with torch.no_grad():
        student_logprobs = student(token_ids).logits[0].double().log_softmax(-1)
        teacher_logprobs = teacher(token_ids).logits[0].double().log_softmax(-1)
    expected = (student_logprobs.exp() * (student_logprobs - teacher_logprobs)).sum(-1).mean()
    torch.testing.assert_close(value.detach().double(), expected, rtol=1e-4, atol=1e-8)
    assert student.lm_head.weight.grad.abs().sum() > 0
    assert student.model.embed_tokens.weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_modules_to_save_copy_is_used_and_trains() -> None:
    model = make_model()
    original = model.lm_head.weight
    model = peft.get_peft_model(model, lora(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    copy = model.base_model.model.lm_head.modules_to_save["default"].weight
    with torch.no_grad():
        copy += 1.0
    head = assert_same_logits(model)
    assert head.weight is copy
    assert head.weight.requires_grad
    with model.disable_adapter():
        assert assert_same_logits(model).weight is original


def test_active_adapter_on_the_head_is_refused() -> None:
    model = make_model()
    original = model.lm_head.weight
    model = peft.get_peft_model(model, lora(target_modules=["q_proj", "lm_head"]))
    with pytest.raises(ValueError, match="acts on the LM head.*drop the head from target_modules"):
        LMHead.from_model(model)
    with model.disable_adapter():
        assert assert_same_logits(model).weight is original
    before = original.clone()
    model.merge_adapter()
    assert assert_same_logits(model).weight is original
    assert not torch.equal(original, before)
    with model.disable_adapter(), pytest.raises(ValueError, match="merged and disabled at once"):
        LMHead.from_model(model)
    model.unmerge_adapter()
    with pytest.raises(ValueError, match="acts on the LM head"):
        LMHead.from_model(model)
    assert_same_logits(model.merge_and_unload())


def test_adapter_on_the_head_that_is_not_the_active_one() -> None:
    model = peft.get_peft_model(make_model(), lora(target_modules=["q_proj", "lm_head"]))
    model.add_adapter("other", lora(target_modules=["v_proj"]))
    model.set_adapter("other")
    assert_same_logits(model)


def test_trainable_tokens_on_a_tied_head_are_refused() -> None:
    config = lora(target_modules=["q_proj"], trainable_token_indices=[5, 7])
    model = peft.get_peft_model(make_model("llama", tied=True), config)
    with pytest.raises(ValueError, match="trainable_token_indices"):
        LMHead.from_model(model)
    with model.disable_adapter():
        assert_same_logits(model)


def test_wrappers() -> None:
    model = make_model()
    compiled = torch.compile(model, backend="eager")
    assert LMHead.from_model(compiled).weight is model.lm_head.weight


class Int8Linear(torch.nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).round()


@pytest.mark.parametrize(
    "layer",
    [
        Int8Linear(DIM, VOCAB),
        torch.nn.Sequential(torch.nn.Linear(DIM, VOCAB)),
        torch.nn.Linear(DIM, VOCAB, device="meta"),
    ],
)
def test_heads_that_are_not_plain_are_refused(layer: torch.nn.Module) -> None:
    model = make_model()
    model.lm_head = layer
    with pytest.raises(ValueError, match="^model: expected an LM head"):
        LMHead.from_model(model)


def test_models_without_a_head_are_refused() -> None:
    for model in (make_model().model, torch.nn.Linear(2, 2)):
        with pytest.raises(ValueError, match="^model: expected a causal LM"):
            LMHead.from_model(model)


class Fake(torch.nn.Module):
    """A model with any config."""

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.config = SimpleNamespace(model_type="fake", **config)
        self.head = torch.nn.Linear(DIM, VOCAB)

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.head


@pytest.mark.parametrize(
    ("config", "softcap", "scale"),
    [
        ({"logits_soft_cap": 15}, 15.0, 1.0),  # RecurrentGemma
        ({"output_logit_soft_cap": 30.0}, 30.0, 1.0),  # xLSTM
        ({"lm_head_multiplier": 0.5}, None, 0.5),  # Falcon H1
        ({"output_multiplier": 0.5, "final_logit_softcapping": 20.0}, 20.0, 0.5),
        ({"logits_scaling": None, "logit_scale": None}, None, 1.0),
    ],
)
def test_other_names_of_softcap_and_scale(
    config: dict[str, Any], softcap: float | None, scale: float
) -> None:
    head = LMHead.from_model(Fake(**config))
    assert (head.softcap, head.scale) == (softcap, scale)


def test_names_with_another_meaning() -> None:
    model = Fake(logits_scaling=8.0)
    model.config.model_type = "hyperclovax"
    assert LMHead.from_model(model).scale == 8.0
    model = Fake(logit_scale="inv_sqrt_d_model")
    model.config.model_type = "mpt"
    assert LMHead.from_model(model).scale == 1.0


def test_padding_of_the_vocabulary_is_cut() -> None:
    head = LMHead.from_model(Fake(unpadded_vocab_size=VOCAB - 3))
    assert head.bias is not None
    assert (head.weight.shape[0], head.bias.shape[0]) == (VOCAB - 3, VOCAB - 3)


def test_wider_logits_are_never_rounded_to_the_inputs_dtype() -> None:
    head = LMHead(torch.randn(7, 5).bfloat16(), torch.randn(7).bfloat16(), softcap=3.0, scale=0.5)
    hidden = torch.randn(4, 5).bfloat16()
    inner = 0.5 * (hidden.double() @ head.weight.double().T + head.bias.double())
    logits = head.logits(hidden, torch.float32)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), 3.0 * torch.tanh(inner / 3.0), rtol=1e-6, atol=1e-6)
    assert head.logits(hidden).dtype == torch.bfloat16
