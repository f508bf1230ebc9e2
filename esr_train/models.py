"""Student and teacher, any causal LM of Transformers: loading, LoRA, hidden states, LM head."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from esr_kernels import (
    LMHead,
    RolloutBatch,
    TokenStats,
    gather_rows,
    linear_reverse_kl,
    rollout_batch,
)
from esr_train.align import Vocabulary
from esr_train.attention import (
    PackedLayout,
    accept_layouts,
    lost_window,
    no_mask,
    relative_difference,
    same_states,
    takes_layouts,
)
from esr_train.bridge import Bridge, Rollout
from esr_train.checkpoint import unreadable
from esr_train.config import TrainConfig
from esr_train.errors import UserError, first_line, loading_error
from esr_train.estimators import sampled_reverse_kl, target_log_probs
from esr_train.fused import FusedLayers, lay_out
from esr_train.linear import column_major
from esr_train.lora import FusedLora, fuse_adapters

# Relative change of a sequence's states when another one changes: none, but for an expert's rows
# in another order.
SEES_NOTHING = 1e-5


def pick_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def compute_dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    """bfloat16 where asked for, or where nothing is said and the GPU has it."""
    bf16 = config.bf16
    if bf16 is None:
        bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if bf16 else torch.float32


def load_model(name: str, role: str, config: TrainConfig, dtype: torch.dtype) -> Any:
    """A Transformers causal LM from safetensors. Raises UserError naming `role` and the way out."""
    try:
        return AutoModelForCausalLM.from_pretrained(
            name,
            dtype=dtype,
            use_safetensors=True,
            attn_implementation=config.attn_implementation,
            trust_remote_code=config.trust_remote_code,
        )
    except Exception as error:
        raise loading_error(role, name, "model", error) from error


def load_student(config: TrainConfig, device: torch.device, checkpoint: Path | None = None) -> Any:
    """The model to train: a PeftModel, or with use_peft=False the Transformers model itself.

    LoRA keeps the frozen weights in the compute dtype and the adapters in float32; full fine-tuning
    keeps float32 weights and computes under autocast. `checkpoint`: a saved folder to go on from.
    """
    name = str(config.model_name_or_path)
    if not config.use_peft:
        source = str(checkpoint or name)
        model = load_model(source, "model_name_or_path", config, torch.float32)
        disable_dropout(model)
    else:
        model = load_model(name, "model_name_or_path", config, compute_dtype(config, device))
        disable_dropout(model)
        model = _load_adapter(model, checkpoint) if checkpoint else _add_lora(model, config)
        fuse_adapters(model)
    if config.gradient_checkpointing:
        checkpoint_activations(transformer(model))
    # Models load in eval mode, where LoRA's dropout and checkpointing are off.
    return model.to(device).train()


def disable_dropout(model: torch.nn.Module) -> None:
    """Of the model, in training mode too: the student in the loss is the one that sampled."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if "dropout" in name and isinstance(value, float):  # attention_dropout and its like
                setattr(module, name, 0.0)


def _load_adapter(model: Any, checkpoint: Path) -> PeftModel:
    try:
        return PeftModel.from_pretrained(model, checkpoint, is_trainable=True)
    except Exception as error:  # of safetensors, peft, json
        raise unreadable(checkpoint, error) from error


def checkpoint_activations(model: Any) -> None:
    # Transformers 5.23 renamed it; the old name warns there and is the only one before.
    enable = getattr(model, "activation_checkpointing_enable", None)
    try:
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    except ValueError as error:
        raise UserError(f"gradient_checkpointing: {error}") from error


def _add_lora(model: Any, config: TrainConfig) -> PeftModel:
    targets: Any = config.lora_target_modules
    lora = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, lora)
    except ValueError as error:
        raise UserError(f"lora_target_modules {' '.join(targets)}: {first_line(error)}") from error


def load_teacher(config: TrainConfig, device: torch.device) -> Any:
    """The frozen teacher, in the compute dtype."""
    name = str(config.teacher_model_name_or_path)
    model = load_model(name, "teacher_model_name_or_path", config, compute_dtype(config, device))
    return model.to(device).eval().requires_grad_(False)


def transformer(model: Any) -> Any:
    """The Transformers model inside a PeftModel, adapters and all; or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def lm_head(model: Any, dtype: torch.dtype, vocab_size: int) -> LMHead:
    """The first rows of the model's LM head, in `dtype`, differentiable where it trains."""
    head = LMHead.from_model(model).first_rows(vocab_size)
    bias = None if head.bias is None else head.bias.to(dtype)
    return replace(head, weight=head.weight.to(dtype), bias=bias)


@torch.no_grad()
def check_lm_head(model: Any, role: str) -> None:
    """Refuse a model whose logits are not what `LMHead` makes of its hidden states.

    A softcap, scale or head adapter that the loss ignored would train towards another distribution.
    """
    core = transformer(model)
    was_training = core.training
    core.eval()
    try:
        head = LMHead.from_model(model)
        # Four tokens from over the vocabulary: one row could agree by chance.
        input_ids = torch.linspace(0, head.weight.shape[0] - 1, 4, device=core.device).long()[None]
        hidden = core.get_decoder()(input_ids=input_ids, use_cache=False).last_hidden_state
        logits = head.logits(hidden[0]).float()
        expected = core(input_ids=input_ids, use_cache=False).logits[0].float()
    except ValueError as error:
        raise UserError(f"{role}: {error}") from error
    finally:
        core.train(was_training)
    difference = relative_difference(logits, expected)
    if not difference < 0.02:  # bfloat16 rounding stays under 0.01; NaN is no agreement
        raise UserError(
            f"{role}: {type(core).__name__} makes its logits in a way the fused loss does not know "
            f"(relative difference {difference:.2g}); please report the architecture"
        )


@torch.no_grad()
def enable_packing(model: Any) -> str | None:
    """Let `model` read packed batches, or say why it cannot; it is as it was then.

    Tried, not looked up: an architecture may mix tokens by other means than attention.
    """
    core = transformer(model)
    base = core.config._attn_implementation
    if not accept_layouts(core):
        return f"its attention, {base}, keeps its own masks"
    was_training = core.training
    core.eval()
    try:
        reason = _packing_error(core)
    except Exception as error:  # whatever an architecture says to a keyword that it does not know
        reason = first_line(error)
    finally:
        core.train(was_training)
    if reason:
        core.set_attn_implementation(base)
    return reason


def _packing_error(core: Any) -> str | None:
    """Two sequences packed: each must be what it is alone, and not see that the other changes."""
    batches = _probes(core)
    layouts = [PackedLayout(batch) for batch in batches]
    packed, changed = map(partial(_hidden_states, core), batches, layouts)
    if reason := lost_window(core, layouts[0].windows):
        return reason
    leak = relative_difference(changed[5:], packed[5:])
    if not leak < SEES_NOTHING:
        return f"packed sequences see each other: {leak:.1g}"
    apart = [
        core.get_decoder()(input_ids=ids[None], use_cache=False).last_hidden_state[0]
        for ids in batches[0].input_ids.split((5, 7))
    ]
    difference = relative_difference(packed, torch.cat(apart))
    return None if difference < same_states(core) else f"states differ by {difference:.2g}"


def _probes(core: Any) -> list[RolloutBatch]:
    """Two packed sequences, of 5 and 7 tokens; and the first of them changed."""
    last_id = core.config.get_text_config().vocab_size - 1
    prompts = torch.linspace(0, last_id, 14, device=core.device).long().view(2, 7)
    mask = torch.ones_like(prompts, dtype=torch.bool)
    mask[0, :2] = False
    return [
        rollout_batch(ids, mask, ids[:, :0], eos_token_ids=())
        for ids in (prompts, torch.stack([prompts[0].flip(0), prompts[1]]))
    ]


@torch.no_grad()
def fused_layers(model: Any) -> FusedLayers | None:
    """To read packed batches with, where they compute what `model` does.

    Frozen projections are laid one behind another. None too where it does not read packed batches.
    """
    core = transformer(model)
    if not takes_layouts(core):
        return None
    lay_out(core.get_decoder(), lambda weight: not weight.requires_grad)
    # Where the decoder's are by columns, so that merging need not turn them.
    adapted = (module for module in core.modules() if isinstance(module, FusedLora))
    bases = {id(module.factors().weight) for module in adapted if module.is_plain()}
    lay_out(core.get_decoder(), lambda weight: id(weight) in bases, column_major)
    batch = _probes(core)[0]
    was_training = core.training
    try:
        layers = FusedLayers(core)  # as in training: what would drop out differs below
        core.eval()
        states = layers.read(batch)
        expected = _hidden_states(core, batch, PackedLayout(batch))
    except Exception:  # whatever an architecture says to being taken for another
        return None
    finally:
        core.train(was_training)
    return layers if relative_difference(states, expected) < same_states(core) else None


def _hidden_states(core: Any, batch: RolloutBatch, layout: PackedLayout) -> Tensor:
    """Final hidden states of packed tokens, [T, D]."""
    output = core.get_decoder()(
        input_ids=batch.input_ids[None],
        attention_mask=no_mask(batch.input_ids.device),
        position_ids=batch.position_ids[None],
        use_cache=False,
        layout=layout,
    )
    return output.last_hidden_state[0]


@dataclass(frozen=True)
class Pair:
    """Student and teacher, ready to be compared on the student's own rollouts.

    student: what is trained and saved, a PeftModel or the Transformers model itself.
    bridge: to a teacher with another tokenizer; None of one.
    student_layers, teacher_layers: what they read packed batches with; None: their own modules.
    """

    student: Any
    teacher: Any
    vocabulary: Vocabulary
    dtype: torch.dtype
    device: torch.device
    bridge: Bridge | None = None
    student_layers: FusedLayers | None = None
    teacher_layers: FusedLayers | None = None

    def autocast(self) -> torch.autocast:
        return torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16
        )

    def read(self, batch: RolloutBatch, estimator: str = "full") -> Rollout:
        """What the student wrote, as the teacher reads it, for a `loss_estimator`."""
        return self.bridge.read(batch, estimator) if self.bridge else Rollout(batch, batch)

    def response_states(
        self, model: Any, batch: RolloutBatch, rows: Tensor | None = None
    ) -> Tensor:
        """Final hidden states [n, D] of the rows that predict a response token; no logits.

        rows: of these, all by default.
        Packed where the model can (`enable_packing`), else padded: the same to rounding.
        """
        core = transformer(model)
        layers = self.student_layers if model is self.student else self.teacher_layers
        form = batch if takes_layouts(core) else batch.padded()
        chosen = form.loss_rows if rows is None else form.loss_rows[rows]
        with self.autocast():
            if layers is not None:
                states = layers.read(batch, chosen)
            elif isinstance(form, RolloutBatch):
                states = gather_rows(_hidden_states(core, batch, PackedLayout(batch)), chosen)
            else:
                output = core.get_decoder()(
                    input_ids=form.input_ids,
                    attention_mask=form.attention_mask.long(),
                    position_ids=form.position_ids,
                    use_cache=False,
                )
                states = gather_rows(output.last_hidden_state, chosen)
        return states.to(self.dtype)

    @torch.inference_mode()
    def score(self, rollout: Rollout) -> Tensor:
        """The teacher's hidden states on its reading of the response; nothing else is kept."""
        return self.response_states(self.teacher, rollout.teacher)

    def reverse_kl(
        self, rollout: Rollout, teacher_states: Tensor, **words: Any
    ) -> tuple[Tensor, TokenStats | None]:
        """KL(student || teacher) of the compared rows, differentiable in the student.

        words: of `linear_reverse_kl`. The statistics are of two tokenizers only.
        """
        heads, aligned = self._heads(), rollout.aligned
        if self.bridge is None or aligned is None:
            states = self.response_states(self.student, rollout.student)
            kl: Tensor = linear_reverse_kl(states, heads[0], teacher_states, heads[1], **words)
            return kl, None
        return linear_reverse_kl(
            self.response_states(self.student, rollout.student, aligned.student_rows),
            heads[0],
            teacher_states[aligned.teacher_rows],
            heads[1],
            vocab_map=self.bridge.vocab_map,
            student_map=self.bridge.student_map,
            return_stats=True,
            **words,
        )

    def sampled_reverse_kl(self, rollout: Rollout, teacher_states: Tensor) -> Tensor:
        """[k] estimates of it from the tokens that were written, with their policy gradient."""
        student_states = self.response_states(self.student, rollout.student)
        heads = self._heads()
        with torch.no_grad():
            reference = target_log_probs(teacher_states, heads[1], rollout.teacher.targets)
        own = target_log_probs(student_states, heads[0], rollout.student.targets)
        return sampled_reverse_kl(own, reference, rollout.spans())

    def _heads(self) -> tuple[LMHead, LMHead]:
        """Of student and teacher; no row that either's tokenizer has no token for."""
        teacher_size = (self.vocabulary.teacher or self.vocabulary).size
        return (
            lm_head(self.student, self.dtype, self.vocabulary.size),
            lm_head(self.teacher, self.dtype, teacher_size),
        )


def load_pair(
    config: TrainConfig,
    vocabulary: Vocabulary,
    device: torch.device,
    checkpoint: Path | None = None,
    bridge: Bridge | None = None,
) -> Pair:
    """Both models. Raises UserError where the fused loss would not see their logits."""
    student = load_student(config, device, checkpoint)
    teacher = load_teacher(config, device)
    check_lm_head(student, "model_name_or_path")
    check_lm_head(teacher, "teacher_model_name_or_path")
    for role, model in (("student", student), ("teacher", teacher)):
        if reason := enable_packing(model):
            warnings.warn(f"the {role} reads padded batches: {reason}", stacklevel=2)
    dtype = compute_dtype(config, device)
    return Pair(
        student,
        teacher,
        vocabulary,
        dtype,
        device,
        bridge,
        student_layers=fused_layers(student),
        teacher_layers=fused_layers(teacher),
    )
