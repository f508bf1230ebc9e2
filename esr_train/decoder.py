"""One token at a time over a static cache: the same few operations each step, on fixed buffers.

So the step can be captured in a CUDA graph and replayed; on a CPU it runs as it is.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, StaticLayer

from esr_kernels import rollout_batch
from esr_kernels.checks import sees_values
from esr_kernels.layers import decode_attention
from esr_train.attention import (
    Layout,
    PackedLayout,
    Scores,
    attend_masked,
    lost_window,
    no_mask,
    relative_difference,
    same_states,
    takes_layouts,
)
from esr_train.errors import first_line
from esr_train.fused import FusedLayers, Heads, Layer, Rotation


class Decoder(Protocol):
    """What `StaticDecoder` and `FusedDecoder` do."""

    @property
    def windows(self) -> set[int | None]:
        """That the layers asked for."""

    def prefill(self, prompt_ids: Tensor, prompt_mask: Tensor) -> Tensor:
        """The last hidden state [B, D] of left-padded prompts [B, P]."""

    def step(self, token_ids: Tensor) -> Tensor:
        """The hidden state [B, D] of one more token [B] a row."""


# (batch size, number of slots, device)
MakeDecoder = Callable[[int, int, torch.device], Decoder]


def best_decoder(model: Any) -> tuple[MakeDecoder, str | None]:
    """The quickest decoder that computes what `model` does; and `decoding_error` if none does."""
    try:
        fused = partial(FusedDecoder, FusedLayers(model))
    except Exception:  # whatever an architecture says to being taken for another
        fused = None
    if fused is not None and decoding_error(model, fused) is None:
        return fused, None
    static = partial(StaticDecoder, model)
    return static, decoding_error(model, static)


@torch.no_grad()
def decoding_error(model: Any, make_decoder: MakeDecoder) -> str | None:
    """Why the decoder is not one of `model`: None if its states are those of a pass.

    Tried, not looked up: an architecture may keep more from token to token than keys and values.
    """
    if not takes_layouts(model):
        return "its attention cannot be replaced"
    last_id = model.config.get_text_config().vocab_size - 1
    ids = torch.linspace(0, last_id, 14, device=model.device).long().view(2, 7)
    mask = torch.ones(2, 5, dtype=torch.bool, device=model.device)
    mask[0, :2] = False
    try:
        decoder = make_decoder(2, 8, model.device)
        states = [decoder.prefill(ids[:, :5], mask), decoder.step(ids[:, 5])]
        with no_host_reads(model.device):
            states.append(decoder.step(ids[:, 6]))
        if reason := lost_window(model, decoder.windows):
            return reason
        expected = [
            model.get_decoder()(input_ids=row[None, -n:], use_cache=False).last_hidden_state[0, -3:]
            for row, n in zip(ids, (5, 7), strict=True)
        ]
    except Exception as error:  # whatever an architecture says to a keyword that it does not know
        return first_line(error)
    difference = relative_difference(torch.stack(states, dim=1), torch.stack(expected))
    return None if difference < same_states(model) else f"its states differ by {difference:.2g}"


@contextmanager
def no_host_reads(device: torch.device) -> Iterator[None]:
    """On a GPU, what makes the host wait is an error in here, as it is in a graph."""
    if device.type != "cuda":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is a prototype and may miss a wait
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _check_left_padded(prompt_mask: Tensor) -> None:
    if sees_values(prompt_mask) and not prompt_mask[:, -1].all():
        raise ValueError("prompt_mask: expected prompts padded on the left alone")


@dataclass
class Place:
    """Where a pass writes, for all layers of a cache.

    slot [1]: one token of every row. Packed tokens [T] have a row and a slot each.
    """

    slot: Tensor
    packed: tuple[Tensor, Tensor] | None = None


class SlotLayer(StaticLayer):
    """A layer of the cache that writes where it is told, [B, H, slots, D].

    Transformers' own counts tokens in every layer: dozens of tiny kernels a token.
    """

    def __init__(self, batch_size: int, num_slots: int, place: Place) -> None:
        super().__init__(max_cache_len=num_slots)
        self.rows = batch_size
        self.place = place

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        shape = self.rows, key_states.shape[1], 1, key_states.shape[3]
        # Only shape, dtype and device are read.
        super().lazy_initialization(
            key_states.new_empty(shape),
            value_states.new_empty(*shape[:3], value_states.shape[3]),
        )

    def get_seq_length(self) -> int:
        """Unused: positions and masks are given. Older versions would look for it in the keys."""
        return 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = cast("tuple[Tensor, Tensor]", (self.keys, self.values))
        if self.place.packed is not None:
            rows, slots = self.place.packed
            keys[rows, :, slots] = key_states.squeeze(0).transpose(0, 1)
            values[rows, :, slots] = value_states.squeeze(0).transpose(0, 1)
            return key_states, value_states  # the prompts' attention is among themselves
        keys.index_copy_(2, self.place.slot, key_states)
        values.index_copy_(2, self.place.slot, value_states)
        return keys, values


class StaticDecoder:
    """Hidden states of prompts [B, P] and then of a token a row, again and again.

    Prompts are padded on the left, so that a step writes one slot for all rows, but read packed.
    All that a step reads and writes stays where it is. `num_slots` >= P + the steps.
    """

    def __init__(self, model: Any, batch_size: int, num_slots: int, device: torch.device) -> None:
        self.decoder = model.get_decoder()
        self.num_slots = num_slots
        num_layers = model.config.get_text_config().num_hidden_layers
        self.place = Place(torch.zeros(1, dtype=torch.int64, device=device))
        self.cache = Cache(
            layers=[SlotLayer(batch_size, num_slots, self.place) for _ in range(num_layers)]
        )
        self.visible = torch.ones(batch_size, num_slots, dtype=torch.bool, device=device)
        self.positions = torch.zeros(batch_size, 1, dtype=torch.int64, device=device)
        self.every_slot = torch.arange(num_slots, device=device)
        self.no_mask = no_mask(device)
        self.num_used = 0  # slots, as the host counts them
        self.windows: set[int | None] = set()  # that layers asked for
        self._masks: dict[int | None, Tensor] = {}

    def prefill(self, prompt_ids: Tensor, prompt_mask: Tensor) -> Tensor:
        """The last hidden state [B, D] of left-padded prompts [B, P]."""
        _check_left_padded(prompt_mask)
        width = prompt_ids.shape[1]
        self.visible[:, :width] = prompt_mask
        self.positions.copy_(prompt_mask.sum(dim=1, keepdim=True))
        self.place.slot.fill_(width)
        self.num_used = width
        batch = rollout_batch(prompt_ids, prompt_mask, prompt_ids[:, :0], eos_token_ids=())
        layout = PackedLayout(batch)
        rows, slots = prompt_mask.nonzero().unbind(1)
        self.place.packed = rows, slots
        hidden = self._forward(batch.input_ids[None], batch.position_ids[None], layout)[0]
        self.place.packed = None
        self.windows = layout.windows
        return hidden[batch.cu_seqlens[1:] - 1]

    def step(self, token_ids: Tensor) -> Tensor:
        """The hidden state [B, D] of one more token [B] a row."""
        self.num_used += 1
        self._masks.clear()
        hidden = self._forward(token_ids.unsqueeze(1), self.positions, self)[:, 0]
        self.place.slot += 1
        self.positions += 1
        return hidden

    def _forward(self, input_ids: Tensor, position_ids: Tensor, layout: Layout) -> Tensor:
        output = self.decoder(
            input_ids=input_ids,
            attention_mask=self.no_mask,
            position_ids=position_ids,
            past_key_values=self.cache,
            use_cache=True,
            layout=layout,
        )
        return output.last_hidden_state

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
        """`Layout`: over the slots in use, or over all of them in a graph, which cannot grow."""
        capturing = query.is_cuda and torch.cuda.is_current_stream_capturing()
        end = self.num_slots if capturing else self.num_used
        if scores.window not in self._masks:
            self._masks[scores.window] = self._mask(end, scores.window, query.dtype)
        return attend_masked(
            query, key[:, :, :end], value[:, :, :end], self._masks[scores.window], scores
        )

    def _mask(self, end: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """[B, 1, 1, end], 0 where a slot is seen, else -inf; made once for all layers."""
        slots, query = self.every_slot[:end], self.place.slot
        seen = self.visible[:, :end] & (slots <= query)
        if window is not None:
            seen &= slots > query - window
        unseen = torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, -torch.inf)
        return unseen[:, None, None]


class FusedDecoder:
    """What `StaticDecoder` does, by `FusedLayers`."""

    def __init__(
        self, layers: FusedLayers, batch_size: int, num_slots: int, device: torch.device
    ) -> None:
        self.layers = layers
        self.shape = batch_size, num_slots
        self.caches: list[tuple[Tensor, Tensor]] = []  # keys and values [B, H, slots, D], a layer
        self.first = torch.zeros(batch_size, dtype=torch.int64, device=device)  # slot in use
        self.slot = torch.zeros(1, dtype=torch.int64, device=device)  # the next token's
        self.positions = torch.zeros(batch_size, dtype=torch.int64, device=device)

    @property
    def windows(self) -> set[int | None]:
        return self.layers.windows

    @torch.no_grad()
    def prefill(self, prompt_ids: Tensor, prompt_mask: Tensor) -> Tensor:
        """The last hidden state [B, D] of left-padded prompts [B, P]."""
        _check_left_padded(prompt_mask)
        width = prompt_ids.shape[1]
        torch.sum(prompt_mask, dim=1, out=self.positions)
        torch.sub(width, self.positions, out=self.first)
        self.slot.fill_(width)
        batch = rollout_batch(prompt_ids, prompt_mask, prompt_ids[:, :0], eos_token_ids=())
        rows, slots = prompt_mask.nonzero().unbind(1)

        def cache(index: int, key: Tensor, value: Tensor) -> dict[str, Any]:
            if index == len(self.caches):
                self.caches.append((self._slots(key), self._slots(value)))
            return {"cache": self.caches[index], "rows": rows, "slots": slots}

        return self.layers.read(batch, batch.cu_seqlens[1:].long() - 1, cache)

    def _slots(self, states: Tensor) -> Tensor:
        batch_size, num_slots = self.shape
        return states.new_zeros(batch_size, states.shape[1], num_slots, states.shape[2])

    @torch.no_grad()
    def step(self, token_ids: Tensor) -> Tensor:
        """The hidden state [B, D] of one more token [B] a row."""
        hidden = self.layers(token_ids, self.positions, self._attend)
        self.slot += 1
        self.positions += 1
        return hidden

    def _attend(self, index: int, layer: Layer, heads: Heads, rotation: Rotation) -> Tensor:
        cache, scores = self.caches[index], layer.scores
        layer.rotate(heads, rotation, cache=cache, slots=self.slot)
        return decode_attention(
            heads[0],
            *cache,
            self.first,
            self.slot,
            scale=scores.scale,
            window=scores.window,
            softcap=scores.softcap,
        )
