"""A twin of the student's weights to decode with: adapters merged, in the compute dtype."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor

from esr_train.attention import accept_layouts
from esr_train.fused import lay_out
from esr_train.linear import PackedLinear, column_major, packed_linears


def merged_weight(layer: Any, out: Tensor | None = None) -> Tensor:
    """W + scaling * B @ A of a LoRA layer's adapters at work, in float32.

    Out of place: merging into a 16-bit weight and out of it, step after step, would wear it away.
    out: float32, where the first sum may go.
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
            scaling = layer.scaling[adapter]
            if merged is base.weight:
                merged = torch.addmm(merged, up, down, alpha=scaling, out=out)
            else:  # nor a copy of it
                merged.addmm_(up, down, alpha=scaling)
        else:
            merged = merged + layer.get_delta_weight(adapter).float()
    return merged


class DecodeWeights:
    """A twin of `model` to decode with: adapters merged, weights in `dtype`, refreshed on demand.

    Tensors that need neither are the model's own: without LoRA and in the model's dtype the twin
    costs nothing, but for copies that a CPU reads faster (`esr_train.linear`). Merging rounds once,
    to `dtype`: exact in float32, in bfloat16 as exact as any other rounding of a step. With
    merge=False the adapters stay at work.
    """

    def __init__(self, model: Any, dtype: torch.dtype, merge: bool = True) -> None:
        tensors = [*model.parameters(), *model.buffers()]
        self.model = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors}).eval()
        if not accept_layouts(self.model):
            # Whatever the student attends with: the twin has a configuration of its own.
            self.model.set_attn_implementation("eager")
            accept_layouts(self.model)
        self._merged: list[tuple[Any, Any]] = []  # an adapted layer, the plain one in the twin
        self._copied: list[tuple[Tensor, Tensor]] = []  # a weight, the twin's of its own
        if merge:
            self._merge_adapters(model, dtype)
        self._turn_head(dtype)
        self._cast_weights(dtype)
        self._packed = packed_linears(self.model.get_decoder())
        for _, plain in self._merged:
            if plain in self._packed:  # straight from what is merged
                self._packed.remove(plain)
                plain.weight = None
        self._lay_out()
        self.refresh()

    def _turn_head(self, dtype: torch.dtype) -> None:
        """A copy of a head that is read faster in another order: tied embeddings keep theirs."""
        head = self.model.get_output_embeddings()
        is_merged = any(head is plain for _, plain in self._merged)
        if type(head) is not torch.nn.Linear or head.weight.dtype != dtype or is_merged:
            return
        weight = column_major(head.weight.detach())
        if weight.stride() != head.weight.stride():
            source, head.weight = head.weight, torch.nn.Parameter(weight, requires_grad=False)
            self._copied.append((source, head.weight))

    def _lay_out(self) -> None:
        """Weights that are the twin's own, as they are read fastest."""
        own = {id(plain.weight) for _, plain in self._merged}
        own |= {id(weight) for _, weight in self._copied}
        for _, plain in self._merged:
            if plain.bias is not None and id(plain.bias) not in own:  # a vector: not worth sharing
                bias = torch.nn.Parameter(plain.bias.detach().clone(), requires_grad=False)
                self._copied.append((plain.bias, bias))
                own.add(id(bias))
                plain.bias = bias
        lay_out(self.model.get_decoder(), lambda weight: id(weight) in own, column_major)

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
                    twin = torch.nn.Parameter(weight.detach().to(dtype), requires_grad=False)
                    twins[id(weight)] = twin
                    self._copied.append((weight, twins[id(weight)]))
                setattr(module, name, twins[id(weight)])

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the model's present weights; on a GPU in place: a captured graph sees them."""
        for layer, plain in self._merged:
            if isinstance(plain, PackedLinear):
                plain.pack(merged_weight(layer))
            else:
                weight = plain.weight
                merged = merged_weight(layer, weight if weight.dtype == torch.float32 else None)
                if merged is not weight:
                    weight.copy_(merged)
        for source, weight in self._copied:
            weight.copy_(source)
        for linear in self._packed:
            linear.pack(linear.weight)
