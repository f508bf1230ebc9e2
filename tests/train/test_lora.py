"""Fused LoRA layers: PEFT's forward and gradients, and its code where a layer is not plain."""

import pytest
import torch
from numerics import relative_error
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners import lora
from tiny_models import make_student
from torch import nn
from torch.utils.checkpoint import checkpoint

from esr_train.lora import FusedLora, fuse_adapters, project_gated


class Net(nn.Module):
    def __init__(self, width, out, bias):
        super().__init__()
        self.linear = nn.Linear(width, out, bias)

    def forward(self, x):
        return self.linear(x)


def make_layer(width=7, out=5, bias=True, dtype=torch.float64, **changes):
    torch.manual_seed(0)
    options = {"r": 3, "lora_alpha": 8, "target_modules": ["linear"], **changes}
    model = get_peft_model(Net(width, out, bias), LoraConfig(**options))
    model.base_model.model.to(dtype)
    layer = model.base_model.model.linear
    if "default" in layer.lora_B:
        nn.init.normal_(layer.lora_B["default"].weight)
    return model, layer


def results(layer, x, run=lambda layer, x: layer(x)):
    """Output, and gradients of x, A and B."""
    x = x.detach().requires_grad_()
    output = run(layer, x)
    torch.manual_seed(1)
    leaves = [x, layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    return [output, *torch.autograd.grad(output, leaves, torch.randn_like(output))]


@pytest.mark.parametrize("shape", [(4,), (1, 9), (2, 3)])
@pytest.mark.parametrize(("width", "out", "bias"), [(7, 5, True), (33, 64, False)])
@pytest.mark.parametrize("use_rslora", [True, False])
def test_the_same_as_peft(shape, width, out, bias, use_rslora):
    for dtype, limit in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        model, layer = make_layer(width, out, bias, dtype, use_rslora=use_rslora)
        x = torch.randn(*shape, width, dtype=dtype)
        expected = results(layer, x)
        fuse_adapters(model)
        assert type(layer) is FusedLora
        for found, truth in zip(results(layer, x), expected, strict=True):
            assert found.shape == truth.shape
            assert found.dtype == dtype
            assert relative_error(found, truth.double()) < limit
        torch.testing.assert_close(layer(x[0]), expected[0][0], rtol=limit, atol=limit)


@pytest.mark.parametrize("checkpointed", [True, False])
def test_under_autocast(checkpointed):
    """16-bit activations, float32 adapters: no further from the truth than PEFT's own."""
    model, layer = make_layer(96, 64, dtype=torch.float32)
    layer.base_layer.to(torch.bfloat16)
    x = torch.randn(1, 200, 96).bfloat16()

    def run(layer, x):
        with torch.autocast("cpu", torch.bfloat16):
            return checkpoint(layer, x, use_reentrant=False) if checkpointed else layer(x)

    own = results(layer, x, run)
    fuse_adapters(model)
    fused = results(layer, x, run)
    truth = results(layer.double(), x.double())
    for found, peft, true in zip(fused, own, truth, strict=True):
        assert found.dtype == peft.dtype
        assert relative_error(found, true) < 1.5 * relative_error(peft, true) + 1e-3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("trains_gate", [False, True])
def test_of_a_gated_product(dtype, autocast, trains_gate):
    """What is not kept is computed again, whatever the dtype of its parts."""
    model, layer = make_layer(6, 5, dtype=dtype)
    fuse_adapters(model)
    gate, up = (torch.randn(4, 6, dtype=dtype).requires_grad_(trains_gate) for _ in range(2))
    leaves = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    leaves += [gate, up] if trains_gate else []
    results = []
    for compute in (
        lambda: project_gated(layer, gate, up, "silu"),
        lambda: layer(torch.nn.functional.silu(gate) * up),
    ):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = compute()
        results.append([output, *torch.autograd.grad(output.double().square().sum(), leaves)])
    for found, expected in zip(*results, strict=True):
        assert found.dtype == expected.dtype
        assert relative_error(found, expected.double()) < (0.02 if autocast else 1e-5)


def test_its_output_may_be_changed_in_place():
    """As OLMo clips its queries, keys and values."""
    model, layer = make_layer()
    x = torch.randn(2, 3, 7, dtype=torch.float64)

    def run(layer, x):
        return layer(x).clamp_(min=-0.5, max=0.5)

    expected = results(layer, x, run)
    fuse_adapters(model)
    for found, truth in zip(results(layer, x, run), expected, strict=True):
        torch.testing.assert_close(found, truth)


def test_only_what_is_needed():
    model, layer = make_layer()
    fuse_adapters(model)
    x = torch.randn(4, 7, dtype=torch.float64)
    layer(x).sum().backward()
    assert layer.lora_A["default"].weight.grad is not None
    layer.lora_A["default"].requires_grad_(False)
    x.requires_grad_()
    layer.zero_grad()
    layer(x).sum().backward()
    assert x.grad is not None
    assert layer.lora_A["default"].weight.grad is None
    with torch.no_grad():
        assert not layer(x).requires_grad


@pytest.mark.parametrize(
    "changes", [{"use_dora": True}, {"lora_bias": True}, {"lora_dropout": 0.5}], ids=str
)
def test_what_is_more_than_that_peft_computes(changes):
    model, layer = make_layer(**changes)
    x = torch.randn(4, 7, dtype=torch.float64)
    torch.manual_seed(3)
    expected = layer(x)
    fuse_adapters(model)
    assert not layer.is_plain()
    torch.manual_seed(3)
    torch.testing.assert_close(layer(x), expected)
    if "lora_dropout" in changes:
        model.eval()
        assert layer.is_plain()


def test_states_of_a_layer():
    """Disabled, merged, with a second adapter, with a base that trains: as PEFT has it."""
    model, layer = make_layer()
    fuse_adapters(model)
    x = torch.randn(4, 7, dtype=torch.float64)
    with_adapter = layer(x)
    with model.disable_adapter():
        torch.testing.assert_close(layer(x), layer.base_layer(x))
    model.merge_adapter()
    torch.testing.assert_close(layer(x), with_adapter)
    model.unmerge_adapter()
    torch.testing.assert_close(layer(x), with_adapter)
    layer.base_layer.weight.requires_grad_()
    torch.testing.assert_close(layer(x), with_adapter)
    layer(x).sum().backward()
    assert layer.base_layer.weight.grad is not None
    model.add_adapter("second", LoraConfig(r=2, target_modules=["linear"]))
    model.base_model.set_adapter(["default", "second"])
    assert not layer.is_plain()


def test_which_layers():
    model = get_peft_model(
        nn.Sequential(nn.Linear(4, 4), nn.Embedding(4, 4)),
        LoraConfig(r=2, target_modules=["0", "1"]),
    )
    fuse_adapters(model)
    kinds = [type(module) for module in model.base_model.model]
    assert kinds == [FusedLora, lora.Embedding]


def test_a_model_trains_saves_and_loads_as_before(tmp_path):
    def student(fused):
        torch.manual_seed(0)
        model = get_peft_model(make_student(), LoraConfig(r=4, target_modules="all-linear"))
        if fused:
            fuse_adapters(model)
        return model

    weights = []
    ids = torch.arange(2, 14).view(2, 6)
    for fused in (True, False):
        model = student(fused)
        optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.5)
        for _ in range(3):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        weights.append({n: p for n, p in model.named_parameters() if "lora_" in n})
        if fused:
            model.save_pretrained(tmp_path)
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], rtol=1e-4, atol=1e-5)
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(make_student(), tmp_path)
    for name, weight in loaded.named_parameters():
        if "lora_" in name:
            assert torch.equal(weight, weights[0][name])
