"""Public functions of a layer's parts: checks, dispatch. They never wait for the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from esr_kernels.checks import choose_impl, error
from esr_kernels.layers import reference
from esr_kernels.layers.autograd import AddRMSNorm, Gated, RMSNorm, Rotate

ACTIVATIONS = tuple(reference.ACTIVATIONS)


def _backend(impl: Any, tensor: Tensor, decoding: bool = False) -> Any:
    if choose_impl(impl, tensor.device, tensor.dtype != torch.float64) == "torch":
        return reference
    from esr_kernels.layers import decode_kernels, kernels

    return decode_kernels if decoding else kernels


def _check(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise error(name, f"shape {list(shape)}", f"shape {list(tensor.shape)}")
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        raise error(name, "a last dimension of stride 1", f"strides {list(tensor.stride())}")


def rms_norm(
    x: Tensor, weight: Tensor, *, eps: float, offset: float = 0.0, impl: str = "auto"
) -> Tensor:
    """x * rsqrt(mean(x**2) + eps) * (weight + offset), differentiable in x and weight.

    Args:
        x: [T, D]. Rows may lie apart.
        weight: [D].
        offset: 1.0 is Gemma's.
        impl: "triton", "torch", or "auto": triton for tensors on a GPU, torch elsewhere.

    Returns:
        [T, D] in x's dtype, from float32 (float64 of float64) rounded once.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    backend = _norm_backend(impl, x, weight)
    if not torch.is_grad_enabled():
        return backend.run_rms_norm(x, weight, eps, offset)
    normed: Tensor = RMSNorm.apply(x, weight, eps, offset, backend)
    return normed


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    *,
    eps: float,
    offset: float = 0.0,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`rms_norm` of the rounded sum residual + x, and that sum; differentiable in all three.

    Args:
        x: [T, D]. Rows may lie apart.
        residual: [T, D]. Under `torch.no_grad` the sum is written over it.
        weight, eps, offset, impl: as `rms_norm`.

    Returns:
        The norm [T, D] in x's dtype, and the sum [T, D] in the residual's.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    backend = _norm_backend(impl, x, weight)
    _check("residual", residual, (x.shape[0], x.shape[1]))
    if not torch.is_grad_enabled():
        return backend.run_rms_norm(x, weight, eps, offset, residual, residual), residual
    normed, total = AddRMSNorm.apply(x, residual, weight, eps, offset, backend)
    return normed, total


def _norm_backend(impl: Any, x: Tensor, weight: Tensor) -> Any:
    if x.ndim != 2:
        raise error("x", "shape [T, D]", f"shape {list(x.shape)}")
    _check("x", x, (x.shape[0], x.shape[1]))
    _check("weight", weight, (x.shape[1],))
    return _backend(impl, x)


def rotate(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Queries and keys turned by their positions, differentiable in both.

    x * cos + cat(-x[D/2:], x[:D/2]) * sin, as Transformers' `apply_rotary_pos_emb`.

    Args:
        query, key: [T, Hq, D], [T, Hk, D]; heads and tokens may lie apart.
        cos, sin: [T, D].
        impl: as `rms_norm`.

    Returns:
        New tensors of their shapes and dtypes, contiguous.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    _check_rotation(query, key, cos, sin)
    backend = _backend(impl, query)
    if not torch.is_grad_enabled():
        return backend.run_rotate(query, key, cos, sin)
    query, key = Rotate.apply(query, key, cos, sin, backend)
    return query, key


def _check_rotation(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> None:
    num_tokens, num_heads, dim = query.shape
    _check("query", query, (num_tokens, num_heads, dim))
    _check("key", key, (num_tokens, key.shape[1], dim))
    _check("cos", cos, (num_tokens, dim))
    _check("sin", sin, (num_tokens, dim))
    if dim % 2:
        raise error("query", "an even head dimension", dim)


@torch.no_grad()
def rotate_and_store(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    query_norm: Tensor | None = None,
    key_norm: Tensor | None = None,
    eps: float = 0.0,
    offset: float = 0.0,
    cache: tuple[Tensor, Tensor] | None = None,
    rows: Tensor | None = None,
    slots: Tensor | None = None,
    impl: str = "auto",
) -> None:
    """`rotate` queries and keys in place, and put keys and values into a cache; without gradient.

    Args:
        query, key, value: [T, Hq, D], [T, Hk, D], [T, Hk, Dv]; heads and tokens may lie apart.
        cos, sin: [T, D].
        query_norm, key_norm: [D], both or neither: weights of an `rms_norm` of each head before.
        eps, offset: of that.
        cache: keys [B, Hk, S, D] and values [B, Hk, S, Dv].
        rows: [T] int64: of the cache. None: token t has row t.
        slots: int64, of the cache: [T], or [1] for all tokens.
        impl: as `rms_norm`.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    _check_rotation(query, key, cos, sin)
    num_tokens = len(query)
    _check("value", value, (num_tokens, key.shape[1], value.shape[2]))
    if (query_norm is None) != (key_norm is None):
        raise error("key_norm", "both norms or neither", "one of them")
    if (cache is None) != (slots is None):
        raise error("slots", "slots with a cache, and only then", slots)
    if cache is not None and slots is not None:
        for name, part, heads in (("keys", cache[0], key), ("values", cache[1], value)):
            _check(
                f"cache {name}", part, (len(part), heads.shape[1], part.shape[2], heads.shape[2])
            )
        if slots.shape not in ((1,), (num_tokens,)):
            raise error("slots", f"shape [1] or [{num_tokens}]", f"shape {list(slots.shape)}")
        if rows is None and len(cache[0]) != num_tokens:
            raise error("rows", "a row of the cache for each token", rows)
    norms = None if query_norm is None else (query_norm, key_norm, eps, offset)
    _backend(impl, query, decoding=True).run_rotate_and_store(
        query, key, value, cos, sin, norms, cache, rows, slots
    )


@torch.no_grad()
def decode_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    first: Tensor,
    last: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Attention of one token a row over a cache: slots max(first, last - window + 1) to last.

    It has no gradient.

    Args:
        query: [B, Hq, D]; its Hq / Hk heads of a key head side by side.
        keys, values: [B, Hk, S, D], [B, Hk, S, Dv]. What is not seen must be finite, and on Triton
            may be anything: it is not read.
        first: [B] int64: the first slot of each row.
        last: [1] int64, on the device: the newest slot, the query's own.
        scale, softcap: scores are softcap * tanh(scale * q @ k / softcap).
        window: how many slots are seen; None: all of them.
        impl: as `rms_norm`.

    Returns:
        [B, Hq, Dv] in the query's dtype.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    num_rows, num_heads, dim = query.shape
    _check("query", query, (num_rows, num_heads, dim))
    _check("keys", keys, (num_rows, keys.shape[1], keys.shape[2], dim))
    _check("values", values, (*keys.shape[:3], values.shape[3]))
    if num_heads % keys.shape[1]:
        raise error("query", f"heads in groups of the {keys.shape[1]} key heads", num_heads)
    if first.shape != (num_rows,) or last.shape != (1,):
        raise error("first, last", f"shapes [{num_rows}] and [1]", (first.shape, last.shape))
    backend = _backend(impl, query, decoding=True)
    return backend.run_decode_attention(query, keys, values, first, last, scale, window, softcap)


def gated(gate: Tensor, up: Tensor, activation: str, impl: str = "auto") -> Tensor:
    """activation(gate) * up, [T, F], from float32 rounded once; differentiable in both.

    Args:
        gate, up: [T, F]. Rows may lie apart.
        activation: "silu", or "gelu_tanh", the approximation by tanh.
        impl: as `rms_norm`.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    backend = _gated_backend(impl, gate, up, activation)
    if not torch.is_grad_enabled():
        return backend.run_gated(gate, up, activation)
    product: Tensor = Gated.apply(gate, up, activation, backend)
    return product


@torch.no_grad()
def gated_backward(
    grad: Tensor, gate: Tensor, up: Tensor, activation: str, impl: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of gate and up for that of `gated`, and what `gated` was: nobody need keep it.

    Args:
        grad: [T, F].
        gate, up, activation, impl: as `gated`.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    backend = _gated_backend(impl, gate, up, activation)
    _check("grad", grad, (gate.shape[0], gate.shape[1]))
    return backend.run_gated_backward(grad, gate, up, activation, True)


def _gated_backend(impl: Any, gate: Tensor, up: Tensor, activation: str) -> Any:
    if activation not in ACTIVATIONS:
        raise error("activation", f"one of {ACTIVATIONS}", repr(activation))
    _check("gate", gate, (gate.shape[0], gate.shape[1]))
    _check("up", up, (gate.shape[0], gate.shape[1]))
    return _backend(impl, gate)
