"""Which tokens see which: packed sequences, and a decoder's cache, for any model of Transformers.

Transformers hands the keywords of a forward pass down to its attention function. Ours looks there
for a `layout`; without one it is the attention that the model was loaded with. So one model trains
on packed batches and still answers to `generate`, and a layer's sliding window and softcap, which
come along, need no knowledge of the architecture.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from inspect import signature
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import dropout, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from esr_kernels import RolloutBatch

# Their masks are tensors, which a layout replaces. Flash attention and others keep their own ways.
REPLACEABLE = ("sdpa", "eager")
_PREFIX = "esr_"
# Tensors that an attention function may be handed and ours has no need of. Any other (sinks, a bias
# by position) would be left out without a word.
_NEEDLESS = ("position_ids", "cache_position")


@dataclass(frozen=True)
class Scores:
    """How a layer weighs: softmax(softcap * tanh(scale * q @ k / softcap)) over `window` tokens.

    window: how many tokens a token sees, itself included; None: all before it.
    """

    scale: float
    dropout: float = 0.0
    window: int | None = None
    softcap: float | None = None


class Layout(Protocol):
    """Which tokens see which."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
        """Queries [B, Hq, Tq, D] over keys and values [B, Hkv, Tk, D]: [B, Tq, Hq, D]."""


def accept_layouts(model: Any) -> bool:
    """Let `model`'s forward take `layout=`; False if its attention cannot be replaced."""
    base = model.config._attn_implementation
    if takes_layouts(model):
        return True
    if base not in REPLACEABLE:
        return False
    name = _PREFIX + base
    AttentionInterface.register(name, partial(_attention, base))
    AttentionMaskInterface.register(name, AttentionMaskInterface()[base])
    model.set_attn_implementation(name)
    return takes_layouts(model)


def takes_layouts(model: Any) -> bool:
    return model.config._attn_implementation.startswith(_PREFIX)


def no_mask(device: torch.device) -> Tensor:
    """An attention mask of four dimensions: Transformers makes none of its own then."""
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)


def _attention(
    base: str,
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    layout: Layout | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    if layout is None:
        attend = _eager_of(type(module)) if base == "eager" else ALL_ATTENTION_FUNCTIONS[base]
        return attend(module, query, key, value, attention_mask, **options)
    for name, option in options.items():
        if isinstance(option, Tensor) and name not in _NEEDLESS:
            raise TypeError(f"{type(module).__name__} weighs its scores by {name}")
    scale = options.get("scaling")
    scores = Scores(
        query.shape[-1] ** -0.5 if scale is None else scale,
        options.get("dropout") or 0.0,
        options.get("sliding_window"),
        options.get("softcap"),
    )
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    return layout.attend(query, key, value, scores), None


def same_states(model: Any) -> float:
    """The relative difference of hidden states of `model` that are the same but for rounding.

    In 16 bits every layer rounds anew: 12 to 40 layers differed by 0.006 to 0.008 times the root of
    their number, in bfloat16.
    """
    num_layers = model.config.get_text_config().num_hidden_layers
    return 0.02 * num_layers**0.5 if model.dtype.itemsize == 2 else 1e-4


def relative_difference(states: Tensor, expected: Tensor) -> float:
    """In L2 norm."""
    return ((states - expected).float().norm() / expected.float().norm().clamp(min=1e-6)).item()


def _eager_of(kind: type) -> Callable[..., Any]:
    """Each modeling file has an eager function of its own."""
    for parent in kind.__mro__:
        own = getattr(sys.modules[parent.__module__], "eager_attention_forward", None)
        if own is not None:
            return own
    raise TypeError(f"{kind.__name__} has no eager_attention_forward beside it")


def lost_window(model: Any, windows: set[int | None]) -> str | None:
    """A reason if `model` limits what a token sees by more than the `windows` its layers asked for.

    Some architectures draw the window into the mask alone, which a layout replaces.
    """
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    window = getattr(config, "sliding_window", None)
    if getattr(config, "use_sliding_window", None) is False or "sliding_attention" not in kinds:
        window = None
    if window is None and "chunked_attention" in kinds:
        window = getattr(config, "attention_chunk_size", None)
    return f"its window of {window} is in its masks alone" if window and windows == {None} else None


class PackedLayout:
    """Sequences one behind another in a batch of one: each token sees its own, up to itself.

    flash-attn where it is installed, else PyTorch's variable-length attention, both on a GPU in 16
    bits; otherwise the sequences are laid side by side for the time of the attention.
    """

    def __init__(self, batch: RolloutBatch) -> None:
        self.cu_seqlens = batch.cu_seqlens
        self.num_sequences = len(batch.cu_seqlens) - 1
        self.max_seqlen = batch.max_seqlen
        self.position_ids = batch.position_ids
        self.windows: set[int | None] = set()  # that layers asked for
        self._bands: dict[tuple[int, torch.dtype], Tensor] = {}

    @cached_property
    def padded_rows(self) -> Tensor:
        """[T], of each packed row in [num_sequences * max_seqlen]: padded on the right."""
        packed_rows = torch.arange(len(self.position_ids), device=self.position_ids.device)
        sequence = torch.searchsorted(self.cu_seqlens[1:], packed_rows, right=True)
        return sequence * self.max_seqlen + self.position_ids

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
        self.windows.add(scores.window)
        if scores.window is not None and scores.window >= self.max_seqlen:
            scores = replace(scores, window=None)
        kernel = varlen_kernel(query, scores)
        if kernel is not None:
            states = [x.squeeze(0).transpose(0, 1) for x in (query, key, value)]
            return kernel(*states, self.cu_seqlens, self.max_seqlen, scores).unsqueeze(0)
        # No row that counts sees what follows it, so the padding needs no mask.
        plain = scores.window is None and scores.softcap is None
        mask = None if plain else self._band(scores.window, query)
        query, key, value = map(self._side_by_side, (query, key, value))
        padded = attend_masked(query, key, value, mask, scores)
        rows = padded.flatten(0, 1).index_select(0, self.padded_rows)
        return rows.unsqueeze(0)

    def _side_by_side(self, states: Tensor) -> Tensor:
        """[1, H, T, D] -> [B, H, L, D]"""
        rows = states.squeeze(0).transpose(0, 1)
        padded = rows.new_zeros(self.num_sequences * self.max_seqlen, *rows.shape[1:])
        padded = padded.index_copy(0, self.padded_rows, rows)
        return padded.view(self.num_sequences, self.max_seqlen, *rows.shape[1:]).transpose(1, 2)

    def _band(self, window: int | None, query: Tensor) -> Tensor:
        """[L, L], 0 where a token is seen, else -inf; made once for all layers."""
        width = window or self.max_seqlen
        if (width, query.dtype) not in self._bands:
            unseen = query.new_full((self.max_seqlen, self.max_seqlen), -torch.inf)
            self._bands[width, query.dtype] = unseen.triu(1) + unseen.tril(-width)
        return self._bands[width, query.dtype]


def attend_masked(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scores: Scores
) -> Tensor:
    """As `Layout.attend`; `mask` is added to the scores. None, without a softcap, is causal."""
    shared = query.shape[1] // key.shape[1]  # query heads of a key head
    num_queries = query.shape[2]
    if shared > 1 and num_queries == 1:
        # One token's heads are queries of one key head: nothing need be repeated.
        query = query.reshape(query.shape[0], key.shape[1], shared, query.shape[3])
    elif shared > 1:
        key, value = (x.repeat_interleave(shared, dim=1) for x in (key, value))
    if scores.softcap is None or mask is None:
        assert scores.softcap is None, "a softcap needs a mask"
        output = scaled_dot_product_attention(
            query, key, value, mask, scores.dropout, is_causal=mask is None, scale=scores.scale
        )
    else:
        products = query @ key.transpose(2, 3) * (scores.scale / scores.softcap)
        capped = scores.softcap * products.tanh() + mask
        weights = capped.softmax(dim=-1, dtype=torch.float32).to(value.dtype)
        output = dropout(weights, scores.dropout, scores.dropout > 0) @ value
    return output.reshape(output.shape[0], -1, num_queries, output.shape[3]).transpose(1, 2)


def varlen_kernel(query: Tensor, scores: Scores) -> Callable[..., Tensor] | None:
    """A kernel for packed sequences, or None where none runs."""
    head_dim = query.shape[-1]
    if not query.is_cuda or query.dtype.itemsize != 2 or head_dim > 256 or head_dim % 8:
        return None
    if _has_flash_attn():
        return _flash_attn
    plain = scores.softcap is None and scores.dropout == 0.0
    return _torch_varlen if plain and "window_size" in _varlen_words() else None


@cache
def _has_flash_attn() -> bool:
    try:
        import flash_attn  # noqa: F401
    except ModuleNotFoundError:
        return False
    except Exception as error:  # built for another torch
        warnings.warn(f"flash_attn cannot be imported ({error}); going on without", stacklevel=2)
        return False
    return True


@cache
def _varlen_words() -> frozenset[str]:
    """What PyTorch's variable-length attention takes; nothing where torch is too old."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return frozenset()
    return frozenset(signature(varlen_attn).parameters)


def _flash_attn(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, max_seqlen: int, scores: Scores
) -> Tensor:
    """Rows [T, H, D] -> [T, H, D]"""
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(
        query,
        key,
        value,
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        dropout_p=scores.dropout,
        softmax_scale=scores.scale,
        causal=True,
        window_size=_window(scores),
        softcap=scores.softcap or 0.0,
    )


def _torch_varlen(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, max_seqlen: int, scores: Scores
) -> Tensor:
    """Rows [T, H, D] -> [T, H, D]"""
    from torch.nn.attention.varlen import varlen_attn

    grouped: dict[str, Any] = {}
    shared = query.shape[1] // key.shape[1]
    if shared > 1 and "enable_gqa" in _varlen_words():  # not in every version
        grouped["enable_gqa"] = True
    elif shared > 1:
        key, value = (x.repeat_interleave(shared, dim=1) for x in (key, value))
    return varlen_attn(  # type: ignore[return-value]  # a pair only where asked for
        query,
        key,
        value,
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        scale=scores.scale,
        window_size=_window(scores),
        **grouped,
    )


def _window(scores: Scores) -> tuple[int, int]:
    """How many tokens before and after a token are seen; -1: all."""
    return (-1 if scores.window is None else scores.window - 1, 0)
