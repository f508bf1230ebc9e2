"""One token at a time over a static cache: the same few operations each step, on fixed buffers.

So the step can be captured in a CUDA graph and replayed; on a CPU it runs as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers.cache_utils import Cache, StaticLayer

from esr_kernels import rollout_batch
from esr_kernels.checks import sees_values
from esr_train.attention import (
    Layout,
    PackedLayout,
    Scores,
    accept_layouts,
    attend_masked,
    lost_window,
    no_mask,
    relative_difference,
    same_states,
    takes_layouts,
)
from esr_train.errors import first_line
from esr_train.linear import PackedLinear, packed_linears


def merged_weight(layer: Any) -> Tensor:
    """W + scaling * B @ A of a LoRA layer's adapters at work, in float32.

    Out of place: merging into a 16-bit weight and out of it, step after step, would wear it away.
    """
    base = layer.get_base_layer()
    merged = base.weight.float()
    if layer.disable_adapters or layer.merged:
        return merged
    for adapter in layer.active_adapters:
        if adapter not in layer.scaling:
            continue
        if adapter in layer.lora_variant or layer.lora_bias.get(adapter):
            raise ValueError(f"adapter {adapter} is more than W + B @ A (DoRA, a bias, a variant)")
        if type(base) is torch.nn.Linear:  # one pass over the weight, not three
            up, down = layer.lora_B[adapter].weight.float(), layer.lora_A[adapter].weight.float()
            merged = torch.addmm(merged, up, down, alpha=layer.scaling[adapter])
        else:
            merged = merged + layer.get_delta_weight(adapter).float()
    return merged


class DecodeWeights:
    """A twin of `model` to decode with: adapters merged, weights in `dtype`, refreshed on demand.

    Tensors that need neither are the model's own: without LoRA and in the model's dtype the twin
    costs nothing, but for the copies of `packed_linears` on a CPU. Merging rounds once, to `dtype`:
    exact in float32, in bfloat16 as exact as any other rounding of a step. With merge=False the
    adapters stay at work.
    """

    def __init__(self, model: Any, dtype: torch.dtype, merge: bool = True) -> None:
        tensors = [*model.parameters(), *model.buffers()]
        self.model = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors}).eval()
        if not accept_layouts(self.model):
            # Whatever the student attends with: the twin has a configuration of its own.
            self.model.set_attn_implementation("eager")
            accept_layouts(self.model)
        self._merged: list[tuple[Any, Any]] = []  # an adapted layer, the plain one in the twin
        self._cast: list[tuple[Tensor, Tensor]] = []  # a weight, the twin's of another dtype
        if merge:
            self._merge_adapters(model, dtype)
        self._cast_weights(dtype)
        self._packed = packed_linears(self.model.get_decoder())
        for _, plain in self._merged:
            if plain in self._packed:  # straight from what is merged
                self._packed.remove(plain)
                plain.weight = None
        self.refresh()

    def _merge_adapters(self, model: Any, dtype: torch.dtype) -> None:
        for name, layer in model.named_modules():
            if isinstance(layer, LoraLayer):
                plain = self.model.get_submodule(name).get_base_layer()
                weight = torch.empty_like(plain.weight, dtype=dtype, requires_grad=False)
                plain.weight = torch.nn.Parameter(weight, requires_grad=False)
                self.model.set_submodule(name, plain)
                self._merged.append((layer, plain))

    def _cast_weights(self, dtype: torch.dtype) -> None:
        twins: dict[int, torch.nn.Parameter] = {}  # tied weights stay tied
        for module in self.model.modules():
            for name, weight in module.named_parameters(recurse=False):
                if weight.dtype == dtype or not weight.is_floating_point():
                    continue
                if id(weight) not in twins:
                    twin = torch.empty_like(weight, dtype=dtype, requires_grad=False)
                    twins[id(weight)] = torch.nn.Parameter(twin, requires_grad=False)
                    self._cast.append((weight, twins[id(weight)]))
                setattr(module, name, twins[id(weight)])

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the model's present weights; on a GPU in place: a captured graph sees them."""
        for layer, plain in self._merged:
            if isinstance(plain, PackedLinear):
                plain.pack(merged_weight(layer))
            else:
                plain.weight.copy_(merged_weight(layer))
        for source, weight in self._cast:
            weight.copy_(source)
        for linear in self._packed:
            linear.pack(linear.weight)


@torch.no_grad()
def decoding_error(model: Any) -> str | None:
    """Why `model` cannot be decoded by `StaticDecoder`: None if its states are those of a pass.

    Tried, not looked up: an architecture may keep more from token to token than keys and values.
    """
    if not takes_layouts(model):
        return "its attention cannot be replaced"
    last_id = model.config.get_text_config().vocab_size - 1
    ids = torch.linspace(0, last_id, 14, device=model.device).long().view(2, 7)
    mask = torch.ones(2, 5, dtype=torch.bool, device=model.device)
    mask[0, :2] = False
    decoder = StaticDecoder(model, 2, 8, model.device)
    try:
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
    return (
        None if difference < same_states(model.dtype) else f"its states differ by {difference:.2g}"
    )


@contextmanager
def no_host_reads(device: torch.device) -> Iterator[None]:
    """On a GPU, what makes the host wait is an error in here, as it is in a graph."""
    if device.type != "cuda":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


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
        if sees_values(prompt_mask) and not prompt_mask[:, -1].all():
            raise ValueError("prompt_mask: expected prompts padded on the left alone")
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
