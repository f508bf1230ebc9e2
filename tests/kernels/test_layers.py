"""A layer's parts against float64: every dtype, odd sizes, strided inputs, caches with garbage."""

import pytest
import torch
from numerics import relative_error
from torch.nn.functional import gelu, silu

from esr_kernels.layers import (
    add_rms_norm,
    decode_attention,
    gated,
    gated_backward,
    reference,
    rms_norm,
    rotate,
    rotate_and_store,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
both = pytest.mark.parametrize("impl", ["torch", "triton"])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@pytest.fixture(autouse=True)
def _scatter_allowed():
    """index_put_ on a GPU has no deterministic kernel of its own for every shape."""
    torch.use_deterministic_algorithms(True, warn_only=True)


def random(*shape, dtype=torch.float32):
    return torch.randn(*shape, device=DEVICE).to(dtype)


def assert_close(actual, truth, dtype):
    assert actual.dtype == dtype
    assert actual.shape == truth.shape
    assert torch.isfinite(actual).all()
    assert relative_error(actual, truth) < LIMITS[dtype]


norms = pytest.mark.parametrize(
    ("rows", "columns", "offset"), [(1, 8, 0.0), (3, 97, 1.0), (2, 1536, 0.0)]
)


def normed(value, weight, offset):
    factor = (value.square().mean(1, keepdim=True) + 1e-3).rsqrt()
    return value * factor * (weight.double() + offset)


def rounded_sum(x, residual):
    return (residual.float() + x.float()).to(residual.dtype)


def rounds_alike(impl, dtype):
    """Triton's interpreter does not round to the nearest bfloat16."""
    return impl == "torch" or dtype != torch.bfloat16 or DEVICE == "cuda"


@both
@dtypes
@norms
def test_rms_norm(impl, dtype, rows, columns, offset):
    x = random(rows, columns + 5, dtype=dtype)[:, :columns]
    weight = random(columns, dtype=dtype)
    found = rms_norm(x, weight, eps=1e-3, offset=offset, impl=impl)
    assert_close(found, normed(x.double(), weight, offset), dtype)


@both
@dtypes
@norms
@pytest.mark.parametrize("wide", [True, False])
def test_add_rms_norm(impl, dtype, rows, columns, offset, wide):
    """In place without gradient, and elsewhere with one; the residual may be float32."""
    x = random(rows, columns + 5, dtype=dtype)[:, :columns]
    weight, residual = random(columns), random(rows, columns + 3)[:, :columns]
    if not wide:
        weight, residual = weight.to(dtype), residual.to(dtype)
    value = rounded_sum(x, residual)
    truth = normed(value.double(), weight, offset)
    options = {"eps": 1e-3, "offset": offset, "impl": impl}
    before = residual.clone()
    found, total = add_rms_norm(x.clone().requires_grad_(), residual, weight, **options)
    assert torch.equal(residual, before)
    with torch.no_grad():
        again, in_place = add_rms_norm(x, residual, weight, **options)
    assert in_place is residual
    assert torch.equal(in_place, total)
    assert torch.equal(again, found)
    assert_close(found.detach(), truth, dtype)
    if rounds_alike(impl, residual.dtype):
        assert torch.equal(total, value)


def compared_gradients(function, truth, leaves, dtype):
    """Gradients in float64 of `truth`, and of `function` in `dtype` from the same upstream."""
    torch.manual_seed(1)
    found = function(*(leaf.requires_grad_() for leaf in leaves))
    upstream = [random(*output.shape, dtype=output.dtype) for output in found]
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = torch.autograd.grad(truth(*wide), wide, [x.double() for x in upstream])
    for leaf, grad, exact in zip(
        leaves, torch.autograd.grad(found, leaves, upstream), expected, strict=True
    ):
        assert grad.dtype == leaf.dtype
        assert_close(grad, exact, leaf.dtype)


@both
@dtypes
@norms
@pytest.mark.parametrize("programs", [1, 512])
def test_gradients_of_norms(impl, dtype, rows, columns, offset, programs, monkeypatch):
    from esr_kernels.layers import kernels

    monkeypatch.setattr(kernels, "WEIGHT_PROGRAMS", programs)
    options = {"eps": 1e-3, "offset": offset, "impl": impl}
    x, residual = (random(rows, columns + 5, dtype=dtype)[:, :columns] for _ in range(2))
    weight = random(columns, dtype=dtype)
    compared_gradients(
        lambda x, weight: [rms_norm(x, weight, **options)],
        lambda x, weight: [normed(x, weight, offset)],
        [x.detach(), weight],
        dtype,
    )
    if dtype != torch.float32:  # so that the sum is what it is in float64
        x, residual = (torch.randint(-9, 9, x.shape, device=DEVICE).to(dtype) for _ in range(2))
    compared_gradients(
        lambda x, residual, weight: add_rms_norm(x, residual, weight, **options),
        lambda x, residual, weight: [normed(residual + x, weight, offset), residual + x],
        [x.detach(), residual.detach(), weight.detach()],
        dtype,
    )


@both
def test_gradients_of_a_part_of_a_norm(impl):
    """Only the norm, or only the sum; a frozen weight; a residual of float32; broadcast ones."""
    x, residual = random(4, 33, dtype=torch.bfloat16).requires_grad_(), random(4, 33)
    weight = random(33)
    residual.requires_grad_()
    first, total = add_rms_norm(x, residual, weight, eps=1e-3, impl=impl)
    assert (first.dtype, total.dtype) == (torch.bfloat16, torch.float32)
    total.sum().backward(retain_graph=True)
    assert torch.equal(residual.grad, torch.ones_like(residual))
    assert torch.equal(x.grad, torch.ones_like(x))
    x.grad = residual.grad = None
    first.sum().backward()
    wide = (x.double() + residual.double()).detach().requires_grad_()
    normed(wide, weight, 0.0).sum().backward()
    assert_close(residual.grad, wide.grad, torch.float32)
    assert_close(x.grad, wide.grad, torch.bfloat16)
    assert weight.grad is None


def turned(x, cos, sin, weight, eps, offset):
    x = x.double()
    if weight is not None:
        x = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * (weight.double() + offset)
    half = x.shape[-1] // 2
    other = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
    return x * cos.double().unsqueeze(1) + other * sin.double().unsqueeze(1)


@both
@dtypes
@pytest.mark.parametrize("with_norms", [True, False])
@pytest.mark.parametrize(("dim", "value_dim"), [(8, 8), (80, 48), (128, 128)])
@pytest.mark.parametrize("place", ["none", "one slot", "rows and slots"])
def test_rotate_and_store(impl, dtype, with_norms, dim, value_dim, place):
    tokens, num_queries, num_keys = 5, 6, 2
    stacked = random(tokens, num_queries * dim + num_keys * (dim + value_dim), dtype=dtype)
    sizes = [num_queries * dim, num_keys * dim, num_keys * value_dim]
    parts = zip(stacked.split(sizes, dim=1), (num_queries, num_keys, num_keys), strict=True)
    query, key, value = (part.unflatten(1, (heads, -1)) for part, heads in parts)
    assert query.data_ptr() == stacked.data_ptr()
    angles = random(tokens, dim)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    options = {}
    if with_norms:
        options = {"query_norm": random(dim, dtype=dtype), "key_norm": random(dim, dtype=dtype)}
        options |= {"eps": 1e-3, "offset": 1.0}
    norm = [options.get(name) for name in ("query_norm", "key_norm")]
    truths = [
        turned(x, cos, sin, weight, 1e-3, 1.0) for x, weight in zip((query, key), norm, strict=True)
    ]
    written = value.clone()
    keys, values = (random(tokens, num_keys, 7, d, dtype=dtype) for d in (dim, value_dim))
    before = keys.clone(), values.clone()
    rows = slots = None
    if place == "one slot":
        slots = torch.tensor([3], device=DEVICE)
    elif place == "rows and slots":
        rows = torch.tensor([0, 0, 2, 2, 4], device=DEVICE)
        slots = torch.tensor([1, 5, 0, 6, 2], device=DEVICE)
    if slots is not None:
        options |= {"cache": (keys, values), "rows": rows, "slots": slots}
    rotate_and_store(query, key, value, cos, sin, **options, impl=impl)
    assert_close(query, truths[0], dtype)
    assert_close(key, truths[1], dtype)
    assert torch.equal(value, written)
    if slots is not None:
        at = torch.arange(tokens, device=DEVICE) if rows is None else rows
        before[0][at, :, slots], before[1][at, :, slots] = key, value
    assert torch.equal(keys, before[0])
    assert torch.equal(values, before[1])


@both
@pytest.mark.parametrize(("query_at", "key_at"), [(0, 4), (0, 5), (2, 0), (0, None)])
def test_queries_and_keys_lie_where_they_like(impl, query_at, key_at):
    heads = random(5, 7, 8)
    query = heads[:, query_at : query_at + 4]
    key = random(5, 2, 8) if key_at is None else heads[:, key_at : key_at + 2]
    angles = random(5, 8)
    cos, sin = angles.cos(), angles.sin()
    truths = [turned(x, cos, sin, None, 0.0, 0.0) for x in (query, key)]
    rotate_and_store(query, key, key, cos, sin, impl=impl)
    assert_close(query, truths[0], torch.float32)
    assert_close(key, truths[1], torch.float32)


@both
def test_autocast_does_not_reach_gradients(impl):
    x, weight = random(5, 64).requires_grad_(), random(64).requires_grad_()
    grads = []
    for enabled in (False, True):
        loss = rms_norm(x, weight, eps=1e-3, impl=impl).square().sum()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=enabled):
            grads.append(torch.autograd.grad(loss, [x, weight]))
    assert all(map(torch.equal, *grads))


@both
@dtypes
@pytest.mark.parametrize("dim", [8, 80])
def test_rotate(impl, dtype, dim):
    """Halves turned by angles of their own, as rotations of several dimensions have them."""
    tokens, num_queries, num_keys = 5, 6, 2
    stacked = random(tokens, (num_queries + num_keys) * dim, dtype=dtype)
    query, key = stacked.split([num_queries * dim, num_keys * dim], dim=1)
    query, key = query.unflatten(1, (num_queries, dim)), key.unflatten(1, (num_keys, dim))
    before = stacked.clone()
    angles = random(tokens, dim)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    found = rotate(query, key, cos, sin, impl=impl)
    assert torch.equal(stacked, before)
    for output, x in zip(found, (query, key), strict=True):
        assert output.is_contiguous()
        assert_close(output, turned(x, cos, sin, None, 0.0, 0.0), dtype)
    compared_gradients(
        lambda query, key: rotate(query, key, cos, sin, impl=impl),
        lambda query, key: [turned(x, cos, sin, None, 0.0, 0.0) for x in (query, key)],
        [query.detach(), key.detach()],
        dtype,
    )
    query.requires_grad_()
    rotate(query, key, cos, sin, impl=impl)[0].sum().backward()  # a gradient without strides
    assert query.grad is not None


def attended(query, keys, values, first, last, scale, window, softcap):
    group = query.shape[1] // keys.shape[1]
    keys, values = (x.double().repeat_interleave(group, dim=1) for x in (keys, values))
    scores = scale * torch.einsum("bhd,bhsd->bhs", query.double(), keys)
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    slots = torch.arange(keys.shape[2], device=DEVICE)
    seen = (slots >= first[:, None]) & (slots <= last)
    if window is not None:
        seen &= slots > last - window
    weights = scores.masked_fill(~seen[:, None], -torch.inf).softmax(dim=-1)
    return torch.einsum("bhs,bhsd->bhd", weights, values)


@both
@dtypes
@pytest.mark.parametrize(
    ("heads", "dim", "value_dim"), [((2, 2), 8, 8), ((6, 2), 80, 48), ((24, 1), 128, 128)]
)
@pytest.mark.parametrize(
    ("num_slots", "last", "window", "softcap"),
    [(20, 0, None, None), (512, 130, None, None), (512, 511, 70, None), (300, 200, 3, 5.0)],
)
def test_decode_attention(impl, dtype, heads, dim, value_dim, num_slots, last, window, softcap):
    num_rows = 3
    query = random(num_rows, 2 * heads[0], dim, dtype=dtype)[:, : heads[0]]
    keys, values = (random(num_rows, heads[1], num_slots, d, dtype=dtype) for d in (dim, value_dim))
    first = torch.tensor([0, last // 2, last], device=DEVICE)
    newest = torch.tensor([last], device=DEVICE)
    options = {"scale": dim**-0.5, "window": window, "softcap": softcap}
    truth = attended(query, keys, values, first, last, **options)
    if impl == "triton":  # what is not seen is not read
        for row, start in enumerate(first.tolist()):
            start = max(start, last - window + 1) if window else start
            for part in (keys, values):
                part[row, :, :start], part[row, :, last + 1 :] = torch.nan, torch.nan
    found = decode_attention(query, keys, values, first, newest, **options, impl=impl)
    assert_close(found, truth, dtype)


def test_splits_are_of_shapes_alone():
    from esr_kernels.layers.decode_kernels import num_splits

    assert [num_splits(s, p) for s, p in ((256, 32), (512, 32), (2048, 32), (2048, 1024), (8, 1))] \
        == [2, 4, 16, 1, 1]  # fmt: skip


@both
@dtypes
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize(("rows", "columns"), [(1, 3), (5, 2051)])
def test_gated(impl, dtype, activation, rows, columns):
    gate, up = (4 * random(rows, 2 * columns, dtype=dtype)).split(columns, dim=1)
    inner = gate.double()
    truth = silu(inner) if activation == "silu" else gelu(inner, approximate="tanh")
    assert_close(gated(gate, up, activation, impl), truth * up.double(), dtype)


@both
@dtypes
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize(("rows", "columns"), [(1, 3), (5, 2051)])
def test_gradients_of_gated(impl, dtype, activation, rows, columns):
    function = {"silu": silu, "gelu_tanh": lambda x: gelu(x, approximate="tanh")}[activation]
    gate, up = (4 * random(rows, 2 * columns, dtype=dtype)).split(columns, dim=1)
    compared_gradients(
        lambda gate, up: [gated(gate, up, activation, impl)],
        lambda gate, up: [function(gate) * up],
        [gate.detach(), up.detach()],
        dtype,
    )
    grad = random(rows, columns, dtype=dtype)
    found = gated_backward(grad, gate, up, activation, impl)
    assert not any(x.requires_grad for x in found)
    assert_close(found[2], function(gate.double()) * up.double(), dtype)
    assert_close(found[1], grad.double() * function(gate.double()), dtype)


@both
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_far_out_the_gate_is_open_or_shut(impl, activation):
    gate = torch.tensor([[-1e30, -1e4, -200.0, 200.0, 1e4, 1e30]], device=DEVICE)
    ones = torch.ones_like(gate)
    slope, active, product = gated_backward(ones, gate, ones, activation, impl)
    is_open = (gate > 0).float()
    if impl == "torch" and activation == "gelu_tanh":
        slope = is_open  # PyTorch's own is NaN far out
    for found, truth in ((slope, is_open), (active, gate * is_open), (product, gate * is_open)):
        torch.testing.assert_close(found, truth, rtol=1e-6, atol=1e-4)


@both
def test_no_tokens(impl):
    empty = random(0, 8)
    weight = random(8).requires_grad_()
    assert gated(empty, empty, "silu", impl).shape == (0, 8)
    for x in (empty, empty.clone().requires_grad_()):
        output = gated(rms_norm(x, weight, eps=1e-6, impl=impl), x, "silu", impl)
        output, total = add_rms_norm(output, x, weight, eps=1e-6, impl=impl)
        query, _ = rotate(output.view(0, 2, 4), random(0, 1, 4), empty[:, :4], empty[:, :4], impl)
        (query.sum() + total.sum()).backward()
        assert torch.equal(weight.grad, torch.zeros_like(weight))
    heads = random(0, 2, 8)
    rotate_and_store(heads, heads, heads, empty, empty, impl=impl)


def test_bad_input():
    x, weight = random(2, 8), random(8)
    for call, message in (
        (lambda: rms_norm(x[0], weight, eps=0.1), r"^x: expected shape \[T, D\]"),
        (lambda: rms_norm(x, random(7), eps=0.1), r"^weight: expected shape \[8\]"),
        (lambda: rms_norm(random(8, 2).T, weight, eps=0.1), "^x: expected a last dimension of st"),
        (lambda: add_rms_norm(x, x[:1], weight, eps=0.1), r"^residual: expected shape \[2, 8\]"),
        (lambda: add_rms_norm(x, x, weight[:3], eps=0.1), r"^weight: expected shape \[8\]"),
        (lambda: rotate(x.view(2, 2, 4), x.view(2, 2, 4), x, x), r"^cos: expected shape \[2, 4\]"),
        (lambda: gated_backward(x[:1], x, x, "silu"), r"^grad: expected shape \[2, 8\]"),
        (lambda: gated(x, x, "relu"), "^activation: expected one of"),
        (lambda: gated(x, x[:1], "silu"), r"^up: expected shape \[2, 8\]"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    heads, cache = random(2, 2, 8), (random(2, 2, 5, 8), random(2, 2, 5, 8))
    slot, longs = torch.tensor([1], device=DEVICE), torch.zeros(2, dtype=torch.int64, device=DEVICE)
    for options, message in (
        ({"cache": cache}, "^slots: expected slots with a cache"),
        ({"cache": cache, "slots": slot.expand(3)}, r"^slots: expected shape \[1\] or \[2\]"),
        ({"cache": (cache[0][:1], cache[1][:1]), "slots": slot}, "^rows: expected a row"),
        ({"query_norm": weight}, "^key_norm: expected both"),
    ):
        with pytest.raises(ValueError, match=message):
            rotate_and_store(heads, heads, heads, x, x, **options)
    odd, angles = random(2, 2, 7), random(2, 7)
    with pytest.raises(ValueError, match="^query: expected an even head dimension, got 7"):
        rotate_and_store(odd, odd, odd, angles, angles)
    with pytest.raises(ValueError, match="^query: expected heads in groups of the 2 key heads"):
        decode_attention(random(2, 3, 8), *cache, longs, slot, scale=1.0)
    with pytest.raises(ValueError, match="^first, last: expected"):
        decode_attention(heads, *cache, longs, longs, scale=1.0)
    with pytest.raises(ValueError, match="^impl: expected one of"):
        gated(x, x, "silu", impl="cuda")
    assert set(reference.ACTIVATIONS) == {"silu", "gelu_tanh"}


@pytest.mark.gpu
def test_replays_see_the_newest_slot():
    """A graph holds neither the number of slots nor a share of them."""
    query = random(4, 6, 64, dtype=torch.bfloat16)
    keys, values = (random(4, 2, 512, 64, dtype=torch.bfloat16) for _ in range(2))
    first = torch.tensor([0, 1, 5, 9], device=DEVICE)
    last = torch.tensor([20], device=DEVICE)

    def step():
        return decode_attention(query, keys, values, first, last, scale=0.1)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    for newest in (10, 300, 511):
        last.fill_(newest)
        graph.replay()
        assert torch.equal(found, step())
