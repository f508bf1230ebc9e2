"""TRL's `DistillationTrainer` with our loss in the place of its own.

Written against `trl.trainer.distillation_trainer` of TRL 1.16: one method, `_compute_loss`, is
replaced on the trainer that is handed in. Rollouts, batches, the divisor, logging, DDP and
checkpoints stay TRL's.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch

from esr_kernels.integrations.precision import match_dtype
from esr_kernels.kl import linear_reverse_kl
from esr_kernels.lm_head import LMHead

_VERSION = "1.16"


def use_in_trl(
    trainer: Any, teacher_model: torch.nn.Module | None = None, *, teacher_tokenizer: Any = None
) -> None:
    """Make a TRL 1.16 `DistillationTrainer` compute its loss with `linear_reverse_kl`.

    Equivalent to TRL's loss at beta=1.0, its default: KL(student || teacher) of both models' logits
    over `trainer.temperature`, summed over the completion tokens (tool results are masked) and
    divided by their number in the whole batch; in evaluation, by that of the local batch. Softcap,
    logit scale and bias are the models' own, and PEFT-wrapped students work as they do in TRL.

    Also for vocabularies padded to different sizes, which TRL refuses: make the trainer without a
    `teacher_model` and hand the teacher in here. Both softmaxes then run over the common prefix,
    and the student no longer samples ids that the teacher has no row for.

    Call it once, before `trainer.train()`. It changes this trainer, not TRL.

    Args:
        trainer: a DistillationTrainer, or a subclass that leaves its loss alone.
        teacher_model: a loaded causal LM, if and only if the trainer was made without one.
        teacher_tokenizer: checked against the trainer's tokenizer if given. A trainer knows no
            tokenizer of the teacher's, so without it (as in TRL) the same tokenizer is taken on
            trust.

    Raises:
        ValueError: TRL is not 1.16; another class of trainer; beta is not 1.0; no teacher, or two;
            an adapter on an LM head, or a head that is not a plain linear layer; DeepSpeed ZeRO-3;
            tokenizers that differ, or that use ids past the common prefix; a student with more rows
            than the teacher under vLLM, which cannot be kept from sampling them.
    """
    _check_trainer(trainer)
    if teacher_model is None and trainer.teacher_model is None:
        raise ValueError("teacher_model: expected a model, as the trainer was made without one")
    if teacher_model is not None and trainer.teacher_model is not None:
        raise ValueError("teacher_model: expected None, as the trainer has a teacher already")
    unwrap = trainer.accelerator.unwrap_model
    teacher = unwrap(trainer.teacher_model) if teacher_model is None else teacher_model
    student_rows = LMHead.from_model(unwrap(trainer.model)).weight.shape[0]
    teacher_rows = LMHead.from_model(teacher).weight.shape[0]
    if teacher_tokenizer is not None:
        _check_tokenizers(trainer._tokenizer, teacher_tokenizer)
    if student_rows != teacher_rows:
        _check_common_prefix(trainer._tokenizer, student_rows, teacher_rows)
    if student_rows > teacher_rows:
        _sample_below(trainer, teacher_rows, student_rows)
    if teacher_model is not None:
        trainer.teacher_model = _prepared(trainer, teacher_model)
    trainer._compute_loss = partial(_compute_loss, trainer)


def _check_trainer(trainer: Any) -> None:
    import trl
    from trl import DistillationTrainer

    if not trl.__version__.startswith(_VERSION + "."):
        raise ValueError(f"trl: expected version {_VERSION}, got {trl.__version__}")
    hooked = ("compute_loss", "_compute_loss", "_get_last_hidden_state")
    if not isinstance(trainer, DistillationTrainer) or any(
        getattr(type(trainer), name) is not getattr(DistillationTrainer, name) for name in hooked
    ):
        raise ValueError(
            "trainer: expected a trl.DistillationTrainer, or a subclass with its compute_loss, "
            f"got {type(trainer).__name__}"
        )
    if trainer.beta != 1.0:
        raise ValueError(
            f"trainer: expected DistillationConfig(beta=1.0), the reverse KL, got {trainer.beta}; "
            "for another divergence keep TRL's loss"
        )
    plugin = trainer.args.deepspeed_plugin
    if plugin is not None and plugin.zero_stage == 3:
        raise ValueError("trainer: expected DDP or DeepSpeed up to ZeRO-2, got ZeRO-3")


def _check_tokenizers(student: Any, teacher: Any) -> None:
    """Added tokens may be one's own (Qwen3 has some that Qwen2.5 lacks), but no id has two."""
    tokens = {index: token for token, index in teacher.get_vocab().items()}
    for token, index in student.get_vocab().items():
        if tokens.get(index, token) != token:
            raise ValueError(
                "teacher_tokenizer: expected the tokens of the trainer's tokenizer, got "
                f"{tokens[index]!r} for id {index}, which is {token!r}"
            )


def _check_common_prefix(tokenizer: Any, student_rows: int, teacher_rows: int) -> None:
    last = max(tokenizer.get_vocab().values())
    if last >= min(student_rows, teacher_rows):
        raise ValueError(
            "teacher_model: expected a vocabulary that differs from the student's in padding only, "
            f"got {teacher_rows} rows and {student_rows} of the student, whose tokenizer uses "
            f"ids up to {last}"
        )


def _sample_below(trainer: Any, stop: int, num_rows: int) -> None:
    """Generation leaves out the ids from `stop`: the teacher could not read them."""
    if trainer.use_vllm:
        raise ValueError(
            f"trainer: expected use_vllm=False where the student has more rows ({num_rows}) than "
            f"the teacher ({stop}): vLLM may sample ids that the teacher has no row for"
        )
    config = trainer.generation_config
    config.suppress_tokens = [*(config.suppress_tokens or []), *range(stop, num_rows)]


def _prepared(trainer: Any, teacher_model: torch.nn.Module) -> Any:
    """As TRL's constructor does it."""
    if trainer.is_deepspeed_enabled:
        from trl.models import prepare_deepspeed

        return prepare_deepspeed(teacher_model, trainer.accelerator)
    return trainer.accelerator.prepare_model(teacher_model, evaluation_mode=True)


def _compute_loss(
    trainer: Any, unwrapped_student: Any, inputs: dict[str, Any], num_items_in_batch: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss, the summed entropy of the student and the number of tokens; all 0-d.

    inputs: prompt_ids and prompt_mask [B, P], completion_ids and completion_mask [B, K], at times
    tool_mask [B, K] and what a model reads beside text.
    """
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    attention_mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    hidden_states = trainer._get_last_hidden_state
    known = inspect.signature(hidden_states).parameters
    arguments: dict[str, Any] = {name: inputs[name] for name in inputs if name in known}
    arguments.update(input_ids=ids, attention_mask=attention_mask)
    arguments["logits_to_keep"] = inputs["completion_ids"].shape[1]

    student_hidden = hidden_states(unwrapped_student, **arguments)
    trainer.teacher_model.eval()
    teacher = trainer.accelerator.unwrap_model(trainer.teacher_model)
    with torch.no_grad():  # through the wrapper's forward, where FSDP and DeepSpeed gather weights
        teacher_hidden = trainer._forward_redirection(
            trainer.teacher_model, teacher, hidden_states, teacher, **arguments
        )

    mask = inputs["completion_mask"]
    if "tool_mask" in inputs:
        mask = mask * inputs["tool_mask"]
    # Padding is dropped, not weighted by 0: it would pay for the GEMMs. [B, K, D] -> [N, D].
    rows = mask.flatten().nonzero().squeeze(1)
    student_side = _side(student_hidden, rows, LMHead.from_model(unwrapped_student))
    teacher_side = _side(teacher_hidden, rows, LMHead.from_model(teacher))
    normalizer = None
    if num_items_in_batch is not None:
        normalizer = torch.as_tensor(num_items_in_batch, device=student_side[0].device)
    loss, stats = linear_reverse_kl(
        *student_side,
        *teacher_side,
        temperature=trainer.temperature,
        normalizer=normalizer,
        return_stats=True,
    )
    return loss, stats.student_entropy.sum(), mask.sum()


def _side(hidden: torch.Tensor, rows: torch.Tensor, head: LMHead) -> tuple[torch.Tensor, LMHead]:
    """[B, K, D] -> [N, D], where the head is (a `device_map` may end elsewhere), in one dtype."""
    hidden = hidden.to(head.weight.device).flatten(0, 1)
    return match_dtype(hidden[rows.to(hidden.device)], head)
