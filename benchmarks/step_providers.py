"""Who takes the step: our trainer with its engines, and TRL's, on models with random weights.

Answers of a random model never end where a real one's would, so the EOS is planted: certain where a
row's answer has its length, impossible before. All pay for it alike, a few tiny operations a token.
"""

from __future__ import annotations

import math
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LogitsProcessorList,
    PrinterCallback,
    TrainerCallback,
)

from benchmarks.step_cases import EOS, PAD, PAIRS, Case, Step
from esr_kernels import SamplingState
from esr_train.data import Prompts
from esr_train.lora import fuse_adapters
from esr_train.metrics import PHASES, PhaseMeter
from esr_train.models import (
    Pair,
    checkpoint_activations,
    enable_packing,
    fused_layers,
    transformer,
)
from esr_train.rollout import Engine, GraphEngine, HFEngine, Session
from esr_train.train import make_optimizer, sampling, step_batches, train_step

GENERATION, SCORING, TRAINING = PHASES
# Of a logit: its softmax is 1 to rounding, and no engine takes it for infinite.
CERTAIN = 1e20

# One training step; its metrics line, as `esr_train.train.train_step` returns it.
StepCall = Callable[[], dict[str, Any]]


class Models:
    """Student and teacher of a case, and a student of TRL's own: it wraps its model's forward."""

    def __init__(self, case: Case, with_trl: bool) -> None:
        device, dtype = torch.device(case.device), getattr(torch, case.dtype)
        student, teacher = PAIRS[case.pair]
        teacher_model = make_model(teacher, dtype, device, seed=1).eval().requires_grad_(False)
        self.answer_lengths = torch.tensor(case.answer_lengths, device=device)

        def make_student() -> Any:
            model = make_model(student, dtype, device, seed=0)
            end_answers(model, self.answer_lengths)
            config = case.config(Step("graph", 0))
            lora = LoraConfig(
                r=config.lora_r,
                lora_alpha=config.lora_alpha,
                target_modules="all-linear",
                task_type="CAUSAL_LM",
            )
            return get_peft_model(model, lora).train()

        ours = make_student()
        fuse_adapters(ours)
        if case.gradient_checkpointing:
            checkpoint_activations(transformer(ours))
        for model in (ours, teacher_model):
            if reason := enable_packing(model):
                raise RuntimeError(f"cannot read packed batches: {reason}")
        self.pair = Pair(
            ours,
            teacher_model,
            case.vocabulary,
            dtype,
            device,
            student_layers=fused_layers(ours),
            teacher_layers=fused_layers(teacher_model),
        )
        self.trl_student: Any = make_student() if with_trl else None


def make_model(options: dict[str, Any], dtype: torch.dtype, device: torch.device, seed: int) -> Any:
    torch.manual_seed(seed)
    config = AutoConfig.for_model(**options)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def plant_eos(logits: Tensor, ends: Tensor) -> None:
    """In place, in logits [B, V]: EOS is certain in rows [B] that end with this token, else out."""
    logits[:, EOS] = torch.where(ends, CERTAIN, -math.inf)


def end_answers(model: Any, answer_lengths: Tensor) -> None:
    """Plant the EOS in every `model.generate`: of our engine hf, and of TRL."""
    generate = model.generate

    def generate_answers(*, input_ids: Tensor, **options: Any) -> Tensor:
        def planted(ids: Tensor, scores: Tensor) -> Tensor:
            plant_eos(scores, answer_lengths == ids.shape[1] - input_ids.shape[1] + 1)
            return scores

        processors = LogitsProcessorList([planted])
        return generate(input_ids=input_ids, logits_processor=processors, **options)

    model.generate = generate_answers


class AnswerHead:
    """The LM head of a `Session`, with the EOS planted: on the device, so a graph can hold it."""

    def __init__(self, head: Any, state: SamplingState, answer_lengths: Tensor) -> None:
        self.head, self.state, self.answer_lengths = head, state, answer_lengths

    def logits(self, hidden: Tensor, dtype: torch.dtype) -> Tensor:
        logits = self.head.logits(hidden, dtype)
        plant_eos(logits, self.state.lengths + 1 == self.answer_lengths)
        return logits


class AnswerEngine(GraphEngine):
    """Our decoder, writing answers of given lengths [B]."""

    def __init__(self, *arguments: Any, answer_lengths: Tensor) -> None:
        super().__init__(*arguments)
        self.answer_lengths = answer_lengths

    def _session(self, batch_size: int, num_slots: int, device: torch.device) -> Session:
        session: Any = super()._session(batch_size, num_slots, device)
        if not isinstance(session.head, AnswerHead):
            session.head = AnswerHead(session.head, session.state, self.answer_lengths)
        return session


def make_step(case: Case, step: Step, models: Models) -> OurStep | TRLStep:
    return (TRLStep if step.engine == "TRL" else OurStep)(case, step, models)


class OurStep:
    """`esr_train`'s own step; always its first, so that all of them see the same prompts."""

    def __init__(self, case: Case, step: Step, models: Models) -> None:
        pair = models.pair
        self.meter = PhaseMeter(pair.device)  # before anything but the models is there
        config = case.config(step)
        words = sampling(config, pair.vocabulary)
        core = transformer(pair.student)
        self.engine: Engine
        if step.engine == "graph":
            lengths = models.answer_lengths
            self.engine = AnswerEngine(core, words, pair.dtype, answer_lengths=lengths)
        else:
            self.engine = HFEngine(core, words, pair.dtype)
        prompts = Prompts(train=case.prompts(), eval=[], grade=None)
        optimizer, scheduler = make_optimizer(config, pair)
        self._arguments = (config, pair, self.engine, prompts, optimizer, scheduler, self.meter)

    def __call__(self) -> dict[str, Any]:
        return train_step(0, *self._arguments)

    def close(self) -> None:
        """Nothing runs on."""


class _Over(Exception):
    """Leaves TRL's loop."""


class TRLStep(TrainerCallback):
    """A step of TRL's `DistillationTrainer`, whose own loop waits in a thread between the steps.

    From `on_step_begin` to `on_step_end`, as its callbacks have it: generation, loss, backward,
    clipping, optimizer; neither the data loader nor logging.
    """

    def __init__(self, case: Case, step: Step, models: Models) -> None:
        from datasets import Dataset
        from trl import DistillationTrainer

        self.device = models.pair.device
        self.meter = PhaseMeter(self.device)
        config = case.config(step)
        batch = step_batches(0, config, Prompts(train=case.prompts(), eval=[], grade=None))[0]
        prompts = [" ".join(f"w{id}" for id in prompt) for prompt in batch]
        self._folder = tempfile.TemporaryDirectory()
        self._trainer: Any = DistillationTrainer(
            model=models.trl_student,
            teacher_model=models.pair.teacher,
            args=_trl_config(config, self._folder.name, case.device),
            train_dataset=Dataset.from_dict({"prompt": prompts}),
            processing_class=_tokenizer(case.vocab_size),
            callbacks=[self],
        )
        self._trainer.remove_callback(PrinterCallback)
        self._watch_phases()
        self.inputs: dict[str, Tensor] = {}  # of the last step's loss
        self._record: dict[str, Any] | None = None
        self._error: BaseException | None = None
        self._closing = False
        self._begin, self._end = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._train, daemon=True)
        self._thread.start()

    def __call__(self) -> dict[str, Any]:
        self._record = None
        self._begin.release()
        self._end.acquire()
        if self._record is None:
            raise RuntimeError("TRL's training ended before its step did") from self._error
        return self._record

    def close(self) -> None:
        self._closing = True
        self._begin.release()
        self._thread.join()
        self._folder.cleanup()

    def _train(self) -> None:
        try:
            self._trainer.train()
        except _Over:
            pass
        except BaseException as error:  # raised again where the step was asked for
            self._error = error
        self._end.release()

    def _watch_phases(self) -> None:
        """What is neither generation nor the teacher's pass is student training, as in ours."""
        trainer = self._trainer
        prepare, states = trainer._prepare_inputs, trainer._get_last_hidden_state

        def prepared(batch: Any) -> dict[str, Tensor]:
            self.inputs = prepare(batch)
            self._enter(TRAINING)
            return self.inputs

        def watched(model: Any, *arguments: Any, **options: Any) -> Tensor:
            if model is trainer.model:
                return states(model, *arguments, **options)
            self._enter(SCORING)
            scored = states(model, *arguments, **options)
            self._enter(TRAINING)
            return scored

        trainer._prepare_inputs, trainer._get_last_hidden_state = prepared, watched
        self._phase: Any = None

    def _enter(self, phase: str | None) -> None:
        if self._phase is not None:
            self._phase.__exit__(None, None, None)
        self._phase = None if phase is None else self.meter(phase)
        if self._phase is not None:
            self._phase.__enter__()

    def on_step_begin(self, *arguments: Any, **options: Any) -> None:
        self._begin.acquire()
        if self._closing:
            raise _Over
        self._start = time.perf_counter()
        self._enter(GENERATION)

    def on_step_end(self, *arguments: Any, **options: Any) -> None:
        self._enter(None)
        self._seconds = time.perf_counter() - self._start

    def on_log(self, *arguments: Any, **options: Any) -> None:
        logs = options["logs"]
        if "grad_norm" not in logs:
            return
        self._record = {
            "loss": logs["loss"],
            "grad_norm": logs["grad_norm"],
            "response_tokens": int(self.inputs["completion_mask"].sum()),
            "seconds": self._seconds,
            "phases": self.meter.take(),
        }
        self._end.release()


def _trl_config(config: Any, folder: str, device: str) -> Any:
    """TRL's options for the same step."""
    from trl import DistillationConfig

    return DistillationConfig(
        folder,
        per_device_train_batch_size=config.per_device_train_batch_size,
        max_completion_length=config.max_new_tokens,
        max_steps=1_000_000,
        temperature=config.temperature,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.lr_scheduler_type,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        optim="adamw_torch_fused" if device == "cuda" else "adamw_torch",
        gradient_checkpointing=config.gradient_checkpointing,
        bf16=config.bf16,
        use_cpu=device == "cpu",
        dataloader_pin_memory=device == "cuda",
        shuffle_dataset=False,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        log_level="error",
    )


def _tokenizer(vocab_size: int) -> Any:
    """One that reads the word w<id> as the token `id`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # Special tokens are found inside words too: no word may begin as they do.
    words = {"<pad>": PAD, "<eos>": EOS} | {f"w{id}": id for id in range(2, vocab_size)}
    backend = Tokenizer(models.WordLevel(words, "<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>", padding_side="left"
    )
