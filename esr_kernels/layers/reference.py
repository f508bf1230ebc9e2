"""The parts of a layer in eager PyTorch: what runs where there is no GPU, and the oracle."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import gelu, scaled_dot_product_attention, silu

Norms = tuple[Tensor, Tensor, float, float]  # weights of queries and keys, eps, offset

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": silu,
    "gelu_tanh": lambda x: gelu(x, approximate="tanh"),
}


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def run_rms_norm(
    x: Tensor, weight: Tensor, eps: float, offset: float, residual: Tensor | None
) -> Tensor:
    if residual is not None:
        x = residual.add_(x)
    return _normed(_wide(x), weight, eps, offset).to(x.dtype)


def _normed(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    # A vector norm is one pass, and quicker than squares and their mean.
    squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
    factor = squares.div_(x.shape[-1]).add_(eps).rsqrt_()
    weight = _wide(weight)
    return (x * factor).mul_(weight + offset if offset else weight)


def run_rotate_and_store(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    norms: Norms | None,
    cache: tuple[Tensor, Tensor] | None,
    rows: Tensor | None,
    slots: Tensor | None,
) -> None:
    cos, sin = _wide(cos).unsqueeze(1), _wide(sin).unsqueeze(1)
    half = query.shape[2] // 2
    for states in (query, key):
        x = _wide(states)
        if norms is not None:
            x = _normed(x, norms[0] if states is query else norms[1], norms[2], norms[3])
        turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1).mul_(sin)
        states.copy_(turned.addcmul_(x, cos))
    if cache is None or slots is None:
        return
    for part, states in zip(cache, (key, value), strict=True):
        if rows is None and len(slots) == 1:
            part.index_copy_(2, slots, states.unsqueeze(2))
        else:
            tokens = torch.arange(len(states), device=states.device)
            part[tokens if rows is None else rows, :, slots] = states


def run_decode_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    first: Tensor,
    last: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    # Where looking is free, slots that are not in use are left out.
    end = int(last) + 1 if last.device.type == "cpu" else keys.shape[2]
    keys, values = keys[:, :, :end], values[:, :, :end]
    slots = torch.arange(end, device=query.device)
    seen = slots >= first.unsqueeze(1)
    if last.device.type != "cpu":
        seen &= slots <= last
    if window is not None:
        seen &= slots > last - window
    # The heads of a key head are queries of it: nothing need be repeated.
    grouped = query.reshape(len(query), keys.shape[1], -1, query.shape[2])
    mask = seen[:, None, None]
    if softcap is None:
        output = scaled_dot_product_attention(grouped, keys, values, mask, scale=scale)
    else:
        scores = _wide(grouped @ keys.transpose(2, 3)) * (scale / softcap)
        weights = (softcap * scores.tanh()).masked_fill(~mask, -torch.inf).softmax(dim=-1)
        output = weights.to(values.dtype) @ values
    return output.reshape(*query.shape[:2], -1)


def run_gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return ACTIVATIONS[activation](_wide(gate)).mul_(up).to(gate.dtype)
