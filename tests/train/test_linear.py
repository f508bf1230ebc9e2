"""How weights lie: packed linear layers are plain ones' product, and which change their order."""

import pytest
import torch
from numerics import assert_within_budget
from torch.nn import Linear, Sequential
from torch.nn.functional import linear

from esr_train.linear import MOST_WEIGHTS, PackedLinear, column_major, packed_linears

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="no oneDNN")


@pytest.fixture(autouse=True)
def _on_amd_with_avx512(monkeypatch):
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr("esr_train.linear.made_by_amd", lambda: True)


@needs_onednn
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("width", "out"), [(256, 512), (331, 307)])
@torch.no_grad()
def test_the_product_is_exact_to_rounding(width, out, bias):
    layer = Linear(width, out, bias)
    (packed,) = packed_linears(layer)
    assert packed is layer
    wide = torch.randn(3, 7, 2 * width)
    inputs = [
        torch.randn(1, width),
        torch.randn(8, 1, width),
        torch.randn(1, 301, width),
        torch.randn(width, 5).T,
        wide[..., 1 : width + 1],
        wide[:, ::2, ::2],
        torch.randn(0, width),
        torch.randn(width),
    ]

    def truth(x):
        return linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)

    for _ in range(2):
        packed.pack(layer.weight)
        # One row is a dot product in eager, whose sums are in another order than those of many.
        eager = [(linear(x, layer.weight, layer.bias), truth(x)) for x in inputs if len(x)]
        for x in inputs:
            assert_within_budget(layer(x), truth(x), eager, "product")
        layer.weight.mul_(-1.5)


@needs_onednn
def test_which_layers_are_packed(monkeypatch):
    class Special(Linear):
        pass

    def layers():
        large, small = Linear(400, 400), Linear(10, 10)
        others = Special(400, 400), Linear(400, 400).bfloat16(), Linear(400, 400, device="meta")
        return Sequential(large, small, *others)

    model = layers()
    assert packed_linears(model) == [model[0]]
    assert [type(layer) is PackedLinear for layer in model] == [True, False, False, False, False]
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX2")
    assert packed_linears(layers()) == []
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr("esr_train.linear.made_by_amd", lambda: False)
    assert packed_linears(layers()) == []


def test_which_weights_lie_by_columns(monkeypatch):
    monkeypatch.setattr("torch.backends.mkl.is_available", lambda: True)
    weight = torch.randn(7, 5)
    assert column_major(weight) is weight
    monkeypatch.setattr("esr_train.linear.made_by_amd", lambda: False)
    turned = column_major(weight)
    assert torch.equal(turned, weight)
    assert turned.stride() == (1, 7)
    for other in (weight.bfloat16(), weight.to("meta"), torch.empty(1, MOST_WEIGHTS + 1)):
        assert column_major(other) is other
    monkeypatch.setattr("torch.backends.mkl.is_available", lambda: False)
    assert column_major(weight) is weight
