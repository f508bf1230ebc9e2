"""The parts of a layer in eager PyTorch: what runs where there is no GPU, and the oracle."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import gelu, scaled_dot_product_attention, silu

Norms = tuple[Tensor, Tensor, float, float]  # weights of queries and keys, eps, offset

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": silu,
    "gelu_tanh": lambda x: gelu(x, approximate="tanh"),
}
# (what reaches the activation, its input) -> what reaches its input
DERIVATIVES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": torch.ops.aten.silu_backward,
    "gelu_tanh": lambda grad, x: torch.ops.aten.gelu_backward(grad, x, approximate="tanh"),
}


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def run_rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    offset: float,
    residual: Tensor | None = None,
    total: Tensor | None = None,
) -> Tensor:
    """total: where residual + x goes, which may be the residual."""
    value = x if residual is None else torch.add(residual, x, out=total)
    wide = _wide(value)
    return (wide * _factor(wide, eps)).mul_(_gain(weight, offset)).to(x.dtype)


def _factor(x: Tensor, eps: float) -> Tensor:
    # A vector norm is one pass, and quicker than squares and their mean.
    squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
    return squares.div_(x.shape[-1]).add_(eps).rsqrt_()


def _gain(weight: Tensor, offset: float) -> Tensor:
    weight = _wide(weight)
    return weight + offset if offset else weight


def run_rms_norm_backward(
    grad: Tensor,
    grad_total: Tensor | None,
    x: Tensor,
    weight: Tensor,
    eps: float,
    offset: float,
    needs_weight: bool,
) -> tuple[Tensor, Tensor | None]:
    """grad_total: what reaches x beside the norm."""
    wide, grad = _wide(x), _wide(grad)
    factor = _factor(wide, eps)
    normed = wide * factor
    grad_weight = (grad * normed).sum(dim=0).to(weight.dtype) if needs_weight else None
    scaled = grad * _gain(weight, offset)
    # Not vecdot, which autocast would run in 16 bits.
    along = (scaled * normed).sum(dim=-1, keepdim=True).div_(x.shape[-1])
    grad_x = scaled.addcmul_(normed, along, value=-1).mul_(factor)
    if grad_total is not None:
        grad_x += grad_total
    return grad_x.to(x.dtype), grad_weight


def run_rotate(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, backward: bool = False
) -> tuple[Tensor, Tensor]:
    """backward: by the transposed rotation."""
    cos, sin = _wide(cos).unsqueeze(1), _wide(sin).unsqueeze(1)
    turn = _turned_back if backward else _turned
    query, key = (turn(_wide(x), cos, sin).to(x.dtype) for x in (query, key))
    return query, key


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, dim=-1)
    return torch.cat((-high, low), dim=-1).mul_(sin).addcmul_(x, cos)


def _turned_back(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = (x * sin).chunk(2, dim=-1)
    return torch.cat((high, -low), dim=-1).addcmul_(x, cos)


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
    both = _side_by_side(query, key) if norms is None else None
    for states in (query, key) if both is None else (both,):
        x = _wide(states)
        if norms is not None:
            weight = norms[0] if states is query else norms[1]
            x = (x * _factor(x, norms[2])).mul_(_gain(weight, norms[3]))
        states.copy_(_turned(x, cos, sin))
    if cache is None or slots is None:
        return
    for part, states in zip(cache, (key, value), strict=True):
        if rows is None and len(slots) == 1:
            part.index_copy_(2, slots, states.unsqueeze(2))
        else:
            tokens = torch.arange(len(states), device=states.device)
            part[tokens if rows is None else rows, :, slots] = states


def _side_by_side(query: Tensor, key: Tensor) -> Tensor | None:
    """[T, Hq + Hk, D], a view, where a joint projection left them so."""
    end = query.storage_offset() + query.shape[1] * query.stride(1)
    same = query.untyped_storage().data_ptr() == key.untyped_storage().data_ptr()
    if not same or query.stride() != key.stride() or key.storage_offset() != end:
        return None
    heads = query.shape[1] + key.shape[1]
    return query.as_strided((len(query), heads, query.shape[2]), query.stride())


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
    # Where looking is free, slots that are not in use are left out, and layers share their mask.
    if last.device.type == "cpu":
        end = int(last) + 1
        keys, values = keys[:, :, :end], values[:, :, :end]
        mask = _mask_up_to(end, tuple(first.tolist()), window, query.dtype)
    else:
        mask = _mask(first, last, keys.shape[2], window, query.dtype)
    # The heads of a key head are queries of it: nothing need be repeated.
    grouped = query.reshape(len(query), keys.shape[1], -1, query.shape[2])
    if softcap is None:
        output = scaled_dot_product_attention(grouped, keys, values, mask, scale=scale)
    else:
        scores = _wide(grouped @ keys.transpose(2, 3)) * (scale / softcap)
        weights = (softcap * scores.tanh()).add_(mask).softmax(dim=-1)
        output = weights.to(values.dtype) @ values
    return output.reshape(*query.shape[:2], -1)


def _mask(
    first: Tensor, last: Tensor, num_slots: int, window: int | None, dtype: torch.dtype
) -> Tensor:
    """[B, 1, 1, num_slots], 0 where a slot is seen, else -inf."""
    slots = torch.arange(num_slots, device=first.device)
    unseen = (slots < first.unsqueeze(1)) | (slots > last)
    if window is not None:
        unseen |= slots <= last - window
    mask = torch.zeros_like(unseen, dtype=dtype).masked_fill_(unseen, -torch.inf)
    return mask[:, None, None]


@lru_cache(maxsize=4)  # kinds of layers in a model
def _mask_up_to(end: int, first: tuple[int, ...], window: int | None, dtype: torch.dtype) -> Tensor:
    starts, last = torch.tensor(first, device="cpu"), torch.tensor([end - 1], device="cpu")
    return _mask(starts, last, end, window, dtype)


def run_gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return ACTIVATIONS[activation](_wide(gate)).mul_(up).to(gate.dtype)


def run_gated_backward(
    grad: Tensor, gate: Tensor, up: Tensor, activation: str, wants_product: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    wide, grad = _wide(gate), _wide(grad)
    active = ACTIVATIONS[activation](wide)
    product = (active * up).to(gate.dtype) if wants_product else None
    grad_gate = DERIVATIVES[activation](grad * up, wide).to(gate.dtype)
    return grad_gate, active.mul_(grad).to(up.dtype), product
