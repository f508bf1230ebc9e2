"""The LM head as data: what turns a hidden state into the logits that a loss must see."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

import torch

# How the models of transformers alter `lm_head(hidden)`, by the name of the config attribute.
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_MULTIPLIERS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
_DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")
# Configs that carry one of these names and give it another meaning: HyperCLOVA X multiplies by
# logits_scaling, MPT never applies logit_scale. None: leave it out.
_EXCEPTIONS = {("hyperclovax", "logits_scaling"): "multiply", ("mpt", "logit_scale"): None}


@dataclass(frozen=True, eq=False)
class LMHead:
    """`logits = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)`; no softcap, no tanh.

    weight [V, D], bias [V] or None. Gradients reach weight and bias where they require them.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0

    def __post_init__(self) -> None:
        weight, bias = self.weight, self.bias
        if not isinstance(weight, torch.Tensor) or weight.ndim != 2:
            raise ValueError(f"LMHead weight: expected a tensor [V, D], got {_describe(weight)}")
        if not weight.is_floating_point():
            raise ValueError(f"LMHead weight: expected a floating dtype, got {weight.dtype}")
        if bias is not None:
            expected = f"[{weight.shape[0]}], {weight.dtype}, {weight.device}"
            if (
                not isinstance(bias, torch.Tensor)
                or bias.shape != weight.shape[:1]
                or bias.dtype != weight.dtype
                or bias.device != weight.device
            ):
                raise ValueError(f"LMHead bias: expected {expected}, got {_describe(bias)}")
        softcap, scale = self.softcap, self.scale
        if softcap is not None and not (_is_finite(softcap) and softcap > 0):
            raise ValueError(f"LMHead softcap: expected None or a number > 0, got {softcap!r}")
        if not _is_finite(scale):
            raise ValueError(f"LMHead scale: expected a finite number, got {scale!r}")

    def logits(self, hidden: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """[N, D] -> [N, V], the definition, not the loss's way; by default in the inputs' dtype.

        dtype: of the logits. Wider than the inputs, they are never rounded to the inputs'; without
        a gradient on a GPU.
        """
        weight, bias = self.weight, self.bias
        if dtype is not None and dtype != weight.dtype and hidden.is_cuda:
            logits = torch.mm(hidden, weight.T, out_dtype=dtype)
            logits = logits if bias is None else logits + bias.to(dtype)
        else:
            if dtype is not None:
                hidden, weight = hidden.to(dtype), weight.to(dtype)
                bias = None if bias is None else bias.to(dtype)
            logits = torch.nn.functional.linear(hidden, weight, bias)
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits

    def first_rows(self, vocab_size: int) -> LMHead:
        """The head of the first `vocab_size` ids alone; a view."""
        bias = None if self.bias is None else self.bias[:vocab_size]
        return replace(self, weight=self.weight[:vocab_size], bias=bias)

    def local(self) -> LMHead:
        """The head with DTensors (FSDP2, tensor parallel) gathered."""
        bias = None if self.bias is None else local(self.bias)
        return replace(self, weight=local(self.weight), bias=bias)

    @classmethod
    def from_model(cls, model: torch.nn.Module) -> LMHead:
        """The head of a transformers causal LM, PEFT-wrapped or not, as its forward uses it now.

        Softcap and logit scale are read from the (text) config. A `modules_to_save` copy of the
        head is used while its adapter is active, and trains. An adapter *on* the head that is
        active and not merged is refused: weight + B @ A would have to be formed in every step, with
        a gradient of the head's size. Call again after adapters were switched, merged or disabled.
        """
        model = _unwrap(model)
        find = getattr(model, "get_output_embeddings", None)
        layer = find() if callable(find) else None
        if layer is None:
            raise ValueError(
                "model: expected a causal LM whose get_output_embeddings() is its LM head, "
                f"got {type(model).__name__}, which has none"
            )
        weight, bias = _plain_linear(_active_layer(layer))
        if getattr(model, "final_logits_bias", None) is not None:
            raise ValueError("model: expected a decoder-only LM, got one with final_logits_bias")
        softcap, scale, vocab_size = _config_of(model)
        if vocab_size is not None and vocab_size < weight.shape[0]:
            weight, bias = weight[:vocab_size], None if bias is None else bias[:vocab_size]
        return cls(weight, bias, softcap, scale)


def local(tensor: Any) -> torch.Tensor:
    """A DTensor gathered on every rank; any other tensor as it is.

    Backward takes every rank's gradient for its own tokens' and averages them over the ranks, as
    FSDP2 does with those of the layers.
    """
    if not hasattr(tensor, "full_tensor"):
        return tensor
    from torch.distributed.tensor import Partial

    return tensor.full_tensor(grad_placements=[Partial("avg")] * tensor.device_mesh.ndim)


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{list(value.shape)}, {value.dtype}, {value.device}"
    return type(value).__name__


def _unwrap(model: Any) -> Any:
    """Through torch.compile, DDP and PEFT to the transformers model."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, torch.nn.parallel.DistributedDataParallel):
            model = model.module
        elif callable(getattr(model, "get_base_model", None)):
            model = model.get_base_model()
        else:
            return model


def _active_layer(layer: Any) -> Any:
    """The layer that computes the logits in PEFT's present state; an acting adapter is refused."""
    if hasattr(layer, "original_module"):  # ModulesToSaveWrapper, TrainableTokensWrapper
        active = list(layer.active_adapters)
        if layer.disable_adapters or not active or any(a not in layer._adapters for a in active):
            return _active_layer(layer.original_module)
        if not hasattr(layer, "modules_to_save"):
            raise ValueError(
                f"model: the LM head carries an active {type(layer).__name__}, which the loss "
                "would not see; leave the head out of trainable_token_indices"
            )
        return _active_layer(layer.modules_to_save[active[0]])
    if hasattr(layer, "get_base_layer") and hasattr(layer, "active_adapters"):  # BaseTunerLayer
        base = layer.get_base_layer()
        if layer.disable_adapters and layer.merged:
            raise ValueError(
                "model: the LM head's adapter is merged and disabled at once; unmerge it first"
            )
        if layer.disable_adapters or layer.merged:
            return base
        present: set[str] = set()
        for name in layer.adapter_layer_names:
            present.update(attrgetter(name)(layer).keys())
        acting = [name for name in layer.active_adapters if name in present]
        if acting:
            raise ValueError(
                f"model: adapter {acting} ({type(layer).__name__}) acts on the LM head, which the "
                "loss would not see; drop the head from target_modules, put it in modules_to_save "
                "to train it, or merge the adapter"
            )
        return base
    return layer


def _plain_linear(layer: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias of a layer that computes `x @ weight.T + bias` and nothing else."""
    weight: Any = getattr(layer, "weight", None)
    plain = (
        isinstance(layer, torch.nn.Linear)
        and type(layer).forward is torch.nn.Linear.forward
        and (type(weight) in (torch.Tensor, torch.nn.Parameter) or hasattr(weight, "full_tensor"))
        and weight.is_floating_point()
    )
    if not plain:
        raise ValueError(
            "model: expected an LM head that is a plain torch.nn.Linear, not quantised, "
            f"got {type(layer).__name__} with a weight of {type(weight).__name__}"
        )
    if weight.is_meta:
        raise ValueError("model: expected an LM head in memory, got one on the meta device")
    return weight, layer.bias


def _config_of(model: Any) -> tuple[float | None, float, int | None]:
    """(softcap, scale, unpadded vocabulary) that the model's forward applies to its logits."""
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "get_text_config"):
        config = config.get_text_config()
    softcap, scale = None, 1.0
    for name in _SOFTCAPS + _MULTIPLIERS + _DIVISORS:
        value = getattr(config, name, None)
        default = "divide" if name in _DIVISORS else "multiply"
        action = _EXCEPTIONS.get((getattr(config, "model_type", ""), name), default)
        if value is None or action is None:
            continue
        if name in _SOFTCAPS:
            softcap = float(value)
        else:
            scale = scale * float(value) if action == "multiply" else scale / float(value)
    return softcap, scale, getattr(config, "unpadded_vocab_size", None)
