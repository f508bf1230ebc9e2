"""Packed batches: every row and every gradient as if each sequence were alone."""

import dataclasses
import sys
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from architectures import ARCHITECTURES, make_model
from peft import LoraConfig, get_peft_model
from tiny_models import SHAPE
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
)

from esr_kernels import gather_rows, rollout_batch
from esr_train import attention
from esr_train.attention import PackedLayout, Scores, accept_layouts, attend_masked, takes_layouts
from esr_train.lora import fuse_adapters
from esr_train.models import (
    Pair,
    checkpoint_activations,
    enable_packing,
    fused_layers,
    transformer,
)

PROMPTS = torch.tensor([[0, 0, 7, 8, 9], [11, 12, 13, 14, 15], [0, 0, 0, 0, 21]])
MASK = PROMPTS > 0
RESPONSES = torch.tensor([[31, 32, 2, 0, 0, 0], [41, 42, 43, 44, 45, 46], [2, 0, 0, 0, 0, 0]])


def make_batch(prompts=PROMPTS, device="cpu"):
    tensors = [x.to(device) for x in (prompts, MASK, RESPONSES)]
    return rollout_batch(*tensors, eos_token_ids=(2,))


def pair_of(model):
    vocabulary = SimpleNamespace(pad_token_id=0)
    return Pair(model, model, vocabulary, model.dtype, model.device)


def alone(model, batch):
    """The response rows [n, D], a sequence at a time."""
    states = [
        model.get_decoder()(input_ids=ids[None], use_cache=False).last_hidden_state[0]
        for ids in batch.input_ids.split(batch.cu_seqlens.diff().tolist())
    ]
    return torch.cat(states)[batch.loss_rows]


def gradients(model, states):
    torch.manual_seed(3)
    (states * torch.randn_like(states)).sum().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same_gradients(found, expected):
    assert set(found) == set(expected)
    assert len(found) > 10
    for name, gradient in expected.items():
        error = (found[name] - gradient).norm() / gradient.norm().clamp(min=1e-6)
        assert error < 1e-4, f"{name}: {error}"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_padded_and_alone_are_the_same(name):
    model, batch = make_model(name), make_batch()
    expected = alone(model, batch)
    expected_gradients = gradients(model, expected)
    padded = pair_of(model).response_states(model, batch)
    assert not takes_layouts(model)
    torch.testing.assert_close(padded, expected, rtol=1e-4, atol=1e-4)
    assert_same_gradients(gradients(model, padded), expected_gradients)

    assert enable_packing(model) is None
    assert takes_layouts(model)
    packed = pair_of(model).response_states(model, batch)
    torch.testing.assert_close(packed, expected, rtol=1e-4, atol=1e-4)
    assert_same_gradients(gradients(model, packed), expected_gradients)


def with_adapters(model):
    """LoRA on all linear layers, with weights that make a difference."""
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    fuse_adapters(model)
    return model


def vary_norms(model):
    """So that no two of a norm's weights are the same."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.rand_like(parameter))


def count_calls(module, name):
    counter = Mock(wraps=getattr(module, name))
    object.__setattr__(module, name, counter)
    return counter


def fused_pair(model):
    layers = fused_layers(model)
    assert layers is not None
    return dataclasses.replace(pair_of(model), student_layers=layers)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_student_trains_by_fused_layers(name, lora, checkpointed):
    """States and every gradient as its own modules have them, a sequence at a time."""
    model, batch = make_model(name), make_batch()
    vary_norms(model)
    whole = with_adapters(model) if lora else model
    expected = alone(model, batch)
    expected_gradients = gradients(whole, expected)
    assert fused_layers(whole) is None  # it reads no packed batches yet
    assert enable_packing(whole) is None
    pair = fused_pair(whole.train())
    assert whole.training
    if checkpointed:
        checkpoint_activations(model)
    passes = count_calls(model.model.layers[0].mlp.down_proj, "factors" if lora else "forward")
    states = pair.response_states(whole, batch)
    assert states.shape == expected.shape
    torch.testing.assert_close(states, expected, rtol=1e-4, atol=1e-4)
    some = torch.tensor([5, 0, 3])
    torch.testing.assert_close(pair.response_states(whole, batch, some), expected[some])
    assert_same_gradients(gradients(whole, states), expected_gradients)
    assert passes.call_count == (3 if checkpointed else 2)


def test_checkpointed_layers_keep_their_inputs():
    """Adapters of the MLP alone: what reaches the first layer needs no gradient, but is kept."""
    model, batch = make_model("qwen3"), make_batch()
    config = LoraConfig(r=4, target_modules=["gate_proj", "down_proj"], task_type="CAUSAL_LM")
    whole = get_peft_model(model, config)
    fuse_adapters(whole)
    assert enable_packing(whole) is None
    pair = fused_pair(whole.train())
    expected = gradients(whole, pair.response_states(whole, batch))
    for module in (model.model, *model.model.layers):  # of the model alone, as older ones have it
        module.gradient_checkpointing = module is model.model
    passes = count_calls(model.model.layers[0].mlp.down_proj, "factors")
    found = gradients(whole, pair.response_states(whole, batch))
    assert passes.call_count == 2
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("name", ["qwen2", "qwen3", "gemma2"])
def test_in_16_bits_fused_layers_are_as_exact_as_the_modules(name, lora, device):
    """Full fine-tuning of float32 weights, LoRA on bfloat16 ones: no further from the truth."""
    model, batch = make_model(name).to(device), make_batch(device=device)
    vary_norms(model)
    model.bfloat16()
    torch.manual_seed(1)
    whole = with_adapters(model) if lora else model.float()
    assert enable_packing(whole) is None
    in_16_bits = dataclasses.replace(fused_pair(whole), dtype=torch.bfloat16)
    by_modules = dataclasses.replace(in_16_bits, student_layers=None)
    pairs = [by_modules, in_16_bits, dataclasses.replace(by_modules, dtype=torch.float32)]
    results = []
    for pair in pairs:
        if pair.dtype == torch.float32:
            whole.float()
        states = pair.response_states(whole, batch)
        assert states.dtype == pair.dtype
        results.append((states, gradients(whole, states.float())))
    own, fused, truth = results
    assert set(own[1]) == set(fused[1]) == set(truth[1])

    def error(found):
        parts = [found[0] - truth[0], *(found[1][n] - x for n, x in truth[1].items())]
        whole = [truth[0], *truth[1].values()]
        return [
            (x.norm() / y.norm().clamp(min=1e-6)).item() for x, y in zip(parts, whole, strict=True)
        ]

    assert all(x < 1.5 * y + 0.02 for x, y in zip(error(fused), error(own), strict=True))


@pytest.mark.parametrize("name", ["qwen3", "gemma2"])
def test_checkpointing_recomputes_the_same(name):
    """The layers run again in backward, when no layout is being handed to the model."""
    model, batch = make_model(name), make_batch()
    assert enable_packing(model) is None
    expected = gradients(model.train(), pair_of(model).response_states(model, batch))
    checkpoint_activations(model)
    found = gradients(model, pair_of(model).response_states(model, batch))
    assert_same_gradients(found, expected)


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_no_sequence_sees_another(name):
    model = make_model(name)
    assert enable_packing(model) is None
    other = PROMPTS.clone()
    other[0, 2:] = torch.tensor([99, 98, 97])
    before, after = (
        pair_of(model).response_states(model, make_batch(prompts)) for prompts in (PROMPTS, other)
    )
    lengths = make_batch().response_lengths.tolist()
    assert torch.equal(before[lengths[0] :], after[lengths[0] :])
    assert not torch.equal(before[: lengths[0]], after[: lengths[0]])


@pytest.mark.parametrize("name", ["qwen2", "gemma2"])
@torch.no_grad()
def test_without_a_layout_the_model_is_what_it_was(name):
    model = make_model(name)
    words = {"attention_mask": MASK.long(), "max_new_tokens": 8, "do_sample": False}
    before = model(PROMPTS, attention_mask=MASK.long()).logits, model.generate(PROMPTS, **words)
    assert accept_layouts(model)
    after = model(PROMPTS, attention_mask=MASK.long()).logits, model.generate(PROMPTS, **words)
    assert all(map(torch.equal, before, after))


def test_a_model_with_attention_of_its_own_stays_as_it_is():
    model = make_model("qwen2")
    model.config._attn_implementation = "flex_attention"
    assert "flex_attention" in enable_packing(model)
    assert model.config._attn_implementation == "flex_attention"


@pytest.mark.parametrize("strength", [0.5, 1e-3])
def test_a_model_that_mixes_tokens_otherwise_is_found_out(strength):
    """A shift by one token inside a layer, as convolutions do, however weak."""
    model = make_model("qwen2")
    layer = model.model.layers[0]

    def leak(_module, _inputs, output):
        return output + strength * output.roll(1, dims=1)

    layer.mlp.register_forward_hook(leak)
    assert "see each other" in enable_packing(model)
    assert model.config._attn_implementation == "sdpa"


@torch.no_grad()
def test_a_hybrid_model_reads_padded_batches():
    config = Lfm2Config(
        **SHAPE, vocab_size=300, hidden_size=32, layer_types=["conv", "full_attention"],
        block_auto_adjust_ff_dim=False,
    )  # fmt: skip
    model, batch = Lfm2ForCausalLM(config).eval(), make_batch()
    assert "see each other" in enable_packing(model)
    torch.testing.assert_close(pair_of(model).response_states(model, batch), alone(model, batch))


def test_a_window_in_the_masks_alone_is_found_out():
    """The probe's sequences are shorter than any real window."""
    config = PhimoeConfig(
        **SHAPE, vocab_size=300, hidden_size=32, sliding_window=16, num_local_experts=2
    )
    model = PhimoeForCausalLM(config).eval()
    assert enable_packing(model) == "its window of 16 is in its masks alone"
    config.sliding_window = None
    assert enable_packing(model) is None


def test_scores_that_something_else_weighs_are_refused():
    """Attention sinks, of whatever size."""
    config = GptOssConfig(
        **{**SHAPE, "num_hidden_layers": 2}, vocab_size=300, hidden_size=32, head_dim=8,
        num_local_experts=2, num_experts_per_tok=1,
    )  # fmt: skip
    model = GptOssForCausalLM(config).eval()
    for layer in model.model.layers:
        torch.nn.init.constant_(layer.self_attn.sinks, -6.0)
    assert enable_packing(model) == "GptOssAttention weighs its scores by s_aux"


def test_an_error_of_the_architecture_is_the_reason():
    model = make_model("qwen2")

    def refuse(_module, _args, kwargs):
        if "layout" in kwargs:
            raise TypeError("unexpected keyword argument 'layout'")

    model.model.layers[1].register_forward_pre_hook(refuse, with_kwargs=True)
    assert enable_packing(model) == "unexpected keyword argument 'layout'"
    assert not takes_layouts(model)


def naive(query, key, value, cu_seqlens, window, scale, softcap=None):
    """[T, H, D], a loop over sequences and heads."""
    output = torch.zeros_like(query)
    shared = query.shape[1] // key.shape[1]
    for first, last in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        for head in range(query.shape[1]):
            for row in range(first, last):
                start = first if window < 0 else max(first, row - window)
                scores = scale * key[start : row + 1, head // shared] @ query[row, head]
                if softcap:
                    scores = softcap * torch.tanh(scores / softcap)
                output[row, head] = scores.softmax(0) @ value[start : row + 1, head // shared]
    return output


@pytest.fixture
def states():
    def random(heads):
        return torch.randn(1, heads, 20, 8, dtype=torch.float64)

    return random(4), random(2), random(2)


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 3, 50])
@pytest.mark.parametrize("kernel", ["side by side", "flash_attn", "torch"])
def test_attention_of_packed_sequences(kernel, window, softcap, states, monkeypatch):
    """Ours against a loop; and the two libraries are called as they define their arguments."""
    batch = make_batch()
    assert len(batch.input_ids) == 19
    states = [x[:, :, :19] for x in states]
    scores = Scores(0.3, window=window, softcap=softcap)

    def flash(q, k, v, cu_q, cu_k, max_q, max_k, *, dropout_p, softmax_scale, causal, window_size,
              softcap):  # fmt: skip
        assert causal
        assert cu_q is cu_k
        assert max_q == max_k == 11
        assert dropout_p == window_size[1] == 0
        return naive(q, k, v, cu_q, window_size[0], softmax_scale, softcap)

    def varlen(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa=False):
        assert enable_gqa
        assert max_q == max_k == 11
        return naive(q, k, v, cu_q, window_size[0], scale)

    if kernel == "flash_attn":
        module = SimpleNamespace(flash_attn_varlen_func=flash)
        monkeypatch.setitem(sys.modules, "flash_attn", module)
        monkeypatch.setattr(attention, "varlen_kernel", lambda *_: attention._flash_attn)
    if kernel == "torch":
        if softcap:
            pytest.skip("has none")
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen)
        monkeypatch.setattr(attention, "varlen_kernel", lambda *_: attention._torch_varlen)
    found = PackedLayout(batch).attend(*states, scores)
    rows = [x[0].transpose(0, 1) for x in states]
    expected = naive(*rows, batch.cu_seqlens, window - 1 if window else -1, 0.3, softcap)
    torch.testing.assert_close(found[0], expected, rtol=1e-5, atol=1e-5)


def test_older_torch_has_no_grouped_heads(states, monkeypatch):
    batch = make_batch()

    def varlen(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size):
        assert q.shape == k.shape == v.shape
        return naive(q, k, v, cu_q, window_size[0], scale)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen)
    monkeypatch.setattr(attention, "_varlen_words", lambda: {"scale", "window_size"})
    rows = [x[0, :, :19].transpose(0, 1) for x in states]
    found = attention._torch_varlen(*rows, batch.cu_seqlens, batch.max_seqlen, Scores(0.3))
    torch.testing.assert_close(found, naive(*rows, batch.cu_seqlens, -1, 0.3))


def test_which_kernel(monkeypatch):
    plain = Scores(1.0)

    def kernel(scores=plain, dtype=torch.bfloat16, head_dim=64, cuda=True):
        query = SimpleNamespace(is_cuda=cuda, dtype=dtype, shape=(1, 2, 3, head_dim))
        return attention.varlen_kernel(query, scores)

    monkeypatch.setattr(attention, "_has_flash_attn", lambda: False)
    assert kernel() is attention._torch_varlen
    for words in (
        {"cuda": False},
        {"dtype": torch.float32},
        {"head_dim": 264},
        {"head_dim": 60},
        {"scores": Scores(1.0, softcap=2.0)},
        {"scores": Scores(1.0, dropout=0.1)},
    ):
        assert kernel(**words) is None
    monkeypatch.setattr(attention, "_varlen_words", frozenset)  # torch 2.10
    assert kernel() is None
    monkeypatch.setattr(attention, "_has_flash_attn", lambda: True)
    assert kernel(Scores(1.0, softcap=2.0)) is attention._flash_attn


def test_a_broken_flash_attn_is_gone_without(monkeypatch, tmp_path):
    attention._has_flash_attn.cache_clear()
    assert attention._has_flash_attn() is False
    attention._has_flash_attn.cache_clear()
    (tmp_path / "flash_attn.py").write_text("raise ImportError('undefined symbol')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.warns(UserWarning, match="flash_attn cannot be imported .undefined symbol."):
        assert attention._has_flash_attn() is False
    attention._has_flash_attn.cache_clear()


def test_dropout_of_a_layer_is_applied():
    model, batch = make_model("qwen2").train(), make_batch()
    enable_packing(model)
    assert fused_layers(model) is not None
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    first, again = (pair_of(model).response_states(model, batch) for _ in range(2))
    assert not torch.equal(first, again)
    assert fused_layers(model) is None
    assert model.training


def test_dropout_reaches_the_scores(states):
    query, key, value = (x[:, :, :19] for x in states)
    mask = torch.full((19, 19), -torch.inf, dtype=torch.float64).triu(1)
    for softcap in (None, 1.5):
        scores = Scores(0.3, dropout=0.5, softcap=softcap)
        first, again = (attend_masked(query, key, value, mask, scores) for _ in range(2))
        assert not torch.equal(first, again)


def test_rows_of_loss_alone_leave_the_transformer(monkeypatch):
    model, batch = make_model("qwen2"), make_batch()
    enable_packing(model)
    states = pair_of(transformer(model)).response_states(model, batch)
    assert states.shape == (len(batch.targets), 32)
    whole = model.get_decoder()(input_ids=batch.input_ids[None, :6]).last_hidden_state
    torch.testing.assert_close(gather_rows(whole, torch.arange(2, 5)), states[:3])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_teacher_scores_by_fused_layers(name):
    """What it reads with its own modules, and only of rows that count; its weights stay where
    Transformers looks for them."""
    model, batch = make_model(name).requires_grad_(False), make_batch()
    assert fused_layers(model) is None  # it reads no packed batches yet
    enable_packing(model)
    pair = pair_of(model)
    expected = pair.response_states(model, batch)
    layers = fused_layers(model)
    assert layers is not None
    assert all(layer.gate_and_up.joint is not None for layer in layers.layers)
    torch.testing.assert_close(layers.read(batch, batch.loss_rows), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(pair.response_states(model, batch), expected, rtol=1e-4, atol=1e-4)


def test_a_teacher_of_another_kind_scores_by_its_modules():
    model = make_model("qwen2").requires_grad_(False)
    enable_packing(model)
    model.model.layers[0].mlp.register_forward_hook(lambda _m, _i, output: 2 * output)
    assert fused_layers(model) is None


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_kernel_of_this_machine(window, dtype):
    """Whichever it is, forward and gradients against the sequences side by side in float32."""
    torch.manual_seed(0)
    batch = rollout_batch(
        PROMPTS.cuda(), MASK.cuda(), RESPONSES.cuda(), eos_token_ids=(2,)
    )  # fmt: skip
    layout, scores = PackedLayout(batch), Scores(0.3, window=window)
    heads = (4, 2, 2)
    states = [torch.randn(1, h, 19, 64, device="cuda", dtype=dtype) for h in heads]
    assert attention.varlen_kernel(states[0], scores) is not None
    upstream = torch.randn(1, 19, 4, 64, device="cuda")
    results = []
    for kind in (dtype, torch.float32):
        leaves = [x.to(kind).requires_grad_() for x in states]
        output = layout.attend(*leaves, scores)
        results.append([output, *torch.autograd.grad(output, leaves, upstream.to(kind))])
    for found, expected in zip(*results, strict=True):
        assert (found.float() - expected).norm() / expected.norm() < 0.02
