"""The layers of a decoder of Llama's kind, in as few kernels as we know.

Transformers' modules hold the weights; the code that runs is ours. Whether it computes what theirs
does is tried, not looked up: `models.fused_layers` and `decoder.best_decoder` compare the two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Set
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from esr_kernels import RolloutBatch, gather_rows
from esr_kernels.layers import add_rms_norm, rms_norm, rotate, rotate_and_store
from esr_kernels.layers.reference import ACTIVATIONS
from esr_train.attention import PackedLayout, Scores, no_mask
from esr_train.lora import project, project_gated

# The modules of Llama's kind, by the names that Transformers gives them.
_DECODER = {"embed_tokens", "layers", "norm", "rotary_emb"}
_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}
# Gemma's layers normalise what they add, Qwen3's and Gemma 3's queries and keys.
_ADDED_NORMS = {"pre_feedforward_layernorm", "post_feedforward_layernorm"}
_HEAD_NORMS = {"q_norm", "k_norm"}

_STACKS = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")


Heads = tuple[Tensor, Tensor, Tensor]  # queries, keys and values, [T, heads, D]
Rotation = tuple[Tensor, Tensor]  # cos and sin, [T, D]


class Norm:
    """v / sqrt(mean(v**2) + eps) * (weight + offset)."""

    def __init__(self, module: Any) -> None:
        if [name for name, _ in module.named_parameters()] != ["weight"]:
            raise ValueError(f"{type(module).__name__} is no RMSNorm")
        self.module = module
        has_variance = hasattr(module, "variance_epsilon")
        self.eps: float = module.variance_epsilon if has_variance else module.eps
        # Of ones, whose root mean square is 1: the weight, or Gemma's weight + 1.
        factors = module(torch.ones_like(module.weight)) - module.weight
        self.offset = float(factors.float().mean().round())

    @property
    def weight(self) -> Tensor:
        return self.module.weight

    def __call__(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, eps=self.eps, offset=self.offset)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Of residual + x; and that."""
        return add_rms_norm(x, residual, self.weight, eps=self.eps, offset=self.offset)


class Projections:
    """Linear layers of one input; one product where their frozen weights lie side by side."""

    def __init__(self, *layers: Any) -> None:
        self.layers = layers
        self.joint: tuple[Tensor, Tensor | None] | None = None
        parameters = [x for layer in layers for x in layer.parameters()]
        frozen = not any(parameter.requires_grad for parameter in parameters)
        if frozen and all(type(layer) is torch.nn.Linear for layer in layers):
            weight = adjacent([layer.weight for layer in layers])
            biases = [layer.bias for layer in layers if layer.bias is not None]
            bias = adjacent(biases) if len(biases) == len(layers) else None
            if weight is not None and (bias is not None or not biases):
                self.joint = weight, bias
                self.sizes = [layer.out_features for layer in layers]

    def __call__(self, hidden: Tensor) -> Sequence[Tensor]:
        if self.joint is None:
            return project(self.layers, hidden)
        return linear(hidden, *self.joint).split(self.sizes, dim=1)


def lay_out(
    model: Any,
    may_move: Callable[[Tensor], bool],
    order: Callable[[Tensor], Tensor] = lambda weight: weight,
) -> None:
    """Lay the weights of linear layers, where they may move, as they are read fastest.

    Those of projections of one input one behind another, in the order that `order` gives a weight.
    They stay the parameters that they are.
    """
    for layers in _by_input(model):
        for name in ("weight", "bias"):
            parts = [getattr(layer, name) for layer in layers]
            if all(part is not None and may_move(part) for part in parts):
                whole = torch.cat([part.detach() for part in parts]) if parts[1:] else parts[0].data
                whole = order(whole) if name == "weight" else whole
                for part, rows in zip(parts, whole.split([len(x) for x in parts]), strict=True):
                    part.data = rows


def _by_input(model: Any) -> Iterator[list[torch.nn.Linear]]:
    """The linear layers of `model`, projections of one input together."""
    stacked: set[Any] = set()
    for module in model.modules():  # parents come first
        for names in _STACKS:
            layers: list[Any] = [getattr(module, name, None) for name in names]
            if all(type(layer) is torch.nn.Linear for layer in layers):
                stacked.update(layers)
                yield layers
        if type(module) is torch.nn.Linear and module not in stacked:
            yield [module]


def adjacent(tensors: Sequence[Tensor]) -> Tensor | None:
    """All of them as one tensor, if in memory they are: [sum of lengths, ...], a view."""
    first = tensors[0].detach()
    storage, offset = first.untyped_storage().data_ptr(), first.storage_offset()
    for tensor in tensors:
        same = tensor.dtype == first.dtype and tensor.shape[1:] == first.shape[1:]
        same = same and tensor.stride() == first.stride()
        same = same and tensor.untyped_storage().data_ptr() == storage
        if not same or tensor.storage_offset() != offset:
            return None
        offset += len(tensor) * first.stride(0)
    return first.as_strided((sum(map(len, tensors)), *first.shape[1:]), first.stride())


class Layer:
    """What one layer multiplies by, and how its attention weighs.

    kind: of its rotations, where a decoder has several.
    """

    def __init__(self, module: Any, scores: Scores, kind: str | None) -> None:
        self.module = module
        attention, mlp = module.self_attn, module.mlp
        has_added_norms = _check_children(module, _LAYER, _ADDED_NORMS)
        has_head_norms = _check_children(attention, _ATTENTION, _HEAD_NORMS)
        _check_children(mlp, _MLP)
        self.scores, self.kind = scores, kind
        self.head_dim: int = attention.head_dim
        self.projections = Projections(attention.q_proj, attention.k_proj, attention.v_proj)
        self.output = attention.o_proj
        self.gate_and_up = Projections(mlp.gate_proj, mlp.up_proj)
        self.down = mlp.down_proj
        self.activation = _activation(mlp.act_fn, module.input_layernorm.weight.device)
        self.head_norms: tuple[Norm, Norm] | None = None
        if has_head_norms:
            self.head_norms = Norm(attention.q_norm), Norm(attention.k_norm)
        self.attention_norm = Norm(module.input_layernorm)
        self.mlp_norm = Norm(module.post_attention_layernorm)
        self.added_norms: tuple[Norm, Norm] | None = None
        if has_added_norms:
            self.added_norms = self.mlp_norm, Norm(module.post_feedforward_layernorm)
            self.mlp_norm = Norm(module.pre_feedforward_layernorm)

    def heads(self, hidden: Tensor) -> Heads:
        """Of hidden states [T, D]."""
        query, key, value = (x.unflatten(1, (-1, self.head_dim)) for x in self.projections(hidden))
        return query, key, value

    def mlp(self, hidden: Tensor) -> Tensor:
        gate, up = self.gate_and_up(hidden)
        return project_gated(self.down, gate, up, self.activation)

    def rotated(self, heads: Heads, rotation: Rotation) -> Heads:
        """With queries and keys turned, differentiable."""
        query, key, value = heads
        if self.head_norms is not None:
            query, key = (
                norm(x.flatten(0, 1)).view(x.shape)
                for norm, x in zip(self.head_norms, (query, key), strict=True)
            )
        return *rotate(query, key, *rotation), value

    def rotate(self, heads: Heads, rotation: Rotation, **cache: Any) -> None:
        """Queries and keys, in place. cache: of `rotate_and_store`."""
        options = dict(cache)
        if self.head_norms is not None:
            first, second = self.head_norms
            options |= {"query_norm": first.weight, "key_norm": second.weight}
            options |= {"eps": first.eps, "offset": first.offset}
        (query, key, value), (cos, sin) = heads, rotation
        rotate_and_store(query, key, value, cos, sin, **options)


def _check_children(module: Any, names: set[str], options: Set[str] = frozenset()) -> bool:
    """Whether it has the options; an error if it is not of `names`, with them or without."""
    found = {name for name, _ in module.named_children()}
    own = [name for name, _ in module.named_parameters(recurse=False)]
    if own or found - options != names or found & options not in (set(), options):
        raise ValueError(f"{type(module).__name__} is not of Llama's kind")
    return found != names


def _activation(function: Any, device: torch.device) -> str:
    x = torch.linspace(-8, 8, 99, device=device)
    for name, ours in ACTIVATIONS.items():
        if torch.allclose(function(x), ours(x)):
            return name
    raise ValueError(f"its activation {type(function).__name__}")


# (the layer's number, the layer, its heads, their rotation) -> [T, heads, D]
Attend = Callable[[int, Layer, Heads, Rotation], Tensor]


class FusedLayers:
    """A decoder's forward pass over tokens [T] side by side, whichever sequences they are of."""

    @torch.no_grad()
    def __init__(self, model: Any) -> None:
        """model: one that takes layouts. Raises ValueError where it is of another kind."""
        decoder = model.get_decoder()
        _check_children(decoder, _DECODER)
        self.decoder = decoder
        self.embed, self.rotary = decoder.embed_tokens, decoder.rotary_emb
        self.has_kinds = "layer_type" in signature(self.rotary.forward).parameters
        kinds = model.config.get_text_config().layer_types if self.has_kinds else None
        self.layers = [
            Layer(module, scores, kinds[index] if kinds else None)
            for index, (module, scores) in enumerate(
                zip(decoder.layers, _scores(decoder), strict=True)
            )
        ]
        self.norm = Norm(decoder.norm)

    @property
    def windows(self) -> set[int | None]:
        return {layer.scores.window for layer in self.layers}

    def __call__(
        self, input_ids: Tensor, position_ids: Tensor, attend: Attend, rows: Tensor | None = None
    ) -> Tensor:
        """Final hidden states [T, D], or those of `rows` alone, each once."""
        residual = self.embed(input_ids)
        rotations = self._rotations(residual, position_ids)
        last = len(self.layers) - 1

        def pass_through(index: int, hidden: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
            """What the layer's second half adds to the residual, and that after the first."""
            layer = self.layers[index]
            attended = attend(index, layer, layer.heads(hidden), rotations[layer.kind]).flatten(1)
            if rows is not None and index == last:
                attended, residual = gather_rows(attended, rows), gather_rows(residual, rows)
            hidden = layer.output(attended)
            if layer.added_norms is not None:
                hidden = layer.added_norms[0](hidden)
            hidden, residual = layer.mlp_norm.add(hidden, residual)
            hidden = layer.mlp(hidden)
            if layer.added_norms is not None:
                hidden = layer.added_norms[1](hidden)
            return hidden, residual

        def recomputed(index: int, residual: Tensor) -> Tensor:
            hidden, residual = pass_through(
                index, self.layers[index].attention_norm(residual), residual
            )
            return residual + hidden

        if torch.is_grad_enabled() and self._checkpoints():
            for index in range(len(self.layers)):
                residual = checkpoint(recomputed, index, residual, use_reentrant=False)
            return self.norm(residual)
        hidden = self.layers[0].attention_norm(residual)
        next_norms = [layer.attention_norm for layer in self.layers[1:]] + [self.norm]
        for index, next_norm in enumerate(next_norms):
            hidden, residual = next_norm.add(*pass_through(index, hidden, residual))
        return hidden

    def _checkpoints(self) -> bool:
        """Whether the model is told to keep the layers' inputs alone."""
        modules = self.decoder, self.layers[0].module
        return self.decoder.training and any(
            getattr(module, "gradient_checkpointing", False) for module in modules
        )

    def _rotations(self, hidden: Tensor, position_ids: Tensor) -> dict[str | None, Rotation]:
        rotations: dict[str | None, Rotation] = {}
        for kind in {layer.kind for layer in self.layers}:
            words = (kind,) if self.has_kinds else ()
            cos, sin = self.rotary(hidden[None], position_ids[None], *words)
            rotations[kind] = cos[0], sin[0]
        return rotations

    def read(
        self,
        batch: RolloutBatch,
        rows: Tensor | None = None,
        cache: Callable[[int, Tensor, Tensor], dict[str, Any]] = lambda *_: {},
    ) -> Tensor:
        """Of packed sequences. cache: of the layer's number, keys and values; for `rotate`."""
        layout = PackedLayout(batch)

        def attend(index: int, layer: Layer, heads: Heads, rotation: Rotation) -> Tensor:
            if torch.is_grad_enabled():
                heads = layer.rotated(heads, rotation)
            else:
                layer.rotate(heads, rotation, **cache(index, *heads[1:]))
            query, key, value = (x.transpose(0, 1).unsqueeze(0) for x in heads)
            return layout.attend(query, key, value, layer.scores)[0]

        return self(batch.input_ids, batch.position_ids, attend, rows)


def _scores(decoder: Any) -> list[Scores]:
    """How each layer weighs, as it tells a layout in the mode that it is in."""
    scores, _ = _asked(decoder, 0)
    was_training = decoder.training
    decoder.eval()
    # The first position last: some rotations keep what the furthest one needed.
    far = getattr(decoder.config, "max_position_embeddings", 2**15) - 1
    distant, near = (_asked(decoder, position)[1] for position in (far, 0))
    decoder.train(was_training)
    if not torch.allclose(distant, near, rtol=0.03):
        raise ValueError("its positions do more than to rotate queries and keys")
    return scores


def _asked(decoder: Any, position: int) -> tuple[list[Scores], Tensor]:
    """The scores of every layer, and the lengths of queries and keys, of a token at `position`."""
    device = decoder.norm.weight.device
    found: list[Scores] = []
    lengths: list[Tensor] = []

    class Recorder:
        def attend(self, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
            found.append(scores)
            lengths.append(torch.stack([query.float().norm(), key.float().norm()]))
            return torch.zeros_like(query).transpose(1, 2)  # so layers see the same at any position

    decoder(
        input_ids=torch.zeros(1, 1, dtype=torch.int64, device=device),
        attention_mask=no_mask(device),
        position_ids=torch.full((1, 1), position, device=device),
        use_cache=False,
        layout=Recorder(),
    )
    return found, torch.stack(lengths)
