"""The decoder: states as a fresh pass has them, and a twin that follows the model's weights."""

import gc
import sys
import weakref

import pytest
import torch
from architectures import ARCHITECTURES, make_model
from peft import LoraConfig, get_peft_model
from tiny_models import SHAPE, make_student
from transformers import (
    GraniteConfig,
    GraniteForCausalLM,
    Ministral3Config,
    Ministral3ForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
)

from esr_train.attention import accept_layouts
from esr_train.decode_weights import DecodeWeights, merged_weight
from esr_train.decoder import (
    FusedDecoder,
    StaticDecoder,
    best_decoder,
    no_host_reads,
)
from esr_train.fused import FusedLayers, Projections, adjacent, lay_out
from esr_train.linear import PackedLinear, column_major
from esr_train.lora import fuse_adapters
from esr_train.models import disable_dropout, fused_layers

PROMPTS = torch.tensor([[0, 0, 0, 7, 8, 9], [11, 12, 13, 14, 15, 16], [0, 0, 0, 0, 0, 21]])
MASK = PROMPTS > 0
LATER = torch.randint(1, 300, (3, 9), generator=torch.Generator().manual_seed(0))


def fresh_states(model):
    """[3, 10, D]: after the prompt, and after each later token; a row at a time."""
    rows = [
        torch.cat([row[seen], later]) for row, seen, later in zip(PROMPTS, MASK, LATER, strict=True)
    ]
    states = [
        model.get_decoder()(input_ids=row[None], use_cache=False).last_hidden_state[0, -10:]
        for row in rows
    ]
    return torch.stack(states)


def decoded_states(decoder):
    states = [decoder.prefill(PROMPTS, MASK)]
    states += [decoder.step(tokens) for tokens in LATER.unbind(1)]
    return torch.stack(states, dim=1)


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_states_are_those_of_a_fresh_pass(name):
    model = make_model(name)
    expected = fresh_states(model)
    assert accept_layouts(model)
    decoder = StaticDecoder(model, 3, 20, torch.device("cpu"))
    torch.testing.assert_close(decoded_states(decoder), expected, rtol=1e-4, atol=1e-4)
    # Again on the same buffers, which hold the last rollout.
    torch.testing.assert_close(decoded_states(decoder), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["qwen2", "gemma2"])
@torch.no_grad()
def test_in_a_graph_all_slots_are_seen(name, monkeypatch):
    """The step as a graph records it: nothing depends on how many slots the host has counted."""
    model = make_model(name)
    expected = fresh_states(model)
    accept_layouts(model)
    decoder = StaticDecoder(model, 3, 20, torch.device("cpu"))
    states = [decoder.prefill(PROMPTS, MASK)]
    for tokens in LATER.unbind(1):
        decoder.num_used = decoder.num_slots - 1
        states.append(decoder.step(tokens))
    torch.testing.assert_close(torch.stack(states, dim=1), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_fused_layers_compute_what_the_modules_do(name):
    model = make_model(name)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # weights of norms: no two the same
                parameter.add_(torch.rand_like(parameter))
    expected = fresh_states(model)
    accept_layouts(model)
    decoder = FusedDecoder(FusedLayers(model), 3, 20, torch.device("cpu"))
    for _ in range(2):
        torch.testing.assert_close(decoded_states(decoder), expected, rtol=1e-4, atol=1e-4)


def making(model):
    make, error = best_decoder(model)
    return make.func, error


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_can_be_decoded(name):
    model = make_model(name)
    assert making(model) == (StaticDecoder, "its attention cannot be replaced")
    accept_layouts(model)
    assert making(model) == (FusedDecoder, None)


def test_what_is_not_of_llamas_kind_is_decoded_by_its_own_modules():
    """Other modules in a layer, and the same modules in another order."""
    model = make_model("qwen2")
    accept_layouts(model)
    model.model.layers[1].extra = torch.nn.Identity()
    assert making(model) == (StaticDecoder, None)
    config = GraniteConfig(**SHAPE, vocab_size=300, hidden_size=32, residual_multiplier=0.5)
    model = GraniteForCausalLM(config).eval()
    accept_layouts(model)
    assert making(model) == (StaticDecoder, None)


def test_queries_that_grow_with_the_position_are_found_out():
    """Ministral's are scaled beyond the context it was first trained on, which no probe reaches."""
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "beta_fast": 32.0}
    rope |= {"beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}
    rope |= {"original_max_position_embeddings": 128, "llama_4_scaling_beta": 0.1}
    words = {**SHAPE, "max_position_embeddings": 512, "rope_parameters": rope}
    config = Ministral3Config(**words, vocab_size=300, hidden_size=32, head_dim=16)
    model = Ministral3ForCausalLM(config).eval()
    accept_layouts(model)
    with pytest.raises(ValueError, match="its positions do more"):
        FusedLayers(model)
    assert making(model)[0] is StaticDecoder


@pytest.mark.parametrize("amd", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_stacked_projections_are_one_product(bias, amd, monkeypatch):
    monkeypatch.setattr("esr_train.linear.made_by_amd", lambda: amd)
    model = make_model("qwen2")
    attention = model.model.layers[0].self_attn
    layers = [attention.q_proj, attention.k_proj, attention.v_proj]
    assert attention.q_proj.bias is not None
    if not bias:
        for layer in layers:
            layer.bias = None
    x = torch.randn(5, 32)
    expected = [layer(x) for layer in layers]
    assert Projections(*layers).joint is None
    lay_out(attention, lambda weight: True)
    assert Projections(*layers).joint is None  # what trains gets its own gradient
    attention.requires_grad_(False)
    parameters = [layer.weight for layer in layers]
    lay_out(attention, lambda weight: True, column_major)
    assert all(layer.weight is old for layer, old in zip(layers, parameters, strict=True))
    joined = Projections(*layers)
    assert joined.joint is not None
    by_columns = torch.backends.mkl.is_available() and not amd
    for weight in (joined.joint[0], attention.o_proj.weight):
        assert weight.stride() == ((1, len(weight)) if by_columns else (weight.shape[1], 1))
    attention.k_proj.weight.mul_(2)
    expected[1] = attention.k_proj(x)
    for found, truth in zip(joined(x), expected, strict=True):
        torch.testing.assert_close(found, truth)


def test_what_lies_behind_another_is_of_one_storage():
    whole, other = torch.randn(6, 3), torch.randn(6, 3)
    joined = adjacent([whole[:4], whole[4:]])
    assert joined is not None
    assert torch.equal(joined, whole)
    for second in (other[4:], whole[3:], whole[4:].bfloat16(), whole.T[:, 4:].T[:, :2]):
        assert adjacent([whole[:4], second]) is None
    by_columns = adjacent([whole.T[:1], whole.T[1:]])
    assert by_columns is not None
    assert torch.equal(by_columns, whole.T)


@pytest.mark.parametrize("attention", ["flash_attention_2", "flex_attention", "eager", "sdpa"])
def test_the_twin_decodes_whatever_the_student_attends_with(attention):
    model = make_model("qwen3")
    model.config._attn_implementation = attention
    assert making(DecodeWeights(model, torch.float32).model) == (FusedDecoder, None)
    assert model.config._attn_implementation == attention


def test_a_window_in_the_masks_alone_is_found_out():
    """The probe's sequences are shorter than any real window."""
    config = PhimoeConfig(
        **SHAPE, vocab_size=300, hidden_size=32, sliding_window=16, num_local_experts=2
    )
    model = PhimoeForCausalLM(config).eval()
    accept_layouts(model)
    assert making(model)[1] == "its window of 16 is in its masks alone"


@pytest.mark.gpu
def test_a_step_may_not_read_on_a_gpu():
    device = torch.device("cuda")
    with pytest.raises(RuntimeError, match="synchroniz"), no_host_reads(device):
        torch.ones(1, device=device).item()
    torch.ones(1, device=device).item()


def test_prompts_are_padded_on_the_left():
    model = make_model("qwen2")
    accept_layouts(model)
    decoder = StaticDecoder(model, 3, 20, torch.device("cpu"))
    with pytest.raises(ValueError, match="prompt_mask: expected prompts padded on the left"):
        decoder.prefill(PROMPTS.flip(1), MASK.flip(1))


@torch.no_grad()
def test_a_decoder_is_freed_with_its_last_reference():
    """Not by the collector, some time later: its cache may be gigabytes."""
    model = make_model("qwen2")
    accept_layouts(model)
    gc.disable()
    try:
        decoder = StaticDecoder(model, 3, 20, torch.device("cpu"))
        decoder.prefill(PROMPTS, MASK)
        keys = weakref.ref(decoder.cache.layers[0].keys)
        del decoder
        assert keys() is None
    finally:
        gc.enable()


def test_a_model_with_memory_of_its_own_is_found_out():
    model = make_model("qwen2")
    accept_layouts(model)
    total = torch.zeros(1)

    def remember(_module, _inputs, output):
        total.add_(output.abs().mean())
        return output * (1 + total)

    model.model.layers[0].mlp.register_forward_hook(remember)
    assert "differ" in making(model)[1]


def lora_student(targets="all-linear"):
    torch.manual_seed(1)
    model = get_peft_model(
        make_student(), LoraConfig(r=4, lora_alpha=8, target_modules=targets, lora_dropout=0.5)
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3)
    accept_layouts(model.get_base_model())
    return model


@torch.no_grad()
def logits(model):
    return model(input_ids=PROMPTS[1:2], use_cache=False).logits


@pytest.mark.parametrize("layout", ["as it is", "packed", "by columns"])
@pytest.mark.parametrize("merge", [True, False])
def test_the_twin_computes_what_the_student_does(merge, layout, monkeypatch):
    packed = layout == "packed"
    monkeypatch.setattr("esr_train.linear.FEWEST_WEIGHTS", 0 if packed else sys.maxsize)
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr("esr_train.linear.made_by_amd", lambda: layout != "by columns")
    model = lora_student().train()
    core = model.get_base_model()
    weights = DecodeWeights(core, torch.float32, merge)
    made_over = [m for m in weights.model.modules() if isinstance(m, PackedLinear)]
    assert bool(made_over) is (packed and torch.backends.mkldnn.is_available())
    for _ in range(2):
        expected = logits(core.eval())
        core.train()
        torch.testing.assert_close(logits(weights.model), expected)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data.mul_(-1.5)
        if merge:
            assert not torch.allclose(logits(core.eval()), logits(weights.model))
        weights.refresh()
    names = [n for n, _ in weights.model.named_modules() if "lora" in n]
    assert bool(names) is not merge


def test_a_head_by_columns_follows_the_students(monkeypatch):
    monkeypatch.setattr("esr_train.linear.made_by_amd", lambda: False)
    monkeypatch.setattr("torch.backends.mkl.is_available", lambda: True)
    model = make_student()
    embeddings = model.get_input_embeddings().weight
    assert model.lm_head.weight is embeddings
    embeddings.requires_grad_(False)
    twin = DecodeWeights(model, torch.float32)
    head = twin.model.lm_head.weight
    assert head.stride() == (1, 300)
    assert torch.equal(head, embeddings)
    assert twin.model.get_input_embeddings().weight is embeddings
    assert embeddings.is_contiguous()
    embeddings.data.mul_(2)
    twin.refresh()
    assert torch.equal(head, embeddings)


@pytest.fixture
def no_copies(monkeypatch):
    """On any CPU."""
    monkeypatch.setattr("esr_train.linear.MOST_WEIGHTS", 0)
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX2")


def test_the_twin_of_a_plain_model_costs_nothing(no_copies):
    model = make_student()
    weights = DecodeWeights(model, torch.float32)
    assert weights.model is not model
    own = {p.data_ptr() for p in model.parameters()}
    assert {p.data_ptr() for p in weights.model.parameters()} == own
    assert all(p.requires_grad for p in model.parameters())
    assert weights.model.training is False


def test_making_a_twin_leaves_the_student_alone():
    model = lora_student().train()
    before = {n: (p.clone(), p.requires_grad) for n, p in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    DecodeWeights(model.get_base_model(), torch.bfloat16).refresh()
    assert [module.training for module in model.modules()] == modes
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name][0])
        assert parameter.requires_grad is before[name][1]
        assert parameter.dtype == torch.float32


def test_in_another_dtype_weights_are_rounded_once_and_stay_tied():
    model = lora_student()
    core = model.get_base_model()
    weights = DecodeWeights(core, torch.bfloat16)
    twin = weights.model
    assert {p.dtype for p in twin.parameters()} == {torch.bfloat16}
    assert twin.lm_head.weight is twin.get_input_embeddings().weight
    layer = core.get_submodule("model.layers.1.mlp.up_proj")
    expected = (
        layer.base_layer.weight.double()
        + 2.0 * layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
    )
    found = twin.get_submodule("model.layers.1.mlp.up_proj").weight
    torch.testing.assert_close(merged_weight(layer).double(), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(found, merged_weight(layer).bfloat16())
    core.model.norm.weight.data.fill_(3.0)
    weights.refresh()
    assert (twin.model.norm.weight == 3.0).all()
    assert twin.get_submodule("model.layers.1.mlp.up_proj").weight is found


@pytest.mark.parametrize("changes", [{"use_dora": True}, {"lora_bias": True}])
def test_adapters_that_add_more_than_a_product_are_not_merged(changes):
    lora = LoraConfig(r=4, target_modules=["q_proj"], **changes)
    model = get_peft_model(make_student(), lora).get_base_model()
    if "lora_bias" in changes:
        for layer in model.model.layers:
            assert layer.self_attn.q_proj.lora_B["default"].bias is not None
    with pytest.raises(ValueError, match=r"adapter default is more than W \+ B @ A"):
        DecodeWeights(model, torch.float32)


def test_what_is_merged_already_is_not_merged_again():
    model = lora_student()
    model.merge_adapter()
    core = model.get_base_model()
    weights = DecodeWeights(core, torch.float32)
    torch.testing.assert_close(logits(weights.model), logits(core.eval()))


def test_only_adapted_layers_are_copied(no_copies):
    model = lora_student(targets=["q_proj", "v_proj"])
    twin = DecodeWeights(model.get_base_model(), torch.float32).model
    own = {p.data_ptr() for p in model.parameters()}
    copied = {n for n, p in twin.named_parameters() if p.data_ptr() not in own}
    assert copied == {
        f"model.layers.{layer}.self_attn.{name}.{part}"
        for layer in (0, 1)
        for name in ("q_proj", "v_proj")
        for part in ("weight", "bias")
    }


def test_disabled_adapters_are_not_merged():
    model = lora_student()
    core = model.get_base_model()
    weights = DecodeWeights(core, torch.float32)
    with model.disable_adapter():
        expected = logits(core.eval())
        weights.refresh()
    torch.testing.assert_close(logits(weights.model), expected)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]])
def test_models_laid_out_are_saved_as_ever(targets, tmp_path, monkeypatch):
    monkeypatch.setattr("esr_train.linear.made_by_amd", lambda: False)
    model = lora_student(targets)
    disable_dropout(model)
    fuse_adapters(model)
    assert fused_layers(model) is not None
    core = model.get_base_model().eval()
    base = core.model.layers[0].self_attn.q_proj.get_base_layer().weight
    assert base.stride() == ((1, 32) if torch.backends.mkl.is_available() else (32, 1))
    expected = logits(core)
    model.merge_and_unload().save_pretrained(tmp_path)
    torch.testing.assert_close(logits(type(core).from_pretrained(tmp_path)), expected)
